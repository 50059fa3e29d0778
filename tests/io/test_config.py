import dataclasses

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.config import config_hash, from_dict, to_dict, with_overrides
from scaling_jax.scanning.experiment import DEMO


def test_overrides_replace_what_they_name_and_nothing_else():
    changed = with_overrides(
        DEMO, ["max_tokens=2e6", "seeds=[0,1]", "optimizer.beta2=0.95", "subjects.1.learning_rates.peak=1", "name=mine"]
    )
    rates = dataclasses.replace(DEMO.subjects[1].learning_rates, peak=1.0)
    assert changed == dataclasses.replace(
        DEMO,
        name="mine",
        max_tokens=2_000_000,
        seeds=(0, 1),
        optimizer=dataclasses.replace(DEMO.optimizer, beta2=0.95),
        subjects=(DEMO.subjects[0], dataclasses.replace(DEMO.subjects[1], learning_rates=rates)),
    )
    assert with_overrides(DEMO, []) == DEMO


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_token=1", "there is no 'max_token'; did you mean 'max_tokens'"),
        ("optimizer.beta3=1", "there is no 'beta3'; did you mean 'beta1'|'beta2'"),
        ("subjects.2.model=1", "there is no '2'; choose from 0, 1"),
        ("max_tokens", "write it as key=value"),
        ("max_tokens=many", "max_tokens = 'many': expected int"),
        ("max_tokens=0.5", "max_tokens = 0.5: expected int"),
        ("name.first=x", "what comes before 'first' is a value"),
        ("optimizer.name=lion", "choose from adam"),
    ],
)
def test_an_impossible_override_is_refused_by_its_key(override, message):
    with pytest.raises(UserError, match=message):
        with_overrides(DEMO, [override])


def test_a_config_comes_back_from_its_values_and_has_their_hash():
    again = from_dict(type(DEMO), to_dict(DEMO))
    assert again == DEMO
    assert config_hash(again) == config_hash(DEMO)
    assert config_hash(dataclasses.replace(DEMO, max_tokens=1)) != config_hash(DEMO)
