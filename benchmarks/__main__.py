"""Runs benchmarks, and keeps what each prints in benchmarks/results/NAME.txt, with the machine and versions.

    pip install -e '.[bench]' && python -m benchmarks [NAME | 'NAME WORDS'] ...

WORDS go to the benchmark, as in 'step 4x256:512'. Without names all of them, one after the other: some hours on two
cores that do nothing else. docs/performance.md quotes these files. Those of an accelerator have a script of their own,
accelerator/run.sh.
"""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NO_BENCHMARKS = ("__main__", "torch_gpt")


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NO_BENCHMARKS)


def heading(asked: str) -> str:
    """What a reader needs to know to make a table again."""
    packages = ("jax", "numpy", "torch")
    versions = [f"{package} {version}" for package in packages if (version := _version(package))]
    return (
        f"python -m benchmarks {shlex.quote(asked)}\n"
        f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} cores of {_processor()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}\n\n"
    )


def run(asked: str) -> int:
    """Runs a benchmark, with words for it after its name. Returns its status; unless that is 0, a former file stays."""
    RESULTS.mkdir(exist_ok=True)
    name, *words = shlex.split(asked)
    part = RESULTS / f"{name}.part"
    root = str(HERE.parent)
    with part.open("w") as out:
        out.write(heading(asked))
        out.flush()
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, str(HERE / f"{name}.py"), *words]
        status = subprocess.run(command, stdout=out, cwd=root, env=os.environ | {"PYTHONPATH": path}).returncode
    if status == 0:
        part.replace(RESULTS / f"{name}.txt")
    return status


def main(asked: list[str]) -> int:
    if unknown := sorted({line.split(" ")[0] for line in asked} - set(names())):
        print(f"there is no benchmark {unknown[0]}: choose from {', '.join(names())}", file=sys.stderr)
        return 2
    failed = []
    for name in asked or names():
        print(name, flush=True)
        if run(name) != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
