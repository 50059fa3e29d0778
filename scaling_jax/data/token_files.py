"""Files of tokens that other programs made: raw uint16 (nanoGPT), llm.c, Megatron's .bin with .idx, and .npy.

Files are memory-mapped, never read whole. They may come from somebody else: what a header says is compared with the
file's size before anything else is done with it.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.io import UserError
from scaling_jax.io.files import open_plain

_LLM_C = {  # (magic, version): dtype, and the ids of its tokenizer
    (20240520, 1): ("<u2", "ids:50257,50256"),  # GPT-2; <|endoftext|> stands before each document
    (20240801, 7): ("<u4", "ids:128256,128000"),  # Llama 3; <|begin_of_text|> does
}
_LLM_C_HEADER = 256  # int32
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, entries of the document index
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_LONGEST_HEADER = 10_000  # bytes of an .npy's header; that of an array has about 100
_LOOKED_AT = 4_096  # tokens at the start of a raw file


class TokenFile(NamedTuple):
    """A file of tokens, mapped."""

    tokens: np.ndarray  # [N] of integers, not in memory
    offsets: np.ndarray | None  # [documents]: byte at which each document starts; None where no index says
    ids: str | None  # `ids:…` of the tokenizer, if the format says it

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Token at which each of the documents [start, stop) starts, and the end of the last: [stop - start + 1]."""
        assert self.offsets is not None
        found = np.asarray(self.offsets[start : stop + 1]) // self.tokens.itemsize
        return found if len(found) > stop - start else np.append(found, len(self.tokens))


def open_tokens(path: Path, check: bool = True) -> TokenFile:
    """Maps a file of tokens; what it is follows from its content, or from the .idx beside it.

    Args:
      check: read the whole .idx, to see if it fits the file.

    Raises:
      UserError: if it is none of the known formats, was cut off, or isn't a plain file. Names the file.
    """
    try:
        with open_plain(path) as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(_LONGEST_HEADER)
        if not size:
            raise UserError(f"{path} is empty: leave it out of --text")
        if path.suffix == ".npy":
            return TokenFile(_npy(path, size), None, None)
        index = path.with_suffix(".idx")
        if index.exists():
            return _megatron(path, size, index, check)
        magic, version, count = struct.unpack("<3i", start[:12]) if len(start) >= 12 else (0, 0, 0)
        if magic in {known for known, _ in _LLM_C}:
            return _llm_c(path, size, magic, version, count)
        return TokenFile(_raw(path, size), None, None)
    except OSError as error:
        raise UserError(f"can't read {path} ({error.strerror}): leave it out of --text") from None


