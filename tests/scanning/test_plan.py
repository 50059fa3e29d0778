import dataclasses

import jax
import pytest

from scaling_jax.io import UserError
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.scanning.plan import flops_per_token, plan_cell, refuse_what_cannot_fit
from scaling_jax.tasks import batch_loss, model_config
from scaling_jax.training.program import program_for

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
    expected = flops_per_token(program_for(run)) * 16 * MODEL.context
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
