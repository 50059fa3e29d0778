"""Runs in dashboards: TensorBoard event files beside metrics.jsonl, and Weights & Biases.

Both read the runs' metrics.jsonl, while a scan runs or afterwards.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scaling_jax.io import UserError
from scaling_jax.io.config import to_dict
from scaling_jax.io.files import Tail, refuse_links
from scaling_jax.noise_scale import Moments, MovingAverage, unbiased
from scaling_jax.training.metrics import MetricsLine
from scaling_jax.training.records import read_run_config

_SECONDS = 2.0  # between looks at the folder while runs train
_HALF_LIFE = 20.0  # in steps, of the averages of both moments


class Writer(Protocol):
    """A run in a dashboard."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Scalars:
    """Turns metrics lines into named values at each step. The noise scale comes from averages of both moments."""

    def __init__(self) -> None:
        self.last_step = 0
        self._averages = MovingAverage(_HALF_LIFE), MovingAverage(_HALF_LIFE)

    def of(self, line: MetricsLine) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, {name: value}) for each step of a line, without steps that came before."""
        # Batch sizes in tokens give a noise scale in tokens.
        sizes = line.small_batch_tokens, line.batch_tokens
        moments = unbiased(Moments(line.small_sq_norm, line.big_sq_norm, *sizes))
        first = line.step - line.num_steps + 1
        for step, loss, *step_moments in zip(range(first, line.step + 1), line.train_loss, *moments, strict=True):
            if step <= self.last_step:
                continue
            self.last_step = step
            grad_sq_norm, trace_cov = (a.add(x) for a, x in zip(self._averages, step_moments, strict=True))
            values = {"loss/train": float(loss), "noise_scale_tokens": math.nan}
            if grad_sq_norm > 0 and math.isfinite(step_moments[0]):
                values["noise_scale_tokens"] = trace_cov / grad_sq_norm
            if step == line.step:
                values["loss/test"] = line.test_loss
                values["tokens"] = line.tokens
            yield step, {name: x for name, x in values.items() if math.isfinite(x)}


class Follower:
    """Passes new metrics of the runs in `workdir` to their writers; a context manager that looks again at its end."""

    def __init__(self, workdir: Path, open_writer: Callable[[Path], Writer]):
        self._runs = workdir / "runs"
        self._open_writer = open_writer
        self._followed: dict[Path, _Followed] = {}
        self._closed: set[Path] = set()
        self._looked_at = 0.0

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *_) -> None:
        self.catch_up()
        for followed in self._followed.values():
            followed.writer.close()

    def look(self) -> None:
        """Calls `catch_up`, at most every two seconds."""
        if time.monotonic() - self._looked_at > _SECONDS:
            self.catch_up()
            self._looked_at = time.monotonic()

    def catch_up(self) -> None:
        """Passes on all new lines."""
        for metrics in sorted(self._runs.glob("*/metrics.jsonl")):
            folder = metrics.parent
            if folder in self._closed:
                continue
            done = (
                folder / "result.json"
            ).exists()  # comes before reading, so that a finished run's lines are complete
            if folder not in self._followed:
                self._followed[folder] = _Followed(self._open_writer(folder), Scalars(), Tail(metrics, from_start=True))
            followed = self._followed[folder]
            _pass_on(followed)
            if done:
                followed.writer.close()
                del self._followed[folder]
                self._closed.add(folder)


def asked_for(tensorboard: bool, wandb_project: str | None) -> list[Callable[[Path], Writer]]:
    """For each dashboard asked for, a function that opens a writer for a run's folder.

    Raises:
      UserError: if a package isn't installed.
    """
    files = [_event_files()] if tensorboard else []
    return files + ([_wandb_runs(wandb_project)] if wandb_project else [])


class _Followed(NamedTuple):
    writer: Writer
    scalars: Scalars
    lines: Tail


def _pass_on(followed: _Followed) -> None:
    # A run that continues from a checkpoint removes its last lines and writes them again; `Scalars` leaves these out.
    path = followed.lines.path
    try:
        for line in map(MetricsLine.read, followed.lines.new()):
            for step, values in followed.scalars.of(line):
                followed.writer.add(step, values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}): remove {path.parent}, then the same command trains the run again"
        ) from None


def _event_files() -> Callable[[Path], Writer]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the package tensorboardX: pip install 'scaling-jax[tensorboard]'"
        ) from None

    def open_writer(folder: Path) -> Writer:
        refuse_links(folder.parent, folder)
        for old in folder.glob("events.out.tfevents.*"):  # from an earlier command
            old.unlink()
        return _EventFiles(SummaryWriter(str(folder)))

    return open_writer


class _EventFiles:
    def __init__(self, writer: Any):
        self._writer = writer

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _wandb_runs(project: str) -> Callable[[Path], Writer]:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb") from None

    def open_writer(folder: Path) -> Writer:
        config = to_dict(read_run_config(folder).run)
        run_id = folder.name.replace(".", "_")
        return _WandbRun(
            wandb.init(project=project, id=run_id, name=folder.name, config=config, resume="allow", reinit="create_new")
        )

    return open_writer


class _WandbRun:
    def __init__(self, run: Any):
        self._run = run
        self._first = run.step  # an earlier command logged the steps before

    def add(self, step: int, values: dict[str, float]) -> None:
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # if the dashboard fails, metrics.jsonl still has everything
            self._run.finish()