def _raw(path: Path, size: int) -> np.ndarray:
    if size % 2:
        raise UserError(f"{path} has {size:,} bytes, an odd number, so it isn't raw uint16: save the tokens as .npy")
    tokens = np.memmap(path, "<u2", "r")
    start = tokens[: 2 * (_LOOKED_AT // 2)]
    if len(start) >= 64 and start[1::2].max() <= 1 < start[0::2].max():
        raise UserError(f"{path} looks like raw uint32, not uint16 as nanoGPT's: save the tokens as .npy")
    return tokens


def _llm_c(path: Path, size: int, magic: int, version: int, count: int) -> TokenFile:
    if (magic, version) not in _LLM_C:
        raise UserError(
            f"{path} is an llm.c file of version {version}, which isn't known here: save the tokens as .npy"
        )
    dtype, ids = _LLM_C[magic, version]
    _check_size(path, size, 4 * _LLM_C_HEADER + count * np.dtype(dtype).itemsize, f"{count:,} tokens", count)
    return TokenFile(np.memmap(path, dtype, "r", 4 * _LLM_C_HEADER, (count,)), None, ids)


def _npy(path: Path, size: int) -> np.ndarray:
    with open_plain(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file, max_header_size=_LONGEST_HEADER)
        except Exception as error:  # NumPy parses the header as Python, which may raise anything
            raise UserError(f"{path} isn't an array of NumPy ({' '.join(str(error).split())[:100]})") from None
        start = file.tell()
    if dtype.kind not in "iu":
        raise UserError(f"{path} holds {dtype}, not whole numbers: save the tokens as uint16 or uint32")
    if fortran and len(shape) > 1:
        raise UserError(f"{path} is stored column by column: save numpy.ascontiguousarray of it")
    count = 1
    for length in shape:
        count *= length
    _check_size(path, size, start + count * dtype.itemsize, f"an array of {shape}", min(shape, default=0))
    return np.memmap(path, dtype, "r", start, (count,))


def _megatron(path: Path, size: int, index: Path, check: bool) -> TokenFile:
    with open_plain(index) as file:
        index_size, start = os.fstat(file.fileno()).st_size, file.read(_MEGATRON_HEADER.size)
    if len(start) < _MEGATRON_HEADER.size or start[:9] != _MEGATRON:
        raise UserError(f"{index} isn't an index of Megatron: remove it if {path.name} is a file of its own")
    _, version, code, sequences, entries = _MEGATRON_HEADER.unpack(start)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(f"{index} has version {version} and dtype code {code}: known are version 1 and whole numbers")
    parts = (("<i4", sequences), ("<i8", sequences), ("<i8", entries))
    needed = _MEGATRON_HEADER.size + sum(int(dtype[-1]) * count for dtype, count in parts)
    said = f"{sequences:,} sequences and {entries:,} entries"
    if index_size > needed:  # multimodal data sets have a byte more for each sequence
        needed += sequences
    _check_size(index, index_size, needed, said, min(sequences, entries))
    arrays, at = [], _MEGATRON_HEADER.size
    for dtype, count in parts:
        arrays.append(np.memmap(index, dtype, "r", at, (count,)))
        at += arrays[-1].nbytes
    lengths, pointers, documents = arrays
    of_tokens = np.dtype(_MEGATRON_DTYPES[code])
    if size % of_tokens.itemsize or (check and not _follow(lengths, pointers, of_tokens.itemsize, size)):
        raise UserError(f"{path} has {size:,} bytes, which aren't those that {index.name} lists: get both again")
    if documents[0] != 0 or documents[-1] > sequences or (check and not _rises(documents)):
        raise UserError(f"{index} lists documents that don't follow each other: get it again")
    firsts = documents if documents[-1] < sequences else documents[:-1]  # the last entry is the end of all
    return TokenFile(np.memmap(path, of_tokens, "r"), _Picked(pointers, firsts), None)  # type: ignore[arg-type]


class _Picked:
    """`values[indices]`, computed for the slices that are asked for."""

    def __init__(self, values: np.ndarray, indices: np.ndarray):
        self._values, self._indices = values, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, span: slice) -> np.ndarray:
        return self._values[self._indices[span]]


def _follow(lengths: np.ndarray, pointers: np.ndarray, itemsize: int, size: int) -> bool:
    """True if sequences of these lengths lie end to end in a file of this size."""
    end = 0
    for start in range(0, len(lengths), 1 << 20):
        some = lengths[start : start + (1 << 20)].astype(np.int64)
        ends = end + np.cumsum(some) * itemsize
        if some.min() < 0 or not np.array_equal(pointers[start : start + (1 << 20)], ends - some * itemsize):
            return False
        end = int(ends[-1])
    return end == size


def _rises(values: np.ndarray) -> bool:
    step = 1 << 20
    return all(bool((np.diff(values[start : start + step + 1]) >= 0).all()) for start in range(0, len(values), step))


def _check_size(path: Path, size: int, needed: int, said: str, least: int) -> None:
    if least < 1:
        raise UserError(f"{path} says that it holds {said}: it is damaged or empty, leave it out of --text")
    if size != needed:
        what = "was cut off" if size < needed else "is damaged"
        raise UserError(f"{path} says that it holds {said}, which take {needed:,} bytes, not {size:,}: it {what}")
