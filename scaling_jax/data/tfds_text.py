"""Documents from TFDS text data sets, read as array_record through `as_data_source`, without TensorFlow."""

import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.data.sources import MOST_SHARDS, SHARD_BYTES, Fingerprint, Part, Source, is_test
from scaling_jax.data.text_files import Piece
from scaling_jax.io import UserError

_BYTES_AT_ONCE, _RECORDS_AT_ONCE = 4 << 20, 8192  # one read call takes as long as hundreds of short records
_builders: dict[str, Any] = {}  # by folder; for a process that only reads, `_source` makes them from the folder


def find_data_set(source: str) -> Source:
    """The text of `tfds:<name>[/<config>][:<version>][#<field>]`. TFDS prepares it in its own folder if needed.

    A Hugging Face data set `<user>/<name>` is `huggingface:<user>__<name>[/<config>]`; this needs their library
    `datasets`.

    The test split is "test" if there is one, else "validation", else one record of "train" in ten, by the hash of its
    text. Without `#<field>`, the text is the feature "text", or the only feature whose name ends in "text".

    Raises:
      UserError: if TFDS has no such data set, can't prepare it here, or it has no such field.
    """
    name, _, field = source.removeprefix("tfds:").partition("#")
    quiet()
    try:
        builder = _builder(name)
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        check_descriptions(Path(builder.data_dir))
    except Exception as error:  # data sets have their own code to download and convert, which may raise anything
        if damaged := _damaged(name):
            raise UserError(
                f"{source}: {damaged} is damaged: remove {damaged.parent}, and the same command prepares it again"
            ) from None
        if versions := _other_versions(name):
            raise UserError(
                f"{source}: there is no such version here, only {', '.join(versions)}: give one of these, or none for "
                "the newest"
            ) from None
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"{source} can't be prepared here ({reason[-200:]}): run `tfds build {name} --file_format=array_record` on "
            "another machine, then copy the result to ~/tensorflow_datasets or set TFDS_DATA_DIR"
        ) from None
    field = _text_field(source, builder.info.features, field)
    splits = {split: info for split, info in builder.info.splits.items() if info.num_examples}
    if "train" not in splits:
        raise UserError(f"{source} has no train split, only {', '.join(splits) or 'none'}: choose another data set")
    test = next((split for split in ("test", "validation") if split in splits), None)
    used = ["train"] + ([test] if test else [])
    parts = [part for split in used for part in split_parts(builder, split, split != "train" if test else None, field)]
    identity = {split: [splits[split].num_examples, splits[split].num_bytes] for split in used}
    # TFDS promises equal records for equal versions. Reading all records to check this would take as long as packing.
    digest = hashlib.sha256(json.dumps([builder.info.full_name, field, identity]).encode()).hexdigest()
    total = sum(splits[split].num_bytes for split in used)
    return Source(
        Fingerprint(source, sum(splits[split].num_shards for split in used), total, digest),
        f"split {test!r}" if test else "one record in ten of 'train', by the hash of its text",
        [[part] for part in parts],
    )


def check_descriptions(folder: Path) -> None:
    """Raises ValueError if a file that says what a prepared data set holds is damaged; the processes that read need it.

    Its argument is the path of the file.
    """
    for path in sorted(folder.rglob("*.json")):
        key = {"dataset_info.json": "name", "features.json": "pythonClassName"}.get(path.name)
        try:
            whole = key is None or isinstance(json.loads(path.read_bytes())[key], str)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(path)


def split_parts(builder, split: str, held_out: bool | None, field: str) -> list[Part]:
    """The records of one split of a prepared builder, as ranges of about a shard's size."""
    folder = str(builder.data_dir)
    _builders[folder] = builder
    edges = _edges(len(_source(folder, split)), builder.info.splits[split].num_bytes)
    return [Part("tfds", folder, held_out, start, stop, field, split) for start, stop in itertools.pairwise(edges)]


