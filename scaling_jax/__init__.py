"""Measure, fit and plan the critical batch size of language-model training.

Names are imported when they are first used, so that `import scaling_jax` costs little more than Python itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_jax import advice, data, fitting, noise_scale, tasks
    from scaling_jax.io import UserError
    from scaling_jax.report import draw_figure, write_figures, write_report
    from scaling_jax.results import analyse, read_results
    from scaling_jax.scanning import (
        BudgetScan,
        BudgetSubject,
        Experiment,
        LearningRates,
        Study,
        Subject,
        log_horizons,
        log_spaced,
        powers_of_two,
        scan,
        scan_budgets,
    )
    from scaling_jax.tasks import MODELS, LanguageModel, LlamaConfig, ModelConfig, OtherModel, Task, model_config
    from scaling_jax.training import LiveRamp, OptimizerConfig, Run, Schedule, SquaredNorms, Stage, train

_SUBPACKAGES = {"advice", "data", "fitting", "noise_scale", "tasks"}
_HOMES = {
    "MODELS": "tasks",
    "LanguageModel": "tasks",
    "LlamaConfig": "tasks",
    "ModelConfig": "tasks",
    "OtherModel": "tasks",
    "Task": "tasks",
    "model_config": "tasks",
    "LiveRamp": "training",
    "OptimizerConfig": "training",
    "Run": "training",
    "Schedule": "training",
    "SquaredNorms": "training",
    "Stage": "training",
    "train": "training",
    "BudgetScan": "scanning",
    "BudgetSubject": "scanning",
    "Experiment": "scanning",
    "LearningRates": "scanning",
    "Study": "scanning",
    "Subject": "scanning",
    "log_horizons": "scanning",
    "log_spaced": "scanning",
    "powers_of_two": "scanning",
    "scan": "scanning",
    "scan_budgets": "scanning",
    "analyse": "results",
    "read_results": "results",
    "draw_figure": "report",
    "write_figures": "report",
    "write_report": "report",
    "UserError": "io",
}

__all__ = [
    "MODELS",
    "BudgetScan",
    "BudgetSubject",
    "Experiment",
    "LanguageModel",
    "LearningRates",
    "LiveRamp",
    "LlamaConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OtherModel",
    "Run",
    "Schedule",
    "SquaredNorms",
    "Stage",
    "Study",
    "Subject",
    "Task",
    "UserError",
    "advice",
    "analyse",
    "data",
    "draw_figure",
    "fitting",
    "log_horizons",
    "log_spaced",
    "model_config",
    "noise_scale",
    "powers_of_two",
    "read_results",
    "scan",
    "scan_budgets",
    "tasks",
    "train",
    "write_figures",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"scaling_jax.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"scaling_jax.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'scaling_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
