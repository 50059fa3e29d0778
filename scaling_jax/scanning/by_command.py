"""Trains a study's settings by a command, for trainers in any language, and follows the loss curves that they write.

A curve is a file of JSON lines with `step` and `loss`, or a CSV with these columns; the fields of `SquaredNorms` may
stand beside them. If a step isn't above the one before, the trainer went back, and the lines after that step no longer
count.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import shlex
import signal
import string
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive
from scaling_jax.io.files import open_plain, write_whole
from scaling_jax.scanning.experiment import Cell
from scaling_jax.scanning.study import Setting, Study, evaluations_needed
from scaling_jax.scanning.worker import STOPPING, Event
from scaling_jax.training import Progress
from scaling_jax.training.metrics import SquaredNorms

PLACES = ("batch", "learning_rate", "seed", "max_steps", "target_loss", "subject", "curve", "folder")
_NEEDED = ("batch", "learning_rate", "curve")
_POLL_SECONDS = 0.2
_ASK_SECONDS = 2.0  # between looks for what others have made possible; each reads the folder
_STOP_SECONDS = 30  # from SIGTERM to SIGKILL
_LEFT = "left"  # file that says why a setting is left


@dataclasses.dataclass(frozen=True)
class Limits:
    """How commands are run."""

    jobs: int = 1  # number of commands that run at the same time
    retries: int = 2  # times that a setting whose command failed is started again
    silent_minutes: float = 30.0  # a command that writes no evaluation for so long is stopped, and has failed

    def __post_init__(self):
        for field in ("jobs", "silent_minutes"):
            check_positive(field, getattr(self, field))
        if self.retries < 0:
            raise UserError(f"retries = {self.retries} must be 0 or more")


class Curve(NamedTuple):
    steps: list[int]
    losses: list[float]
    norms: list[SquaredNorms | None]
    problem: str | None  # the first line that is no evaluation, for a message


class Attempt:
    """One start of the command for a setting. Its output and its curve are in `folder`."""

    def __init__(self, setting: Setting, folder: Path, command: str, lock: int | None):
        self.setting, self.folder, self.path = setting, folder, folder / "curve"
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    arguments(command, setting, self.path, folder),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=() if lock is None else (lock,),  # so that an orphan still holds its setting
                )
            except OSError as error:
                raise UserError(f"--command can't be started ({error.strerror}: {error.filename})") from None
        self.curve = Curve([], [], [], None)
        self.last_news = self._last_evaluation = time.monotonic()
        self._seen: tuple[int, int] | None = None

    def look(self) -> Progress | None:
        """Reads the curve if it has changed; the progress if there is a new evaluation."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        if (seen := (found.st_size, found.st_mtime_ns)) == self._seen:
            return None
        self._seen, before = seen, self.curve
        self.curve = read_curve(self.path)
        if not self.curve.steps or self.curve[:2] == before[:2]:
            return None
        now, (step, loss), setting = time.monotonic(), (self.curve.steps[-1], self.curve.losses[-1]), self.setting
        gained = step - (before.steps[-1] if before.steps else 0)
        rate = max(gained, 0) * setting.batch / max(now - self._last_evaluation, 1e-9)
        self.last_news = self._last_evaluation = now
        return Progress(
            model=setting.subject,
            batch_tokens=setting.batch,
            learning_rate=setting.learning_rate,
            seed=setting.seed,
            run_id=setting.name,
            step=step,
            last_step=setting.max_steps,
            tokens=step * setting.batch,
            test_loss=loss,
            tokens_per_second=rate,
            noise_scale_tokens=math.nan,
        )

    def failure(self, silent_seconds: float) -> str | None:
        """Why the attempt failed; None if it runs, or has ended well."""
        code = self.process.poll()
        if code is None:
            silent = time.monotonic() - self.last_news
            return f"wrote no evaluation for {silent:,.0f} seconds" if silent > silent_seconds else None
        if code:
            return f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        if not self.curve.steps:
            return self.curve.problem or f"wrote no step and loss to {self.path}"
        return None

    def stop(self) -> None:
        """Ends the process and its children: SIGTERM, and after a while SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def train_by_command(
    study: Study,
    command: str,
    limits: Limits = Limits(),
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Trains what a study asks for, until it is done. Several machines may do this with one folder at the same time.

    Args:
      command: with `{batch}`, `{learning_rate}`, `{curve}` and others of `PLACES`; no shell sees it.
      on_event: called at each evaluation, and when a batch size is done.
      say: called with a line about each failure.

    Raises:
      UserError: if the command can't be started; at the end, if runs failed and were left.
      KeyboardInterrupt: after the commands were stopped.
    """
    check_command(command)
    running: list[Attempt] = []
    failures: dict[str, int] = {}
    left: dict[str, str] = {}  # {setting: why it is left}; their locks are kept, so that nobody asks for them again
    cells, ask_at, started = set(study.cells_left), 0.0, time.time()

    def start(setting: Setting) -> None:
        folder = study.folder / "commands" / setting.name
        (folder / _LEFT).unlink(missing_ok=True)
        running.append(Attempt(setting, folder, command, study.lock_of(setting)))

    def left_elsewhere(name: str) -> str | None:
        """Why another worker left a setting since this one began: neither tried again nor waited for."""
        path = study.folder / "commands" / name / _LEFT
        with contextlib.suppress(OSError):
            return path.read_text() if path.stat().st_mtime >= started else None
        return None

    try:
        while True:
            if len(running) < limits.jobs and time.monotonic() >= ask_at:
                while len(running) < limits.jobs and (setting := study.ask(wait=False)) is not None:
                    if (why := left_elsewhere(setting.name)) is not None:
                        left[setting.name] = why
                    else:
                        start(setting)
                if not running and not {name for name in study.wanted - set(left) if left_elsewhere(name) is None}:
                    break
                ask_at = time.monotonic() + _ASK_SECONDS
            for attempt in list(running):
                ended = attempt.process.poll() is not None  # before the look, which then sees the whole curve
                if (progress := attempt.look()) is not None:
                    on_event(Event(_cell(attempt.setting), progress))
                setting, curve = attempt.setting, attempt.curve
                needed = evaluations_needed(setting, curve.steps, curve.losses) if progress is not None else None
                why = None if needed else attempt.failure(60 * limits.silent_minutes)
                if not needed and why is None and not ended:
                    continue
                attempt.stop()
                running.remove(attempt)
                ask_at = 0.0
                if why is None:
                    try:
                        # Without what the command wrote before it was stopped, which chance decides.
                        study.tell(setting, curve.steps[:needed], curve.losses[:needed], norms=curve.norms[:needed])
                    except UserError as error:  # norms that can't be
                        why = str(error)
                if why is None:
                    cells_left = set(study.cells_left)
                    for cell in cells - cells_left:
                        on_event(Event(cell))
                    cells = cells_left
                    continue
                failures[setting.name] = failures.get(setting.name, 0) + 1
                again = failures[setting.name] <= limits.retries
                say(f"{setting.name}: {why}; {'started again' if again else 'left'}, see {attempt.log}")
                if again:
                    start(setting)
                else:
                    left[setting.name] = why
                    write_whole(attempt.folder / _LEFT, why)
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        on_event(STOPPING)
        raise
    finally:
        for attempt in running:
            attempt.stop()
        study.give_all_back()
    if left:
        name, why = next(iter(left.items()))
        raise UserError(
            f"{len(left)} of the runs failed {limits.retries + 1} times and are left, such as {name} ({why}): see "
            f"{study.folder / 'commands' / name / 'log.txt'}, then give the same command again"
        )


