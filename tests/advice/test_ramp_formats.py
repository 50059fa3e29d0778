import itertools
import json
import math

import numpy as np
import pytest

from scaling_jax.advice.advise import write_stages
from scaling_jax.advice.ramp_formats import FORMATS, ramp_as_text, ramp_from_text
from scaling_jax.advice.seesaw import seesaw
from scaling_jax.cli.planned_run import planned_run
from scaling_jax.io import UserError
from scaling_jax.training import Stage

CONTEXT, DEVICES = 2048, 8
SEQUENCES = 16 * 2048


def batches(*starts_and_batches, rates=lambda growth: 1.0):
    first = starts_and_batches[0][1]
    return tuple(Stage(start, batch, rates(batch / first)) for start, batch in starts_and_batches)


GROWING = batches((0, SEQUENCES), (50 * SEQUENCES, 2 * SEQUENCES), (150 * SEQUENCES, 4 * SEQUENCES))
SHRINKING = batches((0, 4 * SEQUENCES), (200 * SEQUENCES, SEQUENCES))
EQUAL = batches((0, SEQUENCES), (60 * SEQUENCES, 2 * SEQUENCES), (120 * SEQUENCES, 3 * SEQUENCES))
ROOT = batches((0, SEQUENCES), (50 * SEQUENCES, 4 * SEQUENCES), (90 * SEQUENCES, 2 * SEQUENCES), rates=math.sqrt)


@pytest.mark.parametrize(
    ("format", "stages"),
    [
        *(("json", stages) for stages in (GROWING, SHRINKING, EQUAL, ROOT)),
        *(("megatron", stages) for stages in (GROWING, SHRINKING, EQUAL)),
        ("megatron-rampup", EQUAL),
        ("olmo-core", ROOT),
        ("maxtext", EQUAL),
    ],
)
def test_each_format_gives_back_the_ramp_that_was_written(tmp_path, format, stages):
    write_stages(tmp_path / "ramp", stages, format, context=CONTEXT, devices=DEVICES)
    text = (tmp_path / "ramp").read_text()
    assert ramp_from_text(text, "ramp", context=CONTEXT) == stages
    assert ramp_as_text(stages, format, context=CONTEXT, devices=DEVICES) == text


