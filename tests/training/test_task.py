"""Tasks of users through the training program: the built-in numbers, and what losses may take and return."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scaling_jax as sj
from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.parallel import data_mesh, replicate
from scaling_jax.tasks import Transformer, evaluator, part_of, shared_evaluator, trainable
from scaling_jax.training import Interrupted, LiveRamp, OptimizerConfig, Run, Stage, read_metrics, run_folder, train
from scaling_jax.training.program import Program, program_for
from tests.training.counting import CORPUS
from tests.training.counting import RUN as BUILT_IN

SGD = OptimizerConfig("sgd")
DRAWS = np.random.default_rng(0)
X = DRAWS.normal(size=(64, 3)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0, 0.5], np.float32) + 0.1 * DRAWS.normal(size=64)).astype(np.float32)
WEIGHTS = DRAWS.integers(0, 4, 64).astype(np.float32)
ORDER = np.arange(8).reshape(1, 8)


class Line(sj.Task):
    """Linear regression in plain functions."""

    unit = "points"
    train = (X, Y, WEIGHTS)
    held_out = (X[:37], Y[:37], WEIGHTS[:37])
    evaluation_batch = 16

    def init(self, key):
        return {"w": 0.1 * jax.random.normal(key, (3,)), "b": jnp.zeros(())}

    def loss(self, params, batch):
        return jnp.mean(errors(params, batch))


class Weighted(Line):
    def loss(self, params, batch):
        return jnp.sum(batch[2] * errors(params, batch)), jnp.sum(batch[2])


class Normalised(Line):
    """Examples share a statistic, whose running mean is the state; a counter is an integer, a flag a bool."""

    def init(self, key):
        return super().init(key), {"mean": jnp.ones(3), "steps": jnp.int32(0), "begun": jnp.bool(False)}

    def loss(self, params, state, batch):
        mean = batch[0].mean(0)
        new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "steps": state["steps"] + 1, "begun": jnp.bool(True)}
        return jnp.mean(errors(params, (batch[0] - mean[None], *batch[1:]))), new

    def metric(self, params, state, batch):
        return jnp.mean(errors(params, (batch[0] - state["mean"][None], *batch[1:])))


class Dropped(Line):
    def loss(self, params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, batch[0].shape).astype(jnp.float32)
        return jnp.mean(errors(params, (batch[0] * keep, *batch[1:])))

    def metric(self, params, batch):
        return jnp.mean(errors(params, batch))


class Source:
    """Random access to examples, one at a time."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        return tuple(x[index] for x in self.arrays)


def errors(params, batch):
    return jnp.square(batch[0] @ params["w"] + params["b"] - batch[1])


def run_of(task, **changes):
    settings = {"batch_tokens": 8, "learning_rate": 0.05, "max_steps": 25, "optimizer": SGD, "steps_per_call": 8}
    return Run(model=task, **(settings | changes))


def step(task, num_devices=1, num_microbatches=2, backend="pmap"):
    """The state before and after one step of SGD with a rate of 1 on the first eight examples."""
    program = Program(trainable(task), SGD, 8, num_microbatches, 1, num_devices, backend)
    before = jax.tree.map(np.array, program.init(0))
    rows = replicate(trainable(task).task.train, num_devices)
    return before, *program.steps(program.first_state(0), rows, ORDER, 1.0, 0)


def first_eight(task):
    return jax.tree.map(lambda x: jnp.asarray(x[:8]), task.train)


def lines_of(workdir, run):
    return [line.json() for line in read_metrics(run_folder(workdir, run))]


class OwnTransformer(sj.Task):
    """The built-in model, written as a user would write it."""

    unit, units_per_example, evaluation_batch = "tokens", 16, 16
    train, held_out = CORPUS.train_RxT1, CORPUS.test_RxT1
    model = Transformer(BUILT_IN.model)

    def init(self, key):
        return self.model.init(key, jnp.zeros((1, 16), jnp.int32))["params"]

    def loss(self, params, batch):
        tokens = batch.astype(jnp.int32)
        return self.model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:])


