"""Overrides and experiment files that can't be: refused by key, or by file and line."""

import json
import re

import pytest

from scaling_jax.cli import joined
from scaling_jax.cli.planned_run import with_other_halves
from scaling_jax.data import prepare
from scaling_jax.io import UserError
from scaling_jax.io.config import to_dict, with_overrides
from scaling_jax.results import read_results
from scaling_jax.results.status import read_status
from scaling_jax.scanning.experiment import QUICK
from scaling_jax.scanning.records import SCHEMA, load_experiment, parse_experiment, read_experiment
from tests.robustness.conftest import contents

INTEGERS = ("max_tokens", "eval_tokens", "microbatch_tokens", "subjects.0.model.context", "subjects.0.model.n_layer")
FLOATS = ("subjects.1.learning_rates.peak", "optimizer.beta1", "subjects.0.learning_rates.factor")
LISTS = ("batch_tokens", "seeds", "subjects.0.target_losses", "subjects")
WRONG_TYPE = ("many", "null", "true", "{}", '"1"', "[[1]]", "")
OUT_OF_RANGE = [
    *((key, value) for key in (*INTEGERS, "subjects.0.model.vocab_size") for value in ("0", "-1", "-1e300")),
    *((key, value) for key in FLOATS for value in ("-1", "1e400", "-1e400", "NaN", "Infinity")),
    *((f"optimizer.{key}", value) for key in ("clip_norm", "weight_decay") for value in ("-1", "NaN", "1e999")),
    *((f"subjects.0.learning_rates.{key}", value) for key in ("most", "places", "together") for value in ("0", "-2")),
    *((key, value) for key in ("warmup_steps", "average_half_life_tokens") for value in ("-1", "-0.5")),
    ("batch_tokens", "[]"),
    ("batch_tokens", "[128,128,128]"),
    ("batch_tokens", "[128,256,512,512]"),
    ("batch_tokens", "[100,200,300]"),
    ("batch_tokens", "[128,256,99999999999999999999]"),
    ("batch_tokens", "[0,128,256]"),
    ("batch_tokens", "[-128,128,256]"),
    ("max_tokens", "1e308"),
    ("max_tokens", "1e19"),
    ("subjects.0.model.vocab_size", "1e12"),
    ("subjects.0.model.context", "1e300"),
    *((f"subjects.0.learning_rates.{key}", "1e13") for key in ("most", "places", "together", "factor")),
    ("subjects.0.learning_rates.reference_batch_tokens", "1e300"),
    ("eval_growth", "1e308"),
    ("steps_per_call", "1e12"),
    ("warmup_steps", "1e12"),
    ("warmup_tokens", "1e300"),
    ("seeds", "[4294967295]"),
    ("seeds", "[2147483648]"),
    ("seeds", str(list(range(10_000)))),
    ("seeds", "[]"),
    ("seeds", "[1,1]"),
    ("seeds", "[-1]"),
    ("seeds", "[18446744073709551616]"),
    ("subjects", "[]"),
    ("subjects.0.target_losses", "[]"),
    ("subjects.0.target_losses", "[2,3]"),
    ("subjects.0.target_losses", "[3,0]"),
    ("subjects.0.target_losses", "[3,NaN]"),
    ("name", ""),
    ("name", ".."),
    ("name", "../outside"),
    ("name", "a/b"),
    ("warmup_tokens", "-5"),
]


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(to_dict(QUICK)))
    return path


def overridden(*overrides):
    """QUICK as `scan` takes overrides."""
    return with_overrides(QUICK, with_other_halves(QUICK, overrides))


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in (*INTEGERS, *FLOATS, *LISTS) for value in WRONG_TYPE] + OUT_OF_RANGE,
)
def test_an_override_that_cannot_be_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=key.rpartition(".")[2].removesuffix("s")) as refused:
        overridden(f"{key}={value}")
    assert "\n" not in str(refused.value)


def test_a_scans_end_is_set_although_it_has_no_steps_to_end_at():
    assert overridden("max_tokens=2e6").max_tokens == 2_000_000


def test_all_overrides_count_and_the_last_of_a_key_wins():
    given = ("max_tokens=5000", "seeds=[5]", "optimizer.beta2=0.9", "max_tokens=1000")
    made = overridden(*given)
    assert (made.max_tokens, made.seeds, made.optimizer.beta2) == (1_000, (5,), 0.9)


@pytest.mark.parametrize(
    "words",
    [
        "--set max_tokens=5000 seeds=[5] --set max_tokens=1000",
        "--set max_tokens=5000 --set=seeds=[5] --set=max_tokens=1000",
    ],
)
def test_a_repeated_set_counts_each_time(words):
    rest = ["scan", "x.py", "--dry-run"]
    joined_words = joined(["scan", "x.py", *words.split(), "--dry-run"])
    assert joined_words == [*rest, "--set", "max_tokens=5000", "seeds=[5]", "max_tokens=1000"]


def test_overrides_that_exclude_each_other_are_refused():
    assert overridden("warmup_tokens=5").warmup_steps is None
    with pytest.raises(UserError, match="exactly one of warmup_steps and warmup_tokens"):
        overridden("warmup_tokens=5", "warmup_steps=5")


def test_a_tokenizer_that_is_none_is_refused():
    with pytest.raises(UserError, match="bpe:x"):
        prepare("python", 64, overridden("tokenizer=bpe:x").tokenizer)


