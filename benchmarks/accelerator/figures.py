"""A stage's figures: a JSON file that is complete at any moment; `arguments` is what every stage is started with."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

START = time.monotonic()


class Figures:
    """The figures of one stage so far. Each `add` writes the whole file anew."""

    def __init__(self, path: Path):
        self.path, self.values = path, {}

    def add(self, name: str, value: Any) -> None:
        """Adds a figure, a JSON value, and prints it."""
        self.values[name] = value
        self.values["seconds"] = round(time.monotonic() - START, 1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1) + "\n")
        os.replace(partial, self.path)
        print(f"{time.monotonic() - START:6.1f} s  {name}: {json.dumps(value)}", flush=True)


class Arguments(NamedTuple):
    figures: Figures
    toy: bool  # a rehearsal
    seconds: float  # what the stage may take
    luggage: Path

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - START)


def arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("json", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    return Arguments(Figures(given.json), given.toy, given.seconds, Path(os.environ["LUGGAGE"]))
