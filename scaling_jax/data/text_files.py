"""TFDS builder over text files on this machine: array_record, built and read without TensorFlow."""

import tokenize
from collections.abc import Sequence

import tensorflow_datasets as tfds

from scaling_jax.data.sources import Document, is_test
from scaling_jax.errors import UserError


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """One example a file, `{"name", "text"}`; train or test by the hash of the name."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, documents: Sequence[Document], fingerprint: str, **kwargs):
        """`fingerprint` names the folder, so that other text never meets this one's records."""
        self._documents = documents
        super().__init__(config=tfds.core.BuilderConfig(name=fingerprint), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            description="Text files of this machine, a document each.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples([d for d in self._documents if not is_test(d.name)]),
            "test": self._generate_examples([d for d in self._documents if is_test(d.name)]),
        }

    def _generate_examples(self, documents):
        for index, document in enumerate(documents):
            yield index, {"name": document.name, "text": read_text(document)}


def read_text(document: Document) -> str:
    """A file's text: Python sources by their coding cookie, anything else as UTF-8.

    Raises:
      UserError: if the file isn't text in that encoding.
    """
    try:
        if document.path.suffix == ".py":
            with tokenize.open(document.path) as file:
                return file.read()
        return document.path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{document.path} is not UTF-8 text ({error}): convert it or leave it out of --text") from None
