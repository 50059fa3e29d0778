"""Learning-rate schedules over a horizon of tokens: factors of a run's learning rate, computed on the host.

The forms are those of Optax (`cosine_decay_schedule`, `linear_schedule`), in tokens instead of steps. So they compose
with batch ramps: a step's factor depends on the tokens before it, not on the steps.
"""

import dataclasses
from typing import Literal, get_args

import numpy as np

from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive

Form = Literal["cosine", "linear", "wsd"]
FORMS: tuple[Form, ...] = get_args(Form)
DecayForm = Literal["linear", "sqrt", "cosine"]
DECAY_FORMS: tuple[DecayForm, ...] = get_args(DecayForm)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate that has fallen to `final_factor` at its horizon; warm-up is a setting of the run.

    "cosine" and "linear" fall from the first step on. "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395)
    is constant up to the last `decay_share` of the horizon. There it falls linearly, along a cosine, or as 1 − √x
    ("sqrt"; Hägele et al. 2024, arXiv 2405.18392).
    """

    form: Form
    horizon_tokens: int
    decay_share: float = 0.2  # of the horizon; of "wsd"
    decay_form: DecayForm = "linear"  # of "wsd"
    final_factor: float = 0.0  # times the run's learning rate

    def __post_init__(self):
        if self.form not in FORMS:
            raise UserError(f"schedule.form = {self.form!r}: choose from {', '.join(FORMS)}")
        if self.decay_form not in DECAY_FORMS:
            raise UserError(f"schedule.decay_form = {self.decay_form!r}: choose from {', '.join(DECAY_FORMS)}")
        check_positive("schedule.horizon_tokens", self.horizon_tokens)
        if not 0 < self.decay_share <= 1:
            raise UserError(f"schedule.decay_share = {self.decay_share} must be above 0, at most 1")
        if not 0 <= self.final_factor < 1:
            raise UserError(f"schedule.final_factor = {self.final_factor} must be at least 0 and below 1")

    @property
    def decay_from(self) -> int:
        """Tokens up to which the learning rate is constant."""
        return 0 if self.form != "wsd" else int(self.horizon_tokens * (1 - self.decay_share))

    def factor(self, tokens) -> np.ndarray:
        """Factor of the learning rate of steps that start after so many `tokens`, of any shape."""
        done = (np.asarray(tokens, float) - self.decay_from) / (self.horizon_tokens - self.decay_from)
        done = np.clip(done, 0.0, 1.0)
        form = self.decay_form if self.form == "wsd" else self.form
        falls = {"linear": 1 - done, "sqrt": 1 - np.sqrt(done), "cosine": 0.5 * (1 + np.cos(np.pi * done))}[form]
        return self.final_factor + (1 - self.final_factor) * falls