class WithItsParts(OwnTransformer):
    part_of = staticmethod(part_of)

    @staticmethod
    def is_stacked(path):
        return path.startswith("layers/")


def test_the_transformer_as_a_task_of_yours_gives_the_same_numbers_bit_for_bit(tmp_path):
    train(BUILT_IN, tmp_path, corpus=CORPUS, num_devices=1)
    built_in = lines_of(tmp_path, BUILT_IN)
    for task in (WithItsParts(), OwnTransformer()):
        run = dataclasses.replace(BUILT_IN, model=task)
        train(run, tmp_path, num_devices=1)
        lines = lines_of(tmp_path, run)
        if isinstance(task, WithItsParts):
            assert lines == built_in
        for key in ("train_loss", "test_loss", "tokens", "epoch"):
            assert [line.get(key) for line in lines] == [line.get(key) for line in built_in], key
        config = json.loads((run_folder(tmp_path, run) / "config.json").read_text())
        assert config["corpus"]["parts"] == list(trainable(task).parts)
    assert trainable(OwnTransformer()).parts == ("embedding", "layers", "norm", "position", "unembedding")


@pytest.mark.parametrize(
    ("num_devices", "num_microbatches", "backend"), [(1, 4, "pmap"), (4, 1, "pmap"), (2, 2, "vmap")]
)
def test_a_weighted_loss_trains_on_the_weighted_mean_of_the_batch(num_devices, num_microbatches, backend):
    def mean(params):
        total, weight = Weighted().loss(params, first_eight(Line))
        return total / weight

    before, after, metrics = step(Weighted(), num_devices, num_microbatches, backend)
    loss, grads = jax.value_and_grad(mean)(before.params)
    np.testing.assert_allclose(metrics.loss, [loss], rtol=1e-6)
    jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a, b - g, rtol=1e-5), after.params, before.params, grads)
    assert metrics.small_sq_norm > metrics.big_sq_norm > 0


@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(1, 2), (1, 4), (4, 1)])
def test_states_are_averaged_over_microbatches_and_devices(num_devices, num_microbatches):
    """A running mean is linear, so it doesn't depend on the split; counts and flags are those of one step."""
    _, after, _ = step(Normalised(), num_devices, num_microbatches)
    np.testing.assert_allclose(after.model_state["mean"], 0.9 + 0.1 * X[:8].mean(0), rtol=1e-6)
    assert (int(after.model_state["steps"]), bool(after.model_state["begun"])) == (1, True)
    assert after.model_state["steps"].dtype == jnp.int32


@pytest.mark.parametrize("whole", [False, True])
def test_whole_batches_share_their_statistics_and_microbatches_have_their_own(whole):
    class Task(Normalised):
        whole_batch = whole

    before, after, metrics = step(Task())
    parts = [slice(8)] if whole else [slice(4), slice(4, 8)]

    def mean(params):
        batch = first_eight(Line)
        found = [Task().loss(params, before.model_state, tuple(x[part] for x in batch))[0] for part in parts]
        return sum(found) / len(found)

    loss, grads = jax.value_and_grad(mean)(before.params)
    np.testing.assert_allclose(metrics.loss, [loss], rtol=1e-6)
    jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a, b - g, rtol=1e-5), after.params, before.params, grads)


def test_each_step_and_each_microbatch_gets_its_own_key():
    """A loss that is linear in a random number: gradients are the draws, and the moments show two of them."""

    class Random(sj.Task):
        train = held_out = np.zeros((16, 1), np.float32)

        def init(self, key):
            return {"w": jnp.zeros(())}

        def loss(self, params, batch, key):
            return params["w"] * jax.random.normal(key)

        def metric(self, params, batch):
            return 1.0 + 0 * params["w"]

    program = Program(trainable(Random()), SGD, 8, 2, 4, 1)
    _, metrics = program.steps(program.init(0), np.zeros((16, 1), np.float32), np.zeros((4, 8), int), 1.0, 0)
    a_plus_b, a2_plus_b2 = 2 * np.sqrt(metrics.big_sq_norm), 2 * metrics.small_sq_norm
    assert (a2_plus_b2 > 1.001 * a_plus_b**2 / 2).all()  # equal only if both draws are
    assert len(set(np.round(a2_plus_b2, 5))) == 4


