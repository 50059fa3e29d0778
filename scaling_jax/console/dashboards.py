"""Runs in other people's dashboards: TensorBoard event files beside metrics.jsonl, Weights & Biases.

Both follow the runs' metrics.jsonl, which stays the record: they can be written while a scan runs, or afterwards.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scaling_jax.io import UserError
from scaling_jax.io.config import to_dict
from scaling_jax.io.files import Tail
from scaling_jax.noise_scale import Moments, MovingAverage, unbiased
from scaling_jax.training.records import MetricsLine, read_run_config

_SECONDS = 2.0  # between looks at the folder while runs are going on
_HALF_LIFE = 20.0  # steps, of the moments' averages; their ratio is the noise scale


class Writer(Protocol):
    """One run in a dashboard."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Scalars:
    """A run's lines of metrics as values at steps, the noise scale from averages of both moments."""

    def __init__(self) -> None:
        self.last_step = 0
        self._averages = MovingAverage(_HALF_LIFE), MovingAverage(_HALF_LIFE)

    def of(self, line: MetricsLine) -> Iterator[tuple[int, dict[str, float]]]:
        """What a line says about each of its steps; nothing for steps that came before."""
        # In tokens, so that the noise scale is.
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


class _Followed(NamedTuple):
    writer: Writer
    scalars: Scalars
    lines: Tail


class Follower:
    """Passes on what runs in `workdir` write; a context manager, which looks a last time when it ends."""

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
        """Catches up, unless it did a moment ago."""
        if time.monotonic() - self._looked_at > _SECONDS:
            self.catch_up()
            self._looked_at = time.monotonic()

    def catch_up(self) -> None:
        """Passes on every line that is new."""
        for metrics in sorted(self._runs.glob("*/metrics.jsonl")):
            folder = metrics.parent
            if folder in self._closed:
                continue
            done = (folder / "result.json").exists()  # asked first: then its lines are all there
            if folder not in self._followed:
                self._followed[folder] = _Followed(self._open_writer(folder), Scalars(), Tail(metrics, from_start=True))
            followed = self._followed[folder]
            _pass_on(followed)
            if done:
                followed.writer.close()
                del self._followed[folder]
                self._closed.add(folder)


def _pass_on(followed: _Followed) -> None:
    # A run that continues from a checkpoint cuts its lines back and writes the same ones again.
    path = followed.lines.path
    try:
        for line in map(MetricsLine.read, followed.lines.new()):
            for step, values in followed.scalars.of(line):
                followed.writer.add(step, values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove {path.parent}, it is trained again") from None


def asked_for(tensorboard: bool, wandb_project: str | None) -> list[Callable[[Path], Writer]]:
    """What opens a writer for a run's folder, for each dashboard that is asked for.

    Raises:
      UserError: if one isn't installed.
    """
    files = [_event_files()] if tensorboard else []
    return files + ([_wandb_runs(wandb_project)] if wandb_project else [])


def _event_files() -> Callable[[Path], Writer]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboardX: pip install 'scaling-jax[tensorboard]'") from None

    def open_writer(folder: Path) -> Writer:
        for old in folder.glob("events.out.tfevents.*"):  # of an earlier look
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
        raise UserError("--wandb needs Weights & Biases: pip install wandb") from None

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
        self._first = run.step  # an earlier look logged what came before

    def add(self, step: int, values: dict[str, float]) -> None:
        if step >= self._first:
            self._run.log(values, step=step)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a dashboard that is away loses nothing: metrics.jsonl has it all
            self._run.finish()
