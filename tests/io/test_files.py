import dataclasses
import errno
import json
import math
import os
import threading
from typing import NamedTuple

import numpy as np
import pytest

from scaling_jax.io.files import Tail, append_line, as_json, read_lines, whole_file, write_json, write_rows, write_whole


class Row(NamedTuple):
    name: str
    count: int
    value: float
    sure: bool


def test_rows_are_written_with_ten_digits_and_nothing_for_nan(tmp_path):
    rows = [Row("a,b", 3, 1 / 3, True), Row("c", 4, math.nan, False), Row("d", 5, math.inf, True)]
    write_rows(tmp_path / "rows.csv", Row, rows)
    expected = 'name,count,value,sure\n"a,b",3,0.3333333333,True\nc,4,,False\nd,5,inf,True\n'
    assert (tmp_path / "rows.csv").read_text() == expected
    write_rows(tmp_path / "none.csv", Row, [])
    assert (tmp_path / "none.csv").read_text() == "name,count,value,sure\n"


def test_a_whole_file_takes_the_old_ones_place_once_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, "old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        unfinished = [other.name for other in path.parent.iterdir() if other != path]
        assert unfinished == [f".file.{os.getpid()}.unfinished"]
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace", "interrupt"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    """A full disk while it is written, brought to the disk or moved; Ctrl-C."""
    path = tmp_path / "file"
    write_whole(path, "old")
    error = KeyboardInterrupt() if moment == "interrupt" else OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise error

    if moment in ("fsync", "replace"):
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises(type(error)), whole_file(path) as file:  # noqa: PT012
        file.write(b"new")
        if moment in ("write", "interrupt"):
            fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "file", {"a": 1})
    for value in (math.nan, object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "file", {"a": value})
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_json_holds_records_and_arrays_and_null_for_what_it_lacks():
    @dataclasses.dataclass
    class Record:
        row: Row
        values: np.ndarray
        keyed: dict

    record = Record(Row("a", 3, math.nan, True), np.array([[1.0, math.inf]]), {2: (np.float32(0.5), None)})
    assert json.loads(as_json(record)) == {
        "row": {"name": "a", "count": 3, "value": None, "sure": True},
        "values": [[1.0, None]],
        "keyed": {"2": [0.5, None]},
    }


def test_whole_lines_are_read_with_their_numbers(tmp_path):
    path = tmp_path / "lines"
    assert list(read_lines(path)) == []
    path.write_bytes(b'1\n\n{"a": 2}\n{"a"')
    assert list(read_lines(path)) == [(1, b"1\n"), (2, b"\n"), (3, b'{"a": 2}\n')]


def test_a_tail_gives_what_a_file_gains_and_each_line_once(tmp_path):
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.new() == []  # nobody has begun it
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    assert tail.new() == [{"step": 1}, {"step": 2}]
    assert tail.new() == []
    append_line(path, {"step": 3})
    assert tail.new() == [{"step": 3}]


def test_a_tail_begins_at_the_files_end_unless_asked(tmp_path):
    path = tmp_path / "lines"
    append_line(path, 1)
    tail, whole = Tail(path), Tail(path, from_start=True)
    append_line(path, 2)
    assert tail.new() == [2]
    assert whole.new() == [1, 2]


def test_a_tail_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "lines"
    tail = Tail(path)
    path.write_text('{"step": 1}\n{"st')
    assert tail.new() == [{"step": 1}]
    assert tail.new() == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.new() == [{"step": 2}]


def test_a_tail_reads_a_file_that_became_shorter_from_its_start(tmp_path):
    """As a run's metrics do when it goes on from an earlier checkpoint."""
    path = tmp_path / "lines"
    for step in range(5):
        append_line(path, {"step": step})
    tail = Tail(path)
    write_whole(path, '{"step": 0}\n')
    append_line(path, {"step": 1})
    assert tail.new() == [{"step": 0}, {"step": 1}]
    append_line(path, {"step": 2})
    assert tail.new() == [{"step": 2}]


def test_a_tail_refuses_a_line_that_is_no_json(tmp_path):
    (tmp_path / "lines").write_text("x\n")
    with pytest.raises(ValueError):  # noqa: PT011
        Tail(tmp_path / "lines", from_start=True).new()


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, errors = tmp_path / "file.json", []

    def write():
        try:
            for _ in range(50):
                write_json(path, {"a": 1})
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert json.loads(path.read_text()) == {"a": 1}