def read_records(part: Part) -> Iterator[Piece]:
    """One document per record in the part's range: the text of its field.

    Raises:
      UserError: if the files of the data set are damaged, or a text isn't UTF-8. Names the split or the record.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    parse, field, held_out = tf_example_pb2.Example.FromString, part.field, part.held_out
    index = part.start - 1
    for batch in _batches(part):
        for record in batch:
            index += 1
            # Parsed here, because TFDS's own decoding takes four times as long as everything else.
            values = parse(record).features.feature[field].bytes_list.value
            if not values:  # array_record returns empty records if a file is cut off
                raise UserError(f"{part.path}, split {part.split!r}, is cut off or changed: prepare it with TFDS again")
            utf8 = values[0]
            try:
                text = utf8.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"record {index} of {part.path}, split {part.split!r}, is not UTF-8 text ({error}): choose another "
                    "field or data set"
                ) from None
            yield Piece(is_test(utf8) if held_out is None else held_out, text, True)


def quiet() -> None:
    """Turns off the progress bars and warnings of TFDS."""
    import absl.logging
    import tensorflow_datasets as tfds

    absl.logging.set_verbosity(absl.logging.ERROR)  # TFDS warns about much that is normal here
    tfds.disable_progress_bar()


def _batches(part: Part) -> Iterator[list[bytes]]:
    """The serialized records in the part's range, in order, some megabytes at a time."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source, info = _source(part.path, part.split), _builders[part.path].info.splits[part.split]
    at_once = min(_RECORDS_AT_ONCE, max(1, _BYTES_AT_ONCE * info.num_examples // max(1, info.num_bytes)))
    try:
        if not isinstance(getattr(source, "data_source", None), ArrayRecordDataSource):
            for start in range(part.start, part.stop or 0, at_once):
                yield source.__getitems__(list(range(start, min(start + at_once, part.stop or 0))))
            return
        # Read ranges of the files. Reading short records one by one would double the time of packing.
        before = 0
        for file in info.file_instructions:
            stop = min((part.stop or 0) - before, file.take)
            for start in range(max(part.start - before, 0), stop, at_once):
                yield _file(file.filename).read(file.skip + start, file.skip + min(start + at_once, stop))
            before += file.take
    except (RuntimeError, IndexError, ValueError) as error:  # array_record: a file is missing, cut off or changed
        raise UserError(
            f"{part.path}, split {part.split!r}, is cut off or changed ({error}): prepare it with TFDS again"
        ) from None


@functools.lru_cache(maxsize=2)
def _file(name: str):
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(name, f"readahead_buffer_size:{_BYTES_AT_ONCE},max_parallelism:0")


def _edges(count: int, num_bytes: int) -> list[int]:
    shards = min(max(1, num_bytes // SHARD_BYTES), MOST_SHARDS, count)
    return [count * k // shards for k in range(shards + 1)]


def _text_field(source: str, features, field: str) -> str:
    import tensorflow_datasets as tfds

    # Strings of Hugging Face data sets are scalars of dtype object.
    scalars = {k: v for k, v in features.items() if isinstance(v, tfds.features.Tensor) and v.shape == ()}
    texts = [name for name, feature in scalars.items() if feature.np_dtype == np.object_]
    if field and field not in texts:
        raise UserError(f"{source} has no text field {field!r}; its text fields: {', '.join(texts) or 'none'}")
    ending = [name for name in texts if name.endswith("text")]
    for candidates in ([field] if field else [], ["text"] if "text" in texts else [], ending, texts):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(
        f"{source} has several text fields: choose one of {', '.join(texts)}, as in {source}#{texts[0]}"
        if texts
        else f"{source} has no text: choose a text data set"
    )


def _builder(name: str):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        # c4, wiki40b and wikipedia are in this module, which TFDS doesn't import without TensorFlow.
        importlib.import_module("tensorflow_datasets.text")
        return tfds.builder(name, file_format="array_record")


def _other_versions(name: str) -> list[str]:
    """The prepared versions of a data set, if `name` gives another one; oldest first."""
    path, colon, version = name.partition(":")
    if not colon:
        return []
    try:
        folder = Path(_builder(path).data_dir).parent
    except Exception:  # there is no such data set at all
        return []
    numbers = sorted(tuple(map(int, found.name.split("."))) for found in folder.glob("*.*.*") if _is_version(found))
    there = [".".join(map(str, number)) for number in numbers]
    return [] if version in there else there


def _damaged(name: str) -> Path | None:
    """A damaged description of any prepared version of a data set; None if there is none."""
    from tensorflow_datasets.core.utils import file_utils

    try:
        for folder in map(Path, file_utils.list_data_dirs()):
            check_descriptions(folder / name.partition(":")[0].partition("/")[0])
    except ValueError as error:
        return error.args[0]
    return None


def _is_version(folder: Path) -> bool:
    return folder.is_dir() and all(part.isdecimal() for part in folder.name.split("."))


def _source(directory: str, split: str):
    import tensorflow_datasets as tfds

    if directory not in _builders:
        quiet()
        _builders[directory] = tfds.builder_from_directory(directory)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return _builders[directory].as_data_source(split, deserialize_method=raw)
