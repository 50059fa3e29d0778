"""Tokenizers of other people: a tokenizer.json of Hugging Face's library, and a SentencePiece .model."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data import prepare
from scaling_jax.data.packing import inspect
from scaling_jax.data.tokenizers import HuggingFace, SentencePiece, from_file, ids_name, most_ids, train_bpe
from scaling_jax.io import UserError

TEXTS = ["low lower lowest", "newer and newest", "<|endoftext|> is text", "  spaces \n\n\tand tabs ", "漢字 é", ""]


def hugging_face(*specials, template=False):
    """A tokenizer.json such as on the Hub; the template ends texts by a special token, and cuts them after 3 tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(train_bpe(TEXTS * 3, 300))
    tokenizer.add_special_tokens(list(specials))
    if template:
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=8)
        end = specials[0]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def loaded():
    return HuggingFace("x.json", hugging_face("<|endoftext|>", "<|user|>", template=True).encode())


@given(text=st.text())
def test_every_text_comes_back_whole(loaded, text):
    """Whatever the file says of truncation, padding and templates; and no text is a special token."""
    tokens, lengths = loaded.encode([text])
    assert loaded.decode(tokens) == text
    assert loaded.separator not in tokens
    assert len(tokens) == lengths[0]


def test_a_special_token_in_a_text_is_text(loaded):
    tokens, _ = loaded.encode(["<|endoftext|><|user|>"])
    assert len(tokens) > 2
    assert loaded.decode(tokens) == "<|endoftext|><|user|>"


def test_the_separator_is_the_end_that_the_vocabulary_has():
    for end in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"):
        found = HuggingFace("x.json", hugging_face("<pad>", end).encode())
        assert found.separator == found.vocab_size - 1
        assert found.has_own_separator
    none = HuggingFace("x.json", hugging_face("<pad>").encode())
    assert not none.has_own_separator
    assert none.separator == none.vocab_size - 1


def test_sparse_ids_count_up_to_the_highest():
    said = json.loads(hugging_face())
    said["model"]["vocab"]["low"] = 70_000
    assert HuggingFace("x.json", json.dumps(said).encode()).vocab_size == 70_002


def test_a_text_is_packed_by_a_file_and_again_when_the_file_changes(own_text, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(hugging_face("<|endoftext|>", template=True))
    source = f"files:{own_text}/*.txt"
    corpus = prepare(source, 8, str(path), workers=2)
    one = HuggingFace("x.json", path.read_bytes())
    assert corpus.vocab_size == one.vocab_size == most_ids(str(path))
    assert corpus.manifest["separator"] == one.separator
    assert corpus.manifest["tokenizer_sha256"] == one.sha256
    train = np.concatenate([corpus.train_RxT1[0, :1], corpus.train_RxT1[:, 1:].reshape(-1)])
    assert "ünïcode and more" in one.decode(train)
    assert "document" in inspect(source, 8, str(path), rows=1)
    assert corpus.manifest["test_bytes_per_token"] > 1
    path.write_text(hugging_face("</s>"))
    other = prepare(source, 8, str(path), workers=1)
    assert other.manifest["sha256"] != corpus.manifest["sha256"]
    assert other.manifest["tokenizer_sha256"] != one.sha256
    with_it = tmp_path / "elsewhere"
    with_it.mkdir()
    shutil.move(path, with_it / path.name)  # what was packed needs only the same file somewhere
    assert prepare(source, 8, str(with_it / path.name)).manifest == other.manifest


def test_ids_of_elsewhere_are_shown_as_text_by_their_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(hugging_face("<|endoftext|>"))
    one = from_file(str(path))
    documents = [one.encode([f"low lower {k}"])[0].tolist() for k in range(80)]
    np.array([token for d in documents for token in (*d, one.separator)], np.uint16).tofile(tmp_path / "a.bin")
    source = f"tokens:{tmp_path}/a.bin"
    corpus = prepare(source, 4, str(path), workers=1)
    assert corpus.vocab_size == one.vocab_size
    assert corpus.manifest["tokenizer"] == ids_name(str(path)) == f"ids:{one.vocab_size},{one.separator}"
    assert sum(corpus.manifest["documents"].values()) == 80
    assert "low lower" in inspect(source, 4, str(path), rows=1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "can't be read"),
        (b"{}", "can't be read"),
        (b"\xff\xfe", "can't be read"),
        (b"[" * 100_000, "can't be read"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "empty vocabulary"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(own_text, tmp_path, content, why):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=why) as refused:
        prepare(f"files:{own_text}/*.txt", 8, str(path))
    assert "\n" not in str(refused.value)


def test_what_is_no_file_is_refused_and_not_waited_for(own_text, tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    for name, why in (("tokenizer.json", "is a pipe"), ("nothing.json", r"nothing\.json can't be read \(No such file")):
        with pytest.raises(UserError, match=why):
            prepare(f"files:{own_text}/*.txt", 8, str(tmp_path / name))


@pytest.fixture(scope="module")
def model():
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["low lower lowest newer and newest"] * 20 + ["abcdefghijklmnopqrstuvwxyz"]),
        model_writer=out,
        vocab_size=60,
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def test_a_sentencepiece_model_packs_text(model, own_text, tmp_path):
    path = tmp_path / "spm.model"
    path.write_bytes(model)
    one = SentencePiece("spm.model", model)
    assert one.decode(one.encode(["lower and lowest"])[0]) == "lower and lowest"
    tokens, lengths = one.encode(["low </s>", "newest"])
    assert one.separator not in tokens  # no text is a special token
    assert lengths.sum() == len(tokens)
    for k in range(30):
        (own_text / f"{k}.txt").write_text("newer and lowest " * (k + 9))
    corpus = prepare(f"files:{own_text}/[0-9]*.txt", 4, str(path), workers=2)
    assert corpus.vocab_size == one.vocab_size == most_ids(str(path))
    assert "newer and" in inspect(f"files:{own_text}/[0-9]*.txt", 4, str(path), rows=1)


def test_a_model_that_is_none_is_refused(model, own_text, tmp_path):
    path = tmp_path / "spm.model"
    for content in (b"", b"not a model", model[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"spm\.model can't be read|spm\.model has an empty vocabulary") as refused:
            prepare(f"files:{own_text}/*.txt", 8, str(path))
        assert "\n" not in str(refused.value)


def test_without_the_library_the_extra_is_named(own_text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "spm.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pip install 'scaling-jax\[sentencepiece\]'"):
        prepare(f"files:{own_text}/*.txt", 8, str(tmp_path / "spm.model"))
