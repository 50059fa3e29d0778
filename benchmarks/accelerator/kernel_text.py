"""A sample of the C sources in Linux's archive, as compressed JSON lines: kernel_text.py ARCHIVE.tar.xz OUT.jsonl.zst

Files come in the order of the hashes of their names, so any size is a fair sample of the whole. The kernel's licence
(GPL-2.0) holds for the text, so it is for measuring only and is never committed.
"""

import hashlib
import json
import sys
import tarfile

import zstandard

MOST_BYTES = 20 << 20  # compressed
SIZES = range(512, 400_000)  # bytes of a file; the largest are tables of numbers


def main(archive: str, out: str) -> None:
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.size in SIZES and member.name.endswith((".c", ".h")):
                text = tar.extractfile(member).read().decode("utf-8", errors="ignore")
                files[hashlib.sha256(member.name.encode()).digest()] = text
    with open(out, "wb") as file, zstandard.ZstdCompressor(19).stream_writer(file) as compressed:
        for count, key in enumerate(sorted(files), start=1):
            compressed.write(json.dumps({"text": files[key]}).encode() + b"\n")
            if count % 200 == 0:
                compressed.flush()
                if file.tell() > MOST_BYTES:
                    break
    print(f"{count:,} of {len(files):,} files")


if __name__ == "__main__":
    main(*sys.argv[1:])
