"""benchmarks/__main__.py: one command that runs benchmarks and keeps what they print."""

import pytest

from benchmarks import __main__ as benchmarks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "quick.py").write_text("import sys\nprint('a table', *sys.argv[1:])\n")
    (tmp_path / "fails.py").write_text("print('half a table', flush=True)\nraise SystemExit(3)\n")
    monkeypatch.setattr(benchmarks, "HERE", tmp_path)
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "results")
    return tmp_path


def test_what_a_benchmark_prints_is_kept_with_machine_and_versions(folder):
    assert benchmarks.main(["quick 4x256:512"]) == 0
    command, machine, _, table = (folder / "results" / "quick.txt").read_text().splitlines()
    assert command == "python -m benchmarks 'quick 4x256:512'"
    assert "cores" in machine
    assert "jax" in machine
    assert table == "a table 4x256:512"


def test_one_that_fails_is_named_and_leaves_the_former_table(folder, capsys):
    (folder / "results").mkdir()
    (folder / "results" / "fails.txt").write_text("former")
    assert benchmarks.main([]) == 1
    assert (folder / "results" / "fails.txt").read_text() == "former"
    assert (folder / "results" / "quick.txt").exists()
    assert "failed: fails" in capsys.readouterr().err


def test_an_unknown_name_is_refused(folder, capsys):
    assert benchmarks.main(["slow"]) == 2
    assert "there is no benchmark slow: choose from fails, quick" in capsys.readouterr().err
    assert not (folder / "results").exists()


def test_all_benchmarks_have_a_main_guard():
    for name in benchmarks.names():
        assert '\nif __name__ == "__main__":\n' in (benchmarks.HERE / f"{name}.py").read_text(), name
