import dataclasses
import itertools

import jax
import numpy as np
import pytest

from scaling_jax.data.feeding import Feeder
from scaling_jax.io import UserError
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import (
    Interrupted,
    OptimizerConfig,
    Run,
    Skip,
    Stage,
    read_metrics,
    read_result,
    run_folder,
    train,
)
from scaling_jax.training.records import read_run_config

RUN = Run(
    ModelConfig(n_layer=1, d_model=16, n_head=1, context=16),
    batch_tokens=64,
    learning_rate=1e-2,
    max_steps=60,
    eval_tokens=512,
    steps_per_call=8,
)


def folder_of(workdir, run=RUN):
    return run_folder(workdir, run)


def losses_of(workdir, run=RUN):
    return [line.test_loss for line in read_metrics(folder_of(workdir, run)) if line.evaluated]


def test_a_run_learns_and_records_every_step(tmp_path, corpus):
    result = train(RUN, tmp_path, corpus=corpus, num_devices=1)
    lines = read_metrics(folder_of(tmp_path))
    assert result.status == "exhausted"
    assert result.steps == 60 == sum(len(line.small_sq_norm) for line in lines)
    for line, norm in itertools.product(lines, ("small_sq_norm", "big_sq_norm")):
        by_part = getattr(line, f"{norm}_by_part")
        assert len(by_part) == 3  # embedding, a layer, unembedding
        assert sum(by_part) == pytest.approx(np.mean(getattr(line, norm)), rel=1e-6)
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0] - 0.3
    config = read_run_config(folder_of(tmp_path))
    assert config.run == RUN
    assert config.corpus["sha256"] == "counting"


def test_a_run_interrupted_anywhere_ends_as_an_undisturbed_one_bit_for_bit(tmp_path, corpus):
    train(RUN, tmp_path / "whole", corpus=corpus, num_devices=1)
    for interruption in range(1, 100):
        answers = iter([False] * interruption + [True])
        try:
            train(RUN, tmp_path / "parts", corpus=corpus, num_devices=1, should_stop=lambda a=answers: next(a, False))
            break
        except Interrupted:
            assert read_result(folder_of(tmp_path / "parts")) is None
    assert interruption > 2
    for name in ("metrics.jsonl", "result.json", "config.json"):
        whole, parts = ((folder_of(tmp_path / which) / name).read_bytes() for which in ("whole", "parts"))
        assert whole == parts, name


def test_a_run_killed_after_a_checkpoint_repeats_the_same_steps(tmp_path, corpus):
    train(RUN, tmp_path / "whole", corpus=corpus, num_devices=1)

    class Killed(BaseException):
        pass

    def kill_at_30(progress):
        if progress.step > 30:
            raise Killed

    with pytest.raises(Killed):
        train(RUN, tmp_path / "cut", corpus=corpus, num_devices=1, checkpoint_seconds=0.0, on_progress=kill_at_30)
    with (folder_of(tmp_path / "cut") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tok')  # a line that the crash cut off
    train(RUN, tmp_path / "cut", corpus=corpus, num_devices=1)
    whole, cut = ((folder_of(tmp_path / which) / "metrics.jsonl").read_bytes() for which in ("whole", "cut"))
    assert whole == cut


def test_a_finished_run_is_not_trained_again(tmp_path, corpus):
    first = train(RUN, tmp_path, corpus=corpus, num_devices=1)
    before = (folder_of(tmp_path) / "metrics.jsonl").stat().st_mtime_ns
    assert train(RUN, tmp_path, corpus=corpus, num_devices=1) == first
    assert (folder_of(tmp_path) / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_stops_once_two_evaluations_lie_below_its_target(tmp_path, corpus):
    run = dataclasses.replace(RUN, target_loss=5.3)
    result = train(run, tmp_path, corpus=corpus, num_devices=1)
    losses = losses_of(tmp_path, run)
    assert result.status == "reached"
    assert max(losses[-2:]) < 5.3
    below = [loss < 5.3 for loss in losses]
    assert not any(a and b for a, b in itertools.pairwise(below[:-1]))


def test_a_diverging_run_ends_as_such(tmp_path, corpus):
    run = dataclasses.replace(RUN, learning_rate=1e30, optimizer=OptimizerConfig("sgd"))
    with jax.debug_nans(False):
        result = train(run, tmp_path, corpus=corpus, num_devices=1)
    assert result.status == "diverged"
    assert result.test_loss is None


def test_eight_devices_train_like_one(tmp_path, corpus):
    run = dataclasses.replace(RUN, batch_tokens=256, max_steps=12)
    for devices in (1, 8):
        train(run, tmp_path / str(devices), corpus=corpus, num_devices=devices)
    one, eight = (losses_of(tmp_path / str(devices), run) for devices in (1, 8))
    np.testing.assert_allclose(one, eight, rtol=1e-5)


def test_results_on_other_text_are_refused(tmp_path, corpus):
    train(RUN, tmp_path, corpus=corpus, num_devices=1)
    other = dataclasses.replace(corpus, manifest={**corpus.manifest, "sha256": "other"})
    with pytest.raises(UserError, match="other text"):
        train(RUN, tmp_path, corpus=other, num_devices=1)


def test_text_that_the_model_cannot_hold_is_refused(tmp_path, corpus):
    small = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, vocab_size=100))
    with pytest.raises(UserError, match="vocab_size is 100"):
        train(small, tmp_path, corpus=corpus)


