"""Tokenizers: UTF-8 bytes, GPT-2's BPE, and a BPE trained on the corpus."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from scaling_jax.io import UserError

_GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
_GPT2_IDS = 50_257
_GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    separator: int  # the id at the end of every document
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


class TrainedBPE:
    """Byte-level BPE of the `tokenizers` library, trained on a corpus. The last id is the separator."""

    def __init__(self, name: str, json: str):
        """`json` is what `train_bpe` returns."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # packing already runs one process per core
        import tokenizers

        self.name = name
        self.json = json
        self._tokenizer = tokenizers.Tokenizer.from_str(json)
        self.separator = self._tokenizer.get_vocab_size()
        self.vocab_size = self.separator + 1
        self.sha256 = hashlib.sha256(json.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined([np.array(e.ids, np.uint32) for e in self._tokenizer.encode_batch_fast(list(texts))])

    def decode(self, tokens: np.ndarray) -> str:
        kept = np.asarray(tokens)
        return self._tokenizer.decode(kept[kept != self.separator].tolist())


def bpe_vocabulary(name: str) -> int | None:
    """The number of ids in `bpe:<vocabulary>`; None for `bytes` and `gpt2`.

    Raises:
      UserError: if there is no such tokenizer.
    """
    if name in ("bytes", "gpt2"):
        return None
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdecimal() and int(size) > 257:
        return int(size)
    if kind == "bpe":
        raise UserError(f"tokenizer {name!r}: the vocabulary must be a number above 257, such as bpe:4096")
    raise UserError(f"unknown tokenizer {name!r}: choose bytes, gpt2 or bpe:<vocabulary>, such as bpe:4096")


def most_ids(name: str) -> int:
    """The largest number of ids of a tokenizer, by its name. A trained tokenizer has fewer if its text is short.

    Raises:
      UserError: if there is no such tokenizer.
    """
    return bpe_vocabulary(name) or (Bytes.vocab_size if name == "bytes" else _GPT2_IDS)


def load_tokenizer(name: str, folder: Path) -> Tokenizer:
    """The tokenizer with this name; a trained one is read from `tokenizer.json` in `folder`."""
    if bpe_vocabulary(name) is None:
        return Bytes() if name == "bytes" else GPT2()
    return TrainedBPE(name, (folder / "tokenizer.json").read_text(encoding="utf-8"))


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


def _joined(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.zeros(0, np.uint32), *parts]), _lengths(parts)


def _lengths(parts: Sequence) -> np.ndarray:
    return np.fromiter(map(len, parts), np.int64, len(parts))


def _gpt2_folder() -> Path:
    import tempfile

    chosen = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / "data-gym-cache"
