import warnings

import numpy as np
import pytest

from scaling_jax.fitting import published


def test_kaplan_doubles_for_every_13_percent_of_loss():
    """The caption of the paper's figure 10; and its two printings of the law agree within their rounding."""
    law, rounded = published["kaplan2020"], published["kaplan2020-rounded"]
    np.testing.assert_allclose(law(4.0 * 0.87) / law(4.0), 2.0, rtol=0.03)
    np.testing.assert_allclose(rounded(4.0), law(4.0), rtol=0.02)
    np.testing.assert_allclose(law(4.0), 2.1e8 / 4.0**4.8)


def test_a_law_warns_outside_the_range_that_it_was_measured_in():
    with pytest.warns(UserWarning, match="kaplan2020 was measured for loss in nats per token between 3 and 10; 1.5"):
        published["kaplan2020"](np.array([4.0, 1.5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(published["kaplan2020"](3.0), float)


def test_every_law_says_what_it_predicts_and_where_it_comes_from():
    for key, law in published.items():
        assert law.key == key
        assert law.predicts in {"B_crit", "B_opt", "CBS20"}
        assert all((law.formula, law.variable, law.corpus, law.tokenizer, law.source))
