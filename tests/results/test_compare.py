import csv
import json

import numpy as np
import pytest

from scaling_jax.cli.main import main
from scaling_jax.io import UserError
from scaling_jax.results.compare import compare_scans
from tests.fitting.planted import Planted


def write(path, change=lambda columns: columns, *, seed=0, **options):
    columns = change(Planted(**{"num_models": 1, "num_losses": 4} | options).columns(np.random.default_rng(seed)))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "batch_tokens", "target_loss", "steps", "seed"])
        writer.writerows(
            zip(*(columns[name] for name in ("model", "batch_tokens", "target_loss", "steps", "run")), strict=True)
        )
    return path


def fewer(share):
    return lambda columns: columns | {"steps": columns["steps"] * (1 - share)}


def test_a_planted_saving_is_found_at_every_batch(tmp_path):
    paths = [write(tmp_path / "a.csv", noise=1e-6), write(tmp_path / "b.csv", fewer(0.2), noise=1e-6)]
    compared = compare_scans(paths)
    (pair,) = compared.pairs
    assert pair.overall == pytest.approx(0.2, abs=1e-3)
    assert [row.batch for row in pair.batches] == list(Planted().batches)
    for row in pair.batches:
        assert row.saving == pytest.approx(0.2, abs=1e-3)
        assert row.tokens[0] == pytest.approx(row.steps[0] * row.batch)
    assert {row.name for row in pair.at_losses} == {"a", "b"}
    lowest = [row for row in pair.at_losses if row.loss == pytest.approx(1.75)]
    assert [row.b_crit for row in lowest] == pytest.approx([Planted().b_crit(1.75)] * 2, rel=0.01)


@pytest.mark.slow
def test_intervals_hold_a_planted_saving_as_often_as_they_say(tmp_path):
    held = []
    for seed in range(12):
        paths = [write(tmp_path / "a.csv", seed=seed), write(tmp_path / "b.csv", fewer(0.1), seed=1_000 + seed)]
        (pair,) = compare_scans(paths).pairs
        held += [row.interval[0] <= 0.1 <= row.interval[1] for row in pair.batches]
    assert np.mean(held) > 0.88


def test_other_tokenizers_are_compared_in_bytes(tmp_path):
    """The same scan, with tokens of four bytes: losses are four times as high, batches and tokens a quarter."""

    def four_bytes(columns):
        return columns | {
            "batch_tokens": columns["batch_tokens"] / 4,
            "target_loss": columns["target_loss"] * 4,
            "steps": columns["steps"] * 0.7,
        }

    paths = [write(tmp_path / "a.csv", noise=1e-6), write(tmp_path / "b.csv", four_bytes, noise=1e-6)]
    compared = compare_scans(paths, bytes_per_token=(1.0, 4.0))
    assert compared.in_bytes
    assert compared.pairs[0].overall == pytest.approx(0.3, abs=1e-3)
    assert compared.pairs[0].losses[-1] == pytest.approx(1.75 / np.log(2))


def test_other_batches_and_losses_are_interpolated(tmp_path):
    paths = [
        write(tmp_path / "a.csv", noise=1e-6),
        write(
            tmp_path / "b.csv",
            fewer(0.2),
            noise=1e-6,
            batches=tuple(int(200 * 2**k) for k in range(8)),
            num_losses=11,
        ),
    ]
    (pair,) = compare_scans(paths).pairs
    assert len(pair.batches) == 7
    assert [row.saving for row in pair.batches] == pytest.approx([0.2] * 7, abs=0.03)


def test_what_cant_be_compared_is_refused(tmp_path):
    first = write(tmp_path / "a.csv")
    with pytest.raises(UserError, match="two results folders"):
        compare_scans([first])
    with pytest.raises(UserError, match=r"no .*none\.csv"):
        compare_scans([first, tmp_path / "none.csv"])
    with pytest.raises(UserError, match="needs 2 positive numbers"):
        compare_scans([first, first], bytes_per_token=(1.0,))
    far = write(tmp_path / "far.csv", lambda columns: columns | {"target_loss": columns["target_loss"] + 5})
    with pytest.raises(UserError, match="no loss in common"):
        compare_scans([first, far])


def test_the_command_writes_a_figure_with_its_data(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / "adamw.csv"), write(tmp_path / "muon.csv", fewer(0.2), seed=1)]
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["scaling-jax", "compare", *map(str, paths), "--out", str(out), "--json"])
    main()
    (pair,) = json.loads(capsys.readouterr().out)
    assert 0.15 < pair["overall"] < 0.25
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert len(rows) == 7
    assert (out / "comparison.png").stat().st_size > 10_000
