"""Many runs at once find what one after the other find."""

import dataclasses

import jax
import numpy as np
import pytest

from scaling_jax.scanning import Experiment, LearningRates, Subject, groups, schedule
from scaling_jax.scanning.search import finished
from tests.training.counting import CORPUS, RUN

EXPERIMENT = Experiment(
    name="tiny",
    subjects=(Subject(RUN.model, (5.45, 5.3), LearningRates(1e-2, 256, factor=3.0, most=3, together=2)),),
    batch_tokens=(64, 128, 256),
    max_tokens=2_000,
    seeds=(0, 1),
    eval_tokens=512,
)


@pytest.mark.long
def test_a_scan_on_accelerators_trains_groups_that_differ_in_seed_together_as_each_alone(tmp_path, monkeypatch):
    for module in (groups, schedule):
        monkeypatch.setattr(module, "prepare", lambda *_: CORPUS)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    events = []
    schedule.scan(EXPERIMENT, tmp_path / "together", on_event=events.append)
    for event in ("done", "progress"):
        assert {e["group"] for e in events if e["event"] == event} == set(range(len(EXPERIMENT.groups)))
    for group in EXPERIMENT.groups[:2]:
        groups.run_group(EXPERIMENT, group, tmp_path / "alone", lambda: False, lambda _: None)
        together, alone = (finished(EXPERIMENT, group, tmp_path / where) for where in ("together", "alone"))
        assert {t.run for t in together} == {t.run for t in alone}
        for t in together:
            other = next(a for a in alone if a.run == t.run)
            np.testing.assert_allclose(t.steps_to_target, other.steps_to_target, rtol=1e-4)


@pytest.mark.parametrize(("batch_tokens", "devices"), [(128, 8), (64, 4), (192, 4), (48, 1)])
def test_as_many_devices_as_share_a_batch_evenly_take_it(monkeypatch, batch_tokens, devices):
    """Sequences of 16: 8, 4, 12 and 3 of them."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert schedule._devices_for(dataclasses.replace(RUN, batch_tokens=batch_tokens)) == devices
