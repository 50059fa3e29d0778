import base64
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from scaling_jax.data import Bytes, prepare, tokenizers
from scaling_jax.data.packing import inspect
from scaling_jax.data.tokenizers import GPT2, HuggingFace, bpe_vocabulary, train_bpe
from scaling_jax.io import UserError

TEXTS = ["low lower lowest", "newer and newest", "<|endoftext|> is text", "  spaces \n\n\tand tabs ", "漢字 é", ""]


@pytest.fixture(scope="module")
def trained():
    return HuggingFace("bpe:300", train_bpe(TEXTS * 3, 300).encode())


@pytest.fixture
def made_up_gpt2(monkeypatch):
    """tiktoken's machinery over an encoding of bytes, two merges and <|endoftext|>."""
    ranks = {bytes([b]): b for b in range(256)} | {b"lo": 256, b"low": 257}
    encoding = tiktoken.Encoding(
        "made up", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


def check_round_trip(tokenizer):
    tokens, lengths = tokenizer.encode(TEXTS)
    assert len(tokens) == lengths.sum()
    assert tokens.max() < tokenizer.separator < tokenizer.vocab_size
    ends = np.cumsum(lengths)
    for text, start, end in zip(TEXTS, ends - lengths, ends, strict=True):
        assert tokenizer.decode(tokens[start:end]) == text
    assert tokenizer.decode(np.array([tokenizer.separator])) == ""


@given(st.text())
def test_bytes_round_trip_any_text(text):
    tokens, lengths = Bytes().encode([text])
    assert Bytes().decode(tokens) == text
    assert lengths.tolist() == [len(text.encode())]


@given(text=st.text())
def test_a_trained_bpe_round_trips_any_text(trained, text):
    assert trained.decode(trained.encode([text])[0]) == text


def test_texts_are_encoded_end_to_end(trained, made_up_gpt2):
    for tokenizer in (Bytes(), trained, GPT2()):
        check_round_trip(tokenizer)


def test_gpt2_merges_what_its_encoding_merges_and_takes_no_text_for_a_special_token(made_up_gpt2):
    tokens, _ = GPT2().encode(["low lo", "<|endoftext|>"])
    assert tokens.tolist() == [257, ord(" "), 256, *b"<|endoftext|>"]
    assert GPT2().separator == 258


def test_gpt2_without_network_says_where_its_file_goes(tmp_path, monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="must be downloaded once") as caught:
        GPT2()
    assert "\n" not in str(caught.value)
    name = str(caught.value).split(f"{tmp_path}/")[1].split()[0]

    # tiktoken itself looks there: a file of that name is what it reads instead of the address
    (tmp_path / name).write_bytes(b"placed by hand")
    assert tiktoken.load.read_file_cached(tokenizers._GPT2_URL) == b"placed by hand"


@pytest.fixture
def placed_vocabulary(tmp_path, monkeypatch):
    """A file of GPT-2's size and form where it is looked for, of other merges; its hash passes for the true one."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail("fetched"))
    tokens = [bytes([b]) for b in range(256)]
    tokens += [bytes([a, b]) for a in b"lower case" + bytes(range(128, 255)) for b in range(256)]
    tokens += [bytes([a, a, b, c]) for a in b"xyz" for b in range(80) for c in range(256)]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(dict.fromkeys(tokens))][:50_256]
    path = tmp_path / hashlib.sha1(tokenizers._GPT2_URL.encode()).hexdigest()
    path.write_bytes(b"".join(lines))
    sha256, true_sha256 = hashlib.sha256(path.read_bytes()).hexdigest(), tokenizers._GPT2_SHA256
    load = openai_public.load_tiktoken_bpe

    def load_with_its_hash(url, expected_hash):
        assert (url, expected_hash) == (tokenizers._GPT2_URL, true_sha256), "what our error message says is tiktoken's"
        return load(url, sha256)

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load_with_its_hash)
    monkeypatch.setattr(tokenizers, "_GPT2_SHA256", sha256)
    return path


def test_gpt2_is_loaded_from_a_file_placed_by_hand(placed_vocabulary):
    gpt2 = GPT2()
    assert (gpt2.vocab_size, gpt2.separator) == (50_257, 50_256)
    assert gpt2.decode(gpt2.encode(["low"])[0]) == "low"
    assert len(gpt2.encode(["low"])[0]) == 2


def test_the_documentation_places_gpt2s_file_where_it_is_looked_for():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for said in (
        tokenizers._GPT2_URL,
        tokenizers._GPT2_SHA256,
        hashlib.sha1(tokenizers._GPT2_URL.encode()).hexdigest(),
    ):
        assert said in text


def test_a_placed_file_that_is_not_gpt2s_is_refused_and_left_alone(placed_vocabulary):
    cut = placed_vocabulary.read_bytes()[:-1]
    placed_vocabulary.write_bytes(cut)
    with pytest.raises(UserError, match=r"is not GPT-2's vocabulary .*: save https://.* there again"):
        GPT2()
    assert placed_vocabulary.read_bytes() == cut


def test_the_same_texts_train_the_same_bpe_in_another_process(trained):
    code = f"from scaling_jax.data.tokenizers import train_bpe; print(train_bpe({TEXTS * 3!r}, 300), end='')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other == train_bpe(TEXTS * 3, 300)


def test_a_trained_bpe_knows_the_train_split_alone_and_is_kept_with_its_rows(own_text):
    from scaling_jax.data import is_test

    for k in range(30):
        word = "heldoutword" if is_test(f"{k}.txt") else "trainedword"
        (own_text / f"{k}.txt").write_text(f" {word}" * 200)
    corpus = prepare(f"files:{own_text}/*.txt", 8, "bpe:300")
    assert corpus.vocab_size <= 300
    assert corpus.manifest["tokenizer"] == "bpe:300"
    folder = corpus.train_RxT1.filename
    tokenizer = HuggingFace("bpe:300", (type(own_text)(folder).parent / "tokenizer.json").read_bytes())
    assert tokenizer.sha256 == corpus.manifest["tokenizer_sha256"]
    assert len(tokenizer.encode([" trainedword"])[0]) < 3
    assert len(tokenizer.encode([" heldoutword"])[0]) > 5
    assert corpus.manifest["test_bytes_per_token"] < 12 / 5
    shown = inspect(f"files:{own_text}/*.txt", 8, "bpe:300", rows=1)
    assert "trainedword" in shown
    assert "heldoutword" in shown


def test_the_largest_vocabularies_take_four_bytes():

    from scaling_jax.data.corpus import token_dtype

    assert token_dtype(65_536).itemsize == 2
    assert token_dtype(65_537).itemsize == 4


def test_names_of_tokenizers():
    assert bpe_vocabulary("bpe:4096") == 4096
    assert bpe_vocabulary("bytes") is None
    for wrong in ("bpe:", "bpe:8k", "bpe:257", "words"):
        with pytest.raises(UserError, match=r"such as bpe:4096"):
            bpe_vocabulary(wrong)
