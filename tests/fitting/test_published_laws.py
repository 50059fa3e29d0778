"""Numbers that the papers print, and the batch sizes that their authors used by their own laws."""

import warnings

import numpy as np
import pytest

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


def test_deepseek_took_the_batches_of_its_law():
    """7B and 67B models on 2e12 tokens: 2304 and 4608 sequences of 4096 tokens (table 2), C of 6·N·D here."""
    np.testing.assert_allclose(quiet("deepseek2024", 6 * 6.9e9 * 2e12), 2304 * 4096, rtol=0.05)
    np.testing.assert_allclose(quiet("deepseek2024", 6 * 67e9 * 2e12), 4608 * 4096, rtol=0.05)


def test_minicpm_took_the_batch_of_its_law():
    """3.93e6 tokens, for the loss of 2.5 that it expected on C4."""
    np.testing.assert_allclose(quiet("minicpm2024", 2.5), 3.93e6, rtol=0.02)


def test_porians_law_in_tokens_is_that_in_sequences():
    """Quoted as 0.00037·N^0.703 sequences of 2048, too."""
    np.testing.assert_allclose(quiet("porian2024", 1e8), 0.00037 * 1e8**0.703 * 2048, rtol=0.01)


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
    with pytest.raises(ValueError, match=r"exponent only, 0\.383: use \.ratio"):
        published["bergsma2025-opt"](1e10)
    with pytest.warns(UserWarning, match="isn't known here"):
        assert published["bergsma2025-opt"].ratio(1e11, 1e10) == pytest.approx(10**0.383)
    with pytest.warns(UserWarning, match="D_min"):
        assert published["bergsma2025-crit"].ratio(1e11, 1e10) == pytest.approx(10**0.462)


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("kaplan2020", 3.0, 1.5),
        ("deepseek2024", 1e18, 1e22),
        ("porian2024", 1e8, 7e9),
        ("zhang2024", 1e9, 1e10),
    ],
)
def test_a_law_warns_outside_the_range_that_it_was_measured_in(key, inside, outside):
    with pytest.warns(UserWarning, match=rf"{key} was measured for .* between .* and .*; .* is outside"):
        published[key](np.array([inside, outside]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(published[key](inside), float)


@pytest.mark.parametrize("key", ["minicpm2024", "steplaw2025"])
def test_a_law_of_unknown_range_says_so_whenever_it_is_used(key):
    with pytest.warns(UserWarning, match=f"{key} was measured in isn't known here"):
        published[key](2.5)


def test_every_law_says_what_it_predicts_and_where_it_comes_from():
    for key, law in published.items():
        assert law.key == key
        assert law.predicts in {"B_crit", "B_opt", "CBS20"}
        assert "arXiv" in law.source
        assert all((law.formula, law.variable, law.corpus, law.tokenizer))


def test_kinds_are_never_mixed():
    kinds = {kind: {law.key for law in of_kind(kind)} for kind in ("B_crit", "B_opt", "CBS20")}
    assert kinds["B_crit"] == {"kaplan2020", "kaplan2020-rounded", "bergsma2025-crit"}
    assert kinds["CBS20"] == {"zhang2024"}
    assert sum(map(len, kinds.values())) == len(published)
    with pytest.raises(ValueError, match="'CBS' is none of B_crit, B_opt, CBS20"):
        of_kind("CBS")
