"""The loop of `scan_and_widen`, with a scan that trains nothing."""

import dataclasses

import pytest

from scaling_jax.console import commands
from scaling_jax.scanning.experiment import QUICK
from scaling_jax.scanning.widening import Wider


class Results:
    def __init__(self, folder):
        pass

    def fit(self):
        return None


@pytest.mark.parametrize("complete", [True, False])
def test_it_scans_again_while_an_end_is_missing_and_says_why(complete, monkeypatch, tmp_path, capsys):
    scanned = []

    def scan(experiment, results, **options):
        scanned.append((max(experiment.batch_tokens), options["minutes"]))
        return complete

    def wider(experiment, fit, least, most):
        twice = 2 * max(experiment.batch_tokens)
        more = dataclasses.replace(experiment, batch_tokens=(*experiment.batch_tokens, twice))
        return Wider(more, (), ("1x16", "1x32")) if twice <= most else None

    monkeypatch.setattr(commands, "scan_on_console", scan)
    monkeypatch.setattr(commands, "read_results", Results)
    monkeypatch.setattr(commands, "wider", wider)
    assert commands.scan_and_widen(QUICK, tmp_path, None, 40_000, minutes=None) == complete
    assert scanned == [(8_192, None), (16_384, None), (32_768, None)][: 3 if complete else 1]
    said = " ".join(capsys.readouterr().out.split())
    assert ("1x16, 1x32: steps still fall with the batch at the largest, so 16,384 tokens are next" in said) == complete


def test_without_limits_nothing_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "scan_on_console", lambda *_, **__: True)
    monkeypatch.setattr(commands, "read_results", None)
    assert commands.scan_and_widen(QUICK, tmp_path, None, None)
