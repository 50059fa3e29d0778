import dataclasses
import math

import numpy as np
import pytest

from scaling_jax.data import example_order, feeding
from scaling_jax.io import UserError
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Interrupted, LiveRamp, Run, Stage, read_metrics, train
from scaling_jax.training.run import next_stage, read_stages, stage_at

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
    return read_metrics(workdir / "runs" / run.run_id)


def test_stages_start_at_their_tokens_and_count_them_right(tmp_path, corpus):
    result = train(RUN, tmp_path, corpus=corpus, num_devices=1)
    lines, tokens = lines_of(RUN, tmp_path), 0
    for line in lines:
        assert line["batch_tokens"] == stage_at(64, RUN.ramp, tokens).batch_tokens
        tokens += len(line["train_loss"]) * line["batch_tokens"]
        assert line["tokens"] == tokens
    assert {line["batch_tokens"] for line in lines} == {64, 128, 256}
    assert result.tokens == tokens
    assert 10_000 - 256 < tokens <= 10_000


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
    assert whole == parts
    assert len({line["batch_tokens"] for line in whole}) > 2


def test_adams_half_lives_stay_what_they_are_in_tokens():
    first, later = RUN.at(Stage(0, 64)), RUN.at(RUN.ramp[1])
    for beta in ("beta1", "beta2"):
        half_lives = [
            run.batch_tokens * math.log(0.5) / math.log(getattr(run.optimizer, beta)) for run in (first, later)
        ]
        assert half_lives[0] == pytest.approx(half_lives[1])
    assert later.learning_rate == pytest.approx(2 * first.learning_rate)
    assert RUN.at(Stage(0, 64)).optimizer == RUN.optimizer


def made_up_lines(noise_scale_tokens, steps, spread=0.1, batch_tokens=64):
    """One line of `steps` steps whose |G|² is 1 and whose noise scale is given."""
    draws = np.random.default_rng(0)
    small, big = (1 + noise_scale_tokens / tokens for tokens in (16, batch_tokens))
    noise = draws.normal(0, spread, (2, steps))
    return [
        {
            "step": steps,
            "tokens": steps * batch_tokens,
            "batch_tokens": batch_tokens,
            "small_batch_tokens": 16,
            "small_sq_norm": (small + noise[0]).tolist(),
            "big_sq_norm": (big + noise[1]).tolist(),
        }
    ]


@pytest.mark.parametrize(("noise_scale", "grows"), [(600, True), (300, True), (200, False), (100, False)])
def test_a_live_ramp_doubles_when_the_noise_scale_passes_its_threshold(noise_scale, grows):
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    stage = next_stage(64, (), live, made_up_lines(noise_scale, 200))
    assert stage.batch_tokens == (128 if grows else 64)
    assert stage.learning_rate_factor == pytest.approx(math.sqrt(stage.batch_tokens / 64))


