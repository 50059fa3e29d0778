"""`scaling-jax data …`: text packed into token rows."""

import tyro

from scaling_jax.cli import app

data = tyro.extras.SubcommandApp()
app.command(data, name="data", help="Pack text into token rows once, and look at them.")


@data.command(name="prepare")
def prepare_data(
    source: tyro.conf.Positional[str],
    tokenizer: str = "bytes",
    context: int = 64,
    workers: int | None = None,
    check: bool = False,
) -> None:
    """Pack text into token rows, once; training and scans on the same text then use them.

    Interrupt it as you like: the same command continues.

    Example: scaling-jax data prepare 'files:~/notes/**/*.txt' --tokenizer bpe:4096

    Args:
      source: 'python', 'files:<glob>[#field]' (text, .jsonl[.gz|.zst]) or 'tfds:<name>[/<config>][#field]'.
      tokenizer: bytes, gpt2, or bpe:<vocabulary>, trained on the source's train split.
      context: tokens per row; one packing serves any.
      workers: processes; one a core unless given.
      check: compare all checksums of what was packed before.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from scaling_jax.data import prepare
    from scaling_jax.data.packing import summary

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(f"reading {source}", total=None)
        corpus = prepare(
            source,
            context,
            tokenizer,
            workers=workers,
            check=check,
            on_progress=lambda p: progress.update(task, description=p.phase, completed=p.done, total=p.total),
        )
    console.print("\n".join(summary(corpus)), highlight=False, markup=False, soft_wrap=True)


@data.command(name="inspect")
def inspect_data(source: tyro.conf.Positional[str], tokenizer: str = "bytes", context: int = 64, rows: int = 3) -> None:
    """Check packed text against its manifest, show its counts and a few rows as text.

    Example: scaling-jax data inspect python

    Args:
      source: as for prepare.
      tokenizer: as for prepare.
      context: tokens per row.
      rows: shown of each split.
    """
    from scaling_jax.data.packing import inspect

    print(inspect(source, context, tokenizer, rows))
