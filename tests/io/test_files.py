import math
from typing import NamedTuple

from scaling_jax.io.files import write_rows


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
