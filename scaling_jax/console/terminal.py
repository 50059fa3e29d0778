"""The console that commands print on: names are shown as they are, and every character fits the terminal.

Names come from files and folders, so they may hold anything: rich's markup, terminal escapes, bytes that aren't UTF-8.
And batch systems often run commands with an encoding that lacks our characters, such as ASCII.
"""

import codecs
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

_PATIENCE = 3.0  # seconds of silence before a terminal shows what a command is doing

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


class Working:
    """Shows on a terminal what a long command is doing, in one line that goes away at the end. Use it as a context.

    The line appears after some seconds, and on standard error, so that output stays what it is.
    """

    def __init__(self, what: str, patience: float = _PATIENCE):
        self._what = what
        self._console = Terminal(stderr=True)
        self._spinner = Spinner("dots" if self._console.encoding.startswith("utf") else "line")
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._timer = threading.Timer(patience, self._live.start)
        self._timer.daemon = True

    def __enter__(self) -> "Working":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._timer.start()
        return self

    def __exit__(self, *_):
        self._timer.cancel()
        if self._timer.ident is not None:
            self._timer.join()  # it may be starting the line just now
        self._live.stop()

    def say(self, what: str) -> None:
        self._what = what

    def count(self, done: int, total: int) -> None:
        """Says how many runs were read."""
        self.say(f"reading runs: {done:,} of {total:,}")

    def _render(self) -> RenderableType:
        self._spinner.update(text=self._what)
        return self._spinner


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
