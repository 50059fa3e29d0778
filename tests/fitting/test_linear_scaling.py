import numpy as np
import pytest

from scaling_jax.fitting import cbs20, fit_tradeoff
from scaling_jax.fitting.linear_scaling import largest_batch_of
from tests.fitting.test_published_laws import ZHANG_STEPS, zhang_cbs20_tokens

BATCHES = 256.0 * 2.0 ** np.arange(7)


def steps(a, batch):
    return 300 * (1 + (2_000 / batch) ** a)


def test_on_a_hyperbola_it_is_a_fifth_of_b_crit_and_1_2_reference_batches():
    fit = fit_tradeoff(BATCHES, steps(1.0, BATCHES))
    assert cbs20(fit) == fit.cbs20 == pytest.approx(400)
    for reference in (1e-3, 128, 1e6):
        assert cbs20(fit, reference) == pytest.approx(fit.b_crit / 5 + 1.2 * reference, rel=1e-9)
        assert cbs20(fit, reference) == pytest.approx(fit.batch_at_overhead(0.2, reference), rel=1e-9)


@pytest.mark.parametrize("a", [0.5, 0.8, 1.4])
@pytest.mark.parametrize("reference", [128.0, 4_096.0])
def test_with_another_shape_it_is_the_largest_batch_with_a_fifth_more_tokens(a, reference):
    shape = fit_tradeoff(BATCHES, steps(a, BATCHES)).shape
    found = cbs20(shape, reference)
    batches = np.geomspace(reference, 1e7, 200_001)
    inside = batches[batches * steps(a, batches) <= 1.2 * reference * steps(a, reference)]
    assert found == pytest.approx(inside.max(), rel=1e-3)
    assert found > 1.2 * reference
    with pytest.raises(ValueError, match="no hyperbola"):
        cbs20(shape)


def test_zhangs_own_definition_gives_their_numbers_from_256_sequences():
    """Through their own steps, by an independent fit of their curve."""
    batch = 512 * 64 * 2.0 ** np.arange(9)
    for num_params, measured in ZHANG_STEPS.items():
        found = cbs20(fit_tradeoff(batch, measured).shape, 256 * 512)
        assert found == pytest.approx(float(zhang_cbs20_tokens(num_params)), rel=0.15)


@pytest.mark.parametrize("reference", [0.0, -1.0, np.nan, np.inf])
def test_a_reference_batch_that_cannot_be_is_refused(reference):
    with pytest.raises(ValueError, match=f"reference_batch_tokens is {reference}"):
        cbs20(fit_tradeoff(BATCHES, steps(1.0, BATCHES)), reference)


def test_the_largest_batch_of_a_number_of_tokens_needs_them():
    for a in (0.5, 1.0, 2.0):
        batch = largest_batch_of(lambda b, a=a: steps(a, b), 9e6, 1_000.0)
        assert batch * steps(a, batch) == pytest.approx(9e6)
        assert batch > 9e6 / 600
