"""Options that can't be: refused by name before anything is written."""

import pytest

TRAIN = {"learning-rate": "1e-3", "batch-tokens": "128", "max-steps": "3", "model": "1x16"}
ADVISE = {"target-loss": "2.5"}
HARDWARE = {"devices": "8", "tokens-per-second": "1e5"}
NOT_POSITIVE = ("nan", "-1", "0", "inf", "-inf", "1e400")
NO_NUMBER = ("many", "", "1,5", "½", "[1]")
HUGE = "9" * 40


def options(given):
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]


def cases(command, given, **bad):
    """(command, all options, which one is bad) for each bad value of each option."""
    for name, values in bad.items():
        option = name.replace("_", "-")
        for value in values:
            yield pytest.param(command, given | {option: value}, name, id=f"{command} {option}={value[:12]}")


TRAIN_CASES = [
    *cases("train", TRAIN, learning_rate=NOT_POSITIVE, target_loss=NOT_POSITIVE),
    *cases("train", TRAIN, batch_tokens=("0", "-1", HUGE), max_steps=("0", "-1", "-" + HUGE)),
    *cases("train", TRAIN, context=("0", "-1"), seed=("-1", HUGE, "4294967296")),
    *cases("train", TRAIN | {"max-steps": None}, max_tokens=("0", "-1")),
]
ADVISE_CASES = [
    *cases("advise", ADVISE, budget_tokens=NOT_POSITIVE, ramp_fraction=NOT_POSITIVE),
    *cases("advise", ADVISE, start_batch_tokens=("0", "-5"), max_batch_tokens=("0", "-1")),
    *cases("advise", ADVISE | HARDWARE, tokens_per_second=NOT_POSITIVE, device_batch_tokens=("nan", "-1", "inf")),
    *cases("advise", ADVISE | HARDWARE, devices=("0", "-1")),
]
UNREADABLE = [
    *cases("train", TRAIN, **dict.fromkeys(("learning_rate", "batch_tokens", "max_steps", "seed"), NO_NUMBER)),
    *cases("train", TRAIN, **dict.fromkeys(("max_tokens", "context", "target_loss"), NO_NUMBER)),
    *cases("advise", ADVISE, **dict.fromkeys(("target_loss", "budget_tokens", "devices"), NO_NUMBER)),
    *cases("advise", ADVISE, **dict.fromkeys(("max_batch_tokens", "ramp_fraction"), NO_NUMBER)),
]


@pytest.fixture
def text(tmp_path):
    """A text of its own for `train`: (options, folder)."""
    folder = tmp_path / "text"
    folder.mkdir()
    for k in range(30):
        (folder / f"{k}.txt").write_text("how now brown cow " * 40)
    return "--text", f"files:{folder}/*"


@pytest.mark.parametrize(("command", "given", "name"), TRAIN_CASES)
def test_training_refuses_what_is_out_of_range(command, given, name, refuses, text):
    refuses(command, *options(given), *text, names=name)


@pytest.mark.parametrize(("command", "given", "name"), ADVISE_CASES)
def test_advice_refuses_what_is_out_of_range(command, given, name, refuses, measured):
    refuses(command, measured, *options(given), names=name, watched=(measured.parent,))


@pytest.mark.parametrize(("command", "given", "name"), UNREADABLE)
def test_what_is_no_number_is_refused_by_its_option(command, given, name, refuses, measured, text):
    results = [measured] if command == "advise" else text
    refuses(command, *results, *options(given), names=f"--{name.replace('_', '-')}", one_line=False)


