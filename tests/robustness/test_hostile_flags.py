"""A corpus of flags, overrides and environments that nobody should give: no traceback, no hang, an answer or one line.

A sample runs by default, all of it with -m long.
"""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from scaling_jax.console import commands
from scaling_jax.io.files import write_json
from tests.robustness.conftest import contents

SECONDS = 20  # of processor time, for each
SAMPLE = 80  # one in so many runs by default
VALUES = (
    *("0", "-1", "1", "0.5", "-0.0", "nan", "inf", "-inf", "1e-308", "1e19", "1e308", "1e400", "2^64", "9" * 40),
    *("", " ", "x", "½", "[]", "[[]]", "{}", "null", "true", "0x10", "1,5", "[0]", "[-1,1e300,nan]", '"1"', "\u202e1"),
)
TRAIN = ("learning-rate", "batch-tokens", "context", "max-tokens", "max-steps", "target-loss", "seed", "model", "text")
ADVISE = (
    *("target-loss", "budget-tokens", "start-batch-tokens", "max-batch-tokens", "ramp-fraction", "model"),
    *("reference-batch-tokens", "devices", "tokens-per-second", "device-batch-tokens", "late-switch"),
)
BRANCH = ("batch-tokens", "points", "replicates", "tolerance", "betas", "model")
KEYS = (
    *("batch_tokens", "seeds", "max_tokens", "name", "subjects", "warmup_steps", "warmup_tokens", "eval_tokens"),
    *("microbatch_tokens", "steps_per_call", "eval_growth", "eval_every_tokens", "average_half_life_tokens"),
    *(f"optimizer.{key}" for key in ("name", "beta1", "beta2_half_life_tokens", "clip_norm", "weight_decay")),
    *(f"subjects.0.model.{key}" for key in ("n_layer", "d_model", "n_head", "vocab_size", "context", "compute_dtype")),
    *(f"subjects.0.learning_rates.{key}" for key in ("peak", "reference_batch_tokens", "factor", "places", "most")),
    *(f"subjects.0.learning_rates.{key}" for key in ("together", "give_up_factor", "catch_up")),
    "subjects.0.target_losses",
)
RUN_KEYS = (
    "ramp",
    "live_ramp.threshold",
    "live_ramp.sequences",
    "live_ramp.max_batch_tokens",
    "live_ramp.factor",
    "snapshot_tokens",
    "skip",
)


def command_lines():
    """Each command line as words; {…} stands for what the test has."""
    start = {"learning-rate": "1e-3", "batch-tokens": "128", "max-steps": "3", "model": "1x16"}
    for flag, value in itertools.product(TRAIN, VALUES):
        given = {key: old for key, old in start.items() if (key, flag) != ("max-steps", "max-tokens")} | {flag: value}
        yield ["train", "--dry-run", *(f"--{key}={said}" for key, said in given.items())]
    for key, value in itertools.product(RUN_KEYS, VALUES):
        given = [f"--{flag}={said}" for flag, said in start.items()]
        yield ["train", "--dry-run", *given, "--set", f"{key}={value}", "live_ramp.max_batch_tokens=256"]
    for key, value in itertools.product(KEYS, VALUES):
        yield ["scan", "{experiment}", "--dry-run", "--set", f"{key}={value}"]
    for flag, value in itertools.product(ADVISE, VALUES):
        given = {"target-loss": "2.5", "devices": "8", "tokens-per-second": "1e5"} | {flag: value}
        yield ["advise", "{measured}", "--extrapolate", *(f"--{key}={said}" for key, said in given.items())]
    for flag, value in itertools.product(BRANCH, VALUES):
        yield [
            "branch",
            "{scanned}",
            *(f"--{key}={said}" for key, said in ({"batch-tokens": "512"} | {flag: value}).items()),
        ]
    for command, value in itertools.product(("fit", "report", "status", "compile", "scan", "train"), VALUES[14:]):
        yield [command, f"./{value}"]


ALL = list(command_lines())


def marked():
    for number, words in enumerate(ALL):
        marks = () if number % SAMPLE == SAMPLE // 2 else (pytest.mark.long,)
        yield pytest.param(words, marks=marks, id=f"{number}")


@pytest.fixture
def places(tmp_path, measured, scanned, monkeypatch):
    """What {…} stands for. Nothing trains: branches that may be trained are told instead."""
    text = tmp_path / "text"
    text.mkdir()
    for k in range(30):
        (text / f"{k}.txt").write_text(f"{k} how now brown cow " * 400)
    rates = {"peak": 1e-2, "reference_batch_tokens": 1_000}
    model = {"n_layer": 1, "d_model": 16, "n_head": 1}
    write_json(
        tmp_path / "experiment.json",
        {
            "schema": 3,
            "name": "hostile",
            "text": f"files:{text}/*",
            "subjects": [{"model": model, "target_losses": [3.0, 2.0], "learning_rates": rates}],
            "batch_tokens": [128, 256, 512],
            "max_tokens": 10_000,
        },
    )
    monkeypatch.setattr(commands, "train_branches", lambda *_, **__: None)
    monkeypatch.setattr(commands, "planned", lambda *_: [])
    monkeypatch.setattr(commands, "write_branches", lambda *_: None)
    monkeypatch.setattr("scaling_jax.cli.running.show", lambda *_: None)
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    return {"experiment": tmp_path / "experiment.json", "measured": measured, "scanned": scanned}


@pytest.fixture
def in_time():
    """Ends what hangs in Python."""

    def fail(*_):
        pytest.fail(f"it hung {15 * SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(15 * SECONDS)  # others may use the processor, too
    started = time.process_time()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("words", list(marked()))
def test_what_nobody_should_give_gets_an_answer(words, places, cli, in_time):
    before = contents(places["scanned"])
    done = cli(*(places.get(word.strip("{}"), word) if word.startswith("{") else word for word in words))
    assert done.code in (0, 2), (words, done)
    assert "Traceback" not in done.errors
    if done.code == 2:
        assert done.errors.strip(), words
        assert done.errors.count("\n") == 1 or "--help" in " ".join(done.errors.split()), done.errors
    if words[0] == "branch":
        assert contents(places["scanned"]) == before


def test_the_corpus_is_as_large_as_it_should_be():
    assert len(ALL) >= 300
    assert len({tuple(words) for words in ALL}) > 0.95 * len(ALL)


ENVIRONMENTS = [
    {"SCALING_JAX_CACHE": "/dev/null/x"},
    {"SCALING_JAX_CACHE": "/proc/x"},
    {"JAX_PLATFORMS": "nonsense"},
    {"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"},
    {"JAX_NUM_CPU_DEVICES": "x"},
    {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
    {"HOME": "/nowhere"},
    {"TMPDIR": "/nowhere"},
    {"LANG": "xx", "LC_ALL": "xx"},
    {"COLUMNS": "1"},
    {"NO_COLOR": "1", "TERM": "dumb"},
    {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
]


@pytest.mark.long
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()))
def test_an_environment_that_nobody_should_have_ends_in_a_run_or_in_one_line(environment, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for k in range(30):
        (text / f"{k}.txt").write_text(f"{k} how now brown cow " * 40)
    flags = f"--learning-rate 1e-3 --batch-tokens 256 --context 16 --max-steps 3 --model 1x16 --text files:{text}/*"
    command = [sys.executable, "-m", "scaling_jax.cli.main", "train", *flags.split(), "--results", str(tmp_path / "r")]
    usual = {"SCALING_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    done = subprocess.run(
        command,
        env=os.environ | usual | environment,
        capture_output=True,
        text=True,
        timeout=15 * SECONDS,
        cwd=tmp_path,
    )
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
