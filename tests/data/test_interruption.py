"""A packing that is stopped at any moment, by any means, and started again."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scaling_jax.data import corpus, packing, prepare, shards, sources
from scaling_jax.io import UserError, workers

FILES = ("manifest.json", "test.tokens", "train.tokens")


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(sources, "SHARD_BYTES", 2500)


def contents(cache):
    (folder,) = (cache / "rows").glob("[!.]*")
    assert not list((cache / "rows").glob(".*.unfinished")), "nothing unfinished is left"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Crash(BaseException):
    pass


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_crash_at_any_rename_leaves_the_same_files_once_rerun(own_text, cache, monkeypatch, many_shards, tokenizer):
    """Before and after each of the moves that make a file count, in turn, in one cache: each rerun continues."""
    source = f"files:{own_text}/*"
    monkeypatch.setenv("SCALING_JAX_CACHE", str(cache / "whole"))
    prepare(source, 16, tokenizer, workers=1)
    monkeypatch.setenv("SCALING_JAX_CACHE", str(cache / "crashed"))
    real = os.replace
    for crashes in range(1000):
        left = 1 + crashes // 2 % 6  # one that stops sooner starts the last moves, of all shards joined, again

        def replace(a, b, crash_after=crashes % 2):
            nonlocal left
            left -= 1
            if crash_after or left:
                real(a, b)
            if not left:
                raise Crash

        monkeypatch.setattr(os, "replace", replace)
        try:
            prepare(source, 16, tokenizer, workers=1)
            break
        except Crash:
            pass
    monkeypatch.setattr(os, "replace", real)
    assert crashes > 10
    assert contents(cache / "crashed") == contents(cache / "whole")


CODE = """
import sys
from scaling_jax.data import prepare, sources
sources.SHARD_BYTES = 100_000
prepare(sys.argv[1], 64, sys.argv[2], workers=int(sys.argv[3]))
"""


def start(source, tokenizer, workers, cache):
    arguments = [sys.executable, "-c", CODE, source, tokenizer, str(workers)]
    return subprocess.Popen(arguments, env=os.environ | {"SCALING_JAX_CACHE": str(cache)})


def kill_and_rerun(tmp_path, tokenizer, workers, kills):
    folder = tmp_path / "large"
    folder.mkdir()
    words = [f"word{k} " for k in range(2000)]
    draw = random.Random(0)
    for k in range(40):
        (folder / f"{k}.txt").write_text("".join(draw.choices(words, k=20_000)) * 3)
    source = f"files:{folder}/*.txt"
    assert start(source, tokenizer, workers, tmp_path / "whole").wait() == 0
    interrupted = 0
    for _ in range(kills):
        before = packed(tmp_path / "killed")
        process = start(source, tokenizer, workers, tmp_path / "killed")
        while packed(tmp_path / "killed") == before and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        time.sleep(random.uniform(0, 0.1))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        interrupted += process.wait() == -signal.SIGKILL
        for child in children:
            assert gone(int(child)), "a worker outlived its parent"
    assert start(source, tokenizer, workers, tmp_path / "killed").wait() == 0
    assert interrupted
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def packed(cache):
    """The files that a packing has written so far."""
    return {path for path in cache.rglob("*") if path.is_file()}


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if ") Z" in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
def test_a_packing_killed_at_random_leaves_the_same_files_once_rerun(tmp_path):
    kill_and_rerun(tmp_path, "bytes", 2, kills=2)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
@pytest.mark.parametrize(("tokenizer", "workers"), [("bytes", 1), ("bytes", 2), ("bpe:2000", 2)])
def test_packings_killed_many_times_at_random_leave_the_same_files_once_rerun(tmp_path, tokenizer, workers):
    kill_and_rerun(tmp_path, tokenizer, workers, kills=10)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a pipe with a name")
def test_ctrl_c_ends_the_training_of_a_tokenizer_at_once_and_leaves_nothing(tmp_path, monkeypatch):
    """In the middle of its text, which is a pipe that doesn't end."""
    work, pipe, started = tmp_path / "work", tmp_path / "pipe", []
    work.mkdir()
    os.mkfifo(pipe)
    start = workers._Worker
    monkeypatch.setattr(workers, "_Worker", lambda *args: started.append(start(*args)) or started[-1])

    def interrupt():
        with pipe.open("wb") as text:  # waits until the worker reads
            text.write(b"some words " * 5000)
            text.flush()
            os.kill(os.getpid(), signal.SIGINT)
            started[0].process.wait()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        shards.train_in_worker([[sources.Part("text", str(pipe), False)]], "bpe:300", work)
    thread.join()
    assert started[0].process.returncode == 0
    assert not list(work.iterdir())


