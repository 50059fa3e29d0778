"""Writes docs/api.md from the docstrings of the package's public names.

    python docs/build_api.py

Public is what a package's `__all__` lists, and the public functions of `noise_scale.geometries` and `noise_scale.taps`.
A test fails while api.md is older than the docstrings.
"""

import ast
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("api.md")
MODULES = (
    "noise_scale",
    "noise_scale.geometries",
    "noise_scale.taps",
    "fitting",
    "advice",
    "scanning",
    "training",
    "results",
    "report",
    "data",
    "tasks",
    "parallel",
)

HEAD = """# API reference

Built from the docstrings by `python docs/build_api.py`; don't edit it by hand. `import scaling_jax as sj` gives
`sj.noise_scale`, `sj.fitting`, `sj.advice`, `sj.data` and `sj.tasks`, and these names directly:
{}.

"""


def page() -> str:
    """The whole page."""
    package = importlib.import_module("scaling_jax")
    modules = [importlib.import_module(f"scaling_jax.{name}") for name in MODULES]
    top = ", ".join(f"`{name}`" for name in package.__all__ if not inspect.ismodule(getattr(package, name)))
    contents = "\n".join(f"- [`{m.__name__}`](#{m.__name__.replace('.', '')}): {_first_line(m)}" for m in modules)
    return HEAD.format(textwrap.fill(top, 118)) + contents + "\n\n" + "\n".join(map(_module, modules))


def _module(module: ModuleType) -> str:
    entries = (_entry(name, getattr(module, name)) for name in _public_names(module))
    return f"## {module.__name__}\n\n{_prose(inspect.getdoc(module) or '')}\n\n" + "\n".join(filter(None, entries))


def _public_names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    return [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__ and n[0] != "_"]


def _entry(name: str, thing: Any) -> str:
    if inspect.ismodule(thing):
        return ""  # has a section of its own
    if hasattr(thing, "cache_info"):  # a cached function
        thing = inspect.unwrap(thing)
    if isinstance(thing, dict):
        return f"### {name}\n\nBy name: {', '.join(f'`{key}`' for key in thing)}.\n"
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"### {name}\n\n`{thing!r}`\n"
    node, source = _parse(thing)
    text = _prose(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        return "\n".join([f"### {name}\n\n{text}\n", *_class_parts(thing)])
    return f"### {name}\n\n```python\n{_signature(node, source)}\n```\n\n{text}\n"


def _class_parts(cls: type) -> Iterator[str]:
    """Its fields as they stand in the source, comments and all; then its public methods. Both with those inherited."""
    fields: dict[str, list[str]] = {}  # a class may give an inherited field another default
    methods: list[str] = []
    for base in (x for x in reversed(cls.__mro__) if x.__module__.startswith("scaling_jax")):
        node, source = _parse(base)
        assert isinstance(node, ast.ClassDef)
        for part in node.body:
            if isinstance(part, ast.AnnAssign):
                fields[ast.unparse(part.target)] = source.splitlines()[part.lineno - 1 : part.end_lineno]
            elif isinstance(part, ast.FunctionDef):
                methods += _method(part, source)
    if fields:
        yield "```python\n" + textwrap.dedent("\n".join(itertools.chain(*fields.values()))) + "\n```\n"
    yield from methods


def _method(node: ast.FunctionDef, source: str) -> Iterator[str]:
    doc = ast.get_docstring(node)
    if doc and (not node.name.startswith("_") or node.name == "__call__"):
        is_property = any(ast.unparse(x).endswith("property") for x in node.decorator_list)
        call = (
            re.sub(r"\s*\n\s*", " ", _signature(node, source))
            .removeprefix("def ")
            .replace("( ", "(")
            .replace(", )", ")")
        )
        yield f"`{f'.{node.name}' if is_property else call}`: {_prose(doc)}\n"


def _parse(thing: Any) -> tuple[ast.ClassDef | ast.FunctionDef, str]:
    source = textwrap.dedent(inspect.getsource(thing))
    node = ast.parse(source).body[0]
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef))
    return node, source


def _signature(node: ast.FunctionDef, source: str) -> str:
    """As it stands in the source, up to the body."""
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(lines)).removesuffix(":")


def _prose(doc: str) -> str:
    """A docstring as Markdown: arguments, results and errors become lists."""
    out: list[str] = []
    section = ""
    for line in doc.splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            section = line
            out += [f"**{line[:-1]}**", ""]
        elif section and line.startswith("  "):
            item = line[2] == "`" or out[-1] == "" if section == "Returns:" else line[2] != " "
            out.append(f"- {line[2:]}" if item else f"  {line.strip()}")
        else:
            section = "" if line else section
            out.append(line)
    return "\n".join(out).strip()


def _first_line(module: ModuleType) -> str:
    return (inspect.getdoc(module) or "").splitlines()[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
