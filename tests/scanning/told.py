"""A made-up trainer for studies: its steps to a loss are a hyperbola with B_CRIT, at the best learning rate."""

import math

from scaling_jax.scanning import Experiment, LearningRates, Setting, Study, Subject, powers_of_two
from scaling_jax.tasks import OtherModel
from scaling_jax.training import next_evaluation

B_CRIT = 64.0
SUBJECT = Subject(OtherModel("net", 1_000, "images"), (2.6, 2.3, 2.0), LearningRates(0.1, 128))
EXPERIMENT = Experiment(
    name="study", subjects=(SUBJECT,), batch_tokens=powers_of_two(8, 512), max_tokens=1_000_000, text="made up"
)


def loss_after(step: int, batch: int, learning_rate: float) -> float:
    """Steps to a loss L are 100·((3/L)^6 - 1)·(1 + B_CRIT/B), and more at rates other than the best, 0.12 of a rule."""
    best = 0.12 / math.sqrt(1 + 128 / batch)
    slower = math.exp(math.log(learning_rate / best) ** 2)
    return 3 * (1 + step / (100 * (1 + B_CRIT / batch) * slower)) ** (-1 / 6)


def least_steps(loss: float) -> float:
    """S_min at the rate of the grid that is nearest to the best."""
    return 100 * ((3 / loss) ** 6 - 1) * math.exp(math.log(1.2) ** 2)


def train(setting: Setting, study: Study) -> tuple[list[int], list[float]]:
    """The curve of a run up to where the study stops it."""
    steps: list[int] = []
    losses: list[float] = []
    while not steps or not study.should_stop(setting, steps[-1], losses[-1]):
        steps.append(min(next_evaluation(steps[-1] if steps else 0, 1.07), setting.max_steps))
        losses.append(loss_after(steps[-1], setting.batch, setting.learning_rate))
    return steps, losses


def work(folder, experiment=EXPERIMENT) -> int:
    """Trains what a study asks for, to its end; returns the number of runs."""
    study, count = Study(experiment, folder), 0
    while (setting := study.ask()) is not None:
        study.tell(setting, *train(setting, study))
        count += 1
    return count
