import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils
from tensorflow_datasets.testing import mocking

from scaling_jax.data import Bytes, is_test, packing, prepare, sources, text_builder, text_files, tfds_text
from scaling_jax.data.shards import read
from scaling_jax.io import UserError
from tests.data import tiny_data_sets
from tests.data.tiny_data_sets import text_of


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """TFDS keeps its data here, and every test starts from none."""
    folder = tmp_path / "tensorflow_datasets"
    folder.mkdir()
    builder = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name, **options: builder(name, data_dir=folder, **options))
    return folder


@pytest.fixture
def lm1b(data_dir, monkeypatch):
    """The One Billion Word benchmark by `mock_data`: its real features and splits, 200 made-up records in each."""
    version = data_dir / "lm1b" / "1.1.0"
    version.mkdir(parents=True)
    info = tfds.builder("lm1b").info
    splits = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[200],
            num_bytes=num_bytes,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=version, dataset_name="lm1b", split=name, filetype_suffix="array_record"
            ),
        )
        for name, num_bytes in (("train", 9_000), ("test", 8_000))
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    info.set_file_format("array_record", override=True)
    info.write_to_directory(version)
    info.features.save_config(version)
    # mock_data calls its `__getitems__` without the instance that it expects
    monkeypatch.setattr(
        mocking, "_getitems", lambda keys, generator: [mocking._getitem(None, k, generator) for k in keys]
    )
    with mocking.mock_data(num_examples=200, data_dir=str(data_dir)):
        yield


def pieces(source):
    return [piece for shard in packing.look_up(source).shards for piece in read(shard)]


def test_a_real_data_set_is_packed_by_its_own_splits(lm1b):
    corpus = prepare("tfds:lm1b", 16, workers=1)  # other processes know nothing of the mock
    assert corpus.manifest["documents"] == {"train": 200, "test": 200}
    assert corpus.manifest["held_out"] == "split 'test'"
    mocked = [example["text"].encode() for example in tfds.builder("lm1b").as_data_source("train")]
    stream = [token for text in mocked for token in [*text, 256]]
    assert corpus.train_RxT1[:, :-1].reshape(-1).tolist() == stream[: corpus.manifest["train_tokens"]]


def test_a_test_split_is_held_out_and_validation_is_left_alone():
    found = pieces("tfds:tiny_with_test")
    assert [p.text for p in found if p.held_out] == [text_of("test", k) for k in range(20)]
    assert [p.text for p in found if not p.held_out] == [text_of("train", k) for k in range(300)]


def test_without_a_test_split_one_record_in_ten_is_held_out_by_its_text():
    found = pieces("tfds:tiny_train_alone")
    assert [p.text for p in found] == [text_of("train", k) for k in range(300)]
    assert all(p.held_out == is_test(p.text) for p in found)
    assert any(p.held_out for p in found)


@pytest.mark.parametrize("workers", [1, 2])
def test_ranges_of_records_read_by_processes_change_nothing(monkeypatch, tmp_path, workers):
    whole = prepare("tfds:tiny_with_test", 16)
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(tfds_text, "SHARD_BYTES", 2000)
    assert len(packing.look_up("tfds:tiny_with_test").shards) > 4
    assert prepare("tfds:tiny_with_test", 16, workers=workers).manifest == whole.manifest


def test_a_field_is_chosen_by_name():
    assert pieces("tfds:tiny_with_test#title")[7].text == "title 7"
    with pytest.raises(UserError, match=r"'pages'.*book_text, title"):
        prepare("tfds:tiny_with_test#pages", 16)


def test_fields_are_different_corpora():
    title, text = (prepare(f"tfds:tiny_with_test{field}", 8) for field in ("#title", ""))
    assert "title 7" in Bytes().decode(title.train_RxT1[:, 1:].reshape(-1))
    assert "title 7" not in Bytes().decode(text.train_RxT1[:, 1:].reshape(-1))


def test_another_version_than_those_that_are_there_names_them():
    prepare("tfds:tiny_with_test", 16)
    with pytest.raises(UserError, match=r"tfds:tiny_with_test:2\.0\.0.* only 1\.0\.0"):
        prepare("tfds:tiny_with_test:2.0.0", 16)


def test_a_data_set_that_cannot_be_prepared_says_what_to_do(monkeypatch):
    with pytest.raises(UserError, match=r"tfds:no_such_set can't be prepared here .*tfds build no_such_set") as caught:
        prepare("tfds:no_such_set", 16)
    assert "\n" not in str(caught.value)

    def refuse(self, dl_manager):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiny_data_sets.WithTest, "_split_generators", refuse)
    with pytest.raises(UserError, match=r"can't be prepared here \(.*no route.*TFDS_DATA_DIR"):
        prepare("tfds:tiny_with_test", 16)


