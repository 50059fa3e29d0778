"""Scans in which some model, or every model, reached none of its target losses: a report with what there is."""

import dataclasses

import numpy as np
import pytest

from scaling_jax.cli.results import show
from scaling_jax.io import UserError
from scaling_jax.report import write_report
from scaling_jax.results import analyse
from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.tasks import ModelConfig
from tests.made_up_scan import b_crit, evaluated_lines, s_min, write_run, write_scan

GOOD, BAD = ModelConfig(1, 32, 1), ModelConfig(1, 16, 1)
LOSSES = np.geomspace(4, 1.9, 60)


def scanned_with(folder, how, alone=False):
    """A finished scan of a model that reaches its targets and one that doesn't, by `how`; or of that one alone."""
    targets = log_spaced(6.0, 5.0, 3) if how == "all below at first" else log_spaced(3.0, 2.2, 5)
    subjects = [Subject(BAD, targets, LearningRates(1e-2, 1_000, most=1))]
    if not alone:
        subjects.append(Subject(GOOD, log_spaced(3.0, 2.2, 5), LearningRates(1e-2, 1_000, most=1)))
    experiment = Experiment(
        name="unreached", subjects=tuple(subjects), batch_tokens=powers_of_two(128, 2_048), max_tokens=10**8
    )

    def train(run):
        steps = s_min(LOSSES) * (1 + b_crit(LOSSES) / run.batch_tokens)
        last = {int(step): loss for step, loss in zip(steps, LOSSES.tolist(), strict=True)}
        evaluations, status = [(step, loss) for step, loss in sorted(last.items()) if step], "reached"
        if run.model == BAD:
            status = "exhausted"
            if how == "stopped high":
                evaluations = [(step, loss) for step, loss in evaluations if loss > 3.2]
            elif how == "one step":
                evaluations = [(1, 5.5)]
            elif how == "diverged at once":
                evaluations, status = [(3, None)], "diverged"
            elif how == "one crossing":
                evaluations = [(step, loss) for step, loss in evaluations if loss > 2.9 or run.batch_tokens == 128]
                evaluations = [(step, loss) for step, loss in evaluations if loss > 2.6]
        return write_run(folder, run, list(map(with_noise, evaluated_lines(run, evaluations))), status)

    write_scan(folder, experiment, train)
    return experiment


def with_noise(line):
    """Norms of a noise scale of 500 tokens."""
    draws = np.random.default_rng(line.step).normal(1, 0.01, (2, line.num_steps))
    small, big = draws * (1 + 500 / np.array([[line.small_batch_tokens], [line.batch_tokens]]))
    return dataclasses.replace(line, small_sq_norm=small, big_sq_norm=big)


HOW = ("stopped high", "one step", "diverged at once", "all below at first", "one crossing")


@pytest.mark.parametrize("how", HOW)
def test_a_model_that_reached_nothing_leaves_the_others_their_report(how, tmp_path):
    scanned_with(tmp_path, how)
    analysis = analyse(tmp_path)
    page = write_report(analysis).read_text()
    good = [p for p in analysis.fit.points if p.model == GOOD.name]
    assert len(good) == 5
    assert all(p.b_crit == pytest.approx(b_crit(p.loss), rel=0.2) for p in good)
    said = [note for note in analysis.notes if ": no target loss was measured" in note]
    if how == "one crossing":
        assert said == []
    else:
        (note,) = said
        assert note.startswith(f"model {BAD.name}: ")
        assert note in page


def test_a_scan_that_reached_nothing_says_so_in_its_report_and_summary(tmp_path, capsys):
    scanned_with(tmp_path, "stopped high", alone=True)
    show(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    for text in (said, (tmp_path / "report.html").read_text()):
        assert f"model {BAD.name}: no target loss was measured (no run reached 3 or below)" in text
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 7


@pytest.mark.parametrize("how", ["one step", "diverged at once", "one crossing"])
def test_a_scan_of_one_model_without_a_fit_gets_a_report(how, tmp_path):
    scanned_with(tmp_path, how, alone=True)
    assert "No law" in write_report(analyse(tmp_path)).read_text()


def test_targets_that_are_all_too_high_are_refused_in_one_line(tmp_path):
    scanned_with(tmp_path, "all below at first", alone=True)
    with pytest.raises(UserError, match="give lower targets"):
        show(tmp_path)
