"""What the command line promises of every command: help with an example, JSON, exit codes, completion."""

import json
import re

import pytest

from scaling_jax.cli import app
from scaling_jax.cli.data import data
from scaling_jax.cli.main import DESCRIPTION
from scaling_jax.io import UserError

COMMANDS = [(name,) for name in app._subcommands if name != "data"] + [("data", name) for name in data._subcommands]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_ends_well_and_shows_an_example_that_parses(command, cli):
    done = cli(*command, "--help")
    assert done.code == 0
    assert done.errors == ""
    (example,) = [line for line in done.output.splitlines() if line.startswith("Example: ")]
    words = example.removeprefix(f"Example: scaling-jax {' '.join(command)}").replace("'", "").split()
    again = cli(*command, *words, "--no-such-option")
    assert "Missing" not in again.errors
    assert "Error parsing" not in again.errors
    (_, named) = again.errors.split("Unrecognized options: ")
    assert named.split()[0] == "--no-such-option"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_every_command(shell, cli):
    script = cli("--tyro-print-completion", shell).output
    for command in COMMANDS:
        assert command[-1] in script
    assert "--target-loss" in script


def test_machines_get_json(cli, scanned, measured):
    for command in (
        ("status", scanned),
        ("advise", measured, "--target-loss", "2.5", "--budget-tokens", "1e9"),
        ("fit", measured),
    ):
        done = cli(*command, "--json")
        assert done.code == 0, done.errors
        assert json.loads(done.output, parse_constant=pytest.fail)
        assert done.errors == ""


def test_a_dry_run_refuses_what_the_run_would_refuse(refuses):
    train = ("train", "--batch-tokens", 128, "--learning-rate", 1e-3, "--max-steps", 9, "--dry-run")
    refuses(*train, "--text", "files:/nowhere/*.txt", names="matches no file")
    refuses(*train, "--set", "model.vocab_size=100", names="vocab_size is 100")


def test_debug_shows_where_an_error_came_from(cli):
    with pytest.raises(UserError, match=r"none\.py"):
        cli("scan", "none.py", "--debug")
    assert cli("scan", "none.py").code == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("what\nwhere"), 2, "scaling-jax: what where\n"),
        (OSError(28, "No space left on device", "/x"), 2, "No space left on device: '/x'.* same command .*\n"),
        (KeyboardInterrupt(), 130, ".*same command .*\n"),
    ],
)
def test_exit_codes_are_those_documented(error, code, said, cli, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(app, "cli", fail)
    done = cli("demo")
    assert done.code == code
    assert re.search(f"{said}$", done.errors)
    assert done.errors.count("\n") == 1
    assert f"{code} " in DESCRIPTION.replace("\n", " ")
