"""Names with markup, terminal escapes or bytes that aren't UTF-8; and terminals that lack our characters."""

import contextlib
import io
import os
import shutil
import sys
import time

import pytest
from rich.table import Table
from rich.text import Text

from scaling_jax.cli.main import main
from scaling_jax.console.terminal import Terminal, Working, escaped, fitting

NAMES = ("[/b]", "[bold]x[/bold]", ":smile:", "\x1b[31mred", "\x9b31m", "\u202eabc", "\x07\x08\x7f")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_without_control(name, cli, measured, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = measured.read_text().splitlines()
    measured.write_text(
        "\n".join([text[0], *(f'"{name}",{row.partition(",")[2]}' for row in text[1:]), ""]), newline=""
    )
    for command in (("fit", measured), ("advise", measured, "--target-loss", "2.5")):
        done = cli(*command)
        assert done.code == 0, done.errors
        assert not set(done.output + done.errors) & set("\x1b\x9b\r\u202e\x07\x08\x7f")
        assert escaped(name) in done.output, done.output


@pytest.mark.parametrize("name", ["[/b]", "\x1b[31mred", os.fsdecode(b"\xff\xfe")])
def test_a_folder_may_have_any_name(name, cli, scanned, tmp_path):
    folder = tmp_path / name
    shutil.copytree(scanned, folder)
    (folder / "experiment.json").unlink()  # single runs: the head names the folder
    done = cli("status", folder)
    assert done.code == 0, done.errors
    assert f"{escaped(folder.name)}: " in done.output
    assert "\x1b" not in done.output
    done = cli("fit", folder)
    assert done.code == 2
    assert escaped(str(folder)) in done.errors
    assert "\x1b" not in done.errors


def test_a_report_is_written_into_a_folder_of_any_name(cli, tmp_path, scanned):
    folder = tmp_path / os.fsdecode(b"[/b]\x1b\xff")
    run = next((scanned / "runs").iterdir())
    shutil.copytree(run, folder / "runs" / run.name)
    done = cli("report", folder)
    assert done.code == 0, done.errors
    assert "[/b]\\x1b\\xff" in done.output
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_gets_what_it_can_show(encoding, monkeypatch, scanned, measured):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    for command in (["status", scanned], ["fit", measured], ["advise", measured, "--target-loss", "2.5"], ["--help"]):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        monkeypatch.setattr(sys, "argv", ["scaling-jax", *map(str, command)])
        with contextlib.suppress(SystemExit):  # of --help
            main()
        sys.stdout.flush()
        said = written.getvalue().decode(encoding)
        assert "\\u" not in said
        if command[0] == "fit":
            boxes, dash = ("│" in said, "–" in said)
            assert boxes == (encoding == "utf-8")
            assert dash == (encoding in ("cp1252", "utf-8"))


def test_an_error_is_printed_in_any_encoding(monkeypatch, tmp_path):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["scaling-jax", "status", str(tmp_path / "é…\x1b[31m")])
    with pytest.raises(SystemExit):
        main()
    sys.stderr.flush()
    assert b"e...\\x1b[31m holds no results" in written.getvalue()


def test_plain_characters_keep_columns_straight():
    written = io.BytesIO()
    table = Table()
    table.add_column("∞ …")
    for cell in ("1k–∞", "…", "2"):
        table.add_row(cell)
    file = io.TextIOWrapper(written, "ascii")
    Terminal(file=file, width=40).print(table)
    file.flush()
    lines = written.getvalue().decode().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "| 1k-inf  |" in lines


def test_what_is_printed_can_be_read_without_our_characters():
    assert (
        fitting("B_crit ∝ (L − 1)^2 · 3 ≥ √2 ±∞ … é 日", "ascii")
        == "B_crit ~ (L - 1)^2 * 3 >= sqrt 2 +/-inf ... e \\u65e5"
    )
    assert fitting("1–2 · é", "latin-1") == "1-2 · é"
    assert fitting("1–2 · é ∞", "utf-8") == "1–2 · é ∞"
    assert escaped("a\tb\nc é ∞") == "a\tb\nc é ∞"
    assert escaped("\x1b[2J\udcff\ud800\u2028") == "\\x1b[2J\\xff\\ud800\\u2028"


def test_text_keeps_its_style():
    assert Terminal(file=io.StringIO()).render_str("x", style="bold").style == "bold"
    (segment, *_) = Terminal(file=io.StringIO(), force_terminal=True).render(Text("\x1b", style="bold"))
    assert segment.text == "\\x1b"
    assert segment.style.bold


class FakeTerminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_terminal_shows_what_a_long_command_is_doing_and_a_short_one_shows_nothing(patience, monkeypatch):
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Working("reading runs", patience) as working:
        for done in range(20):
            working.count(done, 2_028)
            time.sleep(0.02)
    shown = "reading runs: 19 of 2,028"
    assert (shown in screen.getvalue()) == (patience == 0.0)
    assert bool(screen.getvalue()) == (patience == 0.0)


@pytest.mark.parametrize("command", ["status", "fit", pytest.param("report", marks=pytest.mark.long)])
def test_a_command_counts_the_runs_that_it_reads(command, cli, scanned, monkeypatch):
    counted = []
    monkeypatch.setattr(Working, "count", lambda self, *numbers: counted.append(numbers))
    assert cli(command, scanned).code == 0
    runs = len(list((scanned / "runs").iterdir()))
    assert counted == [(done, runs) for done in range(runs)]
