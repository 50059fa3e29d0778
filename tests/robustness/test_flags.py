"""Values that can't be: refused by name before anything is written."""

import contextlib
import functools
import itertools
import math
import re
from pathlib import Path

import pytest

from scaling_jax.advice import advise as advice_on
from scaling_jax.advice.choices import Hardware
from scaling_jax.cli import _whole
from scaling_jax.cli.planned_run import planned_run
from scaling_jax.data import prepare
from scaling_jax.data.packing import inspect
from scaling_jax.io import UserError
from scaling_jax.results import analyse, read_results
from scaling_jax.results.branches import check_tolerance
from scaling_jax.results.status import read_status
from scaling_jax.scanning.experiment import QUICK
from scaling_jax.scanning.records import load_plan
from scaling_jax.scanning.scan import scan
from scaling_jax.training import train
from tests.robustness.conftest import contents
from tests.training.counting import CORPUS, RUN

TRAIN = {"learning_rate": 1e-3, "batch_tokens": 128, "max_steps": 3}
HARDWARE = {"devices": 8, "tokens_per_second": 1e5}
NOT_POSITIVE = (math.nan, -1.0, 0.0, math.inf, -math.inf)
HUGE = int("9" * 40)


def each(**bad):
    """(name, value) for each bad value of each option."""
    return [pytest.param(name, value, id=f"{name}={value:.5g}") for name, values in bad.items() for value in values]


@pytest.mark.parametrize(
    ("name", "value"),
    each(
        learning_rate=NOT_POSITIVE,
        target_loss=NOT_POSITIVE,
        batch_tokens=(0, -1, HUGE),
        max_steps=(0, -1, -HUGE, HUGE, 2**31),
        max_tokens=(0, -1, HUGE, 10**308),
        context=(0, -1, HUGE),
        seed=(-1, HUGE, 2**32, 2**31),
    ),
)
def test_training_refuses_what_is_out_of_range(name, value):
    flags, context = TRAIN | {name: value}, None
    if name == "context":
        context = flags.pop("context")
    if name == "max_tokens":
        del flags["max_steps"]
    with pytest.raises(UserError, match=name):
        planned_run(flags, model="1x16", context=context)


@pytest.mark.parametrize(
    ("name", "value"),
    each(
        budget_tokens=NOT_POSITIVE,
        fraction=(*NOT_POSITIVE, 1e308),
        start_batch_tokens=(0, -5),
        max_batch_tokens=(0, -1),
        target_loss=(*NOT_POSITIVE, 1e300, 1e-300),
    ),
)
def test_advice_refuses_what_is_out_of_range(name, value, measured):
    before = contents(measured.parent)
    with pytest.raises(UserError, match="loss" if name == "target_loss" else name):
        advice_on.advise(measured, **{"target_loss": 2.5} | {name: value})
    assert contents(measured.parent) == before


@pytest.mark.parametrize("target_loss", [1e308, 1e-308, 1e9, 1e-9])
def test_advice_extrapolates_no_farther_than_numbers_reach(target_loss, measured):
    rows = [
        f"m,{batch},{loss},{300 * (3 / loss) ** 6 * (1 + 1e5 * loss**-4.8 / batch):.6g}"
        for batch in (128, 256, 512, 1024, 2048, 8192)
        for loss in (3.0, 2.8, 2.6, 2.4, 2.2, 2.0)
    ]
    measured.write_text("\n".join(["model,batch_tokens,target_loss,steps", *rows, ""]))
    with pytest.raises(UserError, match=re.escape(f"loss {target_loss:g} is too far")):
        advice_on.advise(measured, target_loss, extrapolate=True)
    assert advice_on.advise(measured, 1.5, extrapolate=True).to.extrapolated


@pytest.mark.parametrize(
    ("name", "value"),
    each(tokens_per_second=NOT_POSITIVE, device_batch_tokens=(math.nan, -1.0, math.inf, 1e-308), devices=(0, -1)),
)
def test_hardware_that_cannot_be_is_refused(name, value):
    with pytest.raises(UserError, match=name):
        Hardware(**HARDWARE | {name: value})


