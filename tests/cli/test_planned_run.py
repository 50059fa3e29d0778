"""The run that `train` is asked for, by files, flags and `--set`: what `--dry-run` prints is what would be trained."""

import dataclasses
import json
from pathlib import Path

import pytest

from scaling_jax.io.config import from_dict
from scaling_jax.tasks import model_config
from scaling_jax.training import LiveRamp, OptimizerConfig, Run, Stage
from scaling_jax.training.records import write_run_config

FLAGS = ("--learning-rate", "1e-3", "--batch-tokens", "256", "--max-steps", "30")
GIVEN = Run(model_config("2x64"), 256, 1e-3, max_steps=30)

TEXT = f"files:{Path(__file__).parent}/*.py"  # there must be some


@pytest.fixture
def planned(cli):
    """The run that a command line asks for."""

    def plan(*arguments):
        done = cli("train", *arguments, "--dry-run")
        assert done.code == 0, done.errors
        return from_dict(Run, json.loads(done.output))

    return plan


@pytest.fixture
def refused(cli):
    """What a command line is refused with, in one line."""

    def plan(*arguments):
        done = cli("train", *arguments, "--dry-run")
        assert done.code == 2
        assert done.errors.startswith("scaling-jax: ")
        assert done.errors.count("\n") == 1
        assert done.output == ""
        return done.errors

    return plan


@pytest.fixture
def runs_file(tmp_path):
    path = tmp_path / "runs.py"
    path.write_text(
        "from scaling_jax import Run, model_config\n"
        "RUNS = {rate: Run(model_config('1x16'), 256, float(rate), max_tokens=9_000) for rate in ('1e-3', '2e-3')}\n"
    )
    return path


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from scaling_jax import OptimizerConfig, Run, model_config\n"
        f"RUN = Run(model_config('1x16', context=32), 512, 5e-3, seed=3, text='{TEXT}', max_tokens=9_000,\n"
        "          optimizer=OptimizerConfig(beta2=0.95))\n"
    )
    return path


IN_FILE = Run(
    model_config("1x16", context=32),
    512,
    5e-3,
    seed=3,
    text=TEXT,
    max_tokens=9_000,
    optimizer=OptimizerConfig(beta2=0.95),
)


def test_flags_alone_say_a_run(planned):
    assert planned(*FLAGS) == GIVEN
    others = ("--model", "1x32", "--context", "32", "--text", TEXT, "--target-loss", "2.5", "--seed", "7")
    model = model_config("1x32", context=32)
    changed = dataclasses.replace(GIVEN, model=model, text=TEXT, target_loss=2.5, seed=7)
    assert planned(*FLAGS, *others) == changed


def test_a_file_says_a_run_and_flags_and_values_change_it(planned, run_file):
    assert planned(run_file) == IN_FILE
    changed = planned(run_file, "--batch-tokens", "1Ki", "--set", "optimizer.clip_norm=1")
    optimizer = OptimizerConfig(beta2=0.95, clip_norm=1.0)
    assert changed == dataclasses.replace(IN_FILE, batch_tokens=1_024, optimizer=optimizer)


def test_one_of_several_runs_is_chosen_by_name(planned, refused, runs_file):
    for name in ("1e-3", "2e-3"):
        assert planned(runs_file, "--name", name) == Run(model_config("1x16"), 256, float(name), max_tokens=9_000)
    for arguments in ((runs_file,), (runs_file, "--name", "3e-3")):
        said = refused(*arguments)
        assert "1e-3, 2e-3" in said
        assert "runs.py" in said
    assert "--name" in refused(runs_file)


def test_an_earlier_runs_config_says_it_again(planned, tmp_path):
    folder = tmp_path / "results" / "runs" / IN_FILE.run_id
    write_run_config(folder, IN_FILE, {"source": "made up"})
    assert planned(folder / "config.json") == IN_FILE
    longer = planned(folder / "config.json", "--max-steps", "40", "--model", "1x32")
    model = dataclasses.replace(model_config("1x32"), context=32)
    assert longer == dataclasses.replace(IN_FILE, max_steps=40, max_tokens=None, model=model)


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["model.compute_dtype=bfloat16"], {"model": model_config("2x64", compute_dtype="bfloat16")}),
        (
            ["optimizer.name=adamw", "optimizer.weight_decay=0.1", "optimizer.clip_norm=1"],
            {"optimizer": OptimizerConfig("adamw", weight_decay=0.1, clip_norm=1.0)},
        ),
        (["warmup_steps=500"], {"warmup_steps": 500}),
        (["warmup_tokens=1M"], {"warmup_tokens": 1_000_000, "warmup_steps": None}),
        (["microbatch_tokens=16Ki"], {"microbatch_tokens": 16_384}),
        (["average_half_life_tokens=1e6"], {"average_half_life_tokens": 1e6}),
        (
            ["live_ramp.threshold=0.5", "live_ramp.max_batch_tokens=64Ki"],
            {"live_ramp": LiveRamp(threshold=0.5, max_batch_tokens=65_536)},
        ),
        (
            ["live_ramp.max_batch_tokens=1024", "live_ramp.threshold=2", "live_ramp.metric=l1"],
            {"live_ramp": LiveRamp(2.0, 1_024, metric="l1")},
        ),
        (["max_tokens=2^18"], {"max_tokens": 2**18, "max_steps": None}),
        (["seed=4", f"text={TEXT}"], {"seed": 4, "text": TEXT}),
    ],
)
def test_any_value_is_set_in_one_list_or_in_several(words, changed, planned):
    expected = dataclasses.replace(GIVEN, **changed)
    assert planned(*FLAGS, "--set", *words) == expected
    assert planned("--set", words[0], *FLAGS, *(x for word in words[1:] for x in ("--set", word))) == expected


