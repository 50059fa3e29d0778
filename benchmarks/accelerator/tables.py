"""The tables of docs/performance.md on accelerators, as Markdown: tables.py FOLDER, with what run.sh wrote."""

import json
import sys
from pathlib import Path


def read(folder: Path, stage: str) -> dict:
    path = folder / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def spread(values: list[float], digits: int = 3) -> str:
    middle, low, high = (f"{x:.{digits}f}" for x in values)
    return f"{middle} [{low}, {high}]"


def tables(folder: Path) -> str:
    machine, fast, many = (read(folder, stage) for stage in ("machine", "fast", "many"))
    lines = [f"{machine['card']}, jax {machine['jax']}, {machine['date']}.", ""]
    rates = {name: figure for name, figure in fast.items() if isinstance(figure, dict) and "mfu" in figure}
    if rates:
        lines += [
            "| model, batch, setting | tokens per second | MFU | share of a large product | GiB | compiling |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {x['tokens_per_second']:,} | {100 * x['mfu']:.1f} % | {100 * x['share_of_product']:.0f} % "
            f"| {x['temporary_gib']} | {x['compile_seconds']} s |"
            for name, x in rates.items()
        ]
    costs = {name: figure for name, figure in fast.items() if name.endswith(" / without")}
    if costs:
        lines += ["", "| model, batch: estimator | time of a step, relative to one without |", "|---|---|"]
        lines += [f"| {name.removesuffix(' / without')} | {spread(x)} |" for name, x in costs.items()]
    populations = {name: figure for name, figure in many.items() if isinstance(figure, dict) and "speedup" in figure}
    if populations:
        lines += ["", "| model, batch, runs at once | faster than one by one |", "|---|---|"]
        lines += [f"| {name} | {x['speedup']}× |" for name, x in populations.items()]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


if __name__ == "__main__":
    print(tables(Path(sys.argv[1])))
