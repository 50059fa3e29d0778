"""Runs the stages one after another, each with a time limit; see run.sh. A stage is a script beside this file.

Writes OUT/machine.json, and for each stage OUT/<stage>.json and OUT/<stage>.log. The exit status is 1 if a stage
failed, but not if it ran out of time, unless it is a rehearsal.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SHARES = {"right": 0.25, "fast": 0.4, "many": 0.35, "demo": 0.5, "kaplan": 1.0}  # of the time that is left
_SAVING_SECONDS = 15  # from SIGTERM to SIGKILL
_QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Otherwise XLA tries its kernels on the card while it compiles, minutes for a training step.
_LESS_TUNING = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_experimental_enable_fusion_autotuner=false"
)
_MACHINE = """
import json, jax, jaxlib, flax, optax
device = jax.devices()[0]
memory = (device.memory_stats() or {}).get("bytes_limit")
print(json.dumps({"card": device.device_kind, "platform": device.platform, "devices": jax.device_count(),
    "memory_bytes": memory, "jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__,
    "optax": optax.__version__}))
"""


def machine(environment: dict[str, str]) -> dict:
    asked = subprocess.run([sys.executable, "-c", _MACHINE], env=environment, capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"JAX doesn't start here: {asked.stderr.strip()[-2000:]}")
    return json.loads(asked.stdout) | {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_stage(name: str, out: Path, seconds: float, toy: bool, environment: dict[str, str]) -> str:
    """Runs one stage; returns how it ended."""
    command = [sys.executable, HERE / f"{name}.py", out / f"{name}.json", f"--seconds={seconds:.0f}"]
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command + ["--toy"] * toy, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_SAVING_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return "out of time"
    return "done" if process.returncode == 0 else f"failed with {process.returncode}"


def main() -> None:
    start = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--stages", default=",".join(SHARES), help="right,fast… or with limits in seconds: right:60,fast"
    )
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.gettempdir()) / "scaling_jax_accelerator"
    environment = os.environ | {"SCALING_JAX_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    vocabulary = Path(os.environ["LUGGAGE"]) / "tiktoken"
    if vocabulary.exists():
        environment["TIKTOKEN_CACHE_DIR"] = str(vocabulary)
    if given.rehearse:
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _QUICKLY_COMPILED}
    else:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_LESS_TUNING}".strip()
    ended = {}
    found = machine(environment)
    print(found, flush=True)
    for stage in given.stages.split(","):
        name, _, limit = stage.partition(":")
        left = given.minutes * 60 - (time.monotonic() - start) - _SAVING_SECONDS
        began = time.monotonic()
        status = run_stage(name, given.out, float(limit or max(10, left * SHARES[name])), given.rehearse, environment)
        ended[name] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {status}, {ended[name]['seconds']} s", flush=True)
        if status.startswith("failed"):
            print("".join((given.out / f"{name}.log").read_text().splitlines(keepends=True)[-30:]), flush=True)
        summary = found | {"rehearsal": given.rehearse, "stages": ended}
        (given.out / "machine.json").write_text(json.dumps(summary, indent=1) + "\n")
    fine = {"done"} if given.rehearse else {"done", "out of time"}
    sys.exit(any(stage["status"] not in fine for stage in ended.values()))


if __name__ == "__main__":
    main()
