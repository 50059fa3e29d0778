"""The report in headless Chromium, where there is one: `apt-get install chromium` and `pip install playwright`."""

import shutil

import pytest

from scaling_jax.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIP = "() => { const tip = document.getElementById('tip'); return tip.hidden ? null : tip.textContent; }"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(made_up, analysis):
    return write_report(analysis, made_up[1])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_and_tells_its_values(report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    figures = page.query_selector_all("figure")
    assert len(figures) == 17
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for figure in figures:
        figure.scroll_into_view_if_needed()
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        svg = figure.query_selector("svg")
        box, (_, _, full, _) = svg.bounding_box(), map(float, svg.get_attribute("viewBox").split())
        assert box["width"] > 300
        assert figure.evaluate("f => f.querySelectorAll('path, use').length") > 50
        marks = figure.evaluate("f => JSON.parse(f.querySelector('script').textContent)")
        for x, y, _ in marks[:: max(1, len(marks) // 4)]:
            page.mouse.move(box["x"] + x * box["width"] / full, box["y"] + y * box["width"] / full)
            here = {text for a, b, text in marks if abs(a - x) < 2 and abs(b - y) < 2}  # some lie on each other
            assert page.evaluate(TIP) in here
        page.mouse.move(1, 1)
        assert page.evaluate(TIP) is None
    assert complaints == []
    assert requests == [report.as_uri()]
    page.close()
