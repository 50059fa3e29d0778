"""A process that trains groups of a scan on one core: `python -m scaling_jax.scanning.worker RESULTS`.

Group numbers come in on standard input, a line each; events go out on standard output as JSON lines. The end of the
input, because whoever started it stops or died, means: save and leave.
"""

import json
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import jax

from scaling_jax.config import from_dict
from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment
from scaling_jax.scanning.groups import run_group
from scaling_jax.training import Interrupted, Progress
from scaling_jax.training.compilation import keep_compiled_programs


def main(workdir: Path) -> None:
    jobs: queue.Queue[int | None] = queue.Queue()
    stopping = threading.Event()

    def listen():
        for line in sys.stdin:
            jobs.put(int(line))
        stopping.set()
        jobs.put(None)

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # as SLURM and preempted machines send it
    keep_compiled_programs()
    experiment = from_dict(Experiment, json.loads((workdir / "experiment.json").read_text()))
    while (number := jobs.get()) is not None:
        group = experiment.groups[number]

        def report(progress: Progress, number=number):
            send("progress", number, **progress._asdict())

        try:
            run_group(experiment, group, workdir, stopping.is_set, report, jax.local_device_count())
        except Interrupted:
            break
        except (UserError, OSError) as error:  # no space left, for one
            send("refused", number, message=str(error))
            break
        send("done", number)


def send(event: str, group: int, **details: Any) -> None:
    print(json.dumps({"event": event, "group": group, **details}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
