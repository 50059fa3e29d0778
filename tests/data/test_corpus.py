"""What was packed before is used only if it is whole and its text is still the same."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.data import corpus, prepare
from scaling_jax.data.packing import inspect
from scaling_jax.io import UserError


@pytest.fixture
def packed(own_text):
    source = f"files:{own_text}/*"
    return source, Path(prepare(source, 16).train_RxT1.filename).parent


@pytest.mark.parametrize("name", ["train.tokens", "test.tokens"])
def test_a_file_that_is_cut_is_refused(packed, name):
    source, folder = packed
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"{name} .*{len(content) - 2:,} bytes .*{len(content):,}.*remove {folder}"):
        prepare(source, 16)


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_was_altered_is_refused(packed, monkeypatch, large):
    source, folder = packed
    content = bytearray((folder / "train.tokens").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "train.tokens").write_bytes(content)
    if large:  # where checksums take long they are compared only when asked for
        monkeypatch.setattr(corpus, "_CHECKED_ALWAYS", 0)
        prepare(source, 16)
    for look in (lambda: prepare(source, 16, check=True), lambda: inspect(source, 16)):
        with pytest.raises(UserError, match=r"train\.tokens .*remove"):
            look()


@pytest.mark.parametrize("damage", ["cut", "other keys", "a list", "no tokens"])
def test_a_damaged_folder_is_refused_and_packed_again_once_removed(packed, damage):
    source, folder = packed
    manifest = folder / "manifest.json"
    if damage == "cut":
        manifest.write_text(manifest.read_text()[:100])
    if damage == "other keys":
        manifest.write_text("{}")
    if damage == "a list":
        manifest.write_text("[]")
    if damage == "no tokens":
        (folder / "test.tokens").unlink()
    with pytest.raises(UserError, match=r"is damaged .*: remove .* packed again") as caught:
        prepare(source, 16)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    prepare(source, 16)


def edited(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: value for key, value in (manifest | values).items() if value is not None}


@pytest.mark.parametrize("signed", [True, False], ids=["", "of version 0.1, which signed nothing"])
@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "<u4"},
        {"dtype": "<u1"},
        {"vocab_size": 70_000},
        {"sha256": "0" * 64},
        {"tokenizer": "gpt2"},
        {"checksums": {}},
        {"tokens": {"train": 3, "test": 3}},
        {"checksums": {"../../elsewhere": {"bytes": 0, "sha256": ""}}},
    ],
    ids=str,
)
def test_a_manifest_that_was_edited_is_refused(packed, values, signed):
    """Even where the files are whole: rows of another dtype are garbage that trains."""
    source, folder = packed
    if not signed:
        values = values | {"manifest_sha256": None}
    (folder / "manifest.json").write_text(json.dumps(edited(folder, **values)))
    with pytest.raises(UserError, match=r"manifest\.json was changed .*: remove .* packed again"):
        prepare(source, 16)


def test_a_manifest_without_a_checksum_of_its_own_is_that_of_version_0_1(packed):
    source, folder = packed
    (folder / "manifest.json").write_text(json.dumps(edited(folder, manifest_sha256=None)))
    assert len(prepare(source, 16).train_RxT1) > 9


def test_the_corpus_of_another_text_in_this_texts_folder_is_refused(packed, tmp_path):
    source, folder = packed
    other = tmp_path / "other"
    other.mkdir()
    for k in range(30):
        (other / f"{k}.txt").write_text(f"another text, {k} " * 30)
    exchanged = Path(prepare(f"files:{other}/*", 16).train_RxT1.filename).parent
    shutil.rmtree(folder)
    shutil.copytree(exchanged, folder)
    with pytest.raises(UserError, match=r"manifest\.json was changed .*other/\*"):
        prepare(source, 16)


def test_a_folder_without_its_manifest_is_packed_again_by_the_same_command(packed):
    source, folder = packed
    rows = prepare(source, 16).train_RxT1.copy()
    (folder / "manifest.json").unlink()
    np.testing.assert_array_equal(prepare(source, 16).train_RxT1, rows)
    assert (folder / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["another's", "edited", "a path", "of version 0.1", "cut"])
def test_a_fingerprint_that_was_edited_or_exchanged_is_made_again(own_text, tmp_path, monkeypatch, cache, damage):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("another text " * 99)
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    text = corpus.look_up(f"files:{own_text}/*").text
    (path,) = (cache / "fingerprints").glob("*")
    foreign = corpus.look_up(f"files:{other}/*").text
    (others,) = set((cache / "fingerprints").glob("*")) - {path}
    said = json.loads(path.read_text())
    path.write_text(
        {
            "another's": others.read_text(),
            "edited": json.dumps([*foreign[1:], said[3]]),
            "a path": json.dumps([1, 2, "../../../elsewhere", said[3]]),
            "of version 0.1": json.dumps(foreign[1:]),
            "cut": path.read_text()[:-9],
        }[damage]
    )
    assert corpus.look_up(f"files:{own_text}/*").text == text
    assert json.loads(path.read_text()) == said


def test_rows_of_another_version_are_refused(packed):
    source, folder = packed
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match=r"another version .*remove"):
        prepare(source, 16)


def test_a_trained_tokenizer_that_was_altered_is_refused(own_text):
    source = f"files:{own_text}/*"
    folder = Path(prepare(source, 16, "bpe:300").train_RxT1.filename).parent
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"version":"1.0"', '"version":"1.1"'))
    with pytest.raises(UserError, match=r"tokenizer\.json was changed"):
        prepare(source, 16, "bpe:300")


def test_inspecting_shows_counts_and_rows_and_packs_nothing(own_text, cache):
    source = f"files:{own_text}/*"
    with pytest.raises(
        UserError, match=rf"isn't packed as bytes yet: scaling-jax data prepare '{source}'".replace("*", r"\*")
    ):
        inspect(source, 16)
    assert not (cache / "rows").exists()
    corpus_ = prepare(source, 16)
    shown = inspect(source, 16, rows=2)
    assert "all checksums match" in shown
    assert f"{len(corpus_.train_RxT1):,} rows of 16" in shown
    assert "train row 0: " in shown
    assert f"test row {len(corpus_.test_RxT1) - 1}: " in shown


def test_files_are_read_again_only_if_they_changed(own_text, monkeypatch):
    later = time.time_ns() + 10**10
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: later)
        first = corpus.look_up(f"files:{own_text}/*.txt").text
        patched.setattr(corpus, "fingerprint", lambda *_: pytest.fail("read again"))
        assert corpus.look_up(f"files:{own_text}/*.txt").text == first
    (own_text / "3.txt").write_text((own_text / "3.txt").read_text(encoding="utf-8")[::-1], encoding="utf-8")
    assert corpus.look_up(f"files:{own_text}/*.txt").text.sha256 != first.sha256
