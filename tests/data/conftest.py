import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test packs into a cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SCALING_JAX_CACHE", str(folder))
    return folder


@pytest.fixture
def own_text(tmp_path):
    """Thirty small documents, and files that are odd: empty, of other line ends, in another encoding."""
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(30):
        (folder / f"{k}.txt").write_text(f"document {k}: " + "ünïcode and more " * 20, encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "lines.txt").write_bytes(b"one\r\ntwo\rthree\n" * 9)
    (folder / "cookie.py").write_bytes("# coding: latin-1\ns = 'é'\n".encode("latin-1"))
    return folder
