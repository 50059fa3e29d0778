import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from scaling_jax.data import is_test, packing, prepare, sources, text_files
from scaling_jax.data.shards import read
from scaling_jax.io import UserError

LINES = [{"text": f"line {k}, not too short to be split among rows", "body": f"body {k}", "n": k} for k in range(60)]
JSONL = "".join(json.dumps(line) + "\n" for line in LINES).encode()


def write(path, content=JSONL):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":  # two frames, as parallel compressors write
        half = len(content) // 2
        content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    path.write_bytes(content)
    return path


def texts(source):
    return [piece.text for shard in packing.look_up(source).shards for piece in read(shard)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_each_line_is_a_document_however_it_is_compressed(tmp_path, suffix):
    path = write(tmp_path / f"web.{suffix}")
    assert texts(f"files:{path}") == [line["text"] for line in LINES]
    assert texts(f"files:{path}#body") == [line["body"] for line in LINES]
    corpus = prepare(f"files:{path}#body", 3)
    held_out = [line["body"] for line in LINES if is_test(line["body"])]
    assert corpus.manifest["documents"] == {"train": 60 - len(held_out), "test": len(held_out)}
    stream = [token for body in held_out for token in [*body.encode(), 256]]
    assert corpus.test_RxT1[:, :-1].reshape(-1).tolist() == stream[: corpus.manifest["test_tokens"]]


def test_equal_documents_are_on_the_same_side_wherever_they_are(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl.gz", JSONL[len(JSONL) // 2 :].split(b"\n", 1)[1])
    sides: dict[str, set[bool]] = {}
    for shard in packing.look_up(f"files:{tmp_path}/*").shards:
        for piece in read(shard):
            sides.setdefault(piece.text, set()).add(piece.held_out)
    assert {len(side) for side in sides.values()} == {1}
    assert {True} in sides.values()


@pytest.mark.parametrize("shard_bytes", [50, 97, 101, 1000])
def test_ranges_of_a_large_file_hold_every_line_once(tmp_path, monkeypatch, shard_bytes):
    path = write(tmp_path / "web.jsonl")
    monkeypatch.setattr(sources, "SHARD_BYTES", shard_bytes)
    assert len(packing.look_up(f"files:{path}").shards) >= len(JSONL) // max(shard_bytes, len(JSONL) // 4000) // 2
    assert texts(f"files:{path}") == [line["text"] for line in LINES]


def test_blank_lines_are_none_and_empty_texts_are_documents(tmp_path):
    path = write(tmp_path / "web.jsonl", b'{"text": "a"}\n\n  \n{"text": ""}\n{"text": "b"}')
    assert texts(f"files:{path}") == ["a", "", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "n": 3}', "line 61: .*'text'.*body"),
        (b'{"text": 3}', "line 61: .*'text'.*int"),
        (b'["text"]', "line 61: .*JSON object"),
        (b'{"text": "cut o', "line 61: not JSON"),
        (b'{"text": "\xff\xfe"}', "line 61: not UTF-8 text"),
        (rb'{"text": "\ud800"}', "line 61: not UTF-8 text"),
    ],
)
def test_a_line_without_text_is_named(tmp_path, line, message, monkeypatch):
    path = write(tmp_path / "web.jsonl", JSONL + line + b"\n" + JSONL)
    monkeypatch.setattr(sources, "SHARD_BYTES", 1000)
    with pytest.raises(UserError, match=rf"web\.jsonl, {message}") as caught:
        prepare(f"files:{path}", 8)
    assert "\n" not in str(caught.value)


def test_a_field_of_files_without_fields_is_refused(own_text):
    with pytest.raises(UserError, match=r"only \.jsonl files have fields"):
        prepare(f"files:{own_text}/*.txt#text", 16)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst"])
def test_a_compressed_file_that_is_cut_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"web.{suffix}")
    whole = path.read_bytes()
    for cut in (len(whole) - 5, len(whole) * 3 // 4, 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"web\.{suffix} can't be decompressed .*: .*damaged"):
            texts(f"files:{path}")
    path.write_bytes(b"no compression at all, only text, long enough for a header")
    with pytest.raises(UserError, match="can't be decompressed"):
        texts(f"files:{path}")


def test_files_that_are_not_text_are_named(own_text):
    (own_text / "7.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match=r"7\.txt is not UTF-8 text"):
        prepare(f"files:{own_text}/*.txt", 16)


def test_an_empty_file_is_an_empty_document(own_text):
    (own_text / "another.txt").write_bytes(b"")
    assert texts(f"files:{own_text}/another.txt") == [""]
    before = sum(prepare(f"files:{own_text}/[0-9]*.txt", 16).manifest["tokens"].values())
    (own_text / "9a.txt").write_bytes(b"")
    assert sum(prepare(f"files:{own_text}/[0-9]*.txt", 16).manifest["tokens"].values()) == before + 1


def _bomb(path, total_bytes):
    """A small file that expands to lines of zeros, far more than its size."""
    block = ("0" * 1000 + "\n").encode() * 1000
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with path.open("wb") as file:
        for _ in range(total_bytes // len(block)):
            file.write(compressor.compress(block))
        file.write(compressor.flush())
    return path


PEAK = """
import sys
from scaling_jax.data.sources import Part
from scaling_jax.data.text_files import read_lines, read_text
from scaling_jax.io import UserError

def peak():  # MiB; of this process alone, as ru_maxrss starts from the parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10

before = peak()
try:
    for piece in {"lines": read_lines, "text": read_text}[sys.argv[2]](Part("", sys.argv[1], False)):
        pass
    print("taken")
except UserError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
def test_a_small_file_that_expands_without_end_is_refused_in_little_memory(tmp_path):
    path = _bomb(tmp_path / "web.txt.zst", 2_000_000_000)
    assert path.stat().st_size < 300_000
    done = subprocess.run([sys.executable, "-c", PEAK, path, "text"], capture_output=True, text=True, check=True)
    said, mib = done.stdout.splitlines()
    assert str(path) in said
    assert "expands to more than" in said
    assert int(mib) < 100


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of memory")
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_without_end_is_named_in_little_memory(tmp_path, suffix):
    path = write(tmp_path / f"web.{suffix}", b'{"text": "' + b"0" * 200_000_000)
    done = subprocess.run([sys.executable, "-c", PEAK, path, "lines"], capture_output=True, text=True, check=True)
    said, mib = done.stdout.splitlines()
    assert said == f"{path}, line 1: the line has more than 64 MiB: divide the document"
    assert int(mib) < 250


def test_text_of_ordinary_expansion_is_taken_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_ALWAYS_TAKEN", 0)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst"):
        assert len(texts(f"files:{write(tmp_path / f'web.{suffix}')}")) == len(LINES)


def test_a_line_nested_too_deep_is_named(tmp_path):
    path = write(tmp_path / "web.jsonl", b"[" * 200_000 + b"\n")
    with pytest.raises(UserError, match=r"line 1: not JSON"):
        texts(f"files:{path}")