@pytest.mark.parametrize("loss", ["nan", "inf", "-1", "0", "1e300", "1e-300"])
def test_a_loss_that_nothing_was_measured_at_is_refused(loss, refuses, measured):
    refuses("advise", measured, "--target-loss", loss, names="loss", watched=(measured.parent,))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--model", "nope"), "'nope'"),
        (("--devices", "8"), "--tokens-per-second"),
        (("--tokens-per-second", "8"), "--devices"),
        (("--start-batch-tokens", "512", "--max-batch-tokens", "256"), "512 to 256"),
        (("--write-ramp", "/dev/null/x"), "/dev/null/x"),
        (("--write-ramp", "."), "can't write"),
        (("--write-ramp", ""), "can't write"),
    ],
)
def test_advice_refuses_what_does_not_go_together(arguments, names, refuses, measured):
    refuses("advise", measured, "--target-loss", "2.5", *arguments, names=names, watched=(measured.parent,))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("data", "prepare", "{text}", "--context", "0"), "context"),
        (("data", "prepare", "{text}", "--workers", "0"), "workers"),
        (("data", "prepare", "{text}", "--workers", "-3"), "workers"),
        (("data", "prepare", "{text}", "--tokenizer", "bpe:1"), "bpe:1"),
        (("data", "prepare", "{text}", "--tokenizer", "../x"), "../x"),
        (("data", "prepare", "{text}#field"), "fields"),
        (("data", "prepare", "http://x"), "http://x"),
        (("data", "prepare", ""), "text source"),
        (("data", "inspect", "{text}", "--rows", "-1"), "rows"),
        (("data", "inspect", "{text}"), "isn't packed"),
        (("train", "--learning-rate", "1e-3", "--max-steps", "9"), "exactly one of --batch-tokens and --ramp"),
        (("train", "--learning-rate", "1", "--batch-tokens", "128", "--text", "{text}"), "max_steps"),
        (("train", "--learning-rate", "1", "--ramp", "."), "ramp"),
        (("train", "--learning-rate", "1", "--ramp", "/nowhere.json"), "can't read a ramp from /nowhere.json"),
        (("train", *options(TRAIN | {"batch-tokens": "512"}), "--text", "{text}", "--results", "/dev/null"), "Not a"),
        (("status", "."), "experiment.json"),
        (("status", ""), "experiment.json"),
        (("report", "."), "experiment.json"),
        (("report", "/dev/null"), "/dev/null"),
        (("branch", ".", "--batch-tokens", "128"), "experiment.json"),
        (("advise", ".", "--target-loss", "2"), "measurements.csv"),
        (("scan", "."), "experiment file"),
        (("scan", "missing.py"), "no experiment file missing.py"),
        (("scan", "x.py", "--set", "a=1"), "x.py"),
        (("compile", "x.py"), "x.py"),
        (("demo", "--dry-run", "--text", "files:"), "files:"),
        (("demo", "--dry-run", "--text", "files:/nowhere/*"), "matches no file"),
        (("demo", "--results", "/proc/x"), "can't write results to /proc/x"),
        (("--tyro-print-completion", "foo"), "foo: completion is for bash, zsh, tcsh, fish"),
    ],
)
def test_other_commands_refuse_by_name(arguments, names, refuses, text):
    refuses(*(word.format(text=text[1]) for word in arguments), names=names)


def test_a_mistyped_text_leaves_the_folder_to_the_corrected_command(cli, tmp_path):
    done = cli("demo", "--quick", "--text", "files:/nowhere/*", "--results", tmp_path / "results")
    assert done.code == 2
    assert "matches no file" in done.errors
    assert not (tmp_path / "results" / "experiment.json").exists()


@pytest.mark.parametrize("command", ["demo", "scan", "train", "branch", "fit", "report", "advise", "status", "compile"])
def test_an_option_that_is_not_there_is_named(command, refuses):
    refuses(command, "x", "--no-such-option", "1", names="--no-such-option", one_line=False)


@pytest.mark.parametrize("arguments", [(), ("bogus",), ("data",), ("data", "bogus"), ("fit",), ("fit", "a", "b")])
def test_a_command_that_is_incomplete_is_answered_with_help(arguments, refuses):
    refuses(*arguments, names="--help", one_line=False)


def test_numbers_of_a_hostile_size_are_answered_at_once(cli, measured):
    for option in ("--start-batch-tokens", "--max-batch-tokens"):
        assert cli("advise", measured, "--target-loss", "2.5", option, HUGE).code in (0, 2)
