import dataclasses

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.config import config_hash, from_dict, size, to_dict, with_overrides
from scaling_jax.scanning.experiment import DEMO
from scaling_jax.training import LiveRamp
from tests.training.counting import RUN


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
        ("max_tokens=many", "max_tokens = many: .*such as 4096, .*2k"),
        ("max_tokens=0.5", "max_tokens = 0.5: expected int"),
        ("name.first=x", "name.first=x: .*single value"),
        ("optimizer.name=lion", "optimizer.name = 'lion': choose from adam"),
        ("max_tokens=1.2345k", "max_tokens = 1234.5: expected int"),
        ("max_tokens=0.0005k", "max_tokens = 0.5: expected int"),
        ("max_tokens=-2k", "max_tokens = -2k: .*such as 4096"),
        ("max_tokens=2kB", "max_tokens = 2kB: .*such as 4096"),
        ("max_tokens=9^99999", "max_tokens = 9\\^99999: .*too large"),
        ("max_tokens=1e400k", "max_tokens = inf: expected a finite number"),
        ("max_tokens=true", "max_tokens = True: expected int"),
        ("optimizer.name=2k", "optimizer.name = '2k': choose from adam"),
        ("seeds=[0,1.5k,x]", r"seeds\[2\] = x: .*such as 4096"),
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


SIZES = {"2k": 2_000, "64Ki": 65_536, "2^18": 262_144, "2**18": 262_144, "1.5M": 1_500_000, "1e6": 1_000_000}
SIZES |= {"4096": 4_096, "1_000": 1_000, "3G": 3_000_000_000, "0.5Ki": 512, "2^3k": 8_000, "1T": 10**12}


@pytest.mark.parametrize(("text", "value"), SIZES.items())
def test_a_size_is_a_number_of_the_fields_type(text, value):
    changed = with_overrides(RUN, [f"eval_tokens={text}", f"target_loss={text}", f"snapshot_tokens=[{text},7]"])
    assert changed == dataclasses.replace(RUN, eval_tokens=value, target_loss=float(value), snapshot_tokens=(value, 7))
    assert type(changed.eval_tokens) is type(changed.snapshot_tokens[0]) is int
    assert type(changed.target_loss) is float
    assert size(text) == value


@pytest.mark.parametrize("text", ["2k", "64Ki", "2^18", "1.5M", "many"])
def test_text_that_looks_like_a_size_stays_text_where_text_is_meant(text):
    assert with_overrides(RUN, [f"text={text}", f"tokenizer={text}"]) == dataclasses.replace(
        RUN, text=text, tokenizer=text
    )


def test_sizes_that_are_no_whole_numbers_are_taken_where_any_number_is():
    changed = with_overrides(RUN, ["target_loss=1.2345k", "learning_rate=2^2"])
    assert (changed.target_loss, changed.learning_rate) == (1234.5, 4.0)


def test_an_optional_part_that_is_not_there_is_made_from_its_overrides():
    assert RUN.live_ramp is None
    changed = with_overrides(RUN, ["live_ramp.threshold=0.5", "live_ramp.max_batch_tokens=4Ki"])
    assert changed == dataclasses.replace(RUN, live_ramp=LiveRamp(0.5, 4_096))
    assert with_overrides(changed, ["live_ramp.every_steps=50"]).live_ramp == LiveRamp(0.5, 4_096, 50)
    assert with_overrides(changed, ["live_ramp=null"]) == RUN


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["live_ramp.threshold=0.5"], "missing key 'live_ramp.max_batch_tokens'"),
        (
            ["live_ramp.threshold=0.5", "live_ramp.max_batch_token=4Ki"],
            "'live_ramp.max_batch_token' .*did you mean 'max_batch_tokens'",
        ),
        (["live_ramp.threshold.high=1", "live_ramp.max_batch_tokens=4Ki"], "live_ramp.threshold = .*expected float"),
        (["live_ramp.threshold=0.5", "live_ramp.max_batch_tokens=1.5"], "live_ramp.max_batch_tokens = 1.5: expected"),
        (["deadlines.0.loss=3"], "there is no '0'; .*empty"),
    ],
)
def test_an_optional_part_that_is_made_of_something_else_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        with_overrides(RUN, overrides)
