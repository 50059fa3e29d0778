import dataclasses
import json
import math
import re

import numpy as np
import pytest

from scaling_jax.fitting import fit_scan
from scaling_jax.io import UserError
from scaling_jax.results import Results, analyse, read_results
from scaling_jax.results.measurements import Measurement, SeedSpread, few_steps_notes, measurement_notes, seed_notes
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.tasks import ModelConfig
from tests.made_up_scan import evaluated_lines, write_run, write_scan

TARGETS = (3.0, 2.5, 2.2)
EXPERIMENT = Experiment(
    name="two seeds",
    subjects=(Subject(ModelConfig(1, 16, 1), TARGETS, LearningRates(1e-2, 1_000, most=1)),),
    batch_tokens=(128, 256, 512),
    max_tokens=1_000_000,
    seeds=(0, 1),
)


def scan_with(workdir, slower: float, experiment: Experiment = EXPERIMENT) -> Results:
    """Loss 4·step^−0.1; the second seed takes `slower` times the steps to every loss."""

    def train(run):
        pace = slower if run.seed else 1.0
        steps = np.unique(np.geomspace(10, 2_000, 300).astype(int)).tolist()
        lines = evaluated_lines(run, ((step, 4 * (step / pace) ** -0.1) for step in steps))
        return write_run(workdir, run, lines, "reached")

    write_scan(workdir, experiment, train)
    return read_results(workdir)


@pytest.mark.parametrize("log_std", [2.0, 0.1])
def test_one_note_says_how_many_noise_scales_have_a_warning_and_files_stay(tmp_path, log_std):
    """Of lognormal moments: wide ones are skewed."""
    subject = Subject(ModelConfig(1, 16, 1), (2.6, 2.5, 2.4, 2.3), LearningRates(1e-2, 1_000, most=1))
    experiment = dataclasses.replace(EXPERIMENT, subjects=(subject,), seeds=(0,))
    draws = np.random.default_rng(0)

    def train(run):
        lines = evaluated_lines(run, ((step, 4 * step**-0.1) for step in range(10, 400, 10)))
        for k, line in enumerate(lines):
            noise = 300 * draws.lognormal(0, log_std, line.num_steps)
            lines[k] = dataclasses.replace(
                line, small_sq_norm=1 + noise / line.small_batch_tokens, big_sq_norm=1 + noise / line.batch_tokens
            )
        return write_run(tmp_path, run, lines, "reached")

    write_scan(tmp_path, experiment, train)
    analysis = analyse(tmp_path)
    said = [note for note in analysis.notes if "noise scale" in note]
    if log_std == 2.0:
        assert re.search(r"too narrow in [6-9] of 9 windows", *said)
    else:
        assert said == []
    assert not set(said) & set(json.loads((tmp_path / "fit.json").read_text())["notes"])


def test_the_spread_between_seeds_is_that_of_their_steps_and_of_their_losses_at_one_step(tmp_path):
    spreads = scan_with(tmp_path, 1.5).seeds
    assert [(s.batch_tokens, s.target_loss, s.seeds) for s in spreads[:4]] == [
        (128, 3.0, 2),
        (128, 2.5, 2),
        (128, 2.2, 2),
        (256, 3.0, 2),
    ]
    for s in spreads:
        assert s.steps_spread == pytest.approx(math.log(1.5) / math.sqrt(2), rel=0.02)
        assert s.test_loss_std == pytest.approx(0.1 * s.target_loss * math.log(1.5) / math.sqrt(2), rel=0.05)


def test_seeds_that_lie_far_apart_are_noted_and_close_ones_are_not(tmp_path):
    far, near = (scan_with(tmp_path / str(slower), slower) for slower in (1.5, 1.05))
    (first, *_), near = seed_notes(far.seeds), seed_notes(near.seeds)
    assert re.match("model 1x16 at 128 tokens: .* 33%.* 3 losses", first)
    assert near == ()


def test_one_seed_has_no_spread(tmp_path):
    one = dataclasses.replace(EXPERIMENT, seeds=(0,))
    assert dataclasses.replace(scan_with(tmp_path, 1.0), experiment=one).seeds == []
    assert SeedSpread._fields[:3] == ("model", "batch_tokens", "target_loss")


def test_a_scan_whose_targets_were_all_passed_early_asks_for_lower_ones(tmp_path):
    subject = dataclasses.replace(EXPERIMENT.subjects[0], target_losses=(3.9, 3.5))
    easy = scan_with(tmp_path, 1.0, dataclasses.replace(EXPERIMENT, subjects=(subject,)))
    assert all(m.passed_early for m in easy.measurements)
    with pytest.raises(UserError, match=f"{tmp_path}.* lower target"):
        analyse(easy)


def measured(batch, loss, steps=100.0, tuned=True):
    return Measurement("a", batch, 0, loss, steps, steps * batch, 1e-3, tuned, 5_000, False)


def test_like_notes_are_one_note_for_each_model():
    """Thirteen batch sizes whose best rate is at the edge were thirteen notes."""
    batches = [2**k for k in range(7, 20)]
    rows = [measured(batch, loss, tuned=False) for batch in batches for loss in (3.0, 2.5)]
    rows += [measured(batch, 2.2, steps=math.nan) for batch in batches[:2]]
    edge, missed = measurement_notes(rows)
    for batch in batches:
        assert f"{batch:,} tokens (0.001; 2 of {3 if batch in batches[:2] else 2} losses)" in edge
    assert "128 tokens (2.2 and below, in 5,000 steps); 256 tokens" in missed


def points_of(s_min, batch_tokens=(128, 256, 512, 1_024, 2_048, 4_096), b_crit=700):
    """Fitted points of one model: {loss: S_min}, on a hyperbola."""
    rows = [(x, b, s * (1 + b_crit / b)) for x, s in s_min.items() for b in batch_tokens]
    losses, batches, steps = zip(*rows, strict=True)
    return fit_scan(["a"] * len(rows), batches, losses, steps).points


def test_losses_whose_s_min_is_below_100_steps_are_named_in_one_note():
    (note,) = few_steps_notes(points_of({3.0: 40, 2.8: 60, 2.6: 95, 2.4: 105, 2.2: 300}))
    for words in ("model a", "100 steps", "3 of 5", "3 to 2.6", "lower targets"):
        assert words in note
    (one,) = few_steps_notes(points_of({3.0: 95, 2.8: 110, 2.6: 120}))  # 111 steps were the fewest measured
    assert "loss 3:" in one
    assert few_steps_notes(points_of({3.0: 105, 2.8: 110, 2.6: 120})) == ()


def test_an_s_min_that_the_batches_do_not_show_is_judged_by_the_steps_measured():
    """All batches far below B_crit: S_min may be anything, but a run of 40 steps is surely short."""
    far = points_of({3.0: 20, 2.8: 40, 2.6: 50}, b_crit=1e5)
    assert all(point.tradeoff.one_sided for point in far)
    assert few_steps_notes(far) == ()
    short = points_of({3.0: 1, 2.8: 40, 2.6: 50}, b_crit=1e5)
    assert "loss 3:" in few_steps_notes(short)[0]


def test_a_scans_notes_name_its_losses_of_few_steps(made_up):
    notes = [note for note in analyse(made_up[1]).notes if "below 100 steps" in note]
    assert [note.split(":")[0] for note in notes] == ["model 1x16", "model 1x32"]
