"""Every command line that a page, a docstring or a help text shows is taken by the real parser."""

import ast
import dataclasses
import functools
import json
import re
import shlex

import pytest

from scaling_jax.cli import app
from scaling_jax.cli.data import data
from scaling_jax.cli.main import DESCRIPTION, main
from scaling_jax.io.config import from_dict
from scaling_jax.report.sections import command
from scaling_jax.scanning.experiment import DEMO, QUICK
from scaling_jax.training import Run
from tests.test_docs import PAGES, ROOT, blocks

COMMANDS = {(name,): spec.target for name, spec in app._subcommands.items() if name != "data"}
COMMANDS |= {("data", name): spec.target for name, spec in data._subcommands.items()}
SCRIPTS = sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py")])


def shell_lines():
    """Of pages' shell blocks and prompts, of docstrings, of help texts, of reports."""
    for page in PAGES:
        yield from re.sub(r"\\\n\s*", " ", "\n".join(blocks(page, "bash"))).splitlines()
        yield from re.findall(r"^\$ (.*)$", page.read_text(), re.M)
        for block in blocks(page, "python"):
            yield from docstring(block).splitlines()
    for script in SCRIPTS:
        yield from docstring(script.read_text()).splitlines()
    yield from DESCRIPTION.splitlines()
    for function in COMMANDS.values():
        yield from function.__doc__.replace("Example: ", "").splitlines()
    for experiment in (
        DEMO,
        QUICK,
        dataclasses.replace(DEMO, text="files:~/a b/*"),
        dataclasses.replace(DEMO, name="x"),
    ):
        yield command(experiment)


def docstring(source):
    return (ast.get_docstring(ast.parse(source), clean=False) or "") if source.startswith('"""') else ""


def command_lines():
    """The words behind each different `scaling-jax` or `tpu_setup.sh … --` of them."""
    found = {}
    for line in shell_lines():
        for part in re.split(r"&&|\|", line):
            part = re.split(r"\s{3,}", part.strip())[0]  # what it does often stands behind it
            match = re.match(r"(?:.*/|srun .* )?scaling-jax (?P<words>.*)|\./tpu_setup\.sh .* -- (?P<there>.*)", part)
            if match:
                line = match["words"] or match["there"]
                found[line] = shlex.split(line, comments=True)
    return [pytest.param(words, id=line) for line, words in sorted(found.items())]


@pytest.fixture
def parse(monkeypatch, capsys):
    """What the command line says: which command, and its values."""
    called = []

    def in_place_of(name, function):
        @functools.wraps(function)
        def stub(**values):
            called.append((name, values))

        return stub

    for name, function in COMMANDS.items():
        commands = app if len(name) == 1 else data
        spec = dataclasses.replace(commands._subcommands[name[-1]], target=in_place_of(name, function))
        monkeypatch.setitem(commands._subcommands, name[-1], spec)

    def parse(words):
        monkeypatch.setattr("sys.argv", ["scaling-jax", *words])
        try:
            main()
        except SystemExit:
            pytest.fail(capsys.readouterr().err)
        (said,) = called
        return said

    return parse


@pytest.mark.parametrize("words", command_lines())
def test_command_lines_that_are_shown_are_taken(words, parse):
    name, _ = parse(words)
    assert list(name) == words[: len(name)]
    shown = "".join(block for page in PAGES for block in blocks(page, "python"))
    for path in [word for word in words if word.startswith("experiments/")]:
        assert (ROOT / path).exists() or path in shown


@pytest.mark.parametrize("words", [line for line in command_lines() if line.values[0][0] == "train"])
def test_runs_that_are_shown_can_be_planned(words, tmp_path, monkeypatch, capsys):
    """With the files that pages show."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "ramp.json").write_text('[{"tokens": 0, "batch_tokens": 128}, {"tokens": 1280, "batch_tokens": 256}]')
    defined = [block for page in PAGES for block in blocks(page, "python") if re.search(r"^RUN = ", block, re.M)]
    for path in [tmp_path / word for word in words if word.endswith(".py") and "/" not in word]:
        path.write_text(defined[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scaling_jax.cli.planned_run.find_documents", lambda _: [])  # pages name readers' own files
    monkeypatch.setattr("sys.argv", ["scaling-jax", *words, "--dry-run"])
    main()
    assert from_dict(Run, json.loads(capsys.readouterr().out)).learning_rate > 0


def test_there_are_such_command_lines():
    assert len(command_lines()) > 30
    assert {tuple(line.values[0][: len(name)]) for line in command_lines() for name in COMMANDS} >= set(COMMANDS)


def mentions():
    """Of pages' prose, which may leave out what must be given."""
    found = {}
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for span in re.findall(r"`(?:\S*/)?scaling-jax ([^`]*)`", prose):
            words = span.split()
            if words[0] != "…" and not words[0].startswith("--"):
                found[" ".join(words)] = words
    return [pytest.param(words, id=line) for line, words in sorted(found.items())]


@pytest.mark.parametrize("words", mentions())
def test_commands_and_options_that_prose_mentions_are_there(words, monkeypatch, capsys):
    name = words[:2] if words[0] == "data" else words[:1]
    monkeypatch.setattr("sys.argv", ["scaling-jax", *name, "--help"])
    with pytest.raises(SystemExit):
        main()
    help_text = capsys.readouterr().out
    assert f"scaling-jax {' '.join(name)}" in help_text
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", help_text))
