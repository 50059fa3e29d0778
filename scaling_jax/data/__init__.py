"""From text to batches on devices: sources, tokenizers, packed corpora, and the order in which runs see rows."""

from scaling_jax.data.corpus import Corpus, bits_per_byte, rows_of
from scaling_jax.data.examples import Examples, examples_of
from scaling_jax.data.feeding import example_order
from scaling_jax.data.packing import PackProgress, prepare
from scaling_jax.data.sources import find_documents, fingerprint, is_test
from scaling_jax.data.tokenizers import Bytes, Tokenizer
from scaling_jax.io.stores import cache_folder

__all__ = [
    "Bytes",
    "Corpus",
    "Examples",
    "PackProgress",
    "Tokenizer",
    "bits_per_byte",
    "cache_folder",
    "example_order",
    "examples_of",
    "find_documents",
    "fingerprint",
    "is_test",
    "prepare",
    "rows_of",
]
