"""Numbers that the papers print, and the batch sizes that their authors used by their own laws."""

import re
import warnings

import numpy as np
import pytest
from scipy import optimize

from scaling_jax.fitting import published
from scaling_jax.fitting.published_laws import of_kind


def quiet(key, variable):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return published[key](variable)


def test_kaplan_doubles_for_every_13_percent_of_loss():
    """The caption of the paper's figure 10; and its two printings of the law agree within their rounding."""
    law, rounded = published["kaplan2020"], published["kaplan2020-rounded"]
    np.testing.assert_allclose(law(4.0 * 0.87) / law(4.0), 2.0, rtol=0.03)
    np.testing.assert_allclose(rounded(4.0), law(4.0), rtol=0.02)
    np.testing.assert_allclose(law(4.0), 2.1e8 / 4.0**4.8)


def test_kaplans_exponent_gives_the_exponents_of_compute_that_the_paper_prints():
    """Section 6.1: L ∝ C^-0.05 makes B ∝ C^0.24; eq. 6.4: 1/(1/0.76 + 1/alpha_B + 1/0.077) is about 0.054."""
    np.testing.assert_allclose(-0.05 * published["kaplan2020"].exponent, 0.24, atol=0.005)
    inverse_alpha_b = -published["kaplan2020-rounded"].exponent
    np.testing.assert_allclose(1 / (1 / 0.76 + inverse_alpha_b + 1 / 0.077), 0.054, atol=0.002)


@pytest.mark.parametrize(("layers", "width", "sequences"), [(30, 4_096, 2_304), (95, 8_192, 4_608)])
def test_deepseek_took_the_batches_of_its_law(layers, width, sequences):
    """Table 2: sequences of 4,096 tokens, 2e12 tokens; C = M·D with M = 72·layers·width² + 12·layers·width·context."""
    compute = (72 * layers * width**2 + 12 * layers * width * 4_096) * 2e12
    np.testing.assert_allclose(quiet("deepseek2024", compute), sequences * 4_096, rtol=0.1)


def test_minicpm_took_the_batch_of_its_law():
    """3.93e6 tokens (section 6.2), for a loss of 2.5 on C4."""
    np.testing.assert_allclose(quiet("minicpm2024", 2.5), 3.93e6, rtol=0.02)


def test_porians_law_in_tokens_is_that_in_sequences():
    """Quoted as 0.00037·N^0.703 sequences of 2048, too."""
    np.testing.assert_allclose(quiet("porian2024", 1e8), 0.00037 * 1e8**0.703 * 2048, rtol=0.01)


def test_step_law_is_the_mean_of_its_bootstrap_fits_and_finds_the_best_batch_of_its_runs():
    """exp(bs_intercept) 0.5807 and bs_coefD 0.5709 of the released fits; 2^19 tokens were best at D = 2e10 for models
    of 2.15e8 and of 1.07e9 parameters alike, on a grid of batches about 1.5 apart."""
    np.testing.assert_allclose(published["steplaw2025"](1e11), 0.5807 * 1e11**0.5709, rtol=0.005)
    np.testing.assert_allclose(published["steplaw2025"](2e10), 2**19, rtol=0.25)


# Steps to one validation loss a model at 64, 128, …, 16,384 sequences: the output that the authors' notebook
# plots/chinchilla.ipynb keeps (github.com/hlzhang109/critical-batch-size).
ZHANG_STEPS = {
    8.5e7: [46_000, 23_000, 13_282, 7_000, 3_840, 2_500, 1_800, 1_600, 1_600],
    1.51e8: [96_000, 49_000, 24_000, 11_951, 7_128, 4_200, 2_760, 2_400, 2_300],
    3.02e8: [196_000, 90_000, 46_000, 23_400, 13_300, 7_224, 4_980, 3_400, 2_879],
    6.04e8: [311_000, 166_000, 81_000, 37_440, 21_320, 11_400, 7_199, 4_700, 3_800],
    1.2e9: [643_000, 331_000, 176_000, 94_000, 46_500, 25_000, 15_360, 8_900, 6_500],
}


