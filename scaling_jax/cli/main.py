"""The command line's entry."""

import importlib.metadata
import sys

import scaling_jax.cli.data
import scaling_jax.cli.results
import scaling_jax.cli.running  # noqa: F401  each registers its commands
from scaling_jax.cli import app, joined
from scaling_jax.io import UserError

DESCRIPTION = """Measure, fit and plan the critical batch size of language-model training.

Examples:

  scaling-jax demo                          two small models on this machine, a chart and a report

  scaling-jax scan mine.py --dry-run        what an experiment would take

  scaling-jax fit mine.csv                  critical batch sizes and their law from a table of your own

  scaling-jax advise results/demo --target-loss 2.0

Numbers may be written as 4096, 1e6, 2^18, 2k (2,000), 64Ki (65,536), 1.5M or 10G.

Exit codes: 0 done, or saved because SIGTERM asked for it; 1 what `compile` was asked for doesn't fit; 2 it could not be
done and one line says why; 75 or 134 another process of the run was lost; 130 interrupted, the same command continues.
With --debug an error shows where it came from; --version says which version this is.
"""


_COMPLETION, _SHELLS = "--tyro-print-completion", ("bash", "zsh", "tcsh", "fish")


def main() -> None:
    """Runs the command that the arguments name; see `DESCRIPTION` for exit codes."""
    arguments = joined([argument for argument in sys.argv[1:] if argument != "--debug"])
    if arguments == ["--version"]:
        print(f"scaling-jax {importlib.metadata.version('scaling-jax')}")
        return
    try:
        _check_shell(arguments)
        app.cli(args=arguments, prog="scaling-jax", description=DESCRIPTION)
    except (UserError, OSError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        kept = ": what was done is kept, the same command continues" if isinstance(error, OSError) else ""
        print(f"scaling-jax: {error}{kept}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)


def _check_shell(arguments: list[str]) -> None:
    if _COMPLETION not in arguments:
        return
    shell = [*arguments, ""][arguments.index(_COMPLETION) + 1]
    if shell not in _SHELLS:
        raise UserError(f"{_COMPLETION} {shell}: completion is for {', '.join(_SHELLS)}")


if __name__ == "__main__":
    main()
