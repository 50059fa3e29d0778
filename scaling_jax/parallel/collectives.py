"""Which collective operations a compiled program holds, and how many bytes they move."""

import re
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# `-done` ends an operation that `-start` began: one operation in two instructions.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (?P<shape>.+?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation of a program; `num_bytes` is the size of its result on one device."""

    kind: str
    num_bytes: int


def collectives(hlo: str) -> list[Collective]:
    """The collective operations in optimized HLO (`compiled.as_text()`), each once, loops or not."""
    found = []
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            arrays = [_num_bytes(*array) for array in _ARRAY.findall(match["shape"])]
            with_operand = match["start"] and match["kind"] != "all-reduce"  # its shape is (operand, result, …)
            found.append(Collective(match["kind"], max(arrays) if with_operand else sum(arrays)))
    return found


def _num_bytes(element: str, bits: str, dimensions: str) -> int:
    count = 1
    for size in filter(None, dimensions.split(",")):
        count *= int(size)
    return count * (1 if element == "pred" else -(-int(bits) // 8))
