"""Tables that can't be fitted: refused by line and column; and generated ones, which come back as they were."""

import csv
import io
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_jax.advice.advise import advise
from scaling_jax.io import UserError
from scaling_jax.results.table import fit_table, read_table
from tests.robustness.conftest import contents

HEADER = "model,batch_tokens,target_loss,steps,steps_tried,params,seed,passed_early"
ROWS = [
    f"m,{batch},{loss},{300 * (1 + 2000 / batch) / loss:.1f},9000,1000,0,False"
    for batch in (256, 1024, 4096, 16384)
    for loss in (3.0, 2.5)
]
COLUMNS = HEADER.split(",")
NUMBERS = ("batch_tokens", "target_loss", "steps", "steps_tried", "params")
NOT_NUMBERS = ("many", "-1", "0", "inf", "-inf", "1e999", "1;5", "0x10", "½", "∞", "NaN%", "1e", "--1", "=1+1", "None")


def table(path, rows=ROWS, header=HEADER, end="\n"):
    path.write_bytes(end.join([header, *rows, ""]).encode())
    return path


def with_cell(column, value):
    """ROWS whose second, line 3, has another value in a column."""
    cells = ROWS[1].split(",")
    cells[COLUMNS.index(column)] = value
    return [ROWS[0], ",".join(cells), *ROWS[2:]]


@pytest.mark.parametrize(
    ("column", "value"),
    [(column, value) for column in NUMBERS for value in NOT_NUMBERS]
    + [(column, value) for column in ("batch_tokens", "target_loss") for value in ("", "nan")]
    + [("model", ""), ("target_loss", "20"), ("passed_early", "perhaps"), ("passed_early", "2")],
)
def test_a_cell_that_cannot_be_is_refused_by_line_and_column(column, value, tmp_path):
    path = table(tmp_path / "mine.csv", with_cell(column, value))
    with pytest.raises(UserError) as refused:
        fit_table(path)
    assert f"{path} line 3, column {column} is" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (HEADER.encode(), "no rows"),
        (b"\x00" * 100, "line 1"),
        (b"\xff\xfem\x00o\x00", "in UTF-8"),
        (b"\x1f\x8b\x08\x00", "in UTF-8"),
        (b"\x89PNG\r\n", "in UTF-8"),
        (b"[" * 200_000, "line 1"),
        (b'"' + b"a" * 200_000, "line 1 isn't CSV"),
        (HEADER.replace(",", ";").encode() + b"\nm;256;3;10", "semicolons"),
        (HEADER.replace(",", "\t").encode() + b"\nm\t256\t3\t10", "tabs"),
        (HEADER.encode() + b"\nm,256,2,5,10", "line 2: 5 cells under 8 columns"),
        (HEADER.encode() + b'\n"m,256,3,10,1,1,1,', "line 2: 1 cells"),
        (("\n".join([HEADER, *ROWS]) + "\nm,25\x006,3,1,1,1,1,").encode(), "line 10"),
        ("\n".join(["модель,batch_tokens,target_loss,steps", *ROWS]).encode(), "no column model"),
        (b"<html><body>404</body></html>", "no column model"),
        (b'{"model": "m"}', "no column model"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content, names, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    for read in (fit_table, lambda path: advise(path, 2.5)):
        with pytest.raises(UserError) as refused:
            read(path)
        assert str(path) in str(refused.value)
        assert names in str(refused.value)
        assert "\n" not in str(refused.value)


def test_commands_refuse_a_table_in_one_line(refuses, tmp_path):
    path = table(tmp_path / "mine.csv", with_cell("steps", "-1"))
    refuses("fit", path, names="line 3, column steps is", watched=(tmp_path,))
    refuses("advise", path, "--target-loss", "2.5", names="line 3, column steps is", watched=(tmp_path,))


def test_a_table_that_may_not_be_read_is_refused(refuses, tmp_path, monkeypatch):
    path = table(tmp_path / "mine.csv")

    opens = os.open

    def forbidden(name, *rest, **options):
        if str(name) != str(path):
            return opens(name, *rest, **options)
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr(os, "open", forbidden)
    refuses("fit", path, names="Permission denied")


def test_line_ends_quotes_and_a_byte_order_mark_do_not_matter(tmp_path):
    plain = read_table(table(tmp_path / "plain.csv"))
    quoted = [",".join(f'"{cell}"' for cell in row.split(",")) for row in ROWS]
    for rows, header, end in ((ROWS, HEADER, "\r\n"), (ROWS, "\ufeff" + HEADER, "\r\n"), (quoted, HEADER, "\r")):
        assert read_table(table(tmp_path / "odd.csv", rows, header, end)).columns == plain.columns


def test_losses_that_were_passed_early_are_left_out_and_are_no_bounds(tmp_path):
    early = [f"m,{batch},3.5,,9000,1000,0,{batch == 256}" for batch in (256, 1024)]
    reached = ["m,4096,3.5,20,9000,1000,0,False"]
    found = fit_table(table(tmp_path / "early.csv", [*early, *reached, *ROWS]), laws=False)
    without = fit_table(table(tmp_path / "without.csv"), laws=False)
    assert found.notes[0].startswith("line 2, column passed_early: loss 3.5 of model m is left out, some run was below")
    assert [(p.loss, p.bounds, p.tradeoff.b_crit) for p in found.fit.points] == [
        (p.loss, p.bounds, p.tradeoff.b_crit) for p in without.fit.points
    ]
    bounds = [row.replace("True", "") for row in early]
    assert fit_table(table(tmp_path / "a.csv", [*bounds, *reached, *ROWS]), laws=False).table.target_loss[0] == 3.5
    with pytest.raises(UserError, match="passed_early: every loss"):
        read_table(table(tmp_path / "all.csv", [row.replace("False", "True") for row in ROWS]))


def test_a_scans_measurements_are_read_as_they_were_written(scanned):
    found = read_table(scanned / "measurements.csv")
    with (scanned / "measurements.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["passed_early"] == "False"]
    assert [str(int(b)) for b in found.batch_tokens] == [row["batch_tokens"] for row in rows]


numbers = st.floats(1e-3, 1e12, allow_nan=False)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    model=names,
    batches=st.lists(st.integers(2**10, 2**15), min_size=3, max_size=6, unique=True),
    losses=st.lists(st.floats(0.01, 15), min_size=1, max_size=3, unique=True),
    steps=numbers,
    missing=st.sampled_from(["", "nan"]),
)
def test_a_table_comes_back_as_it_was_written(model, batches, losses, steps, missing, tmp_path_factory):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["batch_tokens", "model", "loss", "steps"])
    rows = [(b, model, loss, steps if k or j else None) for k, b in enumerate(batches) for j, loss in enumerate(losses)]
    writer.writerows([b, m, loss, missing if s is None else s] for b, m, loss, s in rows)
    path = tmp_path_factory.getbasetemp() / "generated.csv"
    path.write_bytes(text.getvalue().encode())
    found = read_table(path)
    assert found.model == [model] * len(rows)
    assert found.batch_tokens == [float(b) for b, *_ in rows]
    assert found.target_loss == [loss for *_, loss, _ in rows]
    assert [None if math.isnan(s) else s for s in found.steps] == [s for *_, s in rows]


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda x: (HEADER + "\n" + x).encode())))
def test_any_bytes_are_a_table_or_refused_in_one_line(content, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "any.csv").write_bytes(content)
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        read_table(folder / "any.csv")
    assert str(folder / "any.csv") in str(caught.value)
    assert contents(folder) == before
