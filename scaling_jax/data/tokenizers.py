"""Tokenizers: UTF-8 bytes, GPT-2's BPE, a BPE trained on the corpus, and files of Hugging Face and SentencePiece."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from scaling_jax.io import UserError
from scaling_jax.io.files import read_whole

_GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
_GPT2_IDS = 50_257
_ENDS = (  # of documents, in the vocabularies of GPT-2, Llama 3, Llama, Gemma, DeepSeek and BERT
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
_MOST_IDS = 1 << 31
_LARGEST_FILE = 1 << 27  # bytes of a tokenizer; the largest have 35 MB
FILE_SUFFIXES = (".json", ".model")
_GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    separator: int  # the id at the end of every document; -1 if none
    sha256: str  # of everything that determines the ids

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts end to end [sum of lengths], and the length of each [texts]."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens, without separators."""
        ...


class Bytes:
    """UTF-8 bytes as ids 0…255; 256 is the separator."""

    name = "bytes"
    vocab_size = 257
    separator = 256
    sha256 = hashlib.sha256(b"UTF-8 bytes, 256 ends a document").hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        whole = "".join(texts)
        if whole.isascii():
            return np.frombuffer(whole.encode("ascii"), np.uint8).astype(np.uint16), _lengths(texts)
        encoded = [text.encode("utf-8") for text in texts]
        tokens = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint16)
        return tokens, _lengths(encoded)

    def decode(self, tokens: np.ndarray) -> str:
        kept = np.asarray(tokens)
        return kept[kept < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class GPT2:
    """GPT-2's 50,257 tokens (Radford et al. 2019), as in Kaplan et al. 2020. The separator is `<|endoftext|>`.

    Raises:
      UserError: if the vocabulary file isn't cached and can't be downloaded, or the cached file is another one.
    """

    name = "gpt2"

    def __init__(self):
        import tiktoken

        placed = _gpt2_folder() / hashlib.sha1(_GPT2_URL.encode()).hexdigest()
        if placed.exists() and hashlib.sha256(placed.read_bytes()).hexdigest() != _GPT2_SHA256:  # tiktoken removes it
            raise UserError(f"{placed} is not GPT-2's vocabulary (sha256 {_GPT2_SHA256}): save {_GPT2_URL} there again")
        try:
            self._encoding = tiktoken.get_encoding("r50k_base")  # GPT-2's vocabulary, in one file instead of two
        except Exception as error:  # tiktoken's HTTP library may raise anything
            raise UserError(
                f"the GPT-2 tokenizer must be downloaded once ({type(error).__name__}); without a network, save "
                f"{_GPT2_URL} as {placed} (TIKTOKEN_CACHE_DIR sets the folder)"
            ) from None
        self.vocab_size = self._encoding.n_vocab
        self.separator = self._encoding.eot_token
        digest = hashlib.sha256()
        for piece in self._encoding.token_byte_values():
            digest.update(len(piece).to_bytes(2, "big") + piece)
        self.sha256 = digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # No special tokens in a text: "<|endoftext|>" is encoded as these 13 characters.
        parts = [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return _joined(parts)

    def decode(self, tokens: np.ndarray) -> str:
        kept = np.asarray(tokens)
        return self._encoding.decode(kept[kept != self.separator].tolist())


class HuggingFace:
    """A tokenizer.json of the `tokenizers` library: `bpe:<vocabulary>`, or a file of somebody else.

    The separator is the first of `</s>`, `<|endoftext|>` and the like that the vocabulary has, else one id more. A text
    is encoded whole, and no text is taken for a special token, whatever the file says of truncation and templates.

    Raises:
      UserError: if the file isn't a tokenizer.
    """

    def __init__(self, name: str, content: bytes):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # packing already runs one process per core
        import tokenizers

        self.name = name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises this type itself
            raise UserError(
                f"tokenizer {name} can't be read ({' '.join(str(error).split())[:200]}): give a tokenizer.json of "
                "Hugging Face's library"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise UserError(f"tokenizer {name} has an empty vocabulary: give another tokenizer.json")
        self.vocab_size = max(ids.values()) + 1
        self.separator = next((ids[end] for end in _ENDS if end in ids), self.vocab_size)
        self.has_own_separator = self.separator < self.vocab_size
        self.vocab_size += not self.has_own_separator
        self.sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _joined([np.array(e.ids, np.uint32) for e in encodings])

    def decode(self, tokens: np.ndarray) -> str:
        kept = np.asarray(tokens)
        return self._tokenizer.decode(kept[kept != self.separator].tolist(), skip_special_tokens=False)


class SentencePiece:
    """A SentencePiece .model, by the `sentencepiece` library. The separator is its end of a sentence, else one id more.

    Raises:
      UserError: if the library is missing, or the file isn't a model.
    """

    def __init__(self, name: str, content: bytes):
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                f"tokenizer {name} needs the package sentencepiece: pip install 'scaling-jax[sentencepiece]'"
            ) from None
        self.name = name
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.load_from_serialized_proto(content)
            ids = self._model.get_piece_size()
        except Exception as error:  # RuntimeError, and others from version to version
            raise UserError(
                f"tokenizer {name} can't be read ({' '.join(str(error).split())[:200]}): give a .model of SentencePiece"
            ) from None
        if not ids:
            raise UserError(f"tokenizer {name} has an empty vocabulary: give a .model of SentencePiece")
        self.has_own_separator = self._model.eos_id() >= 0
        self.separator = self._model.eos_id() if self.has_own_separator else ids
        self.vocab_size = ids + (not self.has_own_separator)
        self.sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined([np.array(ids, np.uint32) for ids in self._model.encode(list(texts), num_threads=1)])

    def decode(self, tokens: np.ndarray) -> str:
        kept = np.asarray(tokens)
        return self._model.decode(kept[kept != self.separator].tolist())


class Ids:
    """Ids that another program made, `ids:<vocabulary>[,<separator>]`: numbers from 0, which stand for no text here."""

    def __init__(self, name: str):
        vocabulary, _, separator = name.removeprefix("ids:").partition(",")
        self.name, self.vocab_size = name, int(vocabulary)
        self.separator = int(separator) if separator else -1
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        raise UserError(f"tokenizer {self.name} makes no ids of text: it is for --text 'tokens:<glob>'")

    def decode(self, tokens: np.ndarray) -> str:
        return " ".join(map(str, np.asarray(tokens).tolist()))


def bpe_vocabulary(name: str) -> int | None:
    """The number of ids in `bpe:<vocabulary>`; None for other tokenizers.

    Raises:
      UserError: if there is no such tokenizer.
    """
    if name in ("bytes", "gpt2") or is_file(name):
        return None
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and int(size) > 257:
        return int(size)
    if kind == "bpe":
        raise UserError(f"tokenizer {name!r}: the vocabulary must be a number above 257, such as bpe:4096")
    if kind == "ids":
        vocabulary, comma, separator = size.partition(",")
        if not (vocabulary.isdecimal() and 1 < int(vocabulary) <= _MOST_IDS):
            raise UserError(f"tokenizer {name!r}: the vocabulary must be a number from 2 to 2^31, such as ids:50257")
        if comma and not (separator.isdecimal() and int(separator) < int(vocabulary)):
            raise UserError(f"tokenizer {name!r}: give the id that ends documents, such as ids:50257,50256")
        return None
    raise UserError(
        f"unknown tokenizer {name!r}: choose bytes, gpt2, bpe:<vocabulary>, such as bpe:4096, or the path of a "
        "tokenizer.json or a SentencePiece .model"
    )


def is_file(name: str) -> bool:
    """True if a tokenizer's name is the path of a file."""
    return name.endswith(FILE_SUFFIXES)


def read_tokenizer(name: str) -> tuple[str, bytes]:
    """The file of a tokenizer whose name is a path: its name in a corpus folder, and its content.

    Raises:
      UserError: if it can't be read.
    """
    path = Path(name).expanduser()
    try:
        return f"tokenizer{path.suffix}", read_whole(path, _LARGEST_FILE)
    except OSError as error:
        raise UserError(f"tokenizer {name} can't be read ({error.strerror}): give the path of a file") from None


def from_file(name: str) -> "HuggingFace | SentencePiece":
    """The tokenizer whose name is the path of its file.

    Raises:
      UserError: if it can't be read.
    """
    return _from_content(name, read_tokenizer(name)[1])


def most_ids(name: str) -> int:
    """The largest number of ids of a tokenizer, by its name. A trained tokenizer has fewer if its text is short.

    Raises:
      UserError: if there is no such tokenizer.
    """
    if is_file(name):
        return from_file(name).vocab_size
    if (trained := bpe_vocabulary(name)) is not None:
        return trained
    return {"bytes": Bytes.vocab_size, "gpt2": _GPT2_IDS}.get(name) or Ids(name).vocab_size


def ids_name(name: str) -> str:
    """`ids:<vocabulary>[,<separator>]` with the ids of GPT-2 or a file. For ids that were made by this tokenizer."""
    if name == "gpt2":
        return f"ids:{_GPT2_IDS},{_GPT2_IDS - 1}"
    made_by = from_file(name)
    own = made_by.has_own_separator
    return f"ids:{made_by.vocab_size},{made_by.separator}" if own else f"ids:{made_by.vocab_size - 1}"


def load_tokenizer(name: str, folder: Path) -> Tokenizer:
    """The tokenizer with this name. That of a corpus, or of a file, is read from `folder`, the corpus folder."""
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return GPT2()
    if is_file(name):
        return _from_content(name, (folder / f"tokenizer{Path(name).suffix}").read_bytes())
    if name.startswith("ids:"):
        return Ids(name)
    return HuggingFace(name, (folder / "tokenizer.json").read_bytes())


def train_bpe(texts: Iterable[str], vocabulary: int) -> str:
    """Trains byte-level BPE with at most `vocabulary` ids, including the separator. Returns JSON.

    The result depends only on the texts.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _from_content(name: str, content: bytes) -> HuggingFace | SentencePiece:
    return (HuggingFace if name.endswith(".json") else SentencePiece)(name, content)


def _joined(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.zeros(0, np.uint32), *parts]), _lengths(parts)


def _lengths(parts: Sequence) -> np.ndarray:
    return np.fromiter(map(len, parts), np.int64, len(parts))


def _gpt2_folder() -> Path:
    import tempfile

    chosen = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / "data-gym-cache"
