"""The report as one HTML file that loads no other files: sections with tables, text, and charts with tooltips."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from scaling_jax.report.chart import Drawn

_POWER = re.compile(r"\^(-?\d+(?:\.\d+)?|[a-z](?![a-z]))")


class Section(NamedTuple):
    """A heading and its content, made by the functions below."""

    title: str
    content: Markup


def page(title: str, sections: Iterable[Section]) -> str:
    """The HTML document."""
    return _template().page(title, list(sections))


def without_home(text: str) -> str:
    """The text with ~ in place of home folders, this user's and any other's, because reports are passed on."""
    if "/" not in text and "\\" not in text:
        return text
    home = str(Path.home())
    if home != "/":
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return re.sub(r"(/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s\"'<>|&]+", "~", text)


def paragraph(value: str) -> Markup:
    return _template().paragraph(value)


def bullets(values: Iterable[str]) -> Markup:
    return _template().bullets(list(values))


def code(value: str) -> Markup:
    return _template().code(value)


def folded(summary: str, content: Markup) -> Markup:
    return _template().folded(summary, content)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table. Columns of words are aligned left, columns of numbers right; a wide table scrolls."""
    cells = [[str(cell) for cell in row] for row in rows]
    words = [k == 0 or any(row[k][:1].isalpha() for row in cells) for k in range(len(header))]
    return _template().table(header, cells, words)


def facts(values: Mapping[str, Any]) -> Markup:
    """A list of names and values."""
    return _template().facts(dict(values))


def charts(drawn: Iterable[Drawn]) -> Markup:
    """Charts, side by side if there is room."""
    return _template().charts(
        [(Markup(one.svg), [(x, y, without_home(said)) for x, y, said in one.marks]) for one in drawn]
    )


def _raised(text: str) -> Markup:
    """The text, escaped, with powers as superscripts: L^-4.66."""
    return Markup(_POWER.sub(lambda power: f"<sup>{power[1].replace('-', '−')}</sup>", str(escape(text))))


@functools.cache
def _template() -> Any:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scaling_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["said"] = lambda value: _raised(without_home(str(value)))
    environment.filters["plainly"] = lambda value: without_home(str(value))
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("report.html.jinja").module
