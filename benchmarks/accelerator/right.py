"""Stage "right": is what this accelerator computes what the CPU computes in float64, and the same each time?

Relative differences ‖x − reference‖ / ‖reference‖ of the noise scale's moments, the gradients, 20 training steps and
the test loss. The references are float64 on the CPU; of what the project's own transformer does, which is never wider
than float32, float32 on the CPU. "default" is JAX's default for float32 products, which on NVIDIA GPUs is TF32;
"highest" is float32. Then whole training runs: twice the same, and killed and resumed; with XLA's default and with its
flag for deterministic operations. The stage fails if a difference is beyond what the number format explains.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from figures import arguments

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
MOST = {"highest": 2e-5, "default": 5e-3, "bfloat16": 3e-2}  # of a difference
KILL_AFTER_LINES = 12  # of the metrics of the run that is killed


def numbers(toy: bool) -> dict[str, np.ndarray]:
    """Worker: everything that is compared, on JAX's platform, in float64 if that is enabled."""
    import functools

    import jax
    import jax.numpy as jnp
    from noise_overhead import init, loss_of

    from scaling_jax.noise_scale import curvature, geometries, value_and_grad
    from scaling_jax.tasks import ModelConfig, batch_loss, model_config
    from scaling_jax.tasks.layers import attention_of
    from scaling_jax.training import Run
    from scaling_jax.training.program import init_params, program_for

    x64 = jax.config.jax_enable_x64
    draws = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}

    def flat(tree):
        return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)])

    model = model_config("1x16" if toy else "2x64", vocab_size=256)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), init(model)) if x64 else init(model)
    batch = draws.integers(0, 256, (8 if toy else 64, model.context + 1)).astype(np.int32)
    loss = functools.partial(loss_of, model)
    for name, options in {
        "two-batch": {"num_microbatches": 4},
        "per example": {"method": "per_example"},
        "per example, in microbatches": {"method": "per_example", "num_microbatches": 4},
        "norm layers": {"method": "norm_layers"},
        "curvature": {"num_microbatches": 4, "norm": functools.partial(curvature, loss)},
    }.items():

        def moments_of(params, batch, options=options):
            made = {"norm": options["norm"](params, batch)} if "norm" in options else {}
            return value_and_grad(loss, **(options | made))(params, batch)

        (value, moments), grads = jax.jit(moments_of)(params, batch)
        out[f"{name}: loss"] = flat(value)
        out[f"{name}: small"], out[f"{name}: big"] = flat(moments.small_sq_norm), flat(moments.big_sq_norm)
        out[f"{name}: gradient"] = flat(grads)
    out["ℓ1"] = flat(jax.jit(geometries.l1(loss, num_microbatches=4))(params, batch))
    spectral = geometries.spectral(loss, num_microbatches=4, select=lambda name: name.startswith("layers"))
    out["spectral"] = flat(jax.jit(spectral)(params, batch))
    if x64:
        return out

    run = Run(model_config("1x16" if toy else "2x64"), 1_024, 4e-3, max_steps=20)
    program = program_for(run, 1)
    state, order = program.first_state(0), draws.integers(0, 300, (20, run.batch_sequences))
    rows = draws.integers(0, 256, (300, run.model.context + 1)).astype(np.uint16)
    state, series = program.steps(state, jnp.asarray(rows), order, run.learning_rate, 10)
    out["20 steps: losses"], out["20 steps: norms"] = series.loss, series.big_sq_norm
    out["20 steps: test loss"] = np.array([program.test_loss(state, rows[:64])])

    # In bfloat16, by both ways of attention where there are two.
    size = (1, 32, 1, 257, 64) if toy else (4, 256, 4, 2_000, 512)
    tokens = draws.integers(0, size[3], (2 if toy else 8, size[4] + 1))
    attentions = {attention_of(ModelConfig(*size, compute_dtype="bfloat16")), "xla"}
    for dtype, attention in [("float32", "xla"), *(("bfloat16", name) for name in sorted(attentions))]:
        model = ModelConfig(*size, compute_dtype=dtype, attention=attention)
        value, grads = jax.jit(jax.value_and_grad(batch_loss(model)))(
            jax.jit(init_params, static_argnums=(0, 1))(model, 0), tokens
        )
        out[f"{dtype}, {attention}: loss"], out[f"{dtype}, {attention}: gradient"] = flat(value), flat(grads)
    return out


def train_runs(folder: Path, toy: bool) -> None:
    """Worker: trains two runs in a results folder; saves after every call, so that a killed worker continues there."""
    from scaling_jax.parallel.devices import keep_compiled_programs
    from scaling_jax.tasks import model_config
    from scaling_jax.training import Run, train

    keep_compiled_programs()
    for run in runs(toy, model_config, Run):
        train(run, folder, num_devices=1, checkpoint_seconds=0.5)


