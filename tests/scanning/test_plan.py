import dataclasses
import io
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import kaplan_small
from scaling_jax.console.tables import plan_table
from scaling_jax.io import UserError
from scaling_jax.results import read_results
from scaling_jax.scanning import Experiment, LearningRates, Subject, scan, speed
from scaling_jax.scanning.experiment import DEMO
from scaling_jax.scanning.plan import (
    CellPlan,
    EasyTargets,
    ScanPlan,
    easy_targets,
    evaluations,
    plan_cell,
    plan_scan,
    refuse_what_cannot_fit,
)
from scaling_jax.scanning.search import search_all
from scaling_jax.tasks import batch_loss, model_config
from scaling_jax.training.program import program_for
from tests.made_up_scan import b_crit, s_min
from tests.scanning.simulated import simulated

MODEL = model_config("2x64")
EXPERIMENT = Experiment(
    name="planned",
    subjects=(Subject(MODEL, (3.0, 2.0), LearningRates(1e-2, 1_000, most=5, together=2)),),
    batch_tokens=(128, 1_024, 8_192),
    max_tokens=1_000_000,
)


def test_flops_are_those_that_xla_counts_within_a_fifth():
    """The count leaves out norms and GELU; a microbatch of one program has no loop that XLA would count once."""
    run = EXPERIMENT.run(EXPERIMENT.cells[1], 0)
    params = jax.eval_shape(lambda: program_for(run).init(0)).params
    tokens = jax.ShapeDtypeStruct((16, MODEL.context + 1), "uint16")
    unrolled = jax.jit(jax.grad(batch_loss(MODEL))).lower(params, tokens).compile().cost_analysis()
    expected = MODEL.flops_per_token * 16 * MODEL.context
    assert expected == pytest.approx(unrolled["flops"], rel=0.2)


def test_a_cell_takes_at_most_every_rate_to_the_last_token():
    plan = plan_cell(EXPERIMENT, EXPERIMENT.cells[0], corpus_bytes=0, together=1)
    assert (plan.least_runs, plan.most_runs) == (3, 5)
    assert plan.most_tokens == 5 * (1_000_000 + 128)
    both = plan_cell(EXPERIMENT, EXPERIMENT.cells[0], corpus_bytes=1_000, together=2)
    assert both.bytes_needed == 2 * plan.bytes_needed + 1_000


def test_what_cannot_fit_is_refused_with_what_to_make_smaller():
    big = dataclasses.replace(EXPERIMENT.subjects[0], model=model_config("12x768"))
    experiment = dataclasses.replace(EXPERIMENT, subjects=(big,))
    plans = [plan_cell(experiment, cell, 0, 1) for cell in experiment.cells]
    refuse_what_cannot_fit(plans, 16 << 30)
    with pytest.raises(UserError, match=r"12x768 · 8,192 tokens .* 2\.\d GiB .* 1\.0: .*microbatch_tokens"):
        refuse_what_cannot_fit(plans, 1 << 30)


def test_the_expected_time_is_that_of_batches_whose_runs_end_early_and_less_than_the_limit():
    """Two timed cells of equal speed: 1 s for 1,000 tokens; small batches take fewer tokens to a loss."""
    small, large = (
        CellPlan(cell, 3, 5, 5_000_000, 1e12, 1 << 30, 5_000.0) for cell in (EXPERIMENT.cells[0], EXPERIMENT.cells[2])
    )
    plan = ScanPlan((small, large), 0, 2, 1 << 32, 1e9, (), ("2x64",), share=0.02)
    assert plan.most_seconds == 5_000  # each has a worker of its own
    assert plan.expected_tokens == pytest.approx(5e6 * 0.02 * (1 + 128 / 2_000 + 1 + 8_192 / 2_000))
    assert plan.expected_seconds == pytest.approx(5_000 * 0.02 * (1 + 8_192 / 2_000))  # the longer one
    alone = plan._replace(workers=1)
    assert alone.expected_seconds == pytest.approx(alone.expected_tokens / 1_000)
    untimed = large._replace(most_seconds=math.nan, most_flops=3e12)
    assert plan._replace(cells=(small, untimed)).most_seconds == pytest.approx(15_000)


def test_the_demos_share_is_what_the_demo_took():
    """131.6 million tokens in 114 runs, of 280 runs of 12 million tokens."""
    cells = [plan_cell(DEMO, cell, 0, 1) for cell in DEMO.cells]
    assert ScanPlan(tuple(cells), 0, 2, 1 << 32, 1e9).expected_tokens == pytest.approx(131.6e6, rel=0.02)


