"""Processes that pack shards, one a core, and one that trains a tokenizer: Ctrl-C can't reach into a library's loops.

Jobs come in on standard input, a JSON line each; the number of each that is done goes out on standard output. The end
of the input, because whoever started it stopped or died, ends the process at once: what it was at is done again.
"""

import contextlib
import errno
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from scaling_jax.data.bpe_training import write_tokenizer
from scaling_jax.data.shards import as_shard, pack_shard
from scaling_jax.data.sources import Shard
from scaling_jax.data.tokenizers import load_tokenizer
from scaling_jax.errors import UserError

_START = "import sys; from scaling_jax.data.pack_workers import main; main(*sys.argv[1:])"
_TRAIN = -1  # in place of a shard's number


def train_in_worker(shards: list[Shard], tokenizer: str, work: Path) -> None:
    """Writes `tokenizer.json`, trained on the shards' train split; interrupted, it stops at once and leaves none.

    Raises:
      UserError, OSError: see `pack_in_workers`.
    """
    list(_in_workers([[_TRAIN, shards]], tokenizer, work, 1))


def pack_in_workers(shards: dict[int, Shard], tokenizer: str, work: Path, workers: int) -> Iterator[int]:
    """Packs shards by number, first come first served; yields each number when it is done.

    Raises:
      UserError: what a worker refused, or that it died.
      OSError: if a worker couldn't write.
    """
    return _in_workers([[number, shard] for number, shard in shards.items()], tokenizer, work, workers)


def _in_workers(waiting: list, tokenizer: str, work: Path, workers: int) -> Iterator[int]:
    answers: queue.Queue[tuple[subprocess.Popen, dict | None]] = queue.Queue()
    started = [_start(tokenizer, work, answers) for _ in range(workers)]
    processes = [process for process, _ in started]
    try:
        for process in processes:
            _give(process, waiting.pop(0))
        for _ in range(len(waiting) + len(processes)):
            process, answer = answers.get()
            if answer is None:
                raise UserError(f"a packing process died (exit code {process.wait()}): the same command continues")
            if "refused" in answer:
                raise UserError(answer["refused"])
            if "errno" in answer:
                raise OSError(answer["errno"], answer["error"], answer["filename"])
            yield answer["done"]
            if waiting:
                _give(process, waiting.pop(0))
    finally:
        for process in processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]
        for process, listener in started:
            process.wait()
            listener.join()


def _start(tokenizer: str, work: Path, answers: queue.Queue) -> tuple[subprocess.Popen, threading.Thread]:
    package_root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", _START, str(work), tokenizer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))},
        start_new_session=True,  # Ctrl-C reaches the parent alone
    )

    def listen():
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                answers.put((process, json.loads(line)))
        answers.put((process, None))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    return process, listener


def _give(process: subprocess.Popen, job: list) -> None:
    with contextlib.suppress(BrokenPipeError):  # a dead worker is noticed by its output's end
        process.stdin.write(json.dumps(job) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]


def main(work: str, tokenizer_name: str) -> None:
    """A worker, until its input ends."""
    jobs: queue.Queue[str] = queue.Queue()

    def listen():
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    answers, sys.stdout = sys.stdout, sys.stderr  # libraries that print don't garble the answers
    threading.Thread(target=listen, daemon=True).start()
    answer: dict = {}
    try:
        tokenizer = None
        while True:
            number, job = json.loads(jobs.get())
            if number == _TRAIN:
                write_tokenizer([as_shard(shard) for shard in job], tokenizer_name, Path(work))
            else:
                tokenizer = tokenizer or load_tokenizer(tokenizer_name, Path(work))
                pack_shard(as_shard(job), tokenizer, Path(work), number)
            print(json.dumps({"done": number}), file=answers, flush=True)
    except UserError as error:
        answer = {"refused": str(error)}
    except OSError as error:
        answer = {"errno": error.errno or errno.EIO, "error": error.strerror or str(error), "filename": error.filename}
    print(json.dumps(answer), file=answers, flush=True)
