"""A text that several files hold counts once, so that it can't be on both sides of the split."""

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling_jax.data import find_documents, packing, prepare
from scaling_jax.data.duplicates import copies, without_links
from scaling_jax.data.packing import summary
from scaling_jax.data.shards import read


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    return path


def test_links_to_one_file_count_once_by_the_path_without_a_link(folder):
    (folder / "z").mkdir()
    (folder / "z" / "own.txt").write_text("text")
    (folder / "a.txt").symlink_to(folder / "z" / "own.txt")
    (folder / "m").symlink_to(folder / "z")
    assert [d.name for d in find_documents(f"files:{folder}/**/*.txt")] == ["z/own.txt"]
    os.link(folder / "z" / "own.txt", folder / "b.txt")
    assert [d.name for d in find_documents(f"files:{folder}/**/*.txt")] == ["b.txt"]


def test_links_to_different_files_all_count(folder, tmp_path):
    """As in the cache of Hugging Face's hub."""
    for k in range(3):
        (tmp_path / f"blob{k}").write_text(f"text {k}")
        (folder / f"{k}.txt").symlink_to(tmp_path / f"blob{k}")
    assert len(find_documents(f"files:{folder}/*")) == 3


def test_a_loop_of_links_ends(folder):
    (folder / "a.txt").write_text("text")
    (folder / "again").symlink_to(folder)
    assert len(find_documents(f"files:{folder}/**/*.txt")) == 1


def test_only_files_of_equal_size_are_read(folder, monkeypatch):
    paths = [folder / f"{k}.txt" for k in range(6)]
    for k, path in enumerate(paths):
        path.write_text("x" * k)
    for path in paths:
        path.chmod(0)
    monkeypatch.setattr(type(paths[0]), "open", lambda *_: pytest.fail("read"))
    assert copies(paths) == set()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(contents=st.lists(st.sampled_from(["", "a", "b", "ab", "ba", "a longer text"]), min_size=1, max_size=12))
def test_each_text_is_read_once_and_on_one_side(folder, contents):
    for old in folder.iterdir():
        old.unlink()
    for number, content in enumerate(contents):
        path = folder / f"{random.Random(number).random()}.txt"
        if number % 3 == 2 and content:
            (folder / f"{number}.other").write_text(content)
            os.link(folder / f"{number}.other", path)
        path.write_text(content)
    found = packing.look_up(f"files:{folder}/*")
    pieces = [piece.text for shard in found.shards for piece in read(shard)]
    assert sorted(pieces) == sorted(set(contents))
    assert found.text.files == len(pieces)


def test_what_is_left_out_is_said(own_text):
    before = prepare(f"files:{own_text}/*.txt", 16)
    assert not any("left out" in line for line in summary(before))
    for k in (3, 4):
        (own_text / f"copy of {k}.txt").write_bytes((own_text / f"{k}.txt").read_bytes())
    after = prepare(f"files:{own_text}/*.txt", 16)
    assert "left out: 2 files that hold the same text as others" in summary(after)
    assert after.manifest["documents"] == before.manifest["documents"]


def test_a_path_is_kept_where_there_are_no_links(folder):
    paths = [folder / name for name in ("b", "a", "c")]
    for path in paths:
        path.write_text(path.name)
    assert without_links(paths) == paths
