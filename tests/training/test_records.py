"""A run's folder: found by value whatever it is called, read strictly, the same after a trip through JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.io import UserError
from scaling_jax.io.config import config_hash, differing, to_dict
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run, RunResult, Stage, read_metrics, read_result, run_folder
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.records import (
    SCHEMA,
    append_clock,
    read_clock,
    read_run_config,
    write_metrics,
    write_result,
    write_run_config,
)
from tests.training.counting import RUN

CORPUS = {"source": "made up", "sha256": "made up"}
RUNS = [
    RUN,
    dataclasses.replace(RUN, optimizer=OptimizerConfig("adamw", weight_decay=0.1), ramp=(Stage(1_000, 256, 1.5),)),
]


def with_new_field(kind, **replaced):
    """The class as a later version may have it: one more optional field, and `replaced` defaults."""
    fields = [("new_field", str | None, None), *((name, type(value), value) for name, value in replaced.items())]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)


def values_of(config):
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("run", RUNS)
def test_an_optional_field_that_a_later_version_adds_changes_no_run_id(run):
    """To the run, to its optimizer or to its model, whether they are the default ones or not."""
    later_optimizer, later_model = with_new_field(OptimizerConfig), with_new_field(ModelConfig)
    later_run = with_new_field(Run, optimizer=later_optimizer())
    parts = {
        "optimizer": later_optimizer(**values_of(run.optimizer)),
        "model": later_model(**values_of(run.model)),
    }
    later = later_run(**values_of(run) | parts)
    assert {"new_field"} == values_of(later).keys() - values_of(run).keys()
    assert differing(later) == differing(run)
    assert later.run_id == run.run_id
    assert dataclasses.replace(later, new_field="used").run_id != run.run_id
    used = dataclasses.replace(later.optimizer, new_field="used")
    assert dataclasses.replace(later, optimizer=used).run_id != run.run_id


def test_a_run_id_differs_wherever_a_value_does():
    changes = [
        {},
        {"seed": 1},
        {"learning_rate": 0.0100001},
        {"max_steps": 41},
        {"tokenizer": "gpt2"},
        {"model": dataclasses.replace(RUN.model, n_layer=2)},
        {"optimizer": OptimizerConfig(beta2=0.99)},
        {"ramp": (Stage(1_000, 256),)},
        {"ramp": (Stage(1_000, 256, 2.0),)},
    ]
    runs = [dataclasses.replace(RUN, **change) for change in changes]
    assert len({run.run_id for run in runs}) == len({config_hash(run) for run in runs}) == len(runs)


def test_a_run_of_schema_1_is_found_by_its_values_whatever_its_id(tmp_path):
    """Its config.json holds all values and no schema, and its folder is named by a hash of another kind."""
    folder = tmp_path / "runs" / f"{RUN.label}-0123456789ab"
    other = tmp_path / "runs" / f"{RUN.label}-000000000000"  # alike in name, and read first
    for at, run in ((folder, RUN), (other, dataclasses.replace(RUN, max_steps=41))):
        at.mkdir(parents=True)
        (at / "config.json").write_text(json.dumps({"run": to_dict(run), "corpus": CORPUS}))
    config = read_run_config(folder)
    assert (config.run, config.corpus, config.schema) == (RUN, CORPUS, 1)
    assert run_folder(tmp_path, RUN) == folder
    assert run_folder(tmp_path, dataclasses.replace(RUN, max_steps=42)) not in (folder, other)


def test_an_id_that_another_run_has_taken_is_no_match(tmp_path):
    """As after a default has changed: two runs that differ in it had one id under different versions."""
    other = dataclasses.replace(RUN, warmup_steps=20)
    write_run_config(tmp_path / "runs" / RUN.run_id, other, CORPUS)
    folder = run_folder(tmp_path, RUN)
    assert folder != run_folder(tmp_path, other) == tmp_path / "runs" / RUN.run_id
    write_run_config(folder, RUN, CORPUS)
    assert run_folder(tmp_path, RUN) == folder


def test_a_run_is_found_beside_a_folder_that_is_damaged(tmp_path):
    damaged, folder = (tmp_path / "runs" / f"{RUN.label}-{k}" for k in (1, 2))
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text('{"run": ')
    write_run_config(folder, RUN, CORPUS)
    assert run_folder(tmp_path, RUN) == folder


def test_a_run_that_is_new_goes_to_the_folder_of_its_id_and_says_its_schema(tmp_path):
    folder = run_folder(tmp_path, RUN)
    assert folder == tmp_path / "runs" / RUN.run_id
    write_run_config(folder, RUN, CORPUS)
    config = read_run_config(folder)
    assert (config.run, config.corpus, config.schema) == (RUN, CORPUS, SCHEMA)
    assert json.loads((folder / "config.json").read_text())["schema"] == SCHEMA == 2


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"schema": SCHEMA + 1, "run": to_dict(RUN), "corpus": CORPUS}, rf"schema {SCHEMA + 1} .*{SCHEMA}"),
        ({"schema": "2", "run": to_dict(RUN), "corpus": CORPUS}, "schema 2"),
        ({"schema": SCHEMA, "run": to_dict(RUN) | {"max_stps": 3}, "corpus": CORPUS}, "max_stps.*max_steps"),
        ({"schema": SCHEMA, "run": to_dict(RUN) | {"seed": "x"}, "corpus": CORPUS}, "seed = 'x'"),
        ({"schema": SCHEMA, "run": to_dict(RUN), "corpus": None}, "corpus"),
        ({"schema": SCHEMA, "corpus": CORPUS}, "run"),
        ([], "config.json"),
    ],
)
def test_a_config_of_a_later_schema_or_that_is_damaged_is_refused_by_its_file(tmp_path, values, named):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{tmp_path / 'config.json'} .*{named}" if named != "config.json" else named):
        read_run_config(tmp_path)


counts = st.integers(1, 2**53)
numbers = st.floats(-9e99, 9e99) | st.just(math.nan)


@st.composite
def metrics_lines(draw):
    num_steps = draw(st.integers(1, 5))
    by_step = st.lists(numbers, min_size=num_steps, max_size=num_steps).map(np.array)
    listed = st.none() | st.lists(numbers, min_size=1, max_size=4).map(np.array)
    evaluated = draw(st.booleans())
    positive = st.floats(0, 9e99, exclude_min=True) | st.just(math.nan)
    return MetricsLine(
        step=draw(counts),
        tokens=draw(counts),
        epoch=draw(st.integers(0, 10**8)) / 1e6,
        batch_tokens=draw(counts),
        small_batch_tokens=draw(counts),
        train_loss=draw(by_step),
        small_sq_norm=draw(by_step),
        big_sq_norm=draw(by_step),
        small_sq_norm_by_part=draw(listed),
        big_sq_norm_by_part=draw(listed),
        live=draw(listed),
        evaluated=evaluated,
        test_loss=draw(positive) if evaluated else math.nan,
        test_bits_per_byte=draw(st.none() | st.floats(0, 100)) if evaluated else None,
    )


@given(metrics_lines())
def test_a_line_comes_back_from_its_json(line):
    again = MetricsLine.read(json.loads(json.dumps(line.json(), allow_nan=False)))
    for field in dataclasses.fields(MetricsLine):
        value, other = getattr(line, field.name), getattr(again, field.name)
        assert type(value) is type(other), field.name
        np.testing.assert_array_equal(value, other, err_msg=field.name)


def line_at(step, num_steps=8, /, **changed):
    """As it lies on disk; `changed` values, and none where they are None."""
    series = [1.0 + k for k in range(num_steps)]
    values = {
        "step": step,
        "tokens": 128 * step,
        "epoch": 0.5,
        "batch_tokens": 128,
        "small_batch_tokens": 64,
        "train_loss": series,
        "small_sq_norm": series,
        "big_sq_norm": series,
    }
    return {name: value for name, value in (values | changed).items() if value is not None}


def write_lines(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


DAMAGE = {
    "steps that don't follow": {"step": 17},
    "steps that went back": {"step": 8},
    "a step in quotes": {"step": "16"},
    "a step that is true": {"step": True},
    "half a token": {"tokens": 2048.5},
    "no tokens": {"tokens": None},
    "a batch of none": {"batch_tokens": 0},
    "a batch below none": {"batch_tokens": -128},
    "a small batch too large": {"small_batch_tokens": 2**64},
    "no small batch": {"small_batch_tokens": None},
    "a single loss": {"train_loss": 3.0},
    "losses in quotes": {"train_loss": ["3.0"] * 8},
    "losses that are true": {"train_loss": [True] * 8},
    "no losses": {"train_loss": None},
    "norms of fewer steps": {"small_sq_norm": [1.0] * 7},
    "no norms": {"big_sq_norm": None},
    "norms by layer in quotes": {"big_sq_norm_by_layer": "x"},
    "a measurement in quotes": {"live": {"x": 1}},
    "an epoch in words": {"epoch": "first"},
    "a test loss of 0": {"test_loss": 0},
    "a test loss of -1": {"test_loss": -1},
    "a test loss that is true": {"test_loss": True},
    "a test loss in quotes": {"test_loss": "3"},
}


@pytest.mark.parametrize("changed", DAMAGE.values(), ids=DAMAGE)
def test_a_line_that_no_run_writes_is_refused_by_file_and_line(tmp_path, changed):
    write_lines(tmp_path, [line_at(8), line_at(16), line_at(24)])
    assert len(read_metrics(tmp_path)) == 3
    write_lines(tmp_path, [line_at(8), line_at(16, **changed), line_at(24)])
    with pytest.raises(UserError, match=rf"{tmp_path / 'metrics.jsonl'} line 2 .*remove {tmp_path}"):
        read_metrics(tmp_path)


def test_metrics_from_whose_middle_a_line_was_taken_are_refused(tmp_path):
    write_lines(tmp_path, [line_at(8), line_at(24)])
    with pytest.raises(UserError, match=rf"{tmp_path / 'metrics.jsonl'} line 2 .*step 24"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("text", ['{"step": 16, "tok', "[1, 2]", "16", "", "\x00" * 20, "[" * 100_000])
def test_a_line_in_the_middle_that_was_cut_or_is_something_else_is_refused(tmp_path, text):
    first, last = (json.dumps(line_at(step)) for step in (8, 16))
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{text}\n{last}\n")
    with pytest.raises(UserError, match=rf"{tmp_path / 'metrics.jsonl'} line 2 "):
        read_metrics(tmp_path)


def test_a_last_line_that_a_crash_cut_off_is_none(tmp_path):
    whole = json.dumps(line_at(16))
    for cut in (whole[:20], whole):  # without its end nobody knows whether it is whole
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line_at(8)) + "\n" + cut)
        assert [line.step for line in read_metrics(tmp_path)] == [8]


@pytest.mark.parametrize("steps", [16, 32])
def test_a_finished_run_whose_metrics_end_elsewhere_is_refused(tmp_path, steps):
    result = RunResult(RUN.run_id, "exhausted", steps, 128 * steps, 3.0, "made up")
    write_result(tmp_path, result)
    write_lines(tmp_path, [line_at(8), line_at(16), line_at(24, test_loss=3.0)])
    with pytest.raises(UserError, match=rf"{tmp_path / 'metrics.jsonl'} .*24.*{steps}.*remove {tmp_path}"):
        read_metrics(tmp_path, read_result(tmp_path))
    whole = dataclasses.replace(result, steps=24, tokens=24 * 128)
    assert [line.step for line in read_metrics(tmp_path, whole)] == [8, 16, 24]


def test_a_result_that_is_damaged_is_refused_by_its_file(tmp_path):
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"run_id": "x"}')
    with pytest.raises(UserError, match=rf"{tmp_path / 'result.json'} .*'status'.*remove {tmp_path}"):
        read_result(tmp_path)


def test_a_course_holds_each_steps_own_batches_and_the_evaluations_that_gave_a_loss(tmp_path):
    write_lines(
        tmp_path,
        [
            line_at(2, 2, test_loss=4.0),
            line_at(5, 3, batch_tokens=256, small_batch_tokens=32, tokens=1024),
            line_at(6, 1, batch_tokens=256, tokens=1280) | {"test_loss": None},
            line_at(7, 1, batch_tokens=256, tokens=1536, test_loss=3.5),
        ],
    )
    found = course(read_metrics(tmp_path))
    assert found.batch_tokens.tolist() == [128] * 2 + [256] * 5
    assert found.small_batch_tokens.tolist() == [64] * 2 + [32] * 3 + [64] * 2
    assert found.line_steps.tolist() == [2, 3, 1, 1]
    assert found.big_sq_norm.tolist() == [1, 2, 1, 2, 3, 1, 1]
    assert found.small_sq_norm_by_part is None
    evaluations = zip(found.eval_steps.tolist(), found.eval_tokens.tolist(), found.eval_losses.tolist(), strict=True)
    assert list(evaluations) == [(2, 256, 4.0), (7, 1536, 3.5)]


def test_lines_come_back_from_their_file(tmp_path):
    write_lines(tmp_path, [line_at(8), line_at(16, live=[1.0, 2.0], test_loss=3.0)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    write_metrics(tmp_path, read_metrics(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_clock_is_read_as_far_as_it_is_one(tmp_path):
    append_clock(tmp_path, 10)
    with (tmp_path / "clock.jsonl").open("a") as file:
        file.write('{"step": 12}\n[]\nx\n')
    append_clock(tmp_path, 14)
    assert list(read_clock(tmp_path)) == [10, 14]
