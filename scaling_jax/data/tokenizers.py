"""Text to token ids and back."""

from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    separator: int  # ends every document

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> str: ...


class Bytes:
    """UTF-8 bytes, ids 0…255, and 256 between documents."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> str:
        kept = np.asarray(tokens)
        return kept[kept < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