def test_numbers_of_a_hostile_size_are_answered_at_once(measured):
    for name in ("start_batch_tokens", "max_batch_tokens"):
        with contextlib.suppress(UserError):
            advice_on.advise(measured, 2.5, **{name: HUGE})


@pytest.mark.parametrize(
    "text", ["many", "", "1,5", "½", "[1]", "-1", "0.5", "1e400", "9^99999", "nan", "inf", "2^0.5"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=f"^'?{text.replace('[', '.').replace('^', '.')}"):
        _whole([text])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"model": "nope"}, "'nope'"),
        ({"start_batch_tokens": 512, "max_batch_tokens": 256}, "512 to 256"),
    ],
)
def test_advice_refuses_what_does_not_go_together(given, names, measured):
    with pytest.raises(UserError, match=names):
        advice_on.advise(measured, 2.5, **given)


@pytest.mark.parametrize("path", ["/dev/null/x", ".", ""])
def test_a_ramp_that_cannot_be_written_is_named(path, measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages, before = advice_on.advise(measured, 2.5).stages, contents(tmp_path)
    with pytest.raises(UserError, match=f"write {Path(path)}"):
        advice_on.write_stages(Path(path), stages)
    assert contents(tmp_path) == before


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A source of its own."""
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(30):
        (folder / f"{k}.txt").write_text(f"{k} how now brown cow " * 40)
    return f"files:{folder}/*"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"context": 0}, "context = 0"),
        ({"workers": 0}, "workers = 0"),
        ({"workers": -3}, "workers = -3"),
        ({"tokenizer": "bpe:1"}, "bpe:1"),
        ({"tokenizer": "../x"}, "../x"),
        ({"source": "{}#field"}, "fields"),
        ({"source": "http://x"}, "http://x"),
        ({"source": ""}, "text source"),
        ({"source": "files:"}, "files:"),
        ({"source": "files:/nowhere/*"}, "/nowhere/.* matches no file"),
    ],
)
def test_text_that_cannot_be_packed_is_refused(given, names, text, tmp_path):
    given = {"source": text, "context": 64} | given
    with pytest.raises(UserError, match=names):
        prepare(**given | {"source": given["source"].format(text)})
    assert not (tmp_path / "cache").exists() or not [p for p in (tmp_path / "cache").rglob("*.tokens")]


def test_text_that_cannot_be_shown_is_refused(text):
    with pytest.raises(UserError, match="isn't packed"):
        inspect(text, 64, "bytes", 3)
    prepare(text, 64)
    with pytest.raises(UserError, match="rows"):
        inspect(text, 64, "bytes", -1)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"learning_rate": 1e-3, "max_steps": 9}, "--batch-tokens or --ramp"),
        ({"learning_rate": 1e-3, "batch_tokens": 128}, "--max-tokens or --max-steps"),
        ({"batch_tokens": 128, "max_steps": 9}, "--learning-rate"),
        ({**TRAIN, "max_tokens": 9}, "max_steps and max_tokens"),
        ({"learning_rate": 1.0, "ramp": Path(".")}, "ramp"),
        ({"learning_rate": 1.0, "ramp": Path("/nowhere.json")}, "/nowhere.json"),
        ({**TRAIN, "ramp": Path("/nowhere.json")}, "/nowhere.json|--batch-tokens or --ramp"),
    ],
)
def test_a_run_that_is_not_all_said_is_refused(flags, names):
    ramp = flags.pop("ramp", None)
    with pytest.raises(UserError, match=names):
        planned_run(flags, ramp=ramp)


@pytest.mark.parametrize(
    ("function", "arguments", "names"),
    [
        (read_status, ["."], "holds no results"),
        (read_status, [""], "holds no results"),
        (read_status, ["/dev/null"], "/dev/null"),
        (analyse, ["."], "holds no results"),
        (read_results, ["gs://bucket"], "gs://bucket"),
        (advice_on.advise, [Path("."), 2.0], "measurements.csv"),
        (load_plan, [Path(".")], "no file"),
        (load_plan, [Path("missing.py")], "missing.py"),
        (check_tolerance, [math.nan], "tolerance = nan"),
        (check_tolerance, [0.0], "tolerance = 0"),
        (scan, [QUICK, "/proc/x"], "/proc/x"),
        (scan, [QUICK, "/dev/null"], "/dev/null"),
        (functools.partial(scan, executor_options=["num_gpus=1"]), [QUICK, "x"], "num_gpus=1"),
        (functools.partial(train, corpus=CORPUS, num_devices=1), [RUN, "/dev/null"], "/dev/null"),
    ],
    ids=itertools.count(),
)
def test_folders_and_files_that_are_not_there_are_named(function, arguments, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, OSError), match=names) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("train --learning-rate 1e-3 --batch-tokens 128 --max-steps 3 --seed 4294967296", "seed = 4294967296"),
        ("advise {measured} --target-loss 2.5 --devices 8", "--tokens-per-second"),
        ("advise {measured} --target-loss 2.5 --tokens-per-second 8", "--devices"),
        ("report .", "holds no results"),
        ("branch . --batch-tokens 128", "holds no results"),
        ("compile x.py", "x.py"),
        ("scan x.py --set a=1", "x.py"),
        ("demo --results /proc/x", "/proc/x"),
        ("--tyro-print-completion foo", "bash, zsh, tcsh, fish"),
    ],
)
def test_commands_refuse_in_one_line(arguments, names, refuses, measured):
    refuses(*arguments.format(measured=measured).split(), names=names, watched=(measured.parent,))


@pytest.mark.parametrize(
    "arguments",
    [
        "train --learning-rate 1e-3 --max-steps 3 --batch-tokens many",
        "train --max-steps 3 --batch-tokens 128 --learning-rate 1,5",
        "advise x --target-loss 2.5 --max-batch-tokens ½",
        "demo x --no-such-option 1",
        "status x --no-such-option 1",
    ],
)
def test_an_option_that_cannot_be_read_is_named(arguments, refuses):
    option = [word for word in arguments.split() if word.startswith("--")][-1]
    refuses(*arguments.split(), names=option, one_line=False)


@pytest.mark.parametrize("arguments", [(), ("bogus",), ("data",), ("data", "bogus"), ("fit",), ("fit", "a", "b")])
def test_a_command_that_is_incomplete_is_answered_with_help(arguments, refuses):
    refuses(*arguments, names="--help", one_line=False)


def test_a_mistyped_text_leaves_the_folder_to_the_corrected_command(cli, tmp_path):
    done = cli("demo", "--quick", "--text", "files:/nowhere/*", "--results", tmp_path / "results")
    assert done.code == 2
    assert "/nowhere/*" in done.errors
    assert not (tmp_path / "results" / "experiment.json").exists()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--minutes", "0"], "--minutes = 0.0 must be positive"),
        (["--minutes", "nan"], "--minutes = nan must be positive"),
        (["--tokens", "0"], "--tokens = 0 must be positive"),
        (["--min-batch-tokens", "0"], "--min-batch-tokens = 0 must be positive"),
        (["--max-batch-tokens", "0"], "--max-batch-tokens = 0 must be positive"),
        (["--max-batch-tokens", "512"], "--max-batch-tokens 512 is below the largest batch size of the scan, 8,192"),
        (["--min-batch-tokens", "1"], "must be two or more whole sequences"),
        (["--min-batch-tokens", "128", "--minutes", "3"], "go with none of --minutes"),
        (["--tokens", "1e6", "--command", "x {batch}"], "--minutes and --tokens work in one process"),
    ],
)
def test_limits_of_a_scan_are_refused_before_it_starts(refuses, tmp_path, flags, names):
    experiment = tmp_path / "mine.py"
    experiment.write_text("from scaling_jax.scanning.experiment import QUICK as EXPERIMENT\n")
    refuses("scan", experiment, *flags, "--results", tmp_path / "results", names=names, watched=[tmp_path])
