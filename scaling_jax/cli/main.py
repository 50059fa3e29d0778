"""The entry point of the command line: dispatch, error messages and exit codes."""

import contextlib
import glob
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from typing import NoReturn

import scaling_jax.cli.comparing
import scaling_jax.cli.data
import scaling_jax.cli.results
import scaling_jax.cli.running  # noqa: F401  each registers its commands
from scaling_jax.cli import app, joined
from scaling_jax.console.signals import before_training
from scaling_jax.console.terminal import escaped, print_any_character
from scaling_jax.io import UserError

DESCRIPTION = """Measure, fit and plan the critical batch size of language-model training.

Examples:

  scaling-jax demo                          scan two small models on this machine; figures and a report

  scaling-jax scan mine.py --dry-run        show what an experiment needs at most

  scaling-jax fit mine.csv                  fit critical batch sizes and their law to your own table

  scaling-jax advise results/demo --target-loss 2.0

  scaling-jax compare results/a results/b   tokens that one scan saves over another

Write numbers as 4096, 1e6, 2^18, 2k (2,000), 64Ki (65,536), 1.5M or 10G.

Exit codes: 0 done, or saved after SIGTERM; 1 a program of `compile` doesn't fit; 2 an error, explained in one line;
75 or 134 another process of the run was lost; 130 interrupted: run the same command again to continue.
--debug shows the traceback of an error; --version shows the version.
"""


_TRAIN = (["demo"], ["scan"], ["train"], ["branch"])
_COMPLETION, _SHELLS = "--tyro-print-completion", ("bash", "zsh", "tcsh", "fish")


def main() -> None:
    """Runs the command in the arguments; `DESCRIPTION` lists the exit codes."""
    try:
        _run()
    except SystemExit as end:
        _end_if_compiling(end.code)
        raise
    _end_if_compiling(0)


def _run() -> None:
    print_any_character()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for flag in ("--set", "--executor-options"):
        arguments = joined(arguments, flag)
    if arguments == ["--version"]:
        print(f"scaling-jax {importlib.metadata.version('scaling-jax')}")
        return
    _leave_out_absent_tpu()
    stack = contextlib.ExitStack()
    try:
        _check_shell(arguments)
        stack.enter_context(before_training() if arguments[:1] in _TRAIN else contextlib.nullcontext())
        app.cli(args=arguments, prog="scaling-jax", description=DESCRIPTION)
    except (UserError, OSError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        kept = ": finished work is kept; run the same command again to continue" if isinstance(error, OSError) else ""
        _refuse(f"{error}{kept}")
    except (RuntimeError, AssertionError) as error:
        if "--debug" in sys.argv or not _no_platform(error):
            raise
        what = str(error) or "no such platform here"
        chosen = os.environ["JAX_PLATFORMS"]
        _refuse(f"JAX can't start with JAX_PLATFORMS={chosen} ({what}): unset it, or name a platform of this machine")
    except ValueError as error:
        if "--debug" in sys.argv or not _from(error, "jax/_src/config.py"):
            raise
        names = ", ".join(name for name in os.environ if name.startswith("JAX_"))
        _refuse(f"JAX refuses its environment ({error}): correct or unset {names}")
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        exec("")  # else Python, if the interrupt passed an exec (dataclasses are made so), ends by SIGINT, not with 130
        sys.exit(130)
    finally:
        stack.close()


def _end_if_compiling(code: str | int | None) -> None:
    """Ends the process at once where a thread compiles a stage that no longer comes: Python would wait for it."""
    ahead = sys.modules.get("scaling_jax.training.ahead")
    if ahead is not None and ahead.compiling() and not isinstance(code, str):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code or 0)


def _refuse(why: str) -> NoReturn:
    print(escaped(f"scaling-jax: {why}".replace("\n", " ")), file=sys.stderr)
    sys.exit(2)


def _no_platform(error: BaseException) -> bool:
    """True if JAX raised the error while it started the platforms of JAX_PLATFORMS."""
    return bool(os.environ.get("JAX_PLATFORMS")) and _from(error, "xla_bridge.py")


def _from(error: BaseException, file: str) -> bool:
    """True if code in a file had to do with the error."""
    return any(frame.filename.endswith(file) for frame in traceback.extract_tb(error.__traceback__))


def _leave_out_absent_tpu() -> None:
    """Makes JAX take the CPU where libtpu is installed but no TPU is there: libtpu would print errors about that."""
    chosen = any(name == "JAX_PLATFORMS" or name.startswith("TPU_") for name in os.environ)
    if chosen or importlib.util.find_spec("libtpu") is None or glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"):
        return
    if importlib.util.find_spec("jax_plugins") is None and not importlib.metadata.entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # no GPU either; before JAX is imported


def _check_shell(arguments: list[str]) -> None:
    if _COMPLETION not in arguments:
        return
    shell = [*arguments, ""][arguments.index(_COMPLETION) + 1]
    if shell not in _SHELLS:
        raise UserError(f"{_COMPLETION} {shell}: choose from {', '.join(_SHELLS)}")


if __name__ == "__main__":
    main()
