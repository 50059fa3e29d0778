import dataclasses
import json

import pytest

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two, relative_cost
from scaling_jax.scanning.experiment import DEMO, QUICK
from scaling_jax.scanning.records import load_experiment
from scaling_jax.tasks import model_config
from scaling_jax.training import OptimizerConfig, Run


@pytest.mark.parametrize("experiment", [DEMO, QUICK])
def test_an_experiment_survives_json(experiment):
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_token", 1, "'max_token' .*'max_tokens'"),
        ("max_tokens", "many", "max_tokens = 'many'.* int"),
        ("batch_tokens", [128, 256, 2.5], r"batch_tokens\[2\] = 2\.5.* int"),
        ("optimizer", {"name": "lion"}, r"optimizer\.name = 'lion'.* adam, adamw, sgd"),
    ],
)
def test_a_damaged_description_is_refused_by_its_key(key, value, message):
    with pytest.raises(UserError, match=message):
        from_dict(Experiment, {**to_dict(DEMO), key: value})


def test_a_missing_key_is_named():
    described = to_dict(DEMO)
    del described["subjects"]
    with pytest.raises(UserError, match=r"missing .*'subjects'"):
        from_dict(Experiment, described)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": (128, 256)}, r"batch_tokens = \(128, 256\).* 3 batch"),
        ({"batch_tokens": (128, 256, 500)}, "500 .* 448 or 512 tokens"),
        ({"subjects": DEMO.subjects[:1] * 2}, "1x32.* different"),
    ],
)
def test_an_experiment_that_cannot_work_is_refused_before_it_trains(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(DEMO, **changes)


def test_the_demo_has_two_sizes_seven_batches_and_two_seeds():
    assert len(DEMO.subjects) == 2
    assert len(DEMO.batch_tokens) == 7
    assert len(DEMO.cells) == 28


def test_learning_rates_follow_the_rule_in_steps_of_the_factor():
    rates = LearningRates(peak=1e-2, reference_batch_tokens=1_000, factor=3.0, places=1)
    assert rates.rate(1_000, 0) == pytest.approx(1e-2 / 2**0.5, rel=1e-2)
    assert rates.rate(1_000, 1) == pytest.approx(3 * rates.rate(1_000, 0), rel=1e-2)
    assert rates.rate(10, 0) == pytest.approx(rates.rate(40, 0) / 2, rel=0.02)


@pytest.mark.parametrize("rule", ["run", "sqrt", "timescale"])
def test_a_scan_has_its_weight_decay_at_the_reference_batch_and_changes_it_by_the_rule(rule):
    rates = LearningRates(peak=1e-2, reference_batch_tokens=1_024, factor=2.0, places=1)
    scan = Experiment(
        name="decay",
        subjects=(Subject(model_config("1x16"), (3.0, 2.9), rates),),
        batch_tokens=(128, 1_024, 8_192),
        max_tokens=100_000,
        optimizer=OptimizerConfig("adamw", weight_decay=0.1),
        weight_decay_rule=rule,
    )
    found = [scan.run(cell, 0) for cell in scan.cells]
    decays = [run.optimizer.weight_decay for run in found]
    assert decays[1] == pytest.approx(0.1)
    if rule == "run":
        assert {run.optimizer for run in found} == {scan.optimizer}
    elif rule == "sqrt":
        assert decays == pytest.approx([0.1 / 8**0.5, 0.1, 0.1 * 8**0.5])
    else:  # B/(ηλ) in tokens; rates have three digits
        assert decays == pytest.approx([0.1 / 8 * 4.5**0.5, 0.1, 0.1 * 8 * (9 / 16) ** 0.5])
        timescales = [run.batch_tokens / (run.learning_rate * run.optimizer.weight_decay) for run in found]
        assert timescales == pytest.approx([timescales[1]] * 3, rel=2e-3)
    assert len({scan.run(scan.cells[0], k).optimizer for k in range(-2, 3)}) == 1  # of all rates: they share a program


def test_spacings():
    assert powers_of_two(128, 1_024) == (128, 256, 512, 1024)
    assert log_spaced(4.0, 1.0, 3) == (4.0, 2.0, 1.0)


def test_larger_models_and_batches_are_expected_to_cost_more():
    costs = {(cell.model, cell.batch_tokens): relative_cost(DEMO, cell) for cell in DEMO.cells}
    assert costs["2x64", 256] > costs["1x32", 256]
    assert costs["2x64", 16_384] > 3 * costs["2x64", 256]


def test_an_experiment_file_is_loaded(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from scaling_jax.scanning.experiment import QUICK\nEXPERIMENT = QUICK\n")
    assert load_experiment(path) == QUICK
    path.write_text("EXPERIMENT = 3\n")
    with pytest.raises(UserError, match=r"mine\.py .*EXPERIMENT = Experiment"):
        load_experiment(path)
    with pytest.raises(UserError, match=r"missing\.py"):
        load_experiment(tmp_path / "missing.py")


def test_subjects_need_targets():
    with pytest.raises(UserError, match="target_losses of 1x16"):
        dataclasses.replace(DEMO, subjects=(Subject(model_config("1x16"), (), LearningRates(1e-2, 1_000)),))


def test_a_scan_has_no_warm_up_unless_it_asks_for_one_while_a_run_has_its_own():
    cell = DEMO.cells[0]
    assert DEMO.run(cell, 0).steps_of_warmup == QUICK.run(QUICK.cells[0], 0).steps_of_warmup == 0
    assert dataclasses.replace(DEMO, warmup_steps=20).run(cell, 0).steps_of_warmup == 20
    in_tokens = dataclasses.replace(DEMO, warmup_steps=None, warmup_tokens=1_000)
    assert in_tokens.run(cell, 0).steps_of_warmup == 4  # of 256 tokens
    assert Run(model=DEMO.subjects[0].model, batch_tokens=128, learning_rate=1e-3, max_steps=9).steps_of_warmup == 10