def check_command(command: str) -> None:
    """Raises UserError if a command has unknown places, or lacks one that it needs."""
    try:
        words = shlex.split(command)
        names = [name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None]
    except ValueError as error:
        raise UserError(f"--command {command!r}: {error}") from None
    if not words:
        raise UserError("--command is empty: give a command such as 'python train.py --batch {batch} …'")
    for name in names:
        if name not in PLACES:
            known = ", ".join(f"{{{place}}}" for place in PLACES)
            raise UserError(f"--command has {{{name}}}: choose from {known}; write {{{{ and }}}} for plain braces")
    for name in _NEEDED:
        if name not in names:
            raise UserError(f"--command needs {{{name}}}: without it, the command can't know what to train or write")


def arguments(command: str, setting: Setting, curve: Path, folder: Path) -> list[str]:
    """The command's words, with the setting's values in their places. Values are never split or seen by a shell."""
    values: dict[str, Any] = {name: getattr(setting, name) for name in PLACES if hasattr(setting, name)}
    values |= {"curve": curve.resolve(), "folder": folder.resolve()}
    return [word.format(**values) for word in shlex.split(command)]


def read_curve(path: Path) -> Curve:
    """The curve in a file so far. Leaves out a last line that isn't complete, and lines that are none."""
    with open_plain(path) as file:
        content = file.read()
    lines = content[: content.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    columns = _columns(lines)
    rows: list[tuple[int, float, SquaredNorms | None]] = []
    problem = None
    for number, line in enumerate(lines, 1):
        if not line.strip() or (columns is not None and number == 1):
            continue
        try:
            row = _evaluation(line, columns)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            problem = problem or f"line {number} of {path} isn't a step and a loss: {line[:60]!r}"
            continue
        while rows and rows[-1][0] >= row[0]:
            rows.pop()
        rows.append(row)
    return Curve([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], problem)


def _columns(lines: Sequence[str]) -> list[str] | None:
    """The names of a CSV's columns; None for JSON lines."""
    header = [name.strip() for name in next(csv.reader(lines[:1]), [])]
    return header if {"step", "loss"} <= set(header) else None


def _evaluation(line: str, columns: list[str] | None) -> tuple[int, float, SquaredNorms | None]:
    if columns is None:
        values = json.loads(line)
    else:
        cells = [cell.strip() or None for cell in next(csv.reader([line]))]
        values = dict(zip(columns, cells, strict=True))
    loss = values["loss"]
    value = math.nan if loss is None else _number(loss)
    if math.isfinite(value) and value <= 0:
        raise ValueError
    norms = [values.get(name) for name in SquaredNorms._fields]
    measured = None if None in norms else SquaredNorms(_whole(norms[0]), _number(norms[1]), _number(norms[2]))
    return _whole(values["step"]), value, measured


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if (number := _number(value)) < 1 or number != int(number):
        raise ValueError
    return int(number)


def _cell(setting: Setting) -> Cell:
    return Cell(setting.subject, setting.batch, setting.seed)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
