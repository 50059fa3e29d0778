"""How fast does one core pack text, and what of that is the tokenizer library's own time?

    python -m benchmarks.packing [--megabytes 48] [--rounds 5]

For bytes: text per second of `prepare` with one worker (fingerprint, packing, joining and checking; all of it), on
files, on JSON lines and on records of TFDS, long documents and short ones. For BPE: packing a shard against a bare loop
over the `tokenizers` library, and over tiktoken, on the same text, taken in turns; the ratio is ours / theirs. tiktoken
runs the corpus's own trained merges, since GPT-2's can't be had without the network. Takes about 3 minutes.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import tiktoken  # noqa: E402

from scaling_jax.data import find_documents, prepare, shards  # noqa: E402
from scaling_jax.data.sources import file_shards  # noqa: E402
from scaling_jax.data.tokenizers import GPT2, TrainedBPE, train_bpe  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"SCALING_JAX_CACHE": f"{folder}/cache", "TFDS_DATA_DIR": f"{folder}/tfds"}
        texts = english_like(options.megabytes << 20)
        print(
            f"{sum(map(len, texts)) / 1e6:.0f} MB of Python source, one core; MB/s of text, median (lowest … highest)"
        )
        for kind, source in write_sources(Path(folder), texts).items():
            speeds = [prepare_speed(source) for _ in range(options.rounds)]
            print(f"bytes, {kind:42} {middle(speeds, '6.1f')}", flush=True)
        compare_bpe(texts[: max(1, len(texts) // 8)], options.rounds)


def english_like(size: int) -> list[str]:
    """The standard library's sources, over and over."""
    once = [document.path.read_text(encoding="utf-8", errors="ignore") for document in find_documents("python")]
    texts: list[str] = []
    while sum(map(len, texts)) < size:
        texts += [f"# copy {len(texts)}\n{text}" for text in once]
    return texts


def write_sources(folder: Path, texts: list[str]) -> dict[str, str]:
    lines = [line for text in texts for line in text.split("\n\n")]
    for name in ("files", "long", "short"):
        (folder / name).mkdir()
    for k, text in enumerate(texts):
        (folder / "files" / f"{k}.txt").write_text(text, encoding="utf-8")
    for name, documents in (("long", texts), ("short", lines)):
        with (folder / name / "all.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    mean_long, mean_short = (sum(map(len, d)) // len(d) for d in (texts, lines))
    return {
        f"files of {mean_long:,} bytes": f"files:{folder}/files/*.txt",
        f".jsonl, lines of {mean_long:,} bytes": f"files:{folder}/long/*.jsonl",
        f".jsonl, lines of {mean_short:,} bytes": f"files:{folder}/short/*.jsonl",
        f"TFDS, records of {mean_long:,} bytes": tfds_source("long", texts),
        f"TFDS, records of {mean_short:,} bytes": tfds_source("short", lines),
    }


def tfds_source(config: str, texts: list[str]) -> str:
    import tensorflow_datasets as tfds

    from tests.data.tiny_data_sets import Given

    Given.texts[config] = texts
    source = f"given/{config}"
    tfds.builder(source, file_format="array_record").download_and_prepare()
    return f"tfds:{source}"


def prepare_speed(source: str) -> float:
    shutil.rmtree(os.environ["SCALING_JAX_CACHE"], ignore_errors=True)
    start = time.perf_counter()
    corpus = prepare(source, 64, workers=1)
    return sum(corpus.manifest["text_bytes"].values()) / 1e6 / (time.perf_counter() - start)


def compare_bpe(texts: list[str], rounds: int) -> None:
    size = sum(len(text.encode()) for text in texts) / 1e6
    trained = TrainedBPE("bpe:4096", train_bpe(texts[:400], 4096))
    library = trained._tokenizer
    encoding = as_tiktoken(trained)
    tiktoken.get_encoding = lambda name: encoding
    folder = Path(tempfile.mkdtemp())
    for k, text in enumerate(texts):
        (folder / f"{k:06}.txt").write_text(text, encoding="utf-8")
    shard = file_shards("files", [d for d in find_documents(f"files:{folder}/*.txt")])
    cases = {
        "bpe:4096 / tokenizers": (trained, lambda batch: library.encode_batch_fast(batch)),
        "gpt2's code / tiktoken": (GPT2(), lambda batch: [encoding.encode_ordinary(text) for text in batch]),
    }
    for name, (tokenizer, bare) in cases.items():
        ours, theirs = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            for number, parts in enumerate(shard):
                shards.pack_shard(parts, tokenizer, folder, number)
            ours.append(size / (time.perf_counter() - start))
            start = time.perf_counter()
            for k in range(0, len(texts), 64):
                bare(texts[k : k + 64])
            theirs.append(size / (time.perf_counter() - start))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(f"{name:24} ours {middle(ours, '.2f')}, library {middle(theirs, '.2f')}, ratio {middle(ratios, '.2f')}")
    shutil.rmtree(folder)


def as_tiktoken(trained: TrainedBPE) -> tiktoken.Encoding:
    """The trained merges as a tiktoken encoding with GPT-2's pattern."""
    from tiktoken_ext.openai_public import r50k_pat_str

    byte_of = {}
    rank = 0
    for b in range(256):  # GPT-2's printable stand-ins for bytes
        printable = 33 <= b <= 126 or 161 <= b <= 172 or b >= 174
        byte_of[chr(b) if printable else chr(256 + rank)] = b
        rank += not printable
    vocabulary = json.loads(trained.json)["model"]["vocab"]
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items()}
    return tiktoken.Encoding(
        "own", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )


def middle(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} … {max(values):{form}})".replace("( ", "(")


if __name__ == "__main__":
    main()
