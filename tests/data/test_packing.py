import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data import Bytes, is_test, pack_rows, prepare
from scaling_jax.errors import UserError


@given(st.lists(st.lists(st.integers(0, 255), max_size=30), max_size=8), st.integers(1, 9))
def test_rows_hold_the_documents_end_to_end_and_overlap_by_one_token(documents, context):
    rows = pack_rows((np.array(d, np.uint16) for d in documents), 256, context)
    stream = [token for document in documents for token in [*document, 256]]
    assert len(rows) == max(0, (len(stream) - 1) // context)
    predicted = rows[:, 1:].reshape(-1)
    assert predicted.tolist() == stream[1 : 1 + len(predicted)]
    assert rows[:, :-1].reshape(-1).tolist() == stream[: len(predicted)]


@given(st.text())
def test_bytes_round_trip_any_text(text):
    assert Bytes().decode(Bytes().encode(text)) == text


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(30):
        (folder / f"{k}.txt").write_text(f"document {k}: " + "ünïcode and more " * 20)
    return folder


def test_train_and_test_rows_come_from_their_own_documents(own_text):
    corpus = prepare(f"files:{own_text}/*.txt", 16)
    for split, held_out in ((corpus.train_RxT1, False), (corpus.test_RxT1, True)):
        text = Bytes().decode(split[:, 1:].reshape(-1))
        present = {k for k in range(30) if f"document {k}: " in text}
        allowed = {k for k in range(30) if is_test(f"{k}.txt") == held_out}
        assert present
        assert present <= allowed


def test_packed_rows_are_reused_and_repacked_when_a_file_changes(own_text):
    first = prepare(f"files:{own_text}/*.txt", 16)
    assert prepare(f"files:{own_text}/*.txt", 16).train_RxT1.filename == first.train_RxT1.filename
    (own_text / "0.txt").write_text("changed " * 50)
    second = prepare(f"files:{own_text}/*.txt", 16)
    assert second.manifest["sha256"] != first.manifest["sha256"]
    assert "changed changed" in Bytes().decode(np.concatenate([second.train_RxT1, second.test_RxT1])[:, 1:].reshape(-1))


def test_text_too_small_to_split_says_so(own_text):
    with pytest.raises(UserError, match=r"leave no (train|test) row"):
        prepare(f"files:{own_text}/0.txt", 16)


def test_files_that_are_not_text_are_named(own_text):
    (own_text / "7.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match=r"7\.txt is not UTF-8 text"):
        prepare(f"files:{own_text}/*.txt", 16)


def test_packing_imports_no_tensorflow(own_text):
    code = (
        "import sys; from scaling_jax.data import prepare; "
        f"prepare('files:{own_text}/*.txt', 16); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