def test_evaluations_lie_in_the_given_ratio_and_calls_are_no_longer_than_asked(tmp_path, corpus):
    run = dataclasses.replace(RUN, max_steps=120, eval_growth=1.2)
    train(run, tmp_path, corpus=corpus, num_devices=1)
    lines = read_metrics(folder_of(tmp_path, run))
    evaluated = [line.step for line in lines if line.evaluated]
    assert evaluated[0] == 10
    assert evaluated[-1] == 120
    assert all(b / a < 1.2 + 1 / a for a, b in itertools.pairwise(evaluated))
    assert all(0 < b - a <= 8 for a, b in itertools.pairwise([0, *(line.step for line in lines)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 100}, "batch_tokens = 100 .*96 or 112 tokens"),
        ({"batch_tokens": 16}, "batch_tokens = 16 .*32 or 48 tokens"),
        ({"max_tokens": 1}, "one of max_steps and max_tokens"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 .*positive"),
        ({"eval_growth": 1.0}, "eval_growth = 1.0"),
        ({"betas": "fixed"}, "betas = 'fixed'.*half-life, run"),
        ({"weight_decay_rule": "linear"}, "weight_decay_rule = 'linear'.*run, sqrt, timescale"),
        ({"weight_decay_rule": "sqrt"}, "weight_decay_rule = 'sqrt'.*optimizer.weight_decay, and it is 0"),
        (
            {"weight_decay_rule": "sqrt", "optimizer": OptimizerConfig("optax:lion")},
            "optax:lion has settings of its own",
        ),
        ({"skip": Skip(0, 20)}, "skip.tokens = 20 .*sequences of 16 tokens"),
    ],
)
def test_impossible_runs_are_refused_with_what_to_change(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RUN, **changes)


def test_a_branch_continues_its_parent_bit_for_bit(tmp_path, corpus):
    """A branch from a kept state is the run that would have come out with its ramp from the first step on."""
    parent = dataclasses.replace(RUN, snapshot_tokens=(1_000, 2_000))
    branch = dataclasses.replace(RUN, max_steps=50, ramp=(Stage(2_000, 256, 2.0),))
    train(parent, tmp_path / "branched", corpus=corpus, num_devices=1)
    assert sorted(x.name for x in (folder_of(tmp_path / "branched", parent) / "snapshots").glob("[0-9]*")) == [
        "16",
        "32",
    ]
    train(branch, tmp_path / "branched", corpus=corpus, num_devices=1, branch_of=parent)
    train(dataclasses.replace(branch), tmp_path / "whole", corpus=corpus, num_devices=1)
    branched, whole = (read_metrics(folder_of(tmp_path / w, branch)) for w in ("branched", "whole"))
    for key in ("train_loss", "big_sq_norm"):
        of_branched, of_whole = (np.concatenate([getattr(x, key) for x in lines]) for lines in (branched, whole))
        np.testing.assert_array_equal(of_branched, of_whole, err_msg=key)
    assert branched[-1].json() == whole[-1].json()