def test_a_tokenizer_is_trained_on_what_can_be_read_or_the_bad_file_is_named(own_text):
    (own_text / "7.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match=r"7\.txt is not UTF-8 text"):
        prepare(f"files:{own_text}/*.txt", 16, "bpe:300")


def test_two_packings_at_once_are_one(own_text, tmp_path):
    processes = [start(f"files:{own_text}/*", "bytes", 1, tmp_path / "cache") for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(contents(tmp_path / "cache")) == list(FILES)


def test_what_was_packed_is_not_packed_again(own_text, cache, monkeypatch, many_shards):
    packed = []
    real = packing.pack_shard

    def stop_at_the_fourth(shard, tokenizer, work, number):
        if len(packed) == 3:
            raise Crash
        packed.append(number)
        real(shard, tokenizer, work, number)

    monkeypatch.setattr(packing, "pack_shard", stop_at_the_fourth)
    with pytest.raises(Crash):
        prepare(f"files:{own_text}/*", 16, workers=1)
    monkeypatch.setattr(packing, "pack_shard", lambda *args: (packed.append(args[3]), real(*args)))
    prepare(f"files:{own_text}/*", 16, workers=1)
    assert packed == list(range(len(packed)))
    assert len(packed) > 4


def test_text_that_changes_while_it_is_packed_is_refused(own_text, monkeypatch):
    real = packing.pack_shard

    def change(*args):
        real(*args)
        (own_text / "1.txt").write_text("something else")

    monkeypatch.setattr(packing, "pack_shard", change)
    with pytest.raises(UserError, match="changed while it was packed"):
        prepare(f"files:{own_text}/*", 16)
    monkeypatch.setattr(packing, "pack_shard", real)
    prepare(f"files:{own_text}/*", 16)


def test_a_shard_altered_before_it_is_joined_is_refused(own_text, monkeypatch, many_shards):
    real = packing.pack_shard

    def alter(shard, tokenizer, work, number):
        real(shard, tokenizer, work, number)
        if number == 1:
            path = work / "00001.train"
            path.write_bytes(path.read_bytes()[::-1])

    monkeypatch.setattr(packing, "pack_shard", alter)
    with pytest.raises(UserError, match=r"00001\.train .*remove"):
        prepare(f"files:{own_text}/*", 16, workers=1)


def test_a_full_disk_is_said_and_the_same_command_continues(own_text, tmp_path):
    """A real one: a file system of half a megabyte, of our own. With one process and with two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for k in range(40):
        (own_text / f"more{k}.txt").write_text(f"{k}: sixteen letters\n" * 4000)
    code = (
        "import sys; from scaling_jax.data import prepare, sources; from scaling_jax.io import UserError\n"
        "sources.SHARD_BYTES = 100_000\n"
        "import subprocess\n"
        "for workers in (1, 2):\n"
        f"    try: prepare('files:{own_text}/*', 16, workers=workers)\n"
        "    except UserError as error: print(error)\n"
        f"subprocess.run(['mount', '-o', 'remount,size=40m', '{disk}'], check=True)\n"
        f"print(len(prepare('files:{own_text}/*', 16).train_RxT1))"
    )
    script = f'mount -t tmpfs -o size=2m none {disk} && "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, sys.executable, code],
        env=os.environ | {"SCALING_JAX_CACHE": str(disk)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("can't mount a small disk here")
    assert done.returncode == 0, done.stderr
    first, second, rows = done.stdout.splitlines()
    assert first == second
    assert "no space left" in first
    assert f"{disk}/rows" in first
    assert "SCALING_JAX_CACHE" in first
    assert int(rows) == len(prepare(f"files:{own_text}/*", 16).train_RxT1)


def test_a_full_disk_leaves_no_shard_that_counts(own_text, tmp_path, monkeypatch):
    """Wherever in a shard's writing the disk is full."""
    shard = corpus.look_up(f"files:{own_text}/*").shards[0]
    for moment in ("write", "fsync", "replace"):
        with monkeypatch.context() as patched:
            error = OSError(28, "No space left on device")
            if moment == "write":
                patched.setattr(shards._Stream, "_write", raising(error))
            else:
                patched.setattr(os, moment, raising(error))
            with pytest.raises(OSError, match="No space"):
                shards.pack_shard(shard, packing.load_tokenizer("bytes", tmp_path), tmp_path, 0)
        assert shards.shard_counts(tmp_path, 0) is None


def raising(error):
    def call(*_):
        raise error

    return call
