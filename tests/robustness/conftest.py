"""The command line called in this process, and what tells whether it wrote or lost anything."""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from scaling_jax.cli.main import main
from scaling_jax.io.files import write_rows
from scaling_jax.results import read_results
from scaling_jax.results.measurements import Measurement


class Done(NamedTuple):
    code: int
    output: str
    errors: str


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Calls `scaling-jax …` in an empty folder; an exception that isn't an exit passes, as its traceback would."""
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)  # too late to look for other processes here
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["scaling-jax", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def refuses(cli):
    """Calls what must be refused: exit code 2, one line or Tyro's box, what it names, and no file touched."""

    def call(*arguments, names, watched=(), one_line=True):
        folders = [Path.cwd(), *watched]
        before = [contents(folder) for folder in folders]
        done = cli(*arguments)
        assert done.code == 2, (arguments, done)
        assert "Traceback" not in done.errors
        said = " ".join(done.errors.split())
        assert names in said, (names, said)
        if one_line:
            assert done.errors.count("\n") == 1
            assert done.errors.startswith("scaling-jax: ")
        assert [contents(folder) for folder in folders] == before
        return done

    return call


def contents(folder):
    """Every file below a folder by its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def scanned(made_up, tmp_path_factory):
    """A finished scan with its measurements.csv; whoever damages a file puts it back."""
    folder = tmp_path_factory.mktemp("scanned") / "scan"
    shutil.copytree(made_up[1], folder)
    write_rows(folder / "measurements.csv", Measurement, read_results(folder).measurements)
    return folder


@contextlib.contextmanager
def replaced(path, content):
    """A file with other bytes for a while; None takes it away."""
    before = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture
def measured(tmp_path):
    """A table whose trade-offs and law are fitted in a blink."""
    folder = tmp_path / "measured"
    folder.mkdir()
    batches, losses = (128, 512, 2048, 8192), (3.0, 2.7, 2.4)
    rows = [f"m,{b},{x},{300 * (3 / x) ** 6 * (1 + 1e5 * x**-4.8 / b):.6g}" for b in batches for x in losses]
    (folder / "mine.csv").write_text("\n".join(["model,batch_tokens,target_loss,steps", *rows, ""]))
    return folder / "mine.csv"
