"""Files of tokens, written here byte by byte as nanoGPT, llm.c, Megatron and NumPy write them."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling_jax.data import packing, prepare, token_documents
from scaling_jax.data.packing import inspect, vocabulary
from scaling_jax.data.token_documents import BLOCK, read_tokens
from scaling_jax.data.token_files import open_tokens
from scaling_jax.io import UserError

END = 999  # of a document
IDS = f"ids:1000,{END}"


def nano_gpt(path, tokens):
    path.write_bytes(b"".join(struct.pack("<H", token) for token in tokens))


def llm_c(path, tokens, magic=20240520, version=1, code="H", count=None):
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(1024, b"\0")
    path.write_bytes(header + b"".join(struct.pack(f"<{code}", token) for token in tokens))


def npy(path, tokens, dtype="<u2", shape=None):
    code = {"<u1": "B", "<u2": "H", "<u4": "I", "<i8": "q", ">i4": "i"}[dtype]
    said = {"descr": dtype, "fortran_order": False, "shape": shape or (len(tokens),)}
    header = (repr(said) + "\n").encode()
    content = b"".join(struct.pack(dtype[0] + code, token) for token in tokens)
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)


def megatron(path, documents, dtype=8, per_sequence=10**9, **wrong):
    """Each document in sequences of at most `per_sequence` tokens."""
    size, code = {1: (1, "B"), 4: (4, "i"), 5: (8, "q"), 8: (2, "H")}[dtype]
    sequences, starts = [], [0]
    for document in documents:
        sequences += [document[k : k + per_sequence] for k in range(0, len(document), per_sequence)]
        starts.append(len(sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [size * sum(lengths[:k]) for k in range(len(lengths))]
    fields = {"version": 1, "dtype": dtype, "sequences": len(lengths), "entries": len(starts)} | wrong
    lengths, pointers, starts = (fields.pop(k, v) for k, v in (("l", lengths), ("p", pointers), ("s", starts)))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", *fields.values())
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(starts)}q", *starts)
    )
    path.write_bytes(b"".join(struct.pack(f"<{code}", token) for sequence in sequences for token in sequence))


def flat(documents, end=END):
    return [token for document in documents for token in (*document, end)]


def some_documents(count=60, seed=0, length=40):
    draws = np.random.default_rng(seed)
    return [draws.integers(0, END, draws.integers(1, length)).tolist() for _ in range(count)]


def stream(rows):
    return [int(rows[0, 0]), *rows[:, 1:].reshape(-1).tolist()]


def documents_of(rows):
    """The documents of a split, with context 1, so that no token is left out."""
    found, document = [], []
    for token in stream(rows):
        if token == END:
            found.append(document)
            document = []
        else:
            document.append(token)
    assert document == []
    return found


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tokens"
    path.mkdir()
    return path


WRITERS = {
    "nanoGPT": lambda path, documents: nano_gpt(path, flat(documents)),
    "llm.c": lambda path, documents: llm_c(path, flat(documents)),
    "uint32 of llm.c": lambda path, documents: llm_c(path, flat(documents), 20240801, 7, "I"),
    "Megatron": lambda path, documents: megatron(path, documents),
    "int32 of Megatron with ends": lambda path, documents: megatron(path, [[*d, END] for d in documents], 4),
    "Megatron with sentences": lambda path, documents: megatron(path, documents, per_sequence=3),
    "uint16 of NumPy": lambda path, documents: npy(path.with_suffix(".npy"), flat(documents)),
    "int64 of NumPy": lambda path, documents: npy(path.with_suffix(".npy"), flat(documents), "<i8"),
    "big-endian of NumPy": lambda path, documents: npy(path.with_suffix(".npy"), flat(documents), ">i4"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_documents_and_the_same_split(folder, kind):
    documents = some_documents()
    WRITERS[kind](folder / "a.bin", documents)
    corpus = prepare(f"tokens:{folder}", 1, IDS, workers=1)
    train, test = documents_of(corpus.train_RxT1), documents_of(corpus.test_RxT1)
    assert [d for d in documents if d in train] == train
    assert [d for d in documents if d in test] == test
    assert len(train) + len(test) == len(documents)
    assert corpus.vocab_size == 1000
    assert corpus.manifest["documents"] == {"train": len(train), "test": len(test)}
    nano_gpt(folder.parent / "same.bin", flat(documents))
    same = prepare(f"tokens:{folder.parent}/same.bin", 1, IDS, workers=1)
    assert stream(same.test_RxT1) == stream(corpus.test_RxT1)


def test_a_separator_before_documents_is_one_after_them(folder):
    """As llm.c writes it."""
    documents = some_documents()
    tokens = flat(documents)
    llm_c(folder / "a.bin", [END, *tokens[:-1]])
    corpus = prepare(f"tokens:{folder}/a.bin", 1, IDS, workers=1)
    assert sorted(documents_of(corpus.train_RxT1) + documents_of(corpus.test_RxT1)) == sorted(documents)


texts = st.lists(st.lists(st.integers(0, END - 1), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    files=st.lists(st.tuples(st.sampled_from(sorted(WRITERS)), texts), min_size=1, max_size=4), cut=st.integers(1, 9)
)
def test_no_document_is_on_both_sides_and_none_is_lost(folder, files, cut):
    """In files of any formats, with the same documents here and there, and whatever ranges they are read in."""
    for old in folder.iterdir():
        old.unlink()
    for number, (kind, documents) in enumerate(files):
        WRITERS[kind](folder / f"{number}.bin", documents)
    sides = ([], [])
    for path in sorted(path for path in folder.iterdir() if path.suffix != ".idx"):
        file = open_tokens(path)
        count = len(file.tokens) if file.offsets is None else len(file.offsets)
        for start in range(0, count, cut):
            part = packing.look_up(f"tokens:{path}").shards[0][0]._replace(start=start, stop=min(start + cut, count))
            for held_out, tokens, _ in read_tokens(part, 1000, END):
                assert tokens[-1] == END
                body = " ".join(map(str, tokens.tolist())).split(str(END))
                sides[held_out].extend(text.strip() for text in body[:-1])
    expected = sorted(" ".join(map(str, document)) for _, documents in files for document in documents)
    assert sorted(sides[0] + sides[1]) == expected
    assert not set(sides[0]) & set(sides[1])


def test_shards_and_workers_change_nothing(folder, tmp_path, monkeypatch):
    nano_gpt(folder / "a.bin", flat(some_documents(400)))
    megatron(folder / "b.bin", some_documents(400, seed=1))
    whole = prepare(f"tokens:{folder}", 16, IDS, workers=1)
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(token_documents, "SHARD_BYTES", 2_000)
    monkeypatch.setattr(token_documents, "BLOCK", 256)
    cut = prepare(f"tokens:{folder}", 16, IDS, workers=2)
    assert cut.manifest == whole.manifest


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train.bin", "val.bin"), ("fineweb_train_000001.bin", "fineweb_val_000000.bin"), ("train/0.bin", "valid/0.bin")],
)
def test_a_file_named_for_validation_is_the_held_out_part(folder, train, validation):
    for name, documents in ((train, some_documents()), (validation, some_documents(9, seed=1))):
        (folder / name).parent.mkdir(exist_ok=True)
        nano_gpt(folder / name, flat(documents))
    corpus = prepare(f"tokens:{folder}", 1, "ids:1000", workers=1)
    assert stream(corpus.train_RxT1) == flat(some_documents())
    assert stream(corpus.test_RxT1) == flat(some_documents(9, seed=1))
    assert validation.rpartition("/")[2] in corpus.manifest["held_out"]
    alone = prepare(f"tokens:{folder / train}", 1, IDS, workers=1)
    assert alone.manifest["documents"]["test"] > 0
    assert "one document in ten" in alone.manifest["held_out"]


def test_blocks_are_held_out_where_nothing_says_where_documents_end(folder):
    tokens = np.random.default_rng(0).integers(0, 1000, 40 * BLOCK + 7).tolist()
    nano_gpt(folder / "a.bin", [*tokens, *tokens[: 5 * BLOCK]])
    corpus = prepare(f"tokens:{folder}", 1, "ids:1000", workers=1)
    blocks = [tuple(tokens[k : k + BLOCK]) for k in range(0, 40 * BLOCK, BLOCK)]
    train, test = stream(corpus.train_RxT1), stream(corpus.test_RxT1)
    assert len(train) + len(test) == 45 * BLOCK + 7
    inside = {
        side: {b for b in blocks if b in {tuple(s[k : k + BLOCK]) for k in range(0, len(s), BLOCK)}}
        for side, s in (("train", train), ("test", test))
    }
    assert inside["test"]
    assert not inside["train"] & inside["test"]


def test_one_text_counts_once(folder):
    """Hard links, symbolic links, and copies; also where a copy of the held-out file is among those to train on."""
    documents = some_documents()
    nano_gpt(folder / "a.bin", flat(documents))
    nano_gpt(folder / "b_copy.bin", flat(documents))
    (folder / "c_link.bin").symlink_to(folder / "a.bin")
    os.link(folder / "a.bin", folder / "d_link.bin")
    megatron(folder / "e.bin", some_documents(seed=1))
    for end in (".bin", ".idx"):
        (folder / f"f_copy{end}").write_bytes((folder / f"e{end}").read_bytes())
    corpus = prepare(f"tokens:{folder}", 1, IDS, workers=1)
    assert sum(corpus.manifest["documents"].values()) == 120
    assert corpus.manifest["copies"] == 3  # files, of which Megatron has two for a text
    (folder / "val.bin").write_bytes((folder / "a.bin").read_bytes())
    corpus = prepare(f"tokens:{folder}", 1, IDS, workers=1)
    assert sorted(documents_of(corpus.test_RxT1)) == sorted(documents)
    assert not any(document in documents for document in documents_of(corpus.train_RxT1))


def test_the_vocabulary_is_known_or_asked_for(folder):
    llm_c(folder / "gpt2.bin", flat(some_documents(), 50_256))
    llm_c(folder / "llama.bin", flat(some_documents(), 128_000), 20240801, 7, "I")
    nano_gpt(folder / "raw.bin", flat(some_documents()) + flat(some_documents(seed=2), 50_256))
    assert prepare(f"tokens:{folder}/gpt2.bin", 8, workers=1).manifest["tokenizer"] == "ids:50257,50256"
    assert prepare(f"tokens:{folder}/llama.bin", 8, workers=1).vocab_size == 128_256
    assert vocabulary(f"tokens:{folder}/llama.bin", "bytes") == 128_256
    assert prepare(f"tokens:{folder}/raw.bin", 8, "gpt2", workers=1).vocab_size == 50_257
    for several in ("raw", "*"):
        with pytest.raises(UserError, match=r"doesn't say which tokenizer .* \(up to .*ids:<vocabulary>"):
            prepare(f"tokens:{folder}/{several}.bin", 8)
    for wrong, why in (("bpe:300", "tokens already"), ("ids:500", r"raw\.bin has the id 50,256, .* 0 to 499")):
        with pytest.raises(UserError, match=why):
            prepare(f"tokens:{folder}/raw.bin", 8, wrong, workers=1)
    with pytest.raises(UserError, match=r"ids:500 is for --text 'tokens:<glob>'"):
        prepare(f"files:{folder}/*", 8, "ids:500")
    for wrong in ("ids:", "ids:1", "ids:5,5", "ids:5,x", "ids:99999999999"):
        with pytest.raises(UserError, match=r"such as ids:50257"):
            prepare(f"tokens:{folder}/raw.bin", 8, wrong)


def test_inspecting_shows_ids_unless_their_tokenizer_is_given(folder):
    nano_gpt(folder / "a.bin", flat(some_documents()))
    first = prepare(f"tokens:{folder}", 4, IDS, workers=1).train_RxT1[0].tolist()
    shown = inspect(f"tokens:{folder}", 4, IDS, rows=1)
    assert f"train row 0: '{' '.join(map(str, first))}'" in shown
    assert "bytes per test token" not in shown


def twice_as_many(path):
    llm_c(path, [1] * 500, count=1_000)


HOSTILE = {
    "empty": (lambda path: path.write_bytes(b""), r"a\.bin is empty"),
    "odd": (lambda path: path.write_bytes(b"abc"), r"a\.bin has 3 bytes, an odd number"),
    "uint32": (lambda path: path.write_bytes(struct.pack("<99I", *range(99))), "looks like raw uint32"),
    "cut": (twice_as_many, r"says that it holds 1,000 tokens, which take 3,024 bytes, not 2,024: it was cut off"),
    "too long": (lambda path: llm_c(path, [1] * 99, count=98), r"98 tokens.* it is damaged"),
    "negative": (lambda path: llm_c(path, [1] * 99, count=-99), r"-99 tokens: it is damaged"),
    "version": (lambda path: llm_c(path, [1] * 99, version=3), r"llm\.c file of version 3"),
    "header alone": (lambda path: path.write_bytes(struct.pack("<3i", 20240520, 1, 99)), "it was cut off"),
    "absurd": (lambda path: megatron(path, [[1, 2]], sequences=2**62), r"a\.idx says .*4,611,686,018,427,387,904"),
    "no index": (lambda path: (nano_gpt(path, [1]), path.with_suffix(".idx").write_bytes(b"x")), "isn't an index of"),
    "floats": (lambda path: megatron(path, [[1, 2]], dtype=8) or patched(path, 17, 6), "dtype code 6"),
    "pointers": (lambda path: megatron(path, [[1, 2], [3]], p=[0, 2]), r"a\.bin has 6 bytes, which aren't those"),
    "lengths": (lambda path: megatron(path, [[1, 2], [3]], l=[4, -1]), "which aren't those"),
    "documents": (lambda path: megatron(path, [[1], [3], [5]], s=[0, 2, 1, 3]), "don't follow each other"),
    "far documents": (lambda path: megatron(path, [[1], [3]], s=[0, 1, 9]), "don't follow each other"),
    "no documents": (lambda path: megatron(path, [[1], [3]], s=[], entries=0), "0 entries"),
    "cut .bin": (lambda path: (megatron(path, [[1], [3]]), path.write_bytes(b"ab")), "has 2 bytes, which aren't"),
    "cut .idx": (lambda path: (megatron(path, [[1], [3]]), cut(path.with_suffix(".idx"))), "it was cut off"),
}


def patched(path, position, byte):
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[position] = byte
    index.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_none_is_refused_in_one_line(folder, kind):
    write, why = HOSTILE[kind]
    write(folder / "a.bin")
    with pytest.raises(UserError, match=why) as refused:
        prepare(f"tokens:{folder}", 4, IDS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x93NUMPY\x01\x00", "isn't an array of NumPy"),
        (b"PK\x03\x04 an archive", "isn't an array of NumPy"),
        (b"\x93NUMPY\x01\x00\xff\xff{}", "isn't an array of NumPy"),
        (np.lib.format.magic(1, 0) + b"\x09\x00__import_", "isn't an array of NumPy"),
        (np.lib.format.magic(1, 0) + b"\x09\x00{'descr':", "isn't an array of NumPy"),
        (np.lib.format.magic(3, 0) + b"\x02\x00\x00\x00{}", "isn't an array of NumPy"),
    ],
)
def test_an_npy_that_is_none_is_refused_in_one_line(folder, content, why):
    (folder / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=why) as refused:
        prepare(f"tokens:{folder}", 4, IDS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros(9), "float64, not whole numbers"),
        (np.array([{}]), "object, not whole numbers"),
        (np.asfortranarray(np.ones((3, 4), int)), "column by column"),
        (np.zeros(0, int), "damaged or empty"),
        (np.array([5, -1]), r"has the id -1, but its tokenizer's ids are 0 to 999"),
    ],
)
def test_an_array_that_holds_no_ids_is_refused(folder, array, why):
    np.save(folder / "a.npy", array)
    with pytest.raises(UserError, match=why):
        prepare(f"tokens:{folder}", 4, IDS, workers=1)


def test_an_absurd_shape_is_refused(folder):
    npy(folder / "a.npy", [1, 2], shape=(10**15, 10**15))
    with pytest.raises(UserError, match="it was cut off"):
        prepare(f"tokens:{folder}", 4, IDS)


def test_what_is_no_plain_file_is_named_and_not_waited_for(folder):
    os.mkfifo(folder / "a.bin")
    (folder / "notes.txt").write_text("x")
    (folder / "lost.bin").symlink_to(folder / "nowhere")
    for pattern, why in (("a.bin", "is a pipe"), ("*.txt", r"matches notes\.txt, but no \.bin or \.npy")):
        with pytest.raises(UserError, match=why):
            prepare(f"tokens:{folder}/{pattern}", 4, IDS)


def test_a_separator_that_never_comes_is_named(folder, monkeypatch):
    monkeypatch.setattr(token_documents, "_LONGEST", 1_000)
    monkeypatch.setattr(token_documents, "_AT_ONCE", 100)
    nano_gpt(folder / "a.bin", [1, 2, 3] * 999)
    with pytest.raises(UserError, match=r"no id 999 in 1,000 tokens from token 0 on: .*ids:<vocabulary> for none"):
        prepare(f"tokens:{folder}", 4, IDS, workers=1)


@pytest.mark.slow
def test_a_large_file_is_never_in_memory_as_a_whole(folder):
    tokens = np.random.default_rng(0).integers(0, 900, 100_000_000, np.uint16)  # 200 MB
    tokens[::50_000] = END
    tokens.tofile(folder / "a.bin")
    code = (
        "import resource, numpy; from scaling_jax.data import prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"prepare('tokens:{folder}', 4, '{IDS}', workers=1)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100
