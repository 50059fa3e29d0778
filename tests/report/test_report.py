import dataclasses
import html.parser
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.report import write_report, write_runs_report
from scaling_jax.report.chart import draw
from scaling_jax.report.page import charts, code, page, paragraph, table, without_home
from scaling_jax.report.scan_charts import best_rate, tradeoffs_chart
from scaling_jax.report.sections import command, runs_table, sections
from scaling_jax.report.words import ending, short
from scaling_jax.results import analyse, read_results
from scaling_jax.results.branches import read_branches
from scaling_jax.results.runs import last_noise_scale
from scaling_jax.scanning.experiment import DEMO, QUICK
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run, run_folder
from scaling_jax.training.metrics import course
from tests.made_up_scan import evaluated_lines, write_run

VOID = {"meta", "link", "br", "hr", "img", "input"}
CHARTS = 3 + 7 * 2  # three of all models, seven of each of two models
HOSTILE = '"/><script>alert(1)</script>&$x$'


class Document(html.parser.HTMLParser):
    """Refuses what isn't well nested; keeps attributes, the text of each tag, and rows of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.said: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.said.append((self.open[-1] if self.open else "", data))

    def text(self, tag):
        return [data for within, data in self.said if within == tag]


@pytest.fixture(scope="module")
def results(made_up, tmp_path_factory):
    """A finished scan with branches of one run."""
    workdir = tmp_path_factory.mktemp("report") / "scan"
    shutil.copytree(made_up[1], workdir)
    (workdir / "branches.csv").write_text(
        "model,batch_tokens,seed,tokens,loss,b_crit,low,high\n"
        "1x16,1024,0,500000,2.7,700,500,900\n1x32,1024,0,1000000,2.4,1300,900,inf\n"
    )
    return workdir


@pytest.fixture(scope="module")
def document(results):
    return read(write_report(analyse(results), results))


@pytest.fixture(scope="module")
def single_runs(made_up, tmp_path_factory):
    """A folder as `train` leaves it: one run, two that go on, one of them not evaluated yet."""
    workdir = tmp_path_factory.mktemp("report") / "trained"
    for index, cell in enumerate(made_up[0].cells[:3]):
        source = run_folder(made_up[1], made_up[0].run(cell, 0))
        shutil.copytree(source, workdir / "runs" / source.name)
        if index:
            (workdir / "runs" / source.name / "result.json").unlink()
    (workdir / "runs" / source.name / "metrics.jsonl").unlink()
    return workdir


@pytest.fixture(scope="module")
def document_of_runs(single_runs):
    return read(write_runs_report(read_results(single_runs)))


def read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 5e6
    return Document(text)


both = pytest.mark.parametrize("kind", ["document", "document_of_runs"])


@both
def test_nothing_is_loaded_from_anywhere(kind, request):
    document = request.getfixturevalue(kind)
    for tag, name, value in document.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:")), (tag, name, value)
        assert "://" not in (value or ""), (tag, name, value)
    assert not [data for data in document.text("style") if "url(" in data.replace("url(#", "") or "@import" in data]
    policy = next(value for tag, name, value in document.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(("kind", "charts"), [("document", CHARTS), ("document_of_runs", 2)])
def test_every_chart_is_there_with_values_at_its_points(kind, charts, request):
    document = request.getfixturevalue(kind)
    tags = [tag for tag, name, _ in document.attributes if name == "viewbox"]
    data = [json.loads(text) for text in document.text("script") if text.startswith("[")]
    assert len(tags) == len(data) == charts
    for marks in data:
        assert len(marks) > 4
        for x, y, text in marks:
            assert x > 0
            assert y > 0
            assert any(character.isdigit() for character in text)
            assert "nan" not in text


@both
def test_no_id_comes_twice_and_every_reference_has_its_target(kind, request):
    document = request.getfixturevalue(kind)
    ids = [value for _, name, value in document.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in document.attributes if name == "href" and value[0] == "#"} <= set(ids)


def test_every_single_run_is_in_the_table_with_its_noise_scale_and_how_it_ended(document_of_runs, single_runs):
    cells = document_of_runs.text("td")
    first, second, _ = read_results(single_runs).runs
    assert ending(first.run, first.result) in cells
    assert cells.count("not done") == 2
    for record in (first, second):
        assert f"{len(record.course.batch_tokens):,}" in cells
        assert f"{record.course.eval_losses[-1]:.4f}" in cells
        noise = last_noise_scale(record.course)
        assert f"{short(noise.value)} [{short(noise.low)}, {short(noise.high)}]" in cells


def test_a_single_run_whose_noise_scale_may_have_too_narrow_an_interval_is_named(tmp_path):
    run = Run(ModelConfig(1, 16, 1), batch_tokens=128, learning_rate=1e-2, max_steps=400)
    skewed = np.random.default_rng(0).lognormal(0, 2, 400)
    (line,) = evaluated_lines(run, [(400, 2.5)])
    line = dataclasses.replace(line, small_sq_norm=1 + skewed, big_sq_norm=1 + skewed / 2)
    write_run(tmp_path, run, [line], "exhausted")
    warning = last_noise_scale(course([line])).warning
    assert [x for x in read(write_runs_report(read_results(tmp_path))).text("p") if f"{run.run_id}: {warning}" in x]


def test_the_law_is_said_in_words(document, analysis):
    law, said = analysis.fit.law, document.text("li")
    low, high = (short(float(end[0])) for end in analysis.fit.band([2.0]))
    assert [x for x in said if "2.00 nats per token" in x and f"{short(law(2.0))} [{low}, {high}] tokens" in x]
    assert [x for x in said if f"{short(law.b_star)} tokens · L" in x]
    assert f"{law.exponent:.2f}".replace("-", "−") in document.text("sup")
    lowest = min((p for p in analysis.fit.points if p.in_law), key=lambda p: p.loss).tradeoff
    dearer = short(lowest.tokens_at(4 * lowest.b_crit))
    assert [x for x in said if "4 times" in x and "2.5 times" in x and dearer in x]


def test_the_spread_of_the_law_is_a_table_and_a_chart(document, analysis):
    cells = document.text("td")
    for law in (analysis.fit.law, analysis.fit.local.law):
        assert len(law.systematic) > 3
        for part in law.systematic:
            assert part.kept in cells
            assert f"{part.exponent:.2f}" in cells
    floors = [floor for form in analysis.forms for floor, _ in form.floors[1:]]
    assert [cell for cell in cells if cell.startswith("of L - ")] == [f"of L - {floor:.2f}" for floor in floors]


def test_powers_are_superscripts_but_not_in_what_is_copied():
    assert "L<sup>−6.63</sup> (1 + (B/b)<sup>a</sup>) x^{2}" in str(paragraph("L^-6.63 (1 + (B/b)^a) x^{2}"))
    assert "2^18" in str(code("--batch-tokens 2^18"))


def test_flags_runs_versions_fingerprint_and_command_are_there(document, analysis, runs):
    cells, facts = document.text("td"), document.text("dd")
    for note in analysis.notes:
        assert note in document.text("li")
    assert sum("reached the target loss" in cell for cell in cells) == sum(len(cell.tried) for cell in runs)
    assert {"made up", "0.1.0"} <= set(facts)
    assert "scaling-jax scan experiment.json --results again" in document.text("pre")
    assert json.loads(document.text("pre")[-1])["name"] == analysis.experiment.name


def test_branches_stand_beside_the_scan_at_the_same_loss(document):
    assert "B_crit by branches" in [" ".join(header.split()) for header in document.text("th")]
    cells = document.text("td")
    assert "1.3k\n900–∞" in cells


def test_a_scan_without_branches_or_law_is_reported_and_hostile_names_stay_text(analysis, monkeypatch):
    source = f"files:/home/jane/{HOSTILE}"
    corpus = {"source": source, "sha256": HOSTILE}
    runs = [
        dataclasses.replace(record, run=dataclasses.replace(record.run, text=source), corpus=corpus)
        for record in analysis.results.runs
    ]
    experiment = dataclasses.replace(analysis.experiment, text=source)
    results = dataclasses.replace(analysis.results, experiment=experiment, runs=tuple(runs))
    vars(results)["noise_scale"] = []  # what is computed once is kept there
    fit = dataclasses.replace(analysis.fit, law=None, errors=None, notes=("no law: why not",))
    told = dataclasses.replace(analysis, results=results, fit=fit, notes=(HOSTILE,))
    monkeypatch.setattr("scaling_jax.report.sections.versions", lambda: {HOSTILE: HOSTILE})
    text = page(HOSTILE, sections(told))
    document = Document(text)
    assert [said for said in document.text("li") if "why not" in said]
    assert "by branches" not in text
    assert "alert(1)" not in "".join(document.text("script"))
    assert document.text("h1") == [HOSTILE]
    assert HOSTILE in document.text("li")
    assert f"files:~/{HOSTILE}" in document.text("dd")
    assert document.text("dd").count(HOSTILE) == 2  # a fingerprint and a version
    assert "jane" not in text


def test_hostile_marks_stay_inside_their_script(analysis):
    points = tuple(dataclasses.replace(p, model=HOSTILE) for p in analysis.fit.points)
    told = dataclasses.replace(analysis, fit=dataclasses.replace(analysis.fit, points=points))
    text = charts([draw(tradeoffs_chart(told, [HOSTILE]), "p")])
    assert text.count("<script") == text.count("</script>") == 1
    (data,) = Document(text).text("script")
    assert json.loads(data)[0][2].startswith(HOSTILE)


def test_tables_hold_what_they_are_given():
    root = ET.fromstring(table(("a", "b"), [("x", 1), ("<y>", 2)]))
    assert [cell.text for cell in root.iter("td")] == ["x", "1", "<y>", "2"]
    assert [cell.get("class") for cell in root.iter("th")] == ["words", None]


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        (DEMO, "scaling-jax demo --results again"),
        (QUICK, "scaling-jax demo --quick --results again"),
        (dataclasses.replace(DEMO, text="files:a b/*"), "scaling-jax demo --text 'files:a b/*' --results again"),
        (dataclasses.replace(DEMO, max_tokens=1_000_000), "scaling-jax scan experiment.json --results again"),
    ],
)
def test_the_command_makes_the_same_experiment(experiment, said):
    assert command(experiment) == said


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"{Path.home()}/x/y", "~/x/y"),
        ("files:/home/jane.doe/notes/*.md", "files:~/notes/*.md"),
        ("see /Users/jane", "see ~"),
        (r"C:\Users\jane\x", r"~\x"),
        ("/srv/text", "/srv/text"),
    ],
)
def test_home_folders_are_not_told(path, shown):
    assert without_home(path) == shown


@pytest.mark.parametrize("row", ["1x16,1024,0,5e5,2.7,x,1,2", "1x16,1024,0,5e5", "1x16,1024,0,,2.7,1,1,2"])
def test_a_damaged_branch_is_named_by_its_line(tmp_path, row):
    (tmp_path / "branches.csv").write_text(f"model,batch_tokens,seed,tokens,loss,b_crit,low,high\n{row}\n")
    with pytest.raises(UserError, match=r"branches\.csv line 2 "):
        read_branches(tmp_path)


def test_every_run_names_the_losses_for_which_its_rate_is_ringed_in_the_search_chart(analysis):
    """The best rate may change from loss to loss, so one best rate for all contradicts a ring at one loss."""
    cell = analysis.results.cells[0]
    fast, slow = cell.tried[0], cell.tried[-1]
    steps = [fast.steps_to_target.copy(), slow.steps_to_target.copy()]
    steps[0][:3], steps[1][:3], steps[0][3:], steps[1][3:] = 10.0, 20.0, 40.0, 30.0
    tried = [t._replace(steps_to_target=s) for t, s in zip((fast, slow), steps, strict=True)]
    document = Document(str(runs_table([cell._replace(tried=tried)])))
    said, targets = [text for text in document.text("td") if "losses" in text], cell.subject.target_losses
    first, second = said
    assert first.startswith(f"3 of 8 losses, {targets[0]:.4g} to {targets[2]:.4g}, at an edge")
    assert second.startswith(f"5 of 8 losses, {targets[3]:.4g} to {targets[7]:.4g}, at an edge")
    middle = best_rate(cell._replace(tried=tried), 4)  # what the search chart rings
    assert middle.learning_rate == slow.run.learning_rate


def test_an_old_report_outlives_a_failure(analysis, tmp_path):
    (tmp_path / "report.html").write_text("old")
    results = dataclasses.replace(analysis.results, runs=())
    with pytest.raises(UserError, match="isn't finished"):
        write_report(dataclasses.replace(analysis, results=results), tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
