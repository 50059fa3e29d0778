"""Damage to files as disks, power cuts and people do it, drawn from a seed; and what tells whether it was handled."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.io import UserError

KINDS = ("bit", "digit", "cut", "emptied", "zeroed", "deleted", "line taken", "line twice", "lines swapped", "grown")


class Damage(NamedTuple):
    file: str  # below the folder
    kind: str
    seed: int


def draw(folder: Path, files: list[Path], count: int, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> list[Damage]:
    """Damages of every kind in turn, to files drawn by chance; only those that change bytes."""
    draws = random.Random(seed)
    found: list[Damage] = []
    while len(found) < count:
        file = draws.choice(files)
        damage = Damage(str(file.relative_to(folder)), kinds[len(found) % len(kinds)], draws.randrange(2**32))
        if damaged(file.read_bytes(), damage) != file.read_bytes():
            found.append(damage)
    return found


def damaged(content: bytes, damage: Damage) -> bytes | None:
    """The bytes after the damage; None if the file is gone."""
    draws, lines = random.Random(damage.seed), content.splitlines(keepends=True)
    if damage.kind == "deleted" or not content:
        return None
    if damage.kind == "emptied":
        return b""
    if damage.kind == "zeroed":
        return bytes(len(content))
    if damage.kind == "cut":
        return content[: draws.randrange(len(content))]
    if damage.kind == "grown":
        return content + draws.randbytes(draws.randrange(1, 100))
    place = draws.randrange(len(content))
    if damage.kind == "digit":  # another number, and JSON all the same
        digits = [k for k, byte in enumerate(content) if chr(byte) in "0123456789"]
        if digits:
            place = draws.choice(digits)
            return content[:place] + draws.choice("123456789").encode() + content[place + 1 :]
    if damage.kind.startswith("line") and len(lines) > 1:
        k = draws.randrange(len(lines) - 1)
        if damage.kind == "line taken":
            del lines[k]
        elif damage.kind == "line twice":
            lines.insert(k, lines[k])
        else:
            lines[k : k + 2] = lines[k + 1], lines[k]
        return b"".join(lines)
    return content[:place] + bytes([content[place] ^ 1 << draws.randrange(8)]) + content[place + 1 :]


def do(folder: Path, damage: Damage) -> None:
    path = folder / damage.file
    content = damaged(path.read_bytes(), damage)
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def copies(folder: Path, to: Path, damages: list[Damage]) -> Iterator[tuple[Damage, Path]]:
    """Each damage with a damaged copy of the folder, which is removed afterwards."""
    for number, damage in enumerate(damages):
        copy = to / f"damaged-{number}"
        shutil.copytree(folder, copy)
        do(copy, damage)
        yield damage, copy
        shutil.rmtree(copy)


def attempted(do: Callable[[], Any]) -> Any:
    """What is returned, or the `UserError` that is raised."""
    try:
        return do()
    except UserError as error:
        return error
