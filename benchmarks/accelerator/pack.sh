#!/usr/bin/env bash
# Fills the folder LUGGAGE, else luggage/ beside this file, with what a machine needs that has JAX, Flax, Optax and Orbax but no network.
#
#   benchmarks/accelerator/pack.sh [--wheels-only] [--python 3.12]      --python: that machine's; x86-64, Linux
#
# wheels/             what this project needs beside those four, 25 MiB
# kernel.jsonl.zst    120 MB of C, a sample of Linux's sources in 20 MiB, from Debian's package (wants apt and zstandard)
# tiktoken/           GPT-2's vocabulary, from TIKTOKEN_CACHE_DIR or the network
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
luggage=${LUGGAGE:-$here/luggage} version=3.12 wheels_only=
while [ $# -gt 0 ]; do
    case $1 in
    --wheels-only) wheels_only=1 ;;
    --python) version=$2 && shift ;;
    *) echo "pack.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done
python=${PYTHON:-python3}
# With what they need, named one by one: their requirements would bring JAX, and pyarrow, which nothing here uses.
packages=(
    tensorflow-datasets importlib_resources array_record grain tokenizers tiktoken zstandard orjson
    promise six absl-py immutabledict simple_parsing docstring-parser tensorflow-metadata protobuf termcolor toml dm-tree attrs wrapt
    orbax-checkpoint etils fsspec zipp typing_extensions tqdm psutil regex requests urllib3 idna charset-normalizer certifi cloudpickle more-itertools
    rich markdown-it-py mdurl pygments tyro typeguard shtab
)
platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
for old in manylinux2014 manylinux2010 manylinux1; do platforms+=(--platform "${old}_x86_64"); done

mkdir -p "$luggage/wheels"
for package in "${packages[@]}"; do
    if [ "$package" = promise ]; then # has no wheel of its own
        "$python" -m pip wheel -q --no-deps -w "$luggage/wheels" promise
    else
        "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
            "${platforms[@]}" -d "$luggage/wheels" "$package"
    fi
done

if [ -z "$wheels_only" ]; then
    "$python" - "$luggage/tiktoken" <<'PYTHON'
import os, shutil, sys
source, target = os.environ.get("TIKTOKEN_CACHE_DIR"), sys.argv[1]
if source:
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
else:
    import tiktoken
    os.environ["TIKTOKEN_CACHE_DIR"] = target
    tiktoken.get_encoding("r50k_base")
PYTHON
    if [ ! -e "$luggage/kernel.jsonl.zst" ]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        (cd "$scratch" && apt-get download -q "$(apt-cache depends linux-source | sed -n 's/.*Depends: //p')")
        dpkg -x "$scratch"/linux-source-*.deb "$scratch"
        "$python" "$here/kernel_text.py" "$scratch"/usr/src/linux-source-*.tar.xz "$luggage/kernel.jsonl.zst"
    fi
fi
du -sh "$luggage"
