import pytest

from scaling_jax.data import find_documents, fingerprint, is_test, sources
from scaling_jax.io import UserError


@pytest.fixture
def folder(tmp_path):
    for k in range(40):
        (tmp_path / f"{k}.txt").write_text(f"text {k}\n")
    return tmp_path


def test_the_split_of_a_document_depends_on_its_name_alone(folder):
    before = {d.name: is_test(d.name) for d in find_documents(f"files:{folder}/*.txt")}
    (folder / "another.txt").write_text("more")
    after = {d.name: is_test(d.name) for d in find_documents(f"files:{folder}/*.txt")}
    assert {name: after[name] for name in before} == before


def test_about_one_document_in_ten_is_held_out():
    assert 850 < sum(is_test(f"document-{k}") for k in range(10_000)) < 1150


def test_a_fingerprint_changes_with_content_and_with_names(folder):
    def print_of():
        return fingerprint("x", find_documents(f"files:{folder}/*.txt")).sha256

    first = print_of()
    assert print_of() == first
    (folder / "3.txt").write_text("text 4\n")
    changed = print_of()
    (folder / "3.txt").rename(folder / "03.txt")
    assert len({first, changed, print_of()}) == 3


def test_the_standard_library_is_large_enough_and_holds_no_tests():
    names = [d.name for d in find_documents("python")]
    assert len(names) > 300
    assert "json/decoder.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)


def test_an_interpreter_without_sources_says_how_to_name_other_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"0 \.py files.*--text 'files:<glob>'"):
        find_documents("python")


@pytest.mark.parametrize(
    ("source", "message"),
    [("wikipedia", "unknown text source 'wikipedia'"), ("files:/nowhere/*.txt", "matches no file")],
)
def test_a_source_that_is_not_there_is_refused_by_name(source, message):
    with pytest.raises(UserError, match=message):
        find_documents(source)
