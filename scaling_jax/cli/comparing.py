"""The command that compares results: compare."""

from pathlib import Path

import tyro

from scaling_jax.cli import app
from scaling_jax.cli.budgets import refuse_budget_scan


@app.command
def compare(
    results: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("comparison"),
    bytes_per_token: tuple[float, ...] = (),
    json: bool = False,
) -> None:
    """Compare scans: steps and tokens to the same losses, B_crit, and what each saves over the first by batch size.

    Writes a figure and its data to a folder.

    Example: scaling-jax compare results/adamw results/muon

    Args:
      results: results folders after `fit`, or CSV tables with columns model, batch_tokens, target_loss, steps.
      out: the folder for the figure.
      bytes_per_token: of each, to compare different tokenizers in bits per byte; folders know theirs.
      json: print JSON.
    """
    from scaling_jax.console.compare import comparison
    from scaling_jax.console.terminal import Terminal, Working
    from scaling_jax.io.files import as_json
    from scaling_jax.io.stores import working_copy
    from scaling_jax.report import write_comparison
    from scaling_jax.results.compare import compare_scans

    folders = [working_copy(path) for path in results]
    for folder in folders:
        refuse_budget_scan(folder, "compare")
    with Working("fitting") as working:
        compared = compare_scans(folders, bytes_per_token=bytes_per_token)
        working.say("drawing the figure")
        figure = write_comparison(compared, out)
    if json:
        print(as_json([pair for pair in compared.pairs]))
    else:
        Terminal().print(comparison(compared, figure))
