"""One of several processes that train a run: `python -m tests.training.one_process DEVICES '{"workdir": …}'`."""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[1]}"

from scaling_jax.data import feeding
from scaling_jax.parallel import connect
from scaling_jax.parallel.processes import stop_on_signals
from scaling_jax.training import Interrupted, train
from tests.training.counting import CORPUS, RUN


def main(
    workdir: str,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    run: dict | None = None,
    streamed: bool = False,
    **options,
):
    """Trains `RUN`, changed by `run`; says each evaluation's step, and `interrupted` or the result's status."""
    connect(coordinator, num_processes, process_id)
    if streamed:
        feeding.RESIDENT_BYTES = 0
    with stop_on_signals() as should_stop:
        try:
            result = train(
                dataclasses.replace(RUN, **run or {}),
                Path(workdir),
                corpus=CORPUS,
                should_stop=should_stop,
                on_progress=lambda progress: print("step", progress.step, flush=True),
                **options,
            )
        except Interrupted:
            print("interrupted")
        else:
            print(result.status)


if __name__ == "__main__":
    main(**json.loads(sys.argv[2]))
