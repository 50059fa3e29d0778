import io

from rich.console import Console

from scaling_jax.compile.ahead_of_time import CompiledBatch, Executable
from scaling_jax.compile.topologies import CHIPS, Topology
from scaling_jax.console.tables import _compiled_sentences, print_fit
from scaling_jax.report.words import short
from scaling_jax.results.table import fit_table
from scaling_jax.training.program import program_for
from tests.results.test_table import planted


def printed(path):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(print_fit(fit_table(path), path.parent / "fit.json"))
    return console.export_text()


def test_one_sided_points_are_printed_without_numbers(tmp_path):
    text = printed(planted(tmp_path / "a.csv", b_crit_middle=1e8))
    assert text.count("one-sided") == 28
    assert "B_crit = " not in text
    assert [line for line in text.splitlines() if line.startswith("No law: ") and "a law takes 3" in line]


def test_both_laws_and_every_form_are_printed_with_their_ranges(tmp_path):
    path = planted(tmp_path / "a.csv")
    found, text = fit_table(path), printed(path)
    for law in (found.fit.law, found.joint.law):
        low, high = law.exponent_interval
        (line,) = [line for line in text.splitlines() if f"{short(law.b_star)} tokens · L^{law.exponent:.2f}" in line]
        assert f"[{low:.2f}, {high:.2f}]" in line
    assert [line for line in text.splitlines() if "2.9 to 1.75" in line and "nats per token" in line]
    assert {form.form for form in found.forms} == {"loss", "above floor", "data", "size"}
    for form in found.forms:
        low, high = form.valid_range
        unit = form.variable.split(" in ")[1]
        values = (form.form, unit, f"{short(low)}–{short(high)}", f"{100 * form.held_out_error:.1f} %")
        assert [line for line in text.splitlines() if all(value in line for value in values)]


def test_a_terminal_shows_exponents_raised(tmp_path):
    """Other outputs keep `^`, which can be searched for and copied."""
    path, file = planted(tmp_path / "a.csv"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    Console(width=200, file=file, force_terminal=True).print(print_fit(fit_table(path), path.parent / "fit.json"))
    file.seek(0)
    text = file.read()
    assert "tokens · L⁻" in text
    assert "^" not in text


def test_the_memory_of_a_compiled_step_is_said_part_by_part(made_up):
    program = program_for(made_up[0].run(made_up[0].cells[-1], 0))
    step = Executable(7 << 29, True, 1e15, (), argument_bytes=2 << 30, temporary_bytes=1 << 30, program_bytes=1 << 29)
    batch = CompiledBatch(program, "v5e:4x4", (), step, step, step, 1e15, 1e15)
    slice_ = Topology("v5e:4x4", CHIPS["v5e"], (), 4)
    (line,) = [line for line in _compiled_sentences([batch], slice_) if line.startswith("3.5 GiB per chip of ")]
    assert f"at {batch.batch_tokens:,} tokens: 2 for the training state" in line
    assert "; 1 for activations" in line
    assert line.endswith("; 0.5 for the program")
