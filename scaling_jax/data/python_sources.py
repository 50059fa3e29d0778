"""The embedded corpus, the Python standard library's sources, as a TFDS builder: array_record without TensorFlow."""

import contextlib
import io
from collections.abc import Sequence

import tensorflow_datasets as tfds

from scaling_jax.data.cache import cache_folder
from scaling_jax.data.sources import Document, Part, Shard, is_test
from scaling_jax.data.text_files import read_text
from scaling_jax.data.tfds_text import quiet, split_parts


class PythonSources(tfds.core.GeneratorBasedBuilder):
    """One example a file, `{"name", "text"}`; train or test by the hash of the name."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, documents: Sequence[Document], fingerprint: str, **kwargs):
        """`fingerprint` names the folder, so that another Python's sources never meet this one's records."""
        self._documents = documents
        super().__init__(config=tfds.core.BuilderConfig(name=fingerprint), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            description="Sources of the Python standard library, a document each.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples([d for d in self._documents if is_test(d.name) == held_out])
            for split, held_out in (("train", False), ("test", True))
        }

    def _generate_examples(self, documents):
        for index, document in enumerate(documents):
            text = "".join(piece.text for piece in read_text(Part("text", str(document.path), None)))
            yield index, {"name": document.name, "text": text}


def python_shards(documents: Sequence[Document], sha256: str) -> list[Shard]:
    """The sources' records, built now unless they were before, in the shards that packing reads."""
    quiet()
    builder = PythonSources(documents, sha256[:16], data_dir=cache_folder() / "tfds", file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return [[part] for split in ("train", "test") for part in split_parts(builder, split, split == "test", "text")]