def test_a_live_ramp_follows_the_loss_rather_than_the_start():
    """A gradient ten times as large in the first half, as early in training, does not hide the noise scale of now."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    (line,) = made_up_lines(600, 400)
    early = np.where(np.arange(400) < 200, 100.0, 0.0)
    line |= {name: (np.array(line[name]) + early).tolist() for name in ("small_sq_norm", "big_sq_norm")}
    assert next_stage(64, (), live, [line]).batch_tokens == 128


def test_noise_alone_makes_no_live_ramp_grow():
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    assert next_stage(64, (), live, made_up_lines(400, 50, spread=30.0)).batch_tokens == 64


def test_a_live_ramp_stops_at_its_largest_batch_and_looks_only_now_and_then():
    live = LiveRamp(threshold=2.0, max_batch_tokens=64, every_steps=50)
    assert next_stage(64, (), live, made_up_lines(1e4, 200)).batch_tokens == 64
    live = dataclasses.replace(live, max_batch_tokens=128, every_steps=60)
    assert next_stage(64, (), live, made_up_lines(1e4, 200)).batch_tokens == 64


@pytest.mark.parametrize("metric", ["l1", "spectral"])
def test_metrics_in_a_norm_use_the_lower_bound_of_their_noise_scale(metric):
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50, metric=metric)
    lines = made_up_lines(1.0, 50)
    for high, expected in ((1.0, 128), (1.2, 64)):  # 17²/1.0² > 2·128 > 17²/1.2²
        measured = [lines[0] | {"live": [17.0, 0.9, high]} for _ in range(6)]
        assert next_stage(64, (), live, measured).batch_tokens == expected
        assert next_stage(64, (), live, measured[:4]).batch_tokens == 64


@pytest.mark.parametrize("metric", ["curvature", "adam_half", "adam_full"])
@pytest.mark.parametrize(("noise_scale", "grows"), [(600, True), (300, True), (200, False), (100, False)])
def test_metrics_of_two_moments_use_the_lower_end_of_their_interval(metric, noise_scale, grows):
    """By what was measured at the looks, not by the training steps, whose noise scale is 1 token here."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50, metric=metric)
    draws = np.random.default_rng(0)
    lines = [
        made_up_lines(1.0, 50)[0]
        | {"live": [1 + noise_scale / 256 + draws.normal(0, 1e-3), 1 + noise_scale / 2048, 256.0, 2048.0]}
        for _ in range(12)
    ]
    assert next_stage(64, (), live, lines).batch_tokens == (128 if grows else 64)
    one_missing = [*lines[:8], lines[8] | {"live": [None, None, 256.0, 2048.0]}, *lines[9:]]
    assert next_stage(64, (), live, one_missing).batch_tokens == (128 if grows else 64)


def test_a_live_ramp_does_not_look_during_warm_up():
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    lines = made_up_lines(600, 200)
    assert next_stage(64, (), live, lines, warmup_steps=200).batch_tokens == 64
    assert next_stage(64, (), live, lines, warmup_steps=199).batch_tokens == 128


@pytest.mark.parametrize("metric", ["l1", pytest.param("curvature", marks=pytest.mark.slow)])
def test_a_ramp_by_a_measured_metric_trains(tmp_path, corpus, metric):
    live = LiveRamp(threshold=1e-3, max_batch_tokens=128, every_steps=10, metric=metric, sequences=16)
    run = dataclasses.replace(LIVE, live_ramp=live)
    train(run, tmp_path, corpus=corpus, num_devices=1)
    lines = lines_of(run, tmp_path)
    assert {line["step"] for line in lines if "live" in line} == {s for s in (x["step"] for x in lines) if s % 10 == 0}
    assert lines[-1]["batch_tokens"] > 64 or metric == "curvature"  # which this little model may not resolve


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ramp": (Stage(1_000, 128), Stage(900, 256))}, "start later with larger batches"),
        ({"ramp": (Stage(1_000, 32),)}, "start later with larger batches"),
        ({"ramp": (Stage(1_000, 100),)}, "nearest that are: 96 or 112"),
        ({"live_ramp": LiveRamp(1.0, 256)}, "not both"),
    ],
)
def test_impossible_ramps_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RUN, **changes)


def test_sequences_that_do_not_make_halves_of_eight_parts_are_refused():
    with pytest.raises(UserError, match="sequences = 24 make two halves of eight parts"):
        LiveRamp(1.0, 256, metric="l1", sequences=24)


def test_a_ramp_is_read_from_what_advice_wrote(tmp_path):
    path = tmp_path / "ramp.json"
    path.write_text(
        '[{"tokens": 0, "batch_tokens": 64}, {"tokens": 960, "batch_tokens": 128, "learning_rate_factor": 2}]'
    )
    assert read_stages(path) == (Stage(0, 64, 1.0), Stage(960, 128, 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "isn't a list of stages"),
        ("[", "can't read a ramp"),
        ('[{"tokens": 5, "batch_tokens": 64}]', "it should at 0"),
        ('[{"tokens": 0, "batch_token": 64}]', "did you mean 'batch_tokens'"),
    ],
)
def test_a_ramp_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "ramp.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_stages(tmp_path / "ramp.json")
