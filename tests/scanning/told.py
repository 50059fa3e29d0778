"""A made-up trainer for studies: its steps to a loss are a hyperbola with B_CRIT, at the best learning rate."""

import math

from scaling_jax.scanning import Experiment, LearningRates, Setting, Study, Subject, powers_of_two
from scaling_jax.tasks import OtherModel
from scaling_jax.training import next_evaluation
from tests.scanning.made_up_loss import B_CRIT, loss_after

__all__ = ["B_CRIT", "EXPERIMENT", "SUBJECT", "Study", "least_steps", "loss_after", "train", "work"]

SUBJECT = Subject(OtherModel("net", 1_000, "images"), (2.6, 2.3, 2.0), LearningRates(0.1, 128, places=1, search="grid"))
EXPERIMENT = Experiment(
    name="study", subjects=(SUBJECT,), batch_tokens=powers_of_two(8, 512), max_tokens=1_000_000, text="made up"
)


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
