"""Stage "kaplan": the next piece of experiments/kaplan_small.py, as far as the minutes go.

Continues the finished runs in luggage/kaplan.tar.xz, if there is one. Batch sizes come in the order of what they tell:
the middle, the ends, the rest. In the end, OUT/kaplan.tar.xz holds the finished runs, without checkpoints.
"""

import dataclasses
import importlib.util
import os
import signal
import sys
import tarfile
import threading
import time
from pathlib import Path

from figures import arguments

from scaling_jax.io import UserError
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.parallel.processes import stop_on_signals
from scaling_jax.results import read_results
from scaling_jax.scanning import powers_of_two
from scaling_jax.scanning.cells import finished_runs, train_cell
from scaling_jax.scanning.experiment import Cell, Experiment
from scaling_jax.scanning.records import check_same_recipe, write_experiment
from scaling_jax.tasks import model_config
from scaling_jax.training import Interrupted

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "kaplan_small.py"
PACKING_SECONDS = 15


def by_information(batches: list[int]) -> list[int]:
    """The middle, both ends, then the rest."""
    first = [batches[len(batches) // 2 - 1], batches[0], batches[-2]]
    return first + [batch for batch in batches if batch not in first]


def experiment(toy: bool) -> Experiment:
    spec = importlib.util.spec_from_file_location("kaplan_small", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not toy:
        return module.EXPERIMENT
    subject = dataclasses.replace(module.EXPERIMENT.subjects[0], model=model_config("1x16", compute_dtype="bfloat16"))
    toy_size = {"batch_tokens": powers_of_two(128, 512), "text": "python", "tokenizer": "bytes", "max_tokens": 5_000}
    return dataclasses.replace(module.EXPERIMENT, subjects=(subject,), **toy_size, eval_tokens=1_024)


def pack(folder: Path, archive: Path) -> int:
    """Packs what the experiment says and the finished runs, without checkpoints; returns the number of runs."""
    runs = [path.parent for path in sorted(folder.glob("runs/*/result.json"))]
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:xz") as tar:
        for path in (folder / "experiment.json", *sorted(folder.glob("cells/*.json"))):
            tar.add(path, path.relative_to(folder))
        for run in runs:
            for path in sorted(run.iterdir()):
                if path.is_file() and path.name != ".lock":
                    tar.add(path, path.relative_to(folder))
    os.replace(partial, archive)
    return len(runs)


def main() -> None:
    given = arguments()
    out = given.figures.path.parent
    folder, archive, before = out / "kaplan", out / "kaplan.tar.xz", given.luggage / "kaplan.tar.xz"
    if before.exists() and not given.toy:
        with tarfile.open(before) as tar:
            tar.extractall(folder, filter="data")
    keep_compiled_programs()
    if not given.toy:
        os.chdir(given.luggage)  # the text's path in every run is relative to it
    scanned = experiment(given.toy)
    check_same_recipe(folder, scanned)
    write_experiment(folder, scanned)
    alarm = threading.Timer(max(5, given.left - PACKING_SECONDS), os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    start = time.monotonic()

    def on_progress(progress) -> None:
        last[progress.run_id] = progress.tokens, progress.test_loss, round(progress.tokens_per_second)

    last: dict[str, tuple] = {}
    alarm.start()
    try:
        with stop_on_signals() as should_stop:
            for batch in by_information(list(scanned.batch_tokens)):
                cell = Cell(scanned.subjects[0].model.name, batch, 0)
                if finished_runs(scanned, cell, folder) is None:
                    train_cell(scanned, cell, folder, should_stop, on_progress)
                    given.figures.add("done", {"batch_tokens": batch, "runs": pack(folder, archive)})
                    given.figures.add("last lines: tokens, test loss, tokens per second", last)
    except Interrupted:
        pass
    except UserError as error:
        sys.exit(str(error))
    given.figures.add("last lines: tokens, test loss, tokens per second", last)
    given.figures.add("finished runs", pack(folder, archive))
    given.figures.add("training, seconds", round(time.monotonic() - start, 1))
    finished = [record.result for record in read_results(folder).runs if record.result is not None]
    given.figures.add("tokens of finished runs", sum(run.tokens for run in finished))


if __name__ == "__main__":
    main()
