"""How long until something happens: imports, `--help`, and the first step from the compilation cache.

    python benchmarks/startup.py

Fresh processes, interleaved; medians, lowest and highest, in seconds of wall time and of processor time. The first
step is that of the demo's larger model, in a cache that the first, uncounted, process fills.
"""

import resource
import statistics
import subprocess
import sys
import time

ROUNDS = 5
FIRST_STEP = """
import numpy as np
from scaling_jax.tasks import model_config
from scaling_jax.training import Run
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.training.program import program_for
keep_compiled_programs()
program = program_for(Run(model_config("2x64"), 2_048, 1e-3, max_steps=1))
rows = np.zeros((100, 65), np.uint16)
program.steps(program.init(0), rows, np.zeros((1, program.batch_sequences), int), 1e-3, 1)
"""
COMMANDS = {
    "import jax": ["-c", "import jax"],
    "import scaling_jax": ["-c", "import scaling_jax"],
    "import scaling_jax, all names": ["-c", "from scaling_jax import *"],
    "scaling-jax --help": ["-m", "scaling_jax.cli.main", "--help"],
    "first step, program cached": ["-c", FIRST_STEP],
}


def run(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    for arguments in COMMANDS.values():
        run(arguments)
    seen = {what: [] for what in COMMANDS}
    for _ in range(ROUNDS):
        for what, arguments in COMMANDS.items():
            seen[what].append(run(arguments))
    print(f"{'':30} wall [lowest, highest]   processor   wall / import jax")
    for what, times in seen.items():
        wall, processor = zip(*times, strict=True)
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(times, seen["import jax"], strict=True))
        print(
            f"{what:30} {statistics.median(wall):5.2f} [{min(wall):.2f}, {max(wall):.2f}]  "
            f"{statistics.median(processor):9.2f}  {ratio:16.2f}×"
        )


if __name__ == "__main__":
    main()
