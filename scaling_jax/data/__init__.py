"""Text to device batches: sources, tokenizers, packed rows, and the order in which rows are seen."""

from scaling_jax.data.cache import cache_folder
from scaling_jax.data.order import example_order
from scaling_jax.data.packing import Corpus, pack_rows, prepare
from scaling_jax.data.sources import find_documents, fingerprint, is_test
from scaling_jax.data.tokenizers import Bytes, Tokenizer

__all__ = [
    "Bytes",
    "Corpus",
    "Tokenizer",
    "cache_folder",
    "example_order",
    "find_documents",
    "fingerprint",
    "is_test",
    "pack_rows",
    "prepare",
]
