import csv
import json
import math

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.results.table import fit_table, read_table, write_fit
from tests.fitting.planted import Planted

HEADER = "model,batch_tokens,target_loss,steps"
ROWS = [f"m,{batch},{loss},{300 * (1 + 2000 / batch) / loss:.1f}" for batch in (256, 1024, 4096) for loss in (3.0, 2.5)]


HEADER_OF_OFFSETS = f"{HEADER},steps_tried,offset_steps"


def write(path, rows=ROWS, header=HEADER):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def changed(line, row):
    """ROWS with one line of the file replaced; the header is line 1."""
    return [*ROWS[: line - 2], row, *ROWS[line - 1 :]]


def offsets(line, offset):
    """ROWS with no offset but on one line of the file."""
    return [f"{row},,{offset if number == line else ''}" for number, row in enumerate(ROWS, 2)]


def planted(path, **variant):
    columns = Planted(**variant).columns(np.random.default_rng(0))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["params", "model", "loss", "seed", "batch_tokens", "steps"])
        for model, batch, loss, steps, run in zip(*columns.values(), strict=True):
            size = {"model0": 10_000, "model1": 90_000}[model]
            writer.writerow([size, model, f"{loss:.6g}", run, batch, f"{steps:.6g}"])
    return path


def test_a_table_of_ones_own_is_fitted_and_its_fit_lies_beside_it(tmp_path):
    found = fit_table(planted(tmp_path / "mine.csv"))
    written = write_fit(found)
    assert written == tmp_path / "mine.fit.json"
    fit = json.loads(written.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert fit["law"]["exponent_interval"][0] < -4.8 < fit["law"]["exponent_interval"][1]
    assert fit["joint_law"]["exponent_interval"][0] < -4.8 < fit["joint_law"]["exponent_interval"][1]
    assert {form["form"] for form in fit["forms"]} == {"loss", "above floor", "data", "size"}
    assert len(fit["points"]) == 28
    assert fit["points"][0]["cbs20"] == pytest.approx(0.2 * fit["points"][0]["b_crit"])
    assert fit["measurements"] == "mine.csv"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    before = written.read_bytes()
    write_fit(fit_table(tmp_path / "mine.csv"))
    assert written.read_bytes() == before


def test_two_tables_in_one_folder_keep_both_fits(tmp_path):
    first = write_fit(fit_table(write(tmp_path / "a.csv")))
    before = first.read_bytes()
    second = write_fit(fit_table(write(tmp_path / "b.csv", [row.replace("m,", "other,") for row in ROWS])))
    assert (first, second) == (tmp_path / "a.fit.json", tmp_path / "b.fit.json")
    assert first.read_bytes() == before


def test_a_scans_own_fit_is_not_overwritten_by_that_of_its_table(tmp_path):
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "fit.json").write_text("untouched")
    assert write_fit(fit_table(write(tmp_path / "measurements.csv"))) == tmp_path / "measurements.fit.json"
    assert (tmp_path / "fit.json").read_text() == "untouched"


def test_spaces_case_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path):
    plain = read_table(write(tmp_path / "plain.csv"))
    rows = [row.replace(",", " , ") for row in ROWS] + ["", " , , , "]
    odd = read_table(write(tmp_path / "odd.csv", rows, "\ufeff Model , BATCH_TOKENS, loss ,steps"))
    assert odd.columns == plain.columns


def test_empty_steps_are_misses_and_steps_tried_makes_them_bounds(tmp_path):
    header = HEADER + ",steps_tried"
    rows = [row + "," for row in ROWS] + ["m,128,3.0,,900", "m,128,2.5,nan,900"]
    found = fit_table(write(tmp_path / "a.csv", rows, header))
    assert [point.bounds for point in found.fit.points] == [1, 1]
    assert math.isnan(found.table.steps[-1])
    without = fit_table(write(tmp_path / "b.csv", [*ROWS, "m,128,3.0,", "m,128,2.5,"]))
    assert [(point.bounds, point.not_reached) for point in without.fit.points] == [(0, 1), (0, 1)]


