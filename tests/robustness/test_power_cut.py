"""A power cut at any moment: what wasn't waited for is lost, and nothing else is said to be complete."""

import contextlib
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from scaling_jax.io import UserError
from scaling_jax.results import read_results
from scaling_jax.training import journal, train
from scaling_jax.training.records import whole_result
from tests.training.counting import CORPUS, RUN

BY_TENSORSTORE = ("ocdbt", "d")  # it waits for its own files, where no test sees it


class Disk:
    """What a disk would hold of a folder if the power went now: only what `os.fsync` was called for.

    A file that nobody waited for is empty, as ext4 leaves it. Of a folder, either all new names are on disk, or only
    those that were there when somebody last waited for the folder.
    """

    def __init__(self, folder: Path, images: Path):
        self.folder, self.images, self.count = folder, images, 0
        self.content: dict[int, bytes] = {}  # by inode
        self.names: dict[Path, dict[str, int]] = {}
        self._fsync, self._replace, self._append = os.fsync, os.replace, journal.append_metrics

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(self.folder):
            self.image()
            if path.is_dir():
                self.names[path] = {p.name: p.stat().st_ino for p in path.iterdir() if p.is_file()}
            else:
                self.content[path.stat().st_ino] = path.read_bytes()
        self._fsync(descriptor)

    def replace(self, old, new) -> None:
        self._replace(old, new)
        if Path(new).is_relative_to(self.folder):
            self.image()

    def append(self, *arguments) -> None:
        self._append(*arguments)
        self.image()

    def image(self) -> None:
        for new_names in (True, False):
            self._write(self.images / f"{self.count:04}", new_names)
            self.count += 1

    def _write(self, to: Path, new_names: bool) -> None:
        to.mkdir(parents=True)
        for place, _, names in os.walk(self.folder):
            here = to / Path(place).relative_to(self.folder)
            here.mkdir(exist_ok=True, parents=True)
            in_states = "checkpoints" in here.parts
            there = {}
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # Orbax renames what it has written
                    there[name] = (Path(place) / name).stat().st_ino
            if not new_names and not in_states:
                there = self.names.get(Path(place), {})
            for name, inode in there.items():
                content = self.content.get(inode, b"")
                # Of a state, a third each: all is on disk, all but what Python wrote, nothing.
                if in_states and (self.count % 3 == 0 or (self.count % 3 == 1 and self._is_tensorstores(here / name))):
                    with contextlib.suppress(FileNotFoundError):
                        content = (Path(place) / name).read_bytes()
                (here / name).write_bytes(content)

    @staticmethod
    def _is_tensorstores(path: Path) -> bool:
        return any(part.startswith(BY_TENSORSTORE[0]) or part == BY_TENSORSTORE[1] for part in path.parts)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(the undisturbed run's folder, what the disk would hold at every moment of it)."""
    folder, there = tmp_path_factory.mktemp("whole") / "results", tmp_path_factory.mktemp("images")
    folder.mkdir()
    disk = Disk(folder, there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        patch.setattr(os, "replace", disk.replace)
        patch.setattr(journal, "append_metrics", disk.append)
        trained(folder, checkpoint_seconds=0)
    disk.image()
    return folder, sorted(there.iterdir())


def trained(folder, **options):
    return train(RUN, folder, corpus=CORPUS, num_devices=1, **options)


def run_in(folder):
    return folder / "runs" / RUN.run_id


def files_of(folder):
    return {name: (run_in(folder) / name).read_bytes() for name in ("config.json", "metrics.jsonl", "result.json")}


def check(image, whole, capfd):
    """A run that seems done is the whole one; and the same command ends with the whole one."""
    try:
        runs = read_results(image).runs
    except UserError:
        runs = ()
    assert all(run.result is None or run.result == whole_result(run_in(whole)) for run in runs), image
    capfd.readouterr()
    trained(image)
    assert files_of(image) == files_of(whole), image
    errors = capfd.readouterr().err
    assert all(line.startswith("scaling-jax: note: ") for line in errors.splitlines()), errors


def test_readers_never_take_a_run_for_done_that_a_power_cut_took_records_from(images):
    whole, all_of_them = images
    done = refused = 0
    for image in all_of_them:
        try:
            runs = read_results(image).runs
        except UserError:
            refused += 1
            continue
        for run in runs:
            if run.result is not None:
                done += 1
                assert run.result == whole_result(run_in(whole)), image
                assert len(run.course.batch_tokens) == RUN.max_steps
    assert len(all_of_them) > 80
    assert done >= 2  # once all is on disk
    assert refused > 0


def test_after_a_power_cut_the_same_command_ends_with_the_same_bytes(images, capfd):
    whole, all_of_them = images
    for image in [*random.Random(0).sample(all_of_them[:-2], 5), *all_of_them[-2:]]:
        check(image, whole, capfd)


@pytest.mark.long
def test_after_a_power_cut_at_any_moment_the_same_command_ends_with_the_same_bytes(images, capfd):
    whole, all_of_them = images
    for image in all_of_them:
        check(image, whole, capfd)


def test_records_are_on_disk_before_a_result_says_that_they_are_complete(tmp_path, monkeypatch):
    waited = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        waited.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(old, new):
        waited.append(f"{Path(new).name} is there")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    trained(tmp_path, keep_checkpoint=False)
    after = waited.index("result.json is there")
    assert {"metrics.jsonl", RUN.run_id} <= set(waited[:after])
    assert RUN.run_id in waited[after:]
    assert waited.count("metrics.jsonl") == 1  # once a run, not once a line


@pytest.mark.long
def test_a_run_on_ext4_survives_a_copy_of_the_live_disk(tmp_path):
    """Trains on a file system of its own, and mounts a copy of it that was made without waiting for anything."""
    disk, copy, place = tmp_path / "disk", tmp_path / "copy", tmp_path / "mounted"
    place.mkdir()
    disk.write_bytes(b"")
    os.truncate(disk, 64 * 2**20)
    if os.geteuid() or subprocess.run(["mkfs.ext4", "-q", disk], check=False).returncode:
        pytest.skip("only root can mount a file system")
    if subprocess.run(["mount", "-o", "loop", disk, place], check=False).returncode:
        pytest.skip("no loop devices here")
    try:
        trained(place / "results", keep_checkpoint=False)
        shutil.copyfile(disk, copy)
        whole = files_of(place / "results")
    finally:
        subprocess.run(["umount", place], check=True)
    subprocess.run(["mount", "-o", "loop", copy, place], check=True)
    try:
        (run,) = read_results(place / "results").runs
        assert run.result is not None
        assert files_of(place / "results") == whole
    finally:
        subprocess.run(["umount", place], check=True)
