import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data import Bytes, bits_per_byte, is_test, prepare, rows_of, sources, text_files
from scaling_jax.io import UserError


@given(st.lists(st.integers(0, 256), max_size=60), st.integers(1, 9))
def test_rows_hold_the_stream_end_to_end_and_overlap_by_one_token(stream, context):
    rows = rows_of(np.array(stream, np.uint16), context)
    assert rows.shape == (max(0, (len(stream) - 1) // context), context + 1)
    predicted = rows[:, 1:].reshape(-1)
    assert predicted.tolist() == stream[1 : 1 + len(predicted)]
    assert rows[:, :-1].reshape(-1).tolist() == stream[: len(predicted)]


def test_rows_and_fingerprint_of_small_files_are_those_of_the_first_version(own_text):
    """Pinned, because committed results depend on them."""
    corpus = prepare(f"files:{own_text}/*", 16)
    assert corpus.manifest["sha256"] == "681dc6dc3bba6863287c1e05b53f1bc65e3d6f80b3e0f926ecc11fd54055abcb"
    assert [digest(rows) for rows in (corpus.train_RxT1, corpus.test_RxT1)] == [
        "c9f284b7bfd34cd3a3faabda3ae335d3a5a5fff094c4cc8a15549c60e64c1a77",
        "b47b09d28077e421cd808bfacb2cc99d0893456d3524815e6761cb7e06fc3047",
    ]
    assert (corpus.manifest["train_tokens"], corpus.manifest["test_tokens"]) == (674 * 16, 73 * 16)


def test_the_stream_is_every_document_in_order_with_a_separator_after_each(own_text):
    documents = sources.find_documents(f"files:{own_text}/*.txt")
    corpus = prepare(f"files:{own_text}/*.txt", 1)
    for held_out, rows in ((False, corpus.train_RxT1), (True, corpus.test_RxT1)):
        expected: list[int] = []
        for document in documents:
            if is_test(document.name) == held_out:
                expected += [*document.path.read_text(encoding="utf-8").encode(), 256]
        assert [rows[0, 0], *rows[:, 1]] == expected


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
    assert prepare(f"files:{own_text}/*.txt", 32).train_RxT1.filename == first.train_RxT1.filename
    (own_text / "0.txt").write_text("changed " * 50)
    second = prepare(f"files:{own_text}/*.txt", 16)
    assert second.manifest["sha256"] != first.manifest["sha256"]
    assert "changed changed" in Bytes().decode(np.concatenate([second.train_RxT1, second.test_RxT1])[:, 1:].reshape(-1))


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_pieces_and_workers_change_nothing(own_text, tmp_path, monkeypatch, workers):
    whole = prepare(f"files:{own_text}/*", 16)
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(sources, "SHARD_BYTES", 1000)
    monkeypatch.setattr(text_files, "_PIECE", 7)
    seen = []
    cut = prepare(f"files:{own_text}/*", 16, workers=workers, on_progress=seen.append)
    assert len(seen) > 5
    assert [p.done for p in seen] == list(range(seen[-1].total + 1))
    assert cut.manifest == whole.manifest
    assert digest(cut.train_RxT1) == digest(whole.train_RxT1)
    assert digest(cut.test_RxT1) == digest(whole.test_RxT1)


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path):
    """Peak memory beyond the imports stays far below 192 MB of text in one file."""
    folder = tmp_path / "large"
    folder.mkdir()
    for k in range(30):
        (folder / f"{k}.txt").write_text(f"small {k}")
    with (folder / "large.txt").open("w") as file:
        for _ in range(192):
            file.write("sixteen letters\n" * (1 << 16))
    code = (
        "import resource, numpy; from scaling_jax.data import prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"prepare('files:{folder}/*.txt', 4, workers=1)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100


def test_text_too_small_to_split_says_so(own_text):
    with pytest.raises(UserError, match=r"(train|test) row of .*: add text"):
        prepare(f"files:{own_text}/0.txt", 16)


def test_bits_per_byte_are_nats_per_token_over_the_bytes_of_one(own_text):
    corpus = prepare(f"files:{own_text}/*.txt", 16)
    held_out = [d.path for d in sources.find_documents(f"files:{own_text}/*.txt") if is_test(d.name)]
    text_bytes = sum(len(path.read_text(encoding="utf-8").encode()) for path in held_out)
    assert bits_per_byte(1.5, corpus.manifest) == pytest.approx(
        1.5 * (text_bytes + len(held_out)) / np.log(2) / text_bytes
    )
    assert bits_per_byte(1.5, {}) is None


def test_packing_imports_no_tensorflow(own_text):
    code = (
        "import sys; from scaling_jax.data import prepare; "
        f"prepare('files:{own_text}/*.txt', 16); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def digest(rows):
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