@pytest.mark.parametrize("b_crit", [1e4, 5e4, 3e5])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_expected_tokens_of_kaplan_small_are_those_of_a_simulated_scan(b_crit, shift):
    """Planted: B_crit at the lowest loss, and best rates that lie `shift` doublings above the rule.

    The H100's one run to 2.5 nats took 45.7 million tokens.
    """
    experiment = kaplan_small.EXPERIMENT
    rates, e_min = experiment.subjects[0].learning_rates, 45.7e6 / (1 + 2**16 / b_crit)
    losses = np.geomspace(11.0, 1.5, 400)

    def train(run):
        tokens = e_min * (2.5 / losses) ** 6 * (1 + run.batch_tokens / b_crit / (2.5 / losses) ** 4.8)
        late = math.log(run.learning_rate / rates.rate(run.batch_tokens, 0)) - shift * math.log(2)
        slower = math.exp(0.3 * late**2)

        def loss_after(step):
            loss = float(np.interp(step * run.batch_tokens / slower, tokens, losses))
            return max(loss, 6.0) if late > 0.9 else loss

        return simulated(run, loss_after)

    taken = sum(t.result.tokens for tried in search_all(experiment, train).values() for t in tried)
    cells = [plan_cell(experiment, cell, 0, 1) for cell in experiment.cells]
    expected = ScanPlan(tuple(cells), 0, 1, 1 << 40, 1e15).expected_tokens
    assert 1 / 1.5 < expected / taken < 1.5


def test_evaluations_are_counted_as_a_run_makes_them():
    """At 10, 12, 14, 17, 20 and so on, and at its end."""
    assert evaluations(9, 1.2) == 1
    assert evaluations(14, 1.2) == 4
    plan = CellPlan(EXPERIMENT.cells[0], 3, 5, 5 * 14 * 128, 1e9, 1, 10.0, evaluation_seconds=2.0, compile_seconds=7.0)
    assert ScanPlan((plan,), 0, 1, 1 << 32, 1e9, eval_growth=1.2).most_seconds == 10 + 5 * 4 * 2 + 7


def test_a_plan_times_steps_and_takes_the_share_of_the_cells_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "START_SECONDS", 120.0)
    (tmp_path / "text").mkdir()
    for k in range(20):
        (tmp_path / "text" / f"{k}.txt").write_text(f"some text {k}, some words. " * 200)
    subject = Subject(model_config("1x16"), (5.0, 4.5), LearningRates(1e-2, 1_000, most=1))
    experiment = Experiment(
        "timed", (subject,), (128, 256, 512, 1_024), 10_000, text=f"files:{tmp_path}/text/*", eval_tokens=512
    )
    first = dataclasses.replace(experiment, batch_tokens=(128, 256, 512))
    scan(first, tmp_path / "scan")
    plan = plan_scan(experiment, tmp_path / "scan")
    assert (plan.cells_done, plan.share_cells, plan.timed) == (3, 3, ("1x16",))
    assert 0 < plan.expected_seconds <= plan.most_seconds < 600
    tokens = [record.result.tokens for record in read_results(tmp_path / "scan").runs]
    assert plan.share == pytest.approx(sum(tokens) / sum((10_000 + b) * (1 + b / 2_000) for b in first.batch_tokens))
    wrong = dataclasses.replace(subject, model=dataclasses.replace(subject.model, vocab_size=100))
    with pytest.raises(UserError, match=r"257 .*vocab_size is 100"):
        plan_scan(dataclasses.replace(experiment, subjects=(wrong,)), tmp_path / "other")
    with pytest.raises(UserError, match="matches no file"):
        plan_scan(dataclasses.replace(experiment, text="files:/nowhere/*.txt"), tmp_path / "other")


def test_a_plan_names_the_targets_that_a_folders_largest_batch_reached_in_few_steps(made_up, tmp_path):
    """S at 8,192 tokens is S_min·(1 + B_crit/B): below 100 where the made-up scan's losses are high."""
    experiment, folder = made_up
    highest = [x for x in experiment.subjects[0].target_losses if s_min(x) * (1 + b_crit(x) / 8_192) < 100]
    assert 0 < len(highest) < 8
    easy = easy_targets(experiment, folder)
    assert easy == tuple(EasyTargets(model, 8_192, tuple(highest), 8) for model in ("1x16", "1x32"))
    assert easy_targets(experiment, tmp_path) == ()


def test_an_earlier_stage_of_a_scan_tells_too_of_targets_that_it_did_not_have(made_up):
    """A larger scan with lower targets, higher ones and a larger batch that has no run yet."""
    experiment, folder = made_up
    (subject, _), batches = experiment.subjects, (*experiment.batch_tokens, 16_384)
    larger = dataclasses.replace(subject, target_losses=(3.2, *subject.target_losses, 1.95))
    (easy,) = easy_targets(dataclasses.replace(experiment, subjects=(larger,), batch_tokens=batches), folder)
    assert (easy.batch_tokens, easy.num_targets, easy.losses[0], min(easy.losses) > 2.2) == (8_192, 10, 3.2, True)


def test_the_plan_says_the_rule_and_what_breaks_it(made_up):
    easy = easy_targets(*made_up)
    for found, lines in (((), 1), (easy, 2)):
        console = Console(width=400, record=True, file=io.StringIO())
        console.print(plan_table(ScanPlan((), 0, 1, 1 << 30, 1e9, found)))
        said = [line for line in console.export_text().splitlines() if "100 steps" in line]
        assert len(said) == lines
    for words in ("1x16", "1x32", "8,192", f"{len(easy[0].losses)} of 8", f"{easy[0].losses[-1]:.4g}", "lower"):
        assert words in said[-1]
