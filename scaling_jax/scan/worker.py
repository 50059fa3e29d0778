"""A process that trains groups of a scan on one core: `python -m scaling_jax.scan.worker RESULTS`.

Group numbers come in on standard input, a line each; events go out on standard output as JSON lines. The end of the
input, because whoever started it stops or died, means: save and leave.
"""

import json
import queue
import sys
import threading
from pathlib import Path

from scaling_jax.config import from_dict
from scaling_jax.data import prepare
from scaling_jax.errors import UserError
from scaling_jax.scan.experiment import Experiment, Group
from scaling_jax.scan.search import search
from scaling_jax.training import Interrupted, Progress, train


def main(workdir: Path) -> None:
    jobs: queue.Queue[int | None] = queue.Queue()
    stopping = threading.Event()

    def listen():
        for line in sys.stdin:
            jobs.put(int(line))
        stopping.set()
        jobs.put(None)

    threading.Thread(target=listen, daemon=True).start()
    experiment = from_dict(Experiment, json.loads((workdir / "experiment.json").read_text()))
    while (number := jobs.get()) is not None:
        group = experiment.groups[number]
        try:
            run_group(
                experiment, group, workdir, stopping.is_set, lambda p, n=number: send("progress", n, **p._asdict())
            )
        except Interrupted:
            break
        except UserError as error:
            send("refused", number, message=str(error))
            break
        send("done", number)


def run_group(experiment: Experiment, group: Group, workdir: Path, should_stop, on_progress, num_devices: int = 1):
    """Trains what is missing of a group; a worker's job, or the whole scan's where one process drives the devices."""
    corpora = {}

    def train_one(run):
        key = (run.text, run.model.context)
        if key not in corpora:
            corpora[key] = prepare(*key)
        return train(
            run,
            workdir,
            corpus=corpora[key],
            num_devices=num_devices,
            keep_checkpoint=False,
            should_stop=should_stop,
            on_progress=on_progress,
        )

    search(experiment, group, train_one)


def send(event: str, group: int, **details: str | Progress) -> None:
    print(json.dumps({"event": event, "group": group, **details}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
