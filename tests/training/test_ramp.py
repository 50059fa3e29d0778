import dataclasses
import json
import math
import re

import pytest

from scaling_jax.cli.planned_run import read_ramp
from scaling_jax.data import example_order, feeding
from scaling_jax.io import UserError
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Interrupted, LiveRamp, Run, Stage, read_metrics, run_folder, train
from scaling_jax.training.stages import stage_at

RUN = Run(
    ModelConfig(n_layer=1, d_model=16, n_head=1, context=16),
    batch_tokens=64,
    learning_rate=1e-2,
    max_tokens=10_000,
    ramp=(Stage(1_000, 128, 1.4), Stage(3_000, 256, 2.0)),
    eval_tokens=512,
    steps_per_call=8,
)
LIVE = dataclasses.replace(RUN, ramp=(), live_ramp=LiveRamp(threshold=1e-3, max_batch_tokens=512, every_steps=10))


def lines_of(run, workdir):
    return read_metrics(run_folder(workdir, run))


def test_stages_start_at_their_tokens_and_count_them_right(tmp_path, corpus):
    result = train(RUN, tmp_path, corpus=corpus, num_devices=1)
    lines, tokens = lines_of(RUN, tmp_path), 0
    for line in lines:
        assert line.batch_tokens == stage_at(64, RUN.ramp, tokens).batch_tokens
        tokens += len(line.train_loss) * line.batch_tokens
        assert line.tokens == tokens
    assert {line.batch_tokens for line in lines} == {64, 128, 256}
    assert result.tokens == tokens
    assert 10_000 - 256 < tokens <= 10_000


def test_the_total_of_steps_is_the_runs_own_through_all_stages(tmp_path, corpus):
    """At the present batch size alone, it would fall with each stage."""
    seen = []
    result = train(RUN, tmp_path, corpus=corpus, num_devices=1, on_progress=seen.append)
    assert {p.last_step for p in seen} == {result.steps}


def test_a_ramp_sees_every_example_once_and_in_order(tmp_path, corpus, monkeypatch):
    seen = []

    def spy(seed, start, count, num_examples):
        seen.append((start, count))
        return example_order(seed, start, count, num_examples)

    monkeypatch.setattr(feeding, "example_order", spy)
    result = train(RUN, tmp_path, corpus=corpus, num_devices=1)
    position = 0
    for start, count in seen:
        assert start == position
        position += count
    assert position * 16 == result.tokens


def test_a_stage_that_cannot_follow_is_shown_as_the_file_shows_it():
    """So that a reader finds it there."""
    with pytest.raises(UserError) as caught:
        dataclasses.replace(RUN, ramp=(Stage(1_000, 32, 1.0), Stage(900, 64, 1.0)))
    shown = re.findall(r"\{.*?\}", str(caught.value))
    assert [json.loads(each)["batch_tokens"] for each in shown] == [64, 32]


def test_a_stage_may_shrink_the_batch_or_change_only_the_rate(tmp_path, corpus):
    ramp = (Stage(640, 32, 0.5), Stage(960, 32, 0.25), Stage(1_280, 128, 1.0))
    run = dataclasses.replace(RUN, ramp=ramp, max_tokens=2_560)
    result = train(run, tmp_path, corpus=corpus, num_devices=1)
    assert result.steps == 640 // 64 + (960 - 640) // 32 + (1_280 - 960) // 32 + (2_560 - 1_280) // 128
    assert result.tokens == 2_560
    lines = lines_of(run, tmp_path)
    assert list(dict.fromkeys(line.batch_tokens for line in lines)) == [64, 32, 128]
    assert run.at(ramp[0]).optimizer.beta1 == pytest.approx(RUN.optimizer.beta1**0.5)


@pytest.mark.parametrize("run", [RUN, LIVE], ids=["schedule", "live"])
def test_a_ramp_interrupted_anywhere_ends_as_an_undisturbed_one(tmp_path, corpus, run):
    train(run, tmp_path / "whole", corpus=corpus, num_devices=1)
    for _ in range(100):
        answers = iter([False] * 5 + [True])
        try:
            train(run, tmp_path / "parts", corpus=corpus, num_devices=1, should_stop=lambda a=answers: next(a, False))
            break
        except Interrupted:
            pass
    whole, parts = (lines_of(run, tmp_path / which) for which in ("whole", "parts"))
    assert [line.json() for line in whole] == [line.json() for line in parts]
    assert len({line.batch_tokens for line in whole}) > 2


def test_adams_half_lives_stay_what_they_are_in_tokens():
    first, later = RUN.at(Stage(0, 64)), RUN.at(RUN.ramp[1])
    for beta in ("beta1", "beta2"):
        half_lives = [
            run.batch_tokens * math.log(0.5) / math.log(getattr(run.optimizer, beta)) for run in (first, later)
        ]
        assert half_lives[0] == pytest.approx(half_lives[1])
    assert later.learning_rate == pytest.approx(2 * first.learning_rate)
    assert RUN.at(Stage(0, 64)).optimizer == RUN.optimizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp": (Stage(1_000, 128), Stage(900, 256))}, r"later.*\"tokens\": 900, .* can't follow .*\"tokens\": 1000"),
        ({"ramp": (Stage(1_000, 64),)}, r"another batch.*\"batch_tokens\": 64, .* can't follow .*\"batch_tokens\": 64"),
        ({"ramp": (Stage(1_000, 100),)}, "batch_tokens = 100 .*96 or 112"),
        ({"live_ramp": LiveRamp(1.0, 256)}, "ramp .*live_ramp"),
    ],
)
def test_impossible_ramps_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RUN, **changes)


def test_a_ramp_is_read_from_what_advice_wrote(tmp_path):
    path = tmp_path / "ramp.json"
    path.write_text(
        '[{"tokens": 0, "batch_tokens": 64}, {"tokens": 960, "batch_tokens": 128, "learning_rate_factor": 2}]'
    )
    assert read_ramp(path, 64) == (Stage(0, 64, 1.0), Stage(960, 128, 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "isn't a list of stages"),
        ("[", "can't read a ramp"),
        ('[{"tokens": 5, "batch_tokens": 64}]', r"ramp\.json .*0 tokens.*5"),
        ('[{"tokens": 0, "batch_token": 64}]', "did you mean 'batch_tokens'"),
    ],
)
def test_a_ramp_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "ramp.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_ramp(tmp_path / "ramp.json", 64)
