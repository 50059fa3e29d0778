"""Runs in other people's dashboards: TensorBoard event files beside metrics.jsonl, Weights & Biases.

Both follow the runs' metrics.jsonl, which stays the record: they can be written while a scan runs, or afterwards.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scaling_jax.errors import UserError
from scaling_jax.noise_scale import Moments, unbiased

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
        self._grad_sq_norm = self._trace_cov = 0.0

    def of(self, line: dict[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
        """What a line says about each of its steps; nothing for steps that came before."""
        losses = line["train_loss"]
        sizes = line["small_batch_tokens"], line["batch_tokens"]  # in tokens, so that the noise scale is
        for k, loss in enumerate(losses):
            step = line["step"] - len(losses) + 1 + k
            if step <= self.last_step:
                continue
            self.last_step = step
            values = {"loss/train": loss}
            norms = line["small_sq_norm"][k], line["big_sq_norm"][k]
            if None not in norms:
                values["noise_scale_tokens"] = self._noise_scale(Moments(*norms, *sizes))
            if step == line["step"]:
                values["loss/test"] = line.get("test_loss")
                values["tokens"] = line["tokens"]
            yield step, {name: x for name, x in values.items() if x is not None and math.isfinite(x)}

    def _noise_scale(self, moments: Moments) -> float:
        decay = 0.5 ** (1 / _HALF_LIFE)
        grad_sq_norm, trace_cov = map(float, unbiased(moments))
        self._grad_sq_norm = decay * self._grad_sq_norm + (1 - decay) * grad_sq_norm
        self._trace_cov = decay * self._trace_cov + (1 - decay) * trace_cov
        return self._trace_cov / self._grad_sq_norm if self._grad_sq_norm > 0 else math.nan


class _Followed(NamedTuple):
    writer: Writer
    scalars: Scalars
    read: int  # bytes of metrics.jsonl


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
            followed = self._followed.get(folder) or _Followed(self._open_writer(folder), Scalars(), 0)
            self._followed[folder] = followed._replace(read=_pass_on(metrics, followed))
            if done:
                followed.writer.close()
                del self._followed[folder]
                self._closed.add(folder)


def _pass_on(metrics: Path, followed: _Followed) -> int:
    # A run that continues from a checkpoint cuts its lines back and writes the same ones again.
    start = followed.read if metrics.stat().st_size >= followed.read else 0
    with metrics.open("rb") as file:
        file.seek(start)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        for line in map(json.loads, whole.splitlines()):
            for step, values in followed.scalars.of(line):
                followed.writer.add(step, values)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{metrics} is damaged ({error!r}): remove {metrics.parent}, it is trained again") from None
    return start + len(whole)


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
        config = json.loads((folder / "config.json").read_text())["run"]
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