@pytest.mark.parametrize("task", [Normalised(), pytest.param(Dropped(), marks=pytest.mark.slow)], ids=["state", "key"])
def test_an_interrupted_task_ends_as_an_undisturbed_one(task, tmp_path):
    run = run_of(task)
    train(run, tmp_path / "whole", num_devices=1)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "cut", num_devices=1, should_stop=lambda: True)
    train(run, tmp_path / "cut", num_devices=1)
    assert lines_of(tmp_path / "whole", run) == lines_of(tmp_path / "cut", run)


def test_sources_of_examples_train_as_their_arrays_do(tmp_path):
    class FromSource(Line):
        name = "Line"
        train, held_out = Source(Line.train), Source(Line.held_out)

    for name, task in (("arrays", Line()), ("source", FromSource())):
        train(run_of(task), tmp_path / name, num_devices=1)
    assert lines_of(tmp_path / "arrays", run_of(Line())) == lines_of(tmp_path / "source", run_of(FromSource()))


def test_batches_of_a_task_grow_by_a_ramp_and_by_its_live_noise_scale(tmp_path):
    ramped = run_of(Line(), ramp=(Stage(80, 16, 1.4),))
    live = run_of(Line(), learning_rate=0.01, max_steps=60, live_ramp=LiveRamp(0.1, 32, every_steps=10))
    for run in (ramped, live):
        train(run, tmp_path, num_devices=1)
        assert lines_of(tmp_path, run)[-1]["batch_tokens"] > 8
    curved = dataclasses.replace(live, live_ramp=LiveRamp(0.1, 32, every_steps=10, metric="curvature", sequences=16))
    train(curved, tmp_path, num_devices=1)
    assert any("live" in line for line in lines_of(tmp_path, curved))
    refused = dataclasses.replace(curved, model=Dropped())
    with pytest.raises(UserError, match=r"metric = 'curvature' can't be measured for task Dropped"):
        train(refused, tmp_path, num_devices=1)


def test_other_data_are_refused_in_the_same_folder(tmp_path):
    class Changed(Line):
        name = "Line"
        train = (X, Y + 1e-6, WEIGHTS)

    train(run_of(Line(), max_steps=2), tmp_path)
    with pytest.raises(UserError, match="the data of Line has changed"):
        train(run_of(Changed(), max_steps=2), tmp_path)


def test_all_held_out_examples_count_equally_however_they_are_chunked():
    for task in (Line(), Weighted()):
        params, batch = task.init(jax.random.key(1)), task.held_out
        weights = batch[2] if isinstance(task, Weighted) else np.ones(37)
        expected = np.average(errors(params, batch), weights=weights)
        assert float(evaluator(trainable(task))(params, batch)) == pytest.approx(expected, rel=1e-6)
        everywhere = replicate((params, batch), 8)
        found = shared_evaluator(trainable(task), data_mesh(jax.devices()))(*everywhere)
        assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_task_divided_over_devices_trains_like_one_on_one_device(tmp_path):
    class Square(Line):
        def init(self, key):
            return {"w": 0.1 * jax.random.normal(key, (3, 8)), "v": jnp.ones((8, 2))}

        def loss(self, params, batch):
            return jnp.mean(jnp.square((batch[0] @ params["w"] @ params["v"]).sum(1) - batch[1]))

    run = run_of(Square(), batch_tokens=16, max_steps=10)
    train(run, tmp_path / "one", num_devices=1)
    train(run, tmp_path / "fsdp", num_devices=4, sharding="fsdp")
    for one, other in zip(lines_of(tmp_path / "one", run), lines_of(tmp_path / "fsdp", run), strict=True):
        np.testing.assert_allclose(one["train_loss"], other["train_loss"], rtol=1e-5)
    with pytest.raises(UserError, match="Normalised can't be trained with sharding fsdp"):
        program_for(run_of(Normalised()), 1, sharding="fsdp")


