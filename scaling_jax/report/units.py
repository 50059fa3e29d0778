"""Sentences, tables and charts are written for tokens. For models that count something else, the word is exchanged."""

import dataclasses
import re
from collections.abc import Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_jax.report.chart import Chart

_TEXT_OF_PAGE = re.compile(r"<(script|style)\b.*?</\1>|>[^<]+", re.DOTALL)


def in_unit(text: str, unit: str) -> str:
    """The text with `unit`, in the plural, in place of tokens; losses then have no unit."""
    if unit == "tokens":
        return text
    text = re.sub(r",? (?:in )?nats\b(?: per token)?", "", text)
    text = re.sub(r"\b([Tt])okens?\b", lambda found: _in_case(unit, found), text)
    return text


def page_in_unit(page: str, unit: str) -> str:
    """An HTML page whose text is in a unit."""
    if unit == "tokens":
        return page
    return _TEXT_OF_PAGE.sub(lambda found: found[0] if found[1] else in_unit(found[0], unit), page)


def chart_in_unit(chart: "Chart", unit: str, except_for: Set[Any] = frozenset()) -> "Chart":
    """A chart whose labels, caption and marks are in a unit; its figure is changed, except for some of its texts."""
    if unit == "tokens":
        return chart
    from matplotlib.text import Text

    for label in chart.figure.findobj(Text):
        assert isinstance(label, Text)
        if label not in except_for and (text := in_unit(label.get_text(), unit)) != label.get_text():
            label.set_text(text)
    marks = [mark._replace(text=in_unit(mark.text, unit)) for mark in chart.marks]
    return dataclasses.replace(chart, caption=in_unit(chart.caption, unit), marks=marks)


def _in_case(unit: str, found: re.Match) -> str:
    word = unit if found[0].endswith("s") else unit.removesuffix("s")
    return word.capitalize() if found[1] == "T" else word
