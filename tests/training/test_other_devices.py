"""A run goes on on other devices than it began on, where its next batches divide over them."""

import dataclasses

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.training import Interrupted, Stage, read_metrics, run_folder, train
from tests.training.counting import CORPUS, RUN

# 2 sequences, then 16; on eight devices only the second stage divides
RAMP = dataclasses.replace(
    RUN, batch_tokens=32, max_steps=None, max_tokens=8_000, ramp=(Stage(1_280, 256, 2.83),), steps_per_call=8
)


def stopped_in(stage, folder, num_devices=1):
    """The ramp, stopped once a line has the batch of a stage."""

    def should_stop():
        return read_metrics(run_folder(folder, RAMP))[-1].batch_tokens == stage

    with pytest.raises(Interrupted):
        train(RAMP, folder, corpus=CORPUS, num_devices=num_devices, should_stop=should_stop)
    return read_metrics(run_folder(folder, RAMP))


def test_a_ramp_in_its_second_stage_goes_on_on_devices_that_its_first_batch_does_not_fill(tmp_path):
    stopped = stopped_in(256, tmp_path / "moved")
    result = train(RAMP, tmp_path / "moved", corpus=CORPUS, num_devices=8)
    undisturbed = train(RAMP, tmp_path / "one", corpus=CORPUS, num_devices=1)
    assert (result.status, result.steps, result.tokens) == (undisturbed.status, undisturbed.steps, undisturbed.tokens)
    lines, others = (read_metrics(run_folder(tmp_path / name, RAMP)) for name in ("moved", "one"))
    assert [line.step for line in lines] == [line.step for line in others]
    np.testing.assert_allclose(
        np.concatenate([line.train_loss for line in lines]),
        np.concatenate([line.train_loss for line in others]),
        rtol=1e-4,
    )
    assert {line.small_batch_tokens for line in lines[len(stopped) :]} == {32}  # 256 tokens over eight devices
    assert {line.small_batch_tokens for line in stopped} == {16, 128}


def test_a_ramp_in_its_first_stage_is_refused_by_the_batch_that_does_not_divide(tmp_path):
    stopped_in(32, tmp_path)
    with pytest.raises(UserError, match=r"batch of 2 sequences .* 8 devices"):
        train(RAMP, tmp_path, corpus=CORPUS, num_devices=8)


def test_a_later_stage_that_does_not_divide_is_refused_before_the_first_step(tmp_path):
    ramp = dataclasses.replace(RAMP, ramp=(Stage(1_280, 48), Stage(8_000, 80)))  # the last stage is never reached
    with pytest.raises(UserError, match=r"batch of 3 sequences .* 2 devices"):
        train(ramp, tmp_path, corpus=CORPUS, num_devices=2)
    assert not (run_folder(tmp_path, ramp) / "metrics.jsonl").exists()


def test_a_batch_that_holds_the_text_more_than_once_is_refused(tmp_path):
    """Its examples would come twice in a batch, and the noise scale takes them as independent."""
    whole = len(CORPUS.train_RxT1) * RUN.model.context
    assert train(dataclasses.replace(RUN, batch_tokens=whole, max_steps=1), tmp_path, corpus=CORPUS).steps == 1
    for run in (
        dataclasses.replace(RUN, batch_tokens=2 * whole),
        dataclasses.replace(RUN, ramp=(Stage(1_280, 2 * whole),)),
    ):
        with pytest.raises(UserError, match=f"batch_tokens = {2 * whole:,} .* {whole:,} tokens"):
            train(run, tmp_path, corpus=CORPUS, num_devices=1)