def test_optimizers_see_which_parameters_are_matrices_and_which_count_layers(tmp_path):
    """A list called layers holds whole matrices: weight decay is for these, and for stacked ones, not for vectors."""

    class Deep(Line):
        def init(self, key):
            return {"layers": [jnp.ones((3, 3)), jnp.ones(3)], "stacked": jnp.ones((2, 3))}

        def loss(self, params, batch):
            return 0.0 * (params["layers"][0].sum() + params["layers"][1].sum() + params["stacked"].sum())

        def metric(self, params, batch):
            return jnp.ones(())

        @staticmethod
        def is_stacked(path):
            return path == "stacked"

    decayed = OptimizerConfig("adamw", weight_decay=0.5)
    program = program_for(run_of(Deep(), optimizer=decayed))
    state, _ = program.steps(program.init(0), Line.train, ORDER, 0.1, 0)
    assert [float(x.ravel()[0]) for x in jax.tree.leaves(state.params)] == pytest.approx([0.95, 1.0, 1.0])
    with pytest.raises(UserError, match="muon is for matrices of stacked layers, and Line has none"):
        program_for(run_of(Line(), optimizer=OptimizerConfig("muon")))


@pytest.mark.parametrize("as_folder", [False, True])
def test_training_starts_from_the_given_parameters(as_folder, tmp_path):
    import orbax.checkpoint as ocp

    given = {"w": jnp.arange(3.0), "b": jnp.float32(7)}
    if as_folder:
        with ocp.StandardCheckpointer() as writer:
            writer.save(tmp_path / "pretrained", given)

    class Tuned(Line):
        start = tmp_path / "pretrained" if as_folder else given

    started = program_for(run_of(Tuned())).init(0).params
    jax.tree.map(np.testing.assert_array_equal, started, given)


def test_a_record_of_a_task_holds_values_and_asks_for_its_code(tmp_path):
    run = run_of(Line(), max_steps=2)
    read = from_dict(Run, to_dict(run))
    assert read == run
    assert read.run_id == run.run_id
    assert (read.text, read.model.unit, read.model.num_params) == ("the data of Line", "points", 4)
    with pytest.raises(UserError, match="Line is a task of your own, and its code isn't here"):
        train(read, tmp_path)


class NoMetric(Line):
    def loss(self, params, batch, key):
        return 0.0


class OtherNames(Line):
    def loss(self, model, x):
        return 0.0


class NoPair(Normalised):
    def init(self, key):
        return {"w": jnp.zeros(3)}


class Counted(Line):
    def init(self, key):
        return {"w": jnp.zeros(3, jnp.int32)}


class ByExample(Line):
    def loss(self, params, batch):
        return errors(params, batch)


class Divided(Line):
    def loss(self, params, batch):
        return jnp.sum(batch[2] * errors(params, batch)) / jnp.sum(batch[2])


class Uneven(Line):
    train = (X, Y[:5])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (NoMetric, r"loss of task NoMetric takes key: define metric\(self, params, batch\)"),
        (OtherNames, r"loss of task OtherNames takes \(model, x\): name its arguments params and batch"),
        (NoPair, r"its init must return \(params, state\)"),
        (Counted, "parameter 'w' of task Counted is int32"),
        (ByExample, r"loss of task ByExample returns \(\d,\): it must return a number"),
        (Divided, r"loss of task Divided divides by .*: return \(sum, weight\)"),
        (Uneven, r"train of the data of Uneven has arrays of \[5, 64\] examples"),
    ],
)
def test_impossible_tasks_are_refused_with_what_to_change(task, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(run_of(task(), max_steps=2), tmp_path)


def test_batches_are_whole_examples_in_the_tasks_unit():
    class Boards(Line):
        unit, units_per_example = "moves", 5

    with pytest.raises(UserError, match=r"batch_tokens = 12 .*whole examples of 5 moves: use 10 or 15 moves"):
        run_of(Boards(), batch_tokens=12)