def test_megatrons_example_is_read_as_megatron_reads_it():
    """num_microbatches_calculator.py: thresholds // seq_length, batches in sequences, sorted."""
    found = ramp_from_text("500B:3072, 0:768 250B:1536", "ramp", context=CONTEXT)
    assert [stage.batch_tokens for stage in found] == [768 * 2048, 1536 * 2048, 3072 * 2048]
    assert [stage.tokens for stage in found] == [0, 250 * 10**9 // 2048 * 2048, 500 * 10**9 // 2048 * 2048]
    assert {stage.learning_rate_factor for stage in found} == {1.0}
    with_flag = ramp_from_text('--step-batch-size-schedule "0:768 250B:1536 500B:3072"', "ramp", context=CONTEXT)
    assert with_flag == found


def megatron_batch(consumed, start, increment, samples, end):
    """The rule of RampupBatchsizeNumMicroBatchesCalculator.update."""
    return end if consumed > samples else start + int(consumed / (samples / ((end - start) // increment))) * increment


@pytest.mark.parametrize("samples", [1000, 999, 37])
def test_megatrons_rampup_has_its_batches_at_every_sequence(samples):
    stages = ramp_from_text(f"--rampup-batch-size 16 8 {samples} --global-batch-size 40", "ramp", context=1)
    for consumed in range(0, samples + 50):
        at = [stage for stage in stages if stage.tokens <= consumed][-1]
        assert at.batch_tokens == megatron_batch(consumed, 16, 8, samples, 40)


def test_maxtexts_rampup_has_its_batches_at_every_step():
    """The rule of RampupBatchManager.update: a stage ends once its own samples reach their share."""
    text = ramp_as_text(EQUAL, "maxtext", context=CONTEXT, devices=DEVICES)
    found = dict(line.split(": ") for line in text.splitlines()[1:])
    start, increment, end = (8 * float(found[f"per_device_batch_size{name}"]) for name in ("_start", "_increment", ""))
    share = int(found["global_rampup_samples"]) / ((end - start) // increment)
    batch, used, total = start, 0, 0
    for _ in range(200):
        expected = [stage for stage in EQUAL if stage.tokens <= total * CONTEXT][-1].batch_tokens
        assert batch * CONTEXT == expected
        used, total = used + batch, total + batch
        if used >= share:
            batch, used = min(batch + increment, end), 0


@pytest.mark.parametrize(
    ("format", "stages", "said"),
    [
        ("megatron", ROOT, r"megatron can't say.*no learning rates.*stage 2.*--drop-rates"),
        ("maxtext", ROOT, "no learning rates"),
        ("olmo-core", GROWING, "√batch.*stage 2"),
        ("olmo-core", batches((0, 64), (640, 96), rates=math.sqrt), "whole factor.*64 to 96"),
        ("megatron-rampup", GROWING, "equal increments.*16, 32, 64"),
        ("megatron-rampup", SHRINKING, "equal increments"),
        ("megatron-rampup", batches((0, 2048), (2048, 4096), (2048 * 99, 6144)), "same number of sequences"),
        ("maxtext", GROWING, "equal increments"),
        ("maxtext", batches((0, 2048 * 8), (2048 * 8, 2048 * 16), (2048 * 800, 2048 * 24)), "stages differ"),
        ("megatron", batches((0, 1000), (10_000, 2000)), "stage 1 has a batch of 1,000"),
        ("yaml", GROWING, "choose from json, megatron"),
    ],
)
def test_what_a_format_cant_say_is_refused_by_name(format, stages, said):
    with pytest.raises(UserError, match=said):
        ramp_as_text(stages, format, context=CONTEXT, devices=DEVICES)


def test_rates_are_left_out_on_request_and_sequences_need_their_length():
    text = ramp_as_text(ROOT, "megatron", context=CONTEXT, drop_rates=True)
    assert [s.batch_tokens for s in ramp_from_text(text, "ramp", context=CONTEXT)] == [s.batch_tokens for s in ROOT]
    with pytest.raises(UserError, match="--context"):
        ramp_as_text(GROWING, "megatron")
    with pytest.raises(UserError, match="--devices"):
        ramp_as_text(EQUAL, "maxtext", context=CONTEXT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0:768 250X:1536",
        "10B:768",
        '{"batch_sizes": [64]}',
        '{"batch_sizes": [64, 128], "schedule": [{"value": 0, "unit": "tokens"}, {"value": 9, "unit": "epochs"}]}',
        '{"batch_sizes": [64], "schedule": [{"value": true, "unit": "tokens"}]}',
        "--rampup-batch-size 16 8",
        "--rampup-batch-size 16 7 100 --global-batch-size 40",
        "per_device_batch_size_start: 4",
        "# for 8 devices\nper_device_batch_size_start: 4\nper_device_batch_size: 2\n"
        "per_device_batch_size_increment: 1\nglobal_rampup_samples: 9",
        "[1, 2]",
        '[{"tokens": 5, "batch_tokens": 128}]',
        "nonsense",
    ],
)
def test_what_is_no_ramp_is_refused(text):
    with pytest.raises(UserError, match=r"ramp\.txt"):
        ramp_from_text(text, "ramp.txt", context=64)


def test_olmo_cores_steps_become_tokens():
    schedule = [{"value": value, "unit": "steps"} for value in (0, 10, 14)]
    found = ramp_from_text(json.dumps({"batch_sizes": [64, 128, 32], "schedule": schedule}), "ramp")
    assert [stage.tokens for stage in found] == [0, 640, 640 + 4 * 128]
    assert [stage.learning_rate_factor for stage in found] == pytest.approx([1, math.sqrt(2), math.sqrt(0.5)])


@pytest.mark.parametrize("format", FORMATS)
def test_train_reads_every_format(tmp_path, format):
    stages = batches((0, 256), (2560, 512), rates=math.sqrt if format == "olmo-core" else lambda growth: 1.0)
    write_stages(tmp_path / "ramp", stages, format, context=64, devices=2)
    run = planned_run({"learning_rate": 1e-3, "max_tokens": 10_000}, ramp=tmp_path / "ramp", context=64)
    assert run.batch_tokens == 256
    assert run.ramp == stages[1:]


def test_a_stage_may_shrink_or_change_the_rate_alone(tmp_path):
    stages = (Stage(0, 512), Stage(5120, 256, 0.7), Stage(10_240, 256, 0.5))
    write_stages(tmp_path / "ramp", stages)
    run = planned_run({"learning_rate": 1e-3, "max_tokens": 20_000}, ramp=tmp_path / "ramp")
    assert run.ramp == stages[1:]
    (tmp_path / "ramp").write_text('[{"tokens": 0, "batch_tokens": 128}, {"tokens": 256, "batch_tokens": 128}]')
    with pytest.raises(UserError, match="another batch or learning rate"):
        planned_run({"learning_rate": 1e-3, "max_tokens": 20_000}, ramp=tmp_path / "ramp")


def test_seesaw_keeps_the_rate_over_the_root_of_the_batch_of_its_schedule():
    """rate/√batch falls by the same factor as the schedule's rate; at each start the schedule has just fallen by 2."""
    end = 10_000_000

    def cosine(tokens):
        return 1e-3 * (1 + math.cos(math.pi * tokens / end)) / 2

    stages = seesaw(cosine, end, batch_tokens=1024)
    for before, stage in itertools.pairwise(stages):
        assert (stage.tokens - before.tokens) % before.batch_tokens == 0
        assert stage.batch_tokens == 2 * before.batch_tokens
        halvings = stage.learning_rate_factor / math.sqrt(stage.batch_tokens / 1024)
        assert cosine(stage.tokens) <= 1e-3 * halvings * (1 + 1e-9) or math.isclose(
            cosine(stage.tokens - before.batch_tokens), 1e-3 * halvings, rel_tol=1e-2
        )
    steps = sum(
        (b.tokens - a.tokens) / a.batch_tokens for a, b in zip(stages, (*stages[1:], Stage(end, 1)), strict=True)
    )
    saved = 1 - steps * 1024 / end
    # In the limit of small factors the batch is 1024·peak/rate, and its steps are the mean of the rate: 1/2. Halvings
    # lag behind, so they save less.
    assert 0.25 < saved < 0.5
    assert stages[-1].tokens < end


def test_seesaw_lets_the_rate_fall_above_the_largest_batch():
    stages = seesaw(lambda tokens: 2.0 ** (-tokens / 1000), 5000, batch_tokens=10, max_batch_tokens=20)
    assert [stage.batch_tokens for stage in stages] == [10, 20, 20, 20, 20]
    assert [stage.learning_rate_factor for stage in stages] == pytest.approx(
        2.0 ** np.array([0, -0.5, -1.5, -2.5, -3.5])
    )
    assert [stage.tokens for stage in stages] == [0, 1000, 2000, 3000, 4000]
    with pytest.raises(UserError, match="not rise"):
        seesaw(lambda tokens: 1 + math.sin(tokens / 300), 5000, batch_tokens=10)
    with pytest.raises(UserError, match="factor 2 or more"):
        seesaw(lambda tokens: 1.0, 5000, batch_tokens=10, factor=1)
    assert len(seesaw(lambda tokens: 1.0, 5000, batch_tokens=10)) == 1