@pytest.mark.parametrize("num_params", ZHANG_STEPS)
def test_zhangs_law_is_near_what_the_authors_own_runs_show(num_params):
    """20 % more tokens than at 256 sequences, their reference, on their curve S = a + b/B^alpha through the steps."""
    batch, steps = 64 * 2.0 ** np.arange(9), np.array(ZHANG_STEPS[num_params])

    def curve(p, batch):
        return np.logaddexp(p[0], p[1] - p[2] * np.log(batch))

    fitted = optimize.least_squares(lambda p: curve(p, batch) - np.log(steps), [7.0, 15.0, 1.0]).x

    def excess(log_batch):
        tokens, reference = (curve(fitted, np.exp(x)) + x for x in (log_batch, np.log(256)))
        return tokens - reference - np.log(1.2)

    cbs20 = np.exp(optimize.brentq(excess, np.log(300), np.log(30_000)))
    np.testing.assert_allclose(published["zhang2024"](num_params), 512 * cbs20, rtol=0.26)


@pytest.mark.parametrize(
    ("key", "variable", "tokens"),
    [
        ("kaplan2020", 3.0, 2.1e8 / 3.0**4.8),
        ("minicpm2024", 3.0, 1.21e9 / 3.0**6.24),
        ("deepseek2024", 1e18, 0.2920 * 1e18**0.3271),
        ("porian2024", 1e8, 0.7576 * 1e8**0.703),
        ("steplaw2025", 1e10, 0.58 * 1e10**0.571),
        ("zhang2024", 3.02e8, 512 * 93.2 * 302**0.468),
    ],
)
def test_every_law_is_its_printed_formula_in_tokens(key, variable, tokens):
    np.testing.assert_allclose(quiet(key, variable), tokens)


def test_a_law_without_a_constant_gives_ratios_only():
    """Ten times the data, 2.4 times the best batch and 2.9 times the critical one (Bergsma et al. 2025)."""
    with pytest.raises(ValueError, match=r"bergsma2025-opt .*0\.383.*\.ratio"):
        published["bergsma2025-opt"](1e10)
    with pytest.warns(UserWarning, match="bergsma2025-opt"):
        assert published["bergsma2025-opt"].ratio(1e11, 1e10) == pytest.approx(10**0.383)
    with pytest.warns(UserWarning, match="D_min"):
        assert published["bergsma2025-crit"].ratio(1e11, 1e10) == pytest.approx(10**0.462)


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("kaplan2020", 3.0, 1.5),
        ("deepseek2024", 1e18, 1e22),
        ("porian2024", 1e8, 7e9),
        ("steplaw2025", 1e10, 1.4e12),
        ("zhang2024", 1e9, 1e10),
    ],
)
def test_a_law_warns_outside_the_range_that_it_was_measured_in(key, inside, outside):
    with pytest.warns(UserWarning, match=re.escape(f"{outside:g} ") + f".* {key} .* to "):
        published[key](np.array([inside, outside]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(published[key](inside), float)


def test_a_law_of_unknown_range_says_so_whenever_it_is_used():
    with pytest.warns(UserWarning, match="loss on C4 .* minicpm2024"):
        published["minicpm2024"](2.5)


def test_every_law_says_what_it_predicts_and_where_it_comes_from():
    for key, law in published.items():
        assert law.key == key
        assert law.predicts in {"B_crit", "B_opt", "CBS20"}
        assert "arXiv" in law.source
        assert all((law.formula, law.variable, law.corpus, law.tokenizer, law.checked))


def test_kinds_are_never_mixed():
    kinds = {kind: {law.key for law in of_kind(kind)} for kind in ("B_crit", "B_opt", "CBS20")}
    assert kinds["B_crit"] == {"kaplan2020", "kaplan2020-rounded", "bergsma2025-crit"}
    assert kinds["CBS20"] == {"zhang2024"}
    assert sum(map(len, kinds.values())) == len(published)
    with pytest.raises(ValueError, match=r"'CBS'.* B_crit, B_opt, CBS20"):
        of_kind("CBS")
