"""The commands `scaling-jax data prepare` and `scaling-jax data inspect`."""

import tyro

from scaling_jax.cli import app

data = tyro.extras.SubcommandApp()
app.command(data, name="data", help="Pack text into token rows, and inspect packed text.")


@data.command(name="prepare")
def prepare_data(
    source: tyro.conf.Positional[str],
    tokenizer: str = "bytes",
    context: int = 64,
    workers: int | None = None,
    check: bool = False,
) -> None:
    """Pack text into token rows. Training and scans on the same text then start at once.

    You can interrupt it at any time. Run the same command again to continue.

    Example: scaling-jax data prepare 'files:~/notes/**/*.txt' --tokenizer bpe:4096

    Args:
      source: 'python', 'files:<glob>[#field]' (text, .jsonl[.gz|.zst]), 'tfds:<name>[/<config>][#field]', or
        'tokens:<glob>' (token files of nanoGPT, llm.c, Megatron, NumPy).
      tokenizer: bytes, gpt2, bpe:<vocabulary>, which is trained on the source's train split, or the path of a
        tokenizer.json or a SentencePiece .model; for tokens the one that made them, or ids:<vocabulary>.
      context: tokens per row; packed text works with any context.
      workers: number of processes; by default one per core.
      check: if the text is already packed, compare all checksums.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from scaling_jax.console.terminal import Terminal
    from scaling_jax.data import prepare
    from scaling_jax.data.packing import summary

    console = Terminal()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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
    console.print("\n".join(summary(corpus)), soft_wrap=True)


@data.command(name="inspect")
def inspect_data(source: tyro.conf.Positional[str], tokenizer: str = "bytes", context: int = 64, rows: int = 3) -> None:
    """Check the files of packed text, and show its counts and a few rows as text.

    Example: scaling-jax data inspect python

    Args:
      source: as for 'data prepare'.
      tokenizer: as for 'data prepare'.
      context: tokens per row.
      rows: number of rows to show from each split.
    """
    from scaling_jax.console.terminal import escaped
    from scaling_jax.data.packing import inspect

    print(escaped(inspect(source, context, tokenizer, rows)))