def test_a_target_that_nobody_reached_is_named_and_left_out(tmp_path):
    rows = ROWS + [f"m,{batch},1.5," for batch in (256, 1024, 4096)]
    found = fit_table(write(tmp_path / "a.csv", rows))
    assert found.notes[0] == "line 8, column steps: no batch size of model m reached loss 1.5"
    assert {point.loss for point in found.fit.points} == {3.0, 2.5}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(3, "m,256,-2.5,10"), "line 3, column target_loss is -2.5: .*positive"),
        (changed(3, "m,256,nan,10"), "line 3, column target_loss is nan"),
        (changed(3, "m,256,,10"), "line 3, column target_loss is empty"),
        (changed(3, "m,256,2.5,0"), "line 3, column steps is 0: .*leave it empty"),
        (changed(3, "m,256,2.5,inf"), "line 3, column steps is inf"),
        (changed(3, "m,many,2.5,10"), "line 3, column batch_tokens is 'many': .*number"),
        (changed(3, "m,0,2.5,10"), "line 3, column batch_tokens is 0"),
        (changed(3, ",256,2.5,10"), "line 3, column model is empty"),
        (changed(3, "m,256,2.5"), "line 3: 3 cells under 4 columns"),
        (changed(3, "m,256,3.0,10"), "line 3, column batch_tokens: .* line 2; .*column seed"),
        (changed(3, "m,256,20.1,10"), "line 3, column target_loss is 20.1, .*perplexity"),
        (ROWS[:4], "line 2, column batch_tokens: model m has 2 distinct batch sizes .256, 1024.; .* 3"),
        ([f"m,{b},3.0,{900 // b}" for b in (8, 16, 32)], "line 4, column batch_tokens: .* 32 tokens; if .*sequences"),
        (
            [f"m,{b},3.0,{9000 // b}" for b in (8, 16, 1024, 4096)],
            "line 3, column batch_tokens: .* 16 and .* 1024",
        ),
        ([f"m,{b},3.0," for b in (256, 512, 1024)], "line 2, column steps: model m reached none of its targets"),
        ([], "has no rows"),
        (
            [f"m,{256 * 2**k},{2.5 + 0.1 * k},1000" for k in range(5)],
            "line 2, column target_loss: .* end of runs, .*curve",
        ),
        (offsets(3, "-1"), "line 3, column offset_steps is -1: "),
        (offsets(3, "inf"), "line 3, column offset_steps is inf"),
        (offsets(3, "some"), "line 3, column offset_steps is 'some': .*number"),
        (offsets(3, "1057.5"), "line 3, column offset_steps is 1057.5, .* 1057.5 steps"),
        (["m,256,1.5,,30,30", *offsets(3, "0")[1:]], "line 2, column offset_steps is 30, .* 30 steps"),
    ],
)
def test_mistakes_are_named_by_line_and_column(rows, message, tmp_path):
    header = HEADER_OF_OFFSETS if rows and rows[0].count(",") == 5 else HEADER
    with pytest.raises(UserError, match=message) as caught:
        fit_table(write(tmp_path / "a.csv", rows, header))
    assert str(tmp_path / "a.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("model,batch,target_loss,steps", "line 1: no column batch_tokens; did you mean 'batch'"),
        ("model,batch_token,target_loss,steps", "line 1: no column batch_tokens; did you mean 'batch_token'"),
        ("model,batch_sequences,target_loss,steps", "no column batch_tokens; .*batch_sequences .*tokens per sequence"),
        ("model,batch_size,target_loss,steps", "no column batch_tokens; .*batch_size .*tokens per sequence"),
        ("model,batch_tokens,val_loss,steps", "no column target_loss; did you mean 'val_loss'"),
        ("model,batch_tokens,final_loss,steps", "'final_loss'.* only if .*loss at the end of a run, .*curve"),
        ("model,batch_tokens,target_loss,iterations", "no column steps among model, batch_tokens"),
        ("name,batch_tokens,target_loss,steps", "no column model"),
        ("model,batch_tokens,steps,steps", "column steps is there twice"),
    ],
)
def test_columns_that_are_missing_or_misnamed_are_named(header, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path / "a.csv", header=header))


def test_files_that_are_no_table_are_refused(tmp_path):
    with pytest.raises(UserError, match="can't read"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "image.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't read"):
        read_table(tmp_path / "image.csv")


def test_steps_before_the_trade_off_are_taken_off_in_every_fit(tmp_path):
    """The same runs, some 5 to 25 steps longer by an offset that the table knows."""
    plain = planted(tmp_path / "plain.csv")
    header, *rows = plain.read_text().splitlines()
    longer = []
    for k, row in enumerate(rows):
        *first, steps = row.split(",")
        longer.append(",".join([*first, repr(float(steps) + 5 + k % 20), str(5 + k % 20)]))
    path = write(tmp_path / "longer.csv", longer, f"{header},offset_steps")
    with_offset, without = fit_table(path), fit_table(plain)
    for fit, other in ((with_offset.fit, without.fit), (with_offset.joint, without.joint)):
        assert fit.law.exponent == pytest.approx(other.law.exponent, abs=1e-6)
    forms = ({form.form: form.exponent for form in found.forms} for found in (with_offset, without))
    assert next(forms) == pytest.approx(next(forms), abs=1e-4)