def test_a_record_file_that_is_cut_is_refused(data_dir):
    pieces("tfds:tiny_with_test")
    (file,) = data_dir.rglob("*train*.array_record*")
    for size in (file.stat().st_size // 2, 100):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(UserError, match=r"split 'train', .*: prepare it with TFDS again"):
            prepare("tfds:tiny_with_test", 16)


def test_tensorflow_is_not_imported(data_dir):
    code = (
        "import sys; from tests.data import tiny_data_sets; from scaling_jax.data import prepare; "
        "prepare('tfds:tiny_with_test', 16); sys.exit('tensorflow' in sys.modules)"
    )
    environment = {"TFDS_DATA_DIR": str(data_dir)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | environment).returncode == 0


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of 150 files."""
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "cache"))
    library = tmp_path / "library"
    library.mkdir()
    for k in range(150):
        (library / f"m{k:03}.py").write_text(f"# módule {k}\nx = {k}\n" * (1 + k % 3))
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(library))
    return library


def test_the_embedded_corpus_is_a_data_set_of_its_own_with_the_rows_that_its_files_have(small_library, tmp_path):
    embedded = packing.prepare("python", 16, workers=1)
    assert list((tmp_path / "cache" / "tfds" / "text_source").glob("*/1.0.0/*.array_record*"))
    assert embedded.manifest["source"] == "python"
    expected = np.array(embedded.train_RxT1), np.array(embedded.test_RxT1)
    shutil.rmtree(packing.corpus_folder(packing.look_up("python").text, "bytes"))
    files = packing.prepare(f"files:{small_library}/*.py", 16, workers=1)
    assert files.manifest["source"].startswith("files:")
    assert files.manifest["sha256"] == embedded.manifest["sha256"]
    np.testing.assert_array_equal(files.train_RxT1, expected[0])
    np.testing.assert_array_equal(files.test_RxT1, expected[1])


@pytest.fixture
def mixed_files(tmp_path):
    """Plain text, long and empty, and lines, compressed and not: 60 documents and 2 of 40 lines."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for k in range(20):
        (folder / f"{k}.txt").write_text(f"document {k}, ünïcode\n" * (k % 5), encoding="utf-8")
    for name, opened in (("a.jsonl", open), ("b.jsonl.gz", gzip.open)):
        with opened(folder / name, "wt") as file:
            file.writelines(json.dumps({"text": f"line {k} of {name}", "n": k}) + "\n" for k in range(40))
    return folder


def test_files_are_a_data_set_whose_examples_are_what_packing_reads(mixed_files, monkeypatch):
    monkeypatch.setattr(text_files, "_PIECE", 16)
    monkeypatch.setattr(sources, "SHARD_BYTES", 500)
    source = f"files:{mixed_files}/*"
    builder = tfds.builder(text_builder.TextSource.name, source=source, file_format="array_record")
    builder.download_and_prepare()
    corpus = prepare(source, 1)
    for split, rows in (("train", corpus.train_RxT1), ("test", corpus.test_RxT1)):
        examples = list(builder.as_data_source(split))
        assert len(examples) == corpus.manifest["documents"][split] > 5
        stream = [token for example in examples for token in [*example["text"], 256]]
        assert [rows[0, 0], *rows[:, 1]] == stream
        assert {example["name"] for example in examples} <= {path.name.encode() for path in mixed_files.iterdir()}


def test_changed_files_are_another_data_set_and_a_bad_one_is_named(mixed_files):
    first = tfds.builder("text_source", source=f"files:{mixed_files}/*").data_dir
    (mixed_files / "0.txt").write_bytes(b"\xff")
    changed = tfds.builder("text_source", source=f"files:{mixed_files}/*", file_format="array_record")
    assert changed.data_dir != first
    with pytest.raises(UserError, match=r"0\.txt is not UTF-8 text"):
        changed.download_and_prepare()
    with pytest.raises(UserError, match="matches no file"):
        tfds.builder("text_source", source=f"files:{mixed_files}/*.md")


def test_names_that_tfds_hides_without_tensorflow_are_found():
    for name in ("c4/realnewslike", "wiki40b/en", "wikipedia/20230601.en", "pg19"):
        assert name.startswith(tfds_text._builder(name).name)


def test_a_data_set_of_hugging_face_is_named_as_tfds_names_it_and_its_strings_are_text(monkeypatch):
    """Their builder needs the network: what it would return is made up, of the features that it converts strings to."""
    known, asked = tfds.builder, []

    def builder(name, **options):
        asked.append(naming.parse_builder_name_kwargs(name))
        return known("tiny_scalars", **options)

    monkeypatch.setattr(tfds, "builder", builder)
    assert pieces("tfds:huggingface:allenai__c4/en")[7].text == text_of("train", 7)
    assert pieces("tfds:huggingface:allenai__c4/en:1.0.0#url")[7].text == "url 7"
    (name, first), (_, second) = asked
    assert (name.namespace, name.name) == ("huggingface", "allenai__c4")
    assert (first, second) == ({"config": "en"}, {"config": "en", "version": "1.0.0"})


DAMAGE = [b"", b"{", b"{}", b"[]", b'{"name": 3}', b"\xff\x00"]


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_description_names_the_folder_to_remove_and_then_the_same_command_works(
    name, content, data_dir, monkeypatch
):
    monkeypatch.setattr(file_utils, "list_data_dirs", lambda: [data_dir])
    prepare("tfds:tiny_with_test", 16, workers=1)
    (damaged,) = data_dir.rglob(name)
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=rf"{damaged} is damaged: remove {damaged.parent}, ") as caught:
        prepare("tfds:tiny_with_test", 16, workers=1)
    assert "\n" not in str(caught.value)
    shutil.rmtree(damaged.parent)
    prepare("tfds:tiny_with_test", 16, workers=1)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_damaged_data_set_of_python_sources_is_made_again(name, small_library, tmp_path):
    whole = text_builder.embedded_shards()
    (damaged,) = (tmp_path / "cache").rglob(name)
    for content in DAMAGE:
        damaged.write_bytes(content)
        assert text_builder.embedded_shards() == whole
