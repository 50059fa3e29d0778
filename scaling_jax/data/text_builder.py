"""The sources `python` and `files:<glob>` as a TFDS data set in array_record files, without TensorFlow."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from scaling_jax.data.corpus import corpus_folder, look_up
from scaling_jax.data.shards import read
from scaling_jax.data.sources import Shard, find_documents
from scaling_jax.data.tfds_text import check_descriptions, quiet, split_parts
from scaling_jax.io import UserError
from scaling_jax.io.stores import cache_folder


class TextSource(tfds.core.GeneratorBasedBuilder):
    """The documents that packing reads, one example `{"name", "text"}` each, with the same splits and the same order.

    After importing this module, `tfds.builder("text_source", source="files:~/web/*.jsonl.gz#text")` gives it. `name` is
    the name of the file. Packing `files:` doesn't use this data set but reads the files directly. TFDS would make a
    second copy of the text, in one process that can't resume when interrupted.

    Raises:
      UserError: if the source, or a text in it, can't be read.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: str, **kwargs):
        found = look_up(source)
        self._shards = found.shards
        self._names = {str(document.path.absolute()): document.name for document in find_documents(source)}
        # The name contains the text's hash, so records of older files are never used for changed files.
        config = tfds.core.BuilderConfig(name=corpus_folder(found.text, "text").name)
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
            description="Text of this machine, one document per example.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict[str, str]]]:
        index, text = 0, ""
        for part in (part for shard in self._shards for part in shard if part.held_out in (None, held_out)):
            for piece in read([part]):
                if piece.held_out == held_out:
                    text += piece.text
                    if piece.last:
                        yield index, {"name": self._names[part.path], "text": text}
                        index, text = index + 1, ""


def embedded_shards() -> list[Shard]:
    """Shards of the TFDS data set of Python sources. Builds the data set if it isn't there yet, or is damaged."""
    quiet()
    folder = cache_folder() / "tfds"
    try:
        builder = _built(folder)
    except (UserError, OSError):
        raise
    except Exception:  # TFDS raises anything where its files in the folder are damaged
        shutil.rmtree(folder / TextSource.name, ignore_errors=True)
        builder = _built(folder)
    return [[part] for split in ("train", "test") for part in split_parts(builder, split, split == "test", "text")]


def _built(folder: Path) -> TextSource:
    builder = TextSource("python", data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    check_descriptions(Path(builder.data_dir))
    return builder
