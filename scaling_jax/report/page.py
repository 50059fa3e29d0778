"""The report as one HTML file that loads nothing: sections with charts inside, and a tooltip for their points."""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from scaling_jax.report.chart import Drawn


class Section(NamedTuple):
    """A heading and what is under it; `content` is HTML, made by the functions below."""

    title: str
    content: str


def page(title: str, sections: Iterable[Section]) -> str:
    """A whole document."""
    body = "\n".join(f"<section>\n<h2>{text(s.title)}</h2>\n{s.content}\n</section>" for s in sections)
    return _PAGE.substitute(title=text(title), style=_STYLE, body=body, script=_SCRIPT)


def without_home(text: str) -> str:
    """Home folders as ~, this user's and those of whoever made the results: reports get passed on."""
    home = str(Path.home())
    if home != "/":
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return re.sub(r"(/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s\"'<>|&]+", "~", text)


def text(value: Any) -> str:
    """Any value as text that can't be taken for HTML, without home folders."""
    return html.escape(without_home(str(value)))


def paragraph(value: str) -> str:
    return f"<p>{text(value)}</p>"


def bullets(values: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{text(value)}</li>" for value in values) + "\n</ul>"


def code(value: str) -> str:
    return f"<pre>{text(value)}</pre>"


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{text(summary)}</summary>\n{content}\n</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of words to the left, of numbers to the right; wide ones scroll."""
    rows = [[str(cell) for cell in row] for row in rows]
    words = [k == 0 or any(row[k][:1].isalpha() for row in rows) for k in range(len(header))]
    classes = [' class="words"' if word else "" for word in words]
    lines = ["<tr>" + "".join(f"<th{c}>{text(h)}</th>" for c, h in zip(classes, header, strict=True)) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{c}>{text(x)}</td>" for c, x in zip(classes, row, strict=True)) + "</tr>")
    return (
        '<div class="wide"><table>\n<thead>'
        + lines[0]
        + "</thead>\n<tbody>\n"
        + "\n".join(lines[1:])
        + ("\n</tbody></table></div>")
    )


def facts(values: Mapping[str, Any]) -> str:
    """Names and what they are."""
    rows = "\n".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values.items())
    return f"<dl>\n{rows}\n</dl>"


def charts(drawn: Iterable[Drawn]) -> str:
    """Charts side by side where there is room, under each other where there isn't."""
    return '<div class="charts">\n' + "\n".join(_chart(one) for one in drawn) + "\n</div>"


def _chart(drawn: Drawn) -> str:
    marks = [(x, y, without_home(said)) for x, y, said in drawn.marks]
    data = json.dumps(marks, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<figure>\n{drawn.svg}\n<script type="application/json">{data}</script>\n</figure>'


# The policy forbids the browser to load anything at all: what the page needs is in it.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
<div id="tip" hidden></div>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
body { margin: 0; background: #fff; color: #222; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p, ul { max-width: 46rem; } li { margin: .3rem 0; } ul { padding-left: 1.2rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 25rem; max-width: 37rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; touch-action: pan-x pan-y; }
.ring { fill: none; stroke: #000; stroke-width: 1.2; pointer-events: none; }
#tip { position: fixed; z-index: 1; max-width: 20rem; padding: .35rem .6rem; border-radius: .3rem; background: #222;
  color: #fff; font-size: .85rem; line-height: 1.35; white-space: pre-line; pointer-events: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th.words, td.words { text-align: left; } th { vertical-align: bottom; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { max-width: 100%; overflow-x: auto; padding: .6rem; background: #f4f4f4; font-size: .85rem; }
@media print { main { max-width: none; padding: 0; } body { font-size: 10pt; } h2 { break-after: avoid; }
  .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } tr { break-inside: avoid; }
  figure { flex: 0 0 calc(50% - .5rem); } }
"""

# The nearest marked point within reach of the pointer is ringed, and says what it is.
_SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const marks = JSON.parse(figure.querySelector("script").textContent);
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("class", "ring");
  ring.setAttribute("r", 6);
  const hide = () => { tip.hidden = true; ring.remove(); };
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let nearest = null, least = 20;
    for (const mark of marks) {
      const distance = Math.hypot(mark[0] - at.x, mark[1] - at.y);
      if (distance < least) { least = distance; nearest = mark; }
    }
    if (nearest === null) { hide(); return; }
    ring.setAttribute("cx", nearest[0]);
    ring.setAttribute("cy", nearest[1]);
    svg.append(ring);
    tip.textContent = nearest[2];
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), gap = 14;
    const right = event.clientX + gap + box.width < innerWidth;
    tip.style.left = Math.max(4, right ? event.clientX + gap : event.clientX - gap - box.width) + "px";
    tip.style.top = Math.max(4, event.clientY - gap - box.height) + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
"""