def runs(toy, model_config, Run):
    small = Run(model_config("1x16" if toy else "2x64"), 1_024, 4e-3, max_steps=40 if toy else 300, steps_per_call=16)
    if toy:
        return [small]
    wide = model_config("4x256", context=256, compute_dtype="bfloat16")
    return [small, Run(wide, 4_096, 2e-3, max_steps=200, microbatch_tokens=2_048, steps_per_call=16)]


class Failed(Exception):
    """A worker failed. Its log's last lines say why."""


def worker(*what: object, log: Path, platform: str, **environment: str) -> subprocess.Popen:
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, *map(str, what)],
            env=os.environ | {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    process.log = log
    return process


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        print(f"{process.args} failed:\n{process.log.read_text()[-4_000:]}", flush=True)
        raise Failed(process.log.read_text().strip().splitlines()[-1])


def killed_and_resumed(folder: Path, start) -> None:
    """Trains, kills the process once it has written some lines, and trains on."""
    process = start(folder)
    while process.poll() is None:
        lines = sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/*/metrics.jsonl"))
        if lines >= KILL_AFTER_LINES:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.05)
    else:
        raise Failed("the run that was to be killed ended before")
    finish(start(folder))


def records(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("runs/*/metrics.jsonl"))]


def compare(here: dict, references: dict) -> dict[str, float]:
    return {
        name: float(f"{np.linalg.norm(x - references[name]) / np.linalg.norm(references[name]):.2g}")
        for name, x in here.items()
    }


def main() -> None:
    given = arguments()
    platform = "cpu" if given.toy else "cuda"
    toy = ["--toy"] * given.toy
    scratch = Path(tempfile.mkdtemp())
    failures = []

    def measure(name: str, platform: str, **environment: str) -> dict[str, np.ndarray]:
        finish(worker("numbers", scratch / name, *toy, log=scratch / f"{name}.log", platform=platform, **environment))
        return dict(np.load(scratch / f"{name}.npz"))

    def run_twice_and_killed(flags: str, wait_for) -> list[bool]:
        def start(folder: Path) -> subprocess.Popen:
            folder.mkdir(parents=True, exist_ok=True)
            flags_here = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
            return worker("train", folder, *toy, log=folder.with_suffix(".log"), platform=platform, **flags_here)

        wait_for.result()
        here, began = scratch / ("flag" if flags else "plain"), time.monotonic()
        finish(start(here / "first"))
        given.figures.add(f"first runs, seconds, {flags or 'default'}", round(time.monotonic() - began, 1))
        again = start(here / "again")
        killed_and_resumed(here / "killed", start)
        finish(again)
        first = records(here / "first")
        return [records(here / "again") == first, records(here / "killed") == first]

    with ThreadPoolExecutor(8) as pool:
        text = pool.submit(pack)
        plain = pool.submit(run_twice_and_killed, "", text)
        flagged = pool.submit(run_twice_and_killed, DETERMINISTIC, text) if not given.toy else plain
        wide = pool.submit(measure, "float64", "cpu", JAX_ENABLE_X64="1")
        cpu = pool.submit(measure, "cpu", "cpu", JAX_DEFAULT_MATMUL_PRECISION="highest")
        if given.toy:  # a CPU has but one precision
            highest = default = cpu
        else:
            highest = pool.submit(measure, "highest", platform, JAX_DEFAULT_MATMUL_PRECISION="highest")
            default = pool.submit(measure, "default", platform)
        exact, own = wide.result(), cpu.result()
        for precision, there in {"highest": highest, "default": default}.items():
            here = there.result()
            references = {name: exact.get(name, own.get(name)) for name in here}
            for name in here:
                if name.startswith("bfloat16"):
                    references[name] = own[f"float32, xla: {name.rpartition(' ')[2]}"]
            found = compare(here, references)
            given.figures.add(f"differences, {precision}", found)
            for name, x in found.items():
                most = MOST["bfloat16" if name.startswith("bfloat16") else precision]
                failures += [f"{precision}, {name}: {x:.1e} > {most:.0e}"] * (not x <= most)
        for name, found in {"default": plain, DETERMINISTIC: flagged}.items():
            try:
                again, killed = found.result()
            except Failed as failed:
                given.figures.add(f"same bits, {name}", str(failed))
                failures.append(f"{name}: {failed}")
                continue
            given.figures.add(f"same bits, {name}", {"run again": again, "killed and resumed": killed})
            if name == DETERMINISTIC and not (again and killed):
                failures.append(f"runs differ with {DETERMINISTIC}")
    given.figures.add("beyond the limits", failures)
    sys.exit(bool(failures))


def pack() -> None:
    """Packs the text, so that no two workers do."""
    from scaling_jax.data import prepare

    prepare("python", 64, "bytes")


if __name__ == "__main__":
    if sys.argv[1] == "numbers":
        np.savez(sys.argv[2], **numbers("--toy" in sys.argv))
    elif sys.argv[1] == "train":
        train_runs(Path(sys.argv[2]), "--toy" in sys.argv)
    else:
        main()