@pytest.mark.parametrize(
    "override",
    ["max_token=1", "=1", "a", "...=1", "subjects.9.model=1", "subjects.-1=1", "name.x=1", "ü=1", "\u202e=1"],
)
def test_an_override_of_nothing_is_refused_as_it_was_written(override):
    with pytest.raises(UserError) as refused:
        overridden(override)
    assert f"--set {override}" in str(refused.value)


@pytest.mark.parametrize(
    ("override", "names"),
    [("max_tokens=many", "max_tokens"), ("batch_tokens=[100,200,300]", "batch_tokens = 100"), ("a", "--set a")],
)
def test_the_command_refuses_an_override_in_one_line(override, names, refuses, experiment):
    refuses("scan", experiment, "--dry-run", "--set", override, names=names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("EXPERIMENT = (", "mine.py line 1"),
        ("\n\nraise RuntimeError('broken')", "mine.py line 3 can't be run: RuntimeError: broken"),
        ("import no_such_module", "mine.py line 1 can't be run: ModuleNotFoundError"),
        ("def f():\n  return 1 / 0\nf()", "mine.py line 2 can't be run: ZeroDivisionError"),
        ("raise SystemExit(0)", "mine.py line 1 can't be run: SystemExit"),
        ("x = 1", "EXPERIMENT = Experiment"),
        ("EXPERIMENT = {}", "EXPERIMENT = Experiment"),
        ("EXPERIMENT = None", "EXPERIMENT = Experiment"),
        ("", "EXPERIMENT = Experiment"),
        ("\x00", "mine.py"),
        ("from scaling_jax import Experiment\nEXPERIMENT = Experiment()", "mine.py line 2 can't be run: TypeError"),
        ("from scaling_jax.scanning import log_spaced\nlog_spaced(3, 2, 1)", "mine.py line"),
        (
            "import dataclasses\nfrom scaling_jax.scanning.experiment import QUICK\n"
            "EXPERIMENT = dataclasses.replace(QUICK, max_tokens=-5)",
            "mine.py: max_tokens = -5",
        ),
        (
            "import dataclasses\nfrom scaling_jax.scanning.experiment import QUICK\n"
            "EXPERIMENT = dataclasses.replace(QUICK, batch_tokens=('a', 'b', 'c'))",
            "mine.py line 3 can't be run: TypeError",
        ),
    ],
)
def test_an_experiment_file_that_fails_is_named_with_its_line(source, names, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError) as refused:
        load_experiment(tmp_path / "mine.py")
    assert names in str(refused.value)


def test_the_command_refuses_such_a_file_in_one_line(refuses, tmp_path):
    (tmp_path / "mine.py").write_text("\n\nraise RuntimeError('broken\\nin two lines')")
    refuses("scan", tmp_path / "mine.py", "--dry-run", names="mine.py line 3 can't be run: RuntimeError: broken in two")


def broken_copies():
    whole = to_dict(QUICK)
    yield "", "can't read"
    yield "{", "can't read"
    yield "[" * 100_000, "can't read"
    for value in ("null", "3", "[]", '"text"'):
        yield value, "expected an object"
    yield json.dumps(whole | {"of_tomorrow": 1}), "unknown key 'of_tomorrow'"
    for key in ("name", "subjects", "max_tokens", "batch_tokens"):
        yield json.dumps({k: v for k, v in whole.items() if k != key}), f"missing key '{key}'"
        for value in (None, {}, 0.5, [None]):
            yield json.dumps(whole | {key: value}), key


@pytest.mark.parametrize(("text", "names"), list(broken_copies()))
def test_a_damaged_or_older_experiment_is_refused_by_all_that_read_it(text, names, experiment):
    experiment.write_text(text)
    before = contents(experiment.parent)
    for read in (
        load_experiment,
        lambda path: parse_experiment(path, "remove it"),
        lambda p: read_experiment(p.parent),
    ):
        with pytest.raises(UserError) as refused:
            read(experiment)
        said = str(refused.value)
        assert names in said
        assert str(experiment) in said
        assert "\n" not in said
    for read in (read_status, read_results):
        with pytest.raises(UserError, match=re.escape(names)):
            read(experiment.parent)
    assert contents(experiment.parent) == before


def test_commands_refuse_a_damaged_experiment_in_one_line(refuses, experiment):
    experiment.write_text(json.dumps(to_dict(QUICK) | {"max_tokens": [None]}))
    for command in (("scan", experiment, "--dry-run"), ("status", experiment.parent), ("fit", experiment.parent)):
        refuses(*command, names="max_tokens", watched=(experiment.parent,))
    refuses("branch", experiment.parent, "--batch-tokens", "128", names="max_tokens")


def test_no_experiment_may_be_a_folder_or_in_another_encoding(experiment, tmp_path):
    experiment.write_bytes(json.dumps(to_dict(QUICK) | {"name": "é"}, ensure_ascii=False).encode("latin-1"))
    (tmp_path / "mine.py").write_bytes(b"# \xff\n")
    for path, names in (
        (experiment, "can't read"),
        (tmp_path, "experiments/demo.py"),
        (tmp_path / "mine.py", "mine.py"),
    ):
        with pytest.raises(UserError, match=names):
            load_experiment(path)


def test_an_experiment_of_a_later_version_is_refused(experiment):
    experiment.write_text(json.dumps({"schema": SCHEMA + 1} | to_dict(QUICK)))
    with pytest.raises(UserError, match=rf"experiment\.json .*{SCHEMA + 1}.* later"):
        read_experiment(experiment.parent)