@pytest.mark.parametrize("ramp", [(), (Stage(1_024, 256, 2.0),)])
def test_a_replicate_starts_from_the_same_state_and_reads_other_text(ramp, tmp_path, corpus, monkeypatch):
    """From a kept state, and interrupted, it is the run that would have come out with its skip from the first step."""
    parent = dataclasses.replace(RUN, snapshot_tokens=(1_024,))
    replicate = dataclasses.replace(RUN, max_steps=40, ramp=ramp, skip=Skip(1_024, 512))
    train(parent, tmp_path / "branched", corpus=corpus, num_devices=1)
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        train(
            replicate,
            tmp_path / "branched",
            corpus=corpus,
            num_devices=1,
            branch_of=parent,
            should_stop=lambda: next(answers),
        )
    train(replicate, tmp_path / "branched", corpus=corpus, num_devices=1, branch_of=parent)
    read = []
    batches = Feeder.batches
    monkeypatch.setattr(Feeder, "batches", lambda self, span: read.append(span) or batches(self, span))
    train(replicate, tmp_path / "whole", corpus=corpus, num_devices=1)
    branched, whole = (read_metrics(folder_of(tmp_path / w, replicate)) for w in ("branched", "whole"))
    for key in ("train_loss", "big_sq_norm"):
        of_branched, of_whole = (np.concatenate([getattr(x, key) for x in lines]) for lines in (branched, whole))
        np.testing.assert_array_equal(of_branched, of_whole, err_msg=key)
    assert branched[-1].json() == whole[-1].json()
    gaps = [
        after.examples_seen - before.examples_seen - before.num_steps * before.batch_sequences
        for before, after in itertools.pairwise(read)
    ]
    assert sum(gaps) == max(gaps) == 512 // RUN.model.context  # one jump
    (jump,) = [span.examples_seen for gap, span in zip(gaps, read[1:], strict=True) if gap]
    assert jump == (1_024 + 512) // RUN.model.context
    straight = dataclasses.replace(replicate, skip=None)
    train(straight, tmp_path / "whole", corpus=corpus, num_devices=1)
    ours, theirs = (
        np.concatenate([line.train_loss for line in lines])
        for lines in (whole, read_metrics(folder_of(tmp_path / "whole", straight)))
    )
    np.testing.assert_array_equal(ours[:16], theirs[:16])
    assert not np.any(ours[16:] == theirs[16:])


def test_betas_of_a_stage_are_half_lives_or_those_of_the_run():
    ramped = dataclasses.replace(RUN, ramp=(Stage(2_000, 256, 2.0),))
    assert ramped.at(ramped.ramp[0]).optimizer.beta2 == pytest.approx(0.98**4)
    kept = dataclasses.replace(ramped, betas="run")
    assert kept.at(kept.ramp[0]).optimizer == RUN.optimizer
    assert kept.run_id != ramped.run_id


def test_ids_are_those_of_before_skips_and_choices_of_betas():
    assert dataclasses.replace(RUN, ramp=(Stage(2_000, 256, 2.0),)).run_id == "1x16-b64-lr1.00e-2-s0-8da1845ea66f"
    assert RUN.run_id == "1x16-b64-lr1.00e-2-s0-b5faf85212b5"


def test_a_branch_of_a_run_that_kept_no_state_is_refused(tmp_path, corpus):
    train(RUN, tmp_path, corpus=corpus, num_devices=1)
    branch = dataclasses.replace(RUN, ramp=(Stage(2_000, 256, 2.0),))
    with pytest.raises(UserError, match="kept no state up to 2,000 tokens"):
        train(branch, tmp_path, corpus=corpus, num_devices=1, branch_of=RUN)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, corpus, capsys):
    train(RUN, tmp_path / "whole", corpus=corpus, num_devices=1)
    answers = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        train(
            RUN,
            tmp_path / "cut",
            corpus=corpus,
            num_devices=1,
            checkpoint_seconds=0.0,
            should_stop=lambda: next(answers, False),
        )
    kept = sorted((folder_of(tmp_path / "cut") / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    assert len(kept) == 2
    for file in kept[-1].rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    train(RUN, tmp_path / "cut", corpus=corpus, num_devices=1)
    assert "is damaged" in capsys.readouterr().err
    whole, cut = ((folder_of(tmp_path / which) / "metrics.jsonl").read_bytes() for which in ("whole", "cut"))
    assert whole == cut
