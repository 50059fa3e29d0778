import json
import struct
import sys

import numpy as np
import pytest

from scaling_jax.console.dashboards import Follower, Scalars, asked_for
from scaling_jax.io import UserError
from scaling_jax.noise_scale.tracker import ema
from scaling_jax.training.metrics import MetricsLine


def line(step, count, test_loss=None):
    """Moments with |G|² = 2 and tr(Σ) = 300·step per token, at 100 and 400 tokens."""
    steps = np.arange(step - count + 1, step + 1)
    small, big = (2 + 300 * steps / tokens for tokens in (100, 400))
    written = {
        "step": step,
        "tokens": 400 * step,
        "batch_tokens": 400,
        "small_batch_tokens": 100,
        "train_loss": (5.0 - 0.1 * steps).tolist(),
        "small_sq_norm": small.tolist(),
        "big_sq_norm": big.tolist(),
    }
    return written | ({} if test_loss is None else {"test_loss": test_loss})


def write(folder, *lines, done=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if done:
        (folder / "result.json").write_text("{}")


class Recorded:
    def __init__(self):
        self.added, self.closed = [], False

    def add(self, step, values):
        assert not self.closed
        self.added.append((step, values))

    def close(self):
        self.closed = True


@pytest.fixture
def writers():
    return {}


@pytest.fixture
def follower(tmp_path, writers):
    return Follower(tmp_path, lambda folder: writers.setdefault(folder.name, Recorded()))


def test_every_step_has_its_loss_and_the_noise_scale_is_a_ratio_of_averages():
    scalars = Scalars()
    said = dict(pair for one in (line(3, 3, 4.2), line(7, 4, 3.9)) for pair in scalars.of(MetricsLine.read(one)))
    assert sorted(said) == list(range(1, 8))
    assert [said[step]["loss/train"] for step in said] == pytest.approx([4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 4.3])
    expected = ema(300.0 * np.arange(1, 8), 20) / 2
    assert [said[step]["noise_scale_tokens"] for step in said] == pytest.approx(list(expected))
    assert {step: values["loss/test"] for step, values in said.items() if "loss/test" in values} == {3: 4.2, 7: 3.9}


def test_losses_that_are_not_finite_are_left_out():
    one = line(1, 1) | {"train_loss": [None], "small_sq_norm": [None], "test_loss": None}
    assert list(Scalars().of(MetricsLine.read(one))) == [(1, {"tokens": 400})]


def test_lines_are_passed_on_once_as_they_come(tmp_path, follower, writers):
    folder = tmp_path / "runs" / "a"
    write(folder, line(2, 2))
    follower.catch_up()
    whole = (folder / "metrics.jsonl").read_text() + json.dumps(line(4, 2)) + "\n"
    (folder / "metrics.jsonl").write_text(whole[:-9])  # half of it is there
    follower.catch_up()
    assert [step for step, *_ in writers["a"].added] == [1, 2]
    (folder / "metrics.jsonl").write_text(whole)
    follower.catch_up()
    follower.catch_up()
    assert [step for step, *_ in writers["a"].added] == [1, 2, 3, 4]


def test_a_run_that_went_back_to_a_checkpoint_is_not_told_twice(tmp_path, follower, writers):
    folder = tmp_path / "runs" / "a"
    write(folder, line(2, 2), line(4, 2), line(6, 2))
    follower.catch_up()
    write(folder, line(2, 2))
    follower.catch_up()
    write(folder, line(2, 2), line(4, 2), line(6, 2), line(8, 2))
    follower.catch_up()
    assert [step for step, *_ in writers["a"].added] == list(range(1, 9))


def test_a_run_is_closed_when_it_is_done_and_all_are_at_the_end(tmp_path, follower, writers):
    with follower:
        write(tmp_path / "runs" / "a", line(2, 2), done=True)
        write(tmp_path / "runs" / "b", line(2, 2))
        follower.catch_up()
        assert (writers["a"].closed, writers["b"].closed) == (True, False)
        write(tmp_path / "runs" / "b", line(2, 2), line(3, 1))
    assert writers["b"].closed
    assert len(writers["b"].added) == 3


def test_event_files_hold_the_values_and_replace_older_ones(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    folder = tmp_path / "runs" / "a"
    write(folder, line(2, 2, 4.5), done=True)
    for _ in range(2):
        (writer,) = asked_for(tensorboard=True, wandb_project=None)
        with Follower(tmp_path, writer) as follower:
            follower.catch_up()
    (path,) = folder.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    found = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert found["loss/train", 1] == pytest.approx(4.9)
    assert found["loss/test", 2] == 4.5
    assert found["tokens", 2] == 800


@pytest.mark.parametrize(("module", "options"), [("tensorboardX", (True, None)), ("wandb", (False, "project"))])
def test_a_dashboard_that_is_not_installed_is_named_before_anything_runs(monkeypatch, module, options):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install"):
        asked_for(*options)
    assert asked_for(False, None) == []
