"""The console that commands print on: names are shown as they are, and every character fits the terminal.

Names come from files and folders, so they may hold anything: rich's markup, terminal escapes, bytes that aren't UTF-8.
And batch systems often run commands with an encoding that lacks our characters, such as ASCII.
"""

import codecs
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Control characters but tab and line end, line separators, marks that turn the direction of writing, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_PLAIN = {
    "…": "...",
    "·": "*",  # also in formulas
    "•": "*",
    "×": "x",
    "÷": "/",
    "√": "sqrt ",
    "∞": "inf",
    "±": "+/-",
    "≈": "~=",
    "∝": "~",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "²": "^2",
    "³": "^3",
    "½": "1/2",
    "α": "alpha",
    "β": "beta",
    "η": "eta",
    "λ": "lambda",
    "Δ": "Delta",
    "Σ": "Sigma",
    "‖": "||",
} | dict.fromkeys("‐‑‒–—−─━╌╴╶╸╺", "-")
_PLAIN |= dict.fromkeys("│┃╎", "|") | dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╞╡╪", "+") | dict.fromkeys("‘’", "'")
_PLAIN |= dict.fromkeys("“”", '"')
_PLAIN_ERRORS = "scaling_jax.plain"


class Terminal(Console):
    """A rich console without markup, emoji and highlights, which escapes what would control the terminal.

    Args:
      said: a last change of every text.
    """

    def __init__(self, said: Callable[[str], str] = lambda text: text, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self._said = said

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(self._safe(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text) and (safe := self._safe(renderable.plain)) != renderable.plain:
            renderable = renderable.blank_copy(safe)  # before it is laid out, because lengths change
        return super().render(renderable, options)

    def _safe(self, text: str) -> str:
        return fitting(escaped(self._said(text)), self.encoding)


def escaped(text: str) -> str:
    r"""The text with `\x1b` for an escape character, and likewise for all that would control a terminal.

    Bytes in the name of a file that aren't UTF-8 become `\xff`.
    """
    return _UNSAFE.sub(lambda found: _escape(found[0]), text)


def fitting(text: str, encoding: str) -> str:
    """The text with plain characters in place of those that an encoding lacks: ... for …, - for –, inf for ∞."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, _PLAIN_ERRORS).decode(encoding)
    except LookupError:
        return text
    return text


def print_any_character() -> None:
    """Makes standard output and standard error print plain characters in place of those that they can't encode."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_PLAIN_ERRORS)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that isn't UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain_character, error.object[error.start : error.end])), error.end


def _plain_character(character: str) -> str:
    if (known := _PLAIN.get(character)) is not None:
        return known
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()  # e for é
    return letters or (_escape(character) if ord(character) < 0x10000 else f"\\U{ord(character):08x}")


codecs.register_error(_PLAIN_ERRORS, _plain)
