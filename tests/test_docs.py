"""What the documentation shows is run as it stands there, and what it names is there."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import scaling_jax as sj
from experiments import noisy_quadratic as quadratic

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("experiments/**/*.md")])
STEPS, BATCH = 300, 32


def name(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def test_the_loop_of_the_noise_scale_page_finds_the_known_noise_scale():
    """At a learning rate of zero the parameters stay where B_simple is known."""
    keys = jax.random.split(jax.random.key(0), STEPS)
    yours = {
        "params": quadratic.PARAMS,
        "optimizer": optax.sgd(0.0),
        "loss_fn": quadratic.loss,
        "batches": [quadratic.draw(key, BATCH) for key in keys],
    }
    namespace = {"sj": sj, "jax": jax, "np": np, "optax": optax} | yours
    (loop,) = (block for block in blocks(DOCS / "noise_scale.md", "python") if block.startswith("# optax"))
    exec(loop, namespace)
    found = sj.noise_scale.estimate(namespace["grad_sq_norm"], namespace["trace_cov"], confidence=0.999)
    assert found.resolved
    assert found.low < quadratic.TRACE_COV / quadratic.GRAD_SQ_NORM < found.high
    assert found.high / found.low < 1.7


COMPLETE = [
    pytest.param(block, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"))
    if block.startswith(("import ", "from ", '"""')) and "tensorflow_datasets" not in block
    if "Study(" not in block and "(sj.Task)" not in block  # tests/test_your_model.py
]


@pytest.fixture(scope="module")
def analysis(made_up):
    return sj.analyse(made_up[1])


@pytest.mark.parametrize("block", COMPLETE)
def test_code_that_brings_its_own_imports_runs(block, analysis, monkeypatch):
    """With a scan made up beforehand in place of one that would train for minutes."""
    monkeypatch.setattr(sj, "scan", lambda experiment, workdir: workdir)
    monkeypatch.setattr(sj, "analyse", lambda workdir: analysis)
    for drawing in ("write_figures", "write_report"):
        monkeypatch.setattr(sj, drawing, lambda analysis, workdir: None)
    exec(block, {})


def test_there_is_such_code():
    assert len(COMPLETE) >= 5


def test_the_notebook_runs_and_finds_what_is_known(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(DOCS)
    cells = json.loads((DOCS / "critical_batch_size.ipynb").read_text())["cells"]
    found = {}
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        exec(source.replace("plt.show()", "plt.close()"), found)
    truth = found["truth"]
    assert found["found"].low < truth < found["found"].high
    assert not found["few"].resolved
    assert found["few"].low < 25 * truth
    assert found["many"].low < 25 * truth < found["many"].high
    rising = [window.value for *_, window in found["windows"]]
    assert rising[-1] > 5 * rising[0]
    assert found["law"] is not None
    assert found["goal"].loss == found["law"].loss_range[0]


def headings(page):
    """Anchors, as GitHub makes them."""
    found = []
    fences = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for heading in re.findall(r"^#+ (.*)$", fences, re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in headings(there), link


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    for page in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_api_page_is_that_of_the_docstrings():
    """If it isn't: python docs/build_api.py."""
    assert runpy.run_path(str(DOCS / "build_api.py"))["page"]() == (DOCS / "api.md").read_text()


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f" {version}\n" in (ROOT / "CHANGELOG.md").read_text()