def test_a_warm_up_takes_the_place_of_the_other_kind(planned, tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from scaling_jax import Run, model_config\n"
        "RUN = Run(model_config('1x16'), 256, 1e-3, max_steps=9, warmup_steps=None, warmup_tokens=5_120)\n"
    )
    assert planned(path).warmup_tokens == 5_120
    changed = planned(path, "--set", "warmup_steps=7")
    assert (changed.warmup_steps, changed.warmup_tokens) == (7, None)


@pytest.mark.parametrize(("text", "value"), [("2k", 2_000), ("1e6", 1_000_000), ("2^18", 2**18), ("64Ki", 65_536)])
def test_sizes_are_written_as_people_write_them(text, value, planned):
    assert planned("--learning-rate", "1e-3", "--batch-tokens", "256", "--max-tokens", text).max_tokens == value
    assert (
        planned("--learning-rate", "1e-3", "--batch-tokens", "256", "--set", f"max_tokens={text}").max_tokens == value
    )


def test_values_alone_say_a_run_too(planned):
    assert planned("--set", "batch_tokens=256", "learning_rate=1e-3", "max_steps=30") == GIVEN


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_every_stage_of_a_ramp_has_the_learning_rate_that_its_file_says(first, planned, tmp_path):
    stages = [Stage(0, 128, first), Stage(1_280, 256, 1.4), Stage(2_560, 512, 2.0)]
    path = tmp_path / "ramp.json"
    path.write_text(json.dumps([dataclasses.asdict(stage) for stage in stages]))
    run = planned("--ramp", path, "--learning-rate", "1e-3", "--max-tokens", "1M")
    assert run.batch_tokens == 128
    assert run.learning_rate == pytest.approx(1e-3 * first)
    assert [(stage.tokens, stage.batch_tokens) for stage in run.ramp] == [(1_280, 256), (2_560, 512)]
    assert [run.at(stage).learning_rate for stage in run.ramp] == pytest.approx([1.4e-3, 2e-3])


@pytest.mark.parametrize(("tokenizer", "vocabulary"), [("bytes", 257), ("gpt2", 50_257), ("bpe:4096", 4_096)])
def test_a_run_of_flags_has_its_tokenizers_vocabulary(tokenizer, vocabulary, planned):
    assert planned(*FLAGS, "--tokenizer", tokenizer).model.vocab_size == vocabulary
    assert planned(*FLAGS, "--set", f"tokenizer={tokenizer}", "model.vocab_size=60000").model.vocab_size == 60_000


@pytest.mark.parametrize(
    ("left_out", "named"),
    [("--learning-rate", "--learning-rate"), ("--batch-tokens", "--ramp"), ("--max-steps", "--max-tokens")],
)
def test_what_is_missing_is_said_with_what_to_give(left_out, named, refused):
    at = FLAGS.index(left_out)
    said = refused(*FLAGS[:at], *FLAGS[at + 2 :])
    assert left_out in said
    assert named in said
    assert "RUN" in said  # or a file


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--batch-tokens"),
        ((*FLAGS, "--max-tokens", "1M"), "max_steps"),
        ((*FLAGS, "--set", "warmup_steps=3", "warmup_tokens=300"), "warmup_tokens"),
        ((*FLAGS, "--set", "optimizer.beta3=0.9"), "optimizer.beta3"),
        ((*FLAGS, "--set", "warmup"), "key=value"),
        ((*FLAGS, "--set", "live_ramp.threshold=2"), "max_batch_tokens"),
        ((*FLAGS, "--set", "live_ramp.metric=l3", "live_ramp.threshold=2", "live_ramp.max_batch_tokens=1Ki"), "l1"),
        ((*FLAGS, "--set", "batch_tokens.x=3"), "batch_tokens.x"),
        ((*FLAGS, "--ramp", "nowhere.json"), "--ramp"),
        (("--ramp", "nowhere.json", "--learning-rate", "1e-3", "--max-steps", "3"), "nowhere.json"),
        ((*FLAGS, "--tokenizer", "gpt3"), "gpt2"),
        (("nowhere.py",), "nowhere.py"),
        (("nowhere/config.json",), "nowhere/config.json"),
    ],
)
def test_what_does_not_fit_is_named(arguments, named, refused):
    assert named in refused(*arguments)


def test_a_file_without_a_run_is_named(refused, tmp_path):
    path = tmp_path / "none.py"
    path.write_text("RATE = 1e-3\n")
    said = refused(path)
    assert "none.py" in said
    assert "RUN = Run(" in said
    (tmp_path / "scan.py").write_text("from scaling_jax.scanning.experiment import QUICK as EXPERIMENT\n")
    assert "scan.py defines no RUN" in refused(tmp_path / "scan.py")


def test_the_first_stage_of_a_ramp_has_its_own_learning_rate_and_the_same_id_as_the_rate_alone(planned, tmp_path):
    """Factors are of --learning-rate, and a run's ramp counts from its first batch."""
    path = tmp_path / "ramp.json"
    path.write_text(
        '[{"tokens": 0, "batch_tokens": 128, "learning_rate_factor": 0.5},'
        ' {"tokens": 1280, "batch_tokens": 512, "learning_rate_factor": 1.0}]'
    )
    run = planned("--ramp", path, "--learning-rate", "2e-3", "--max-tokens", "60000")
    assert run.learning_rate == 1e-3
    assert [run.at(stage).learning_rate for stage in run.ramp] == [2e-3]
    alone = Run(model_config("2x64"), 128, 1e-3, max_tokens=60_000, ramp=(Stage(1_280, 512, 2.0),))
    assert run.run_id == alone.run_id
