"""Stage "fast": tokens per second and MFU of 85M and 3M parameters, and what the noise scale costs.

Models of GPT-2's vocabulary, with 1,024 tokens of context, in bfloat16. MFU counts 6 FLOP per token and weight, the
unembedding included, and 12·layers·T·D for attention, over the card's rate for dense bfloat16 in its data sheet.
First, settings of the transformer against each other; then the noise scale on and off, in the project's own step (by
layer) and in a step of the same model with taps (benchmarks/noise_overhead.py). Figures that are compared come from
interleaved rounds. The next programs compile meanwhile.
"""

import contextlib
import functools
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import noise_overhead as tapped
import numpy as np
import optax
from figures import arguments

from scaling_jax.noise_scale import Moments, geometries
from scaling_jax.parallel import replicate
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.tasks import layers, model_config, part_names, transformer
from scaling_jax.training import Run
from scaling_jax.training.program import many_steps, program_for

PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense bfloat16, by the data sheets (SXM)
ROUNDS = 4
SETTINGS = {  # of the transformer: attention, most logits at a time, most layers unrolled
    "cudnn, unrolled": ("cudnn", 2**31, 12),
    "cudnn, unrolled, norms and GELU recomputed": ("cudnn", 2**31, 12),
    "cudnn, scan": ("cudnn", 2**31, 4),
    "cudnn, unrolled, loss in chunks": ("cudnn", 2**25, 12),
    "xla, unrolled": ("xla", 2**31, 12),
}


class Step:
    """A compiled call of some training steps, and the state that it works on."""

    def __init__(self, lowered, arguments, num_steps: int):
        self._lowered, self._arguments, self.num_steps = lowered, arguments, num_steps

    def compile(self) -> None:
        start = time.monotonic()
        self._call = self._lowered.compile()
        self.compile_seconds = round(time.monotonic() - start, 1)
        analysis = self._call.memory_analysis()
        self.gibibytes = round(analysis.temp_size_in_bytes / 2**30, 2) if analysis else None

    def seconds(self) -> float:
        """Seconds a step, over one call."""
        state, *rest = self._arguments
        start = time.perf_counter()
        state, out = self._call(state, *rest)
        jax.block_until_ready(out)
        self._arguments = state, *rest
        return (time.perf_counter() - start) / self.num_steps


def without_noise_scale(loss, *, num_microbatches, axis_name, groups, stacked, n_layer):
    """Gradient accumulation as one writes it without a noise scale, with moments of zeros."""
    of_batch = tapped.plain(loss, num_microbatches)

    def fn(params, batch):
        value, grads = jax.lax.pmean(of_batch(params, batch, 0), axis_name)
        zeros = {part: jnp.float32(0) for part in part_names(n_layer)}
        return (value, Moments(zeros, zeros, jnp.float32(1), jnp.float32(2))), grads

    return fn


@contextlib.contextmanager
def recomputed():
    """While this lasts, models are traced that keep no values of LayerNorm and GELU for the backward pass."""
    norm, gelu = nn.remat(transformer._LayerNorm), jax.checkpoint(jax.nn.gelu)
    with mock.patch.object(transformer, "_LayerNorm", norm), mock.patch.object(jax.nn, "gelu", gelu):
        yield


def own_step(model, batch_tokens: int, microbatch_tokens: int, num_steps: int, noise_scale: bool = True) -> Step:
    """The project's step."""
    run = Run(model, batch_tokens, 1e-4, max_steps=1, microbatch_tokens=microbatch_tokens, steps_per_call=num_steps)
    program = program_for(run, 1)
    options = {} if noise_scale else {"differentiate": functools.partial(without_noise_scale, n_layer=model.n_layer)}
    draws = np.random.default_rng(0)
    rows = draws.integers(0, model.vocab_size, (2_000, model.context + 1)).astype(np.uint16)
    order = draws.integers(0, len(rows), (1, num_steps, run.batch_sequences)).astype(np.int32)
    settings = np.int32(num_steps), np.float32(1e-4), np.int32(10)
    arguments = replicate(program.init(0), 1), replicate(rows, 1), order, settings
    return Step(many_steps(program, **options).lower(*arguments), arguments, num_steps)


def tapped_step(of_batch, model, batch_tokens: int, num_steps: int) -> Step:
    """A step of the model with taps: Adam on what `of_batch(params, batch, step)` returns."""
    optimizer = optax.adam(1e-4, b2=0.98)
    params = tapped.init(model)
    draws = np.random.default_rng(0)
    shape = (num_steps, batch_tokens // model.context, model.context + 1)
    rows = jnp.asarray(draws.integers(0, model.vocab_size, shape).astype(np.uint16))

    @functools.partial(jax.jit, donate_argnums=0)
    def call(state, rows_SxBxT1):
        def body(i, carry):
            params, opt_state, total = carry
            value, grads = of_batch(params, rows_SxBxT1[i], i)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state, total + value

        state = jax.lax.fori_loop(0, num_steps, body, state)
        return state, jnp.copy(state[-1])

    arguments = (params, jax.jit(optimizer.init)(params), jnp.float32(0)), rows
    return Step(call.lower(*arguments), arguments, num_steps)


class Group(NamedTuple):
    """Steps that are compared with each other, in compilation."""

    steps: dict[str, Step]
    jobs: dict[str, Future]

    @classmethod
    def start(cls, steps: dict[str, Step], pool: ThreadPoolExecutor) -> "Group":
        return cls(steps, {name: pool.submit(step.compile) for name, step in steps.items()})

    def measure(self, given) -> dict[str, list[float]]:
        """{name: seconds a step in each round}; leaves out what doesn't compile or run, and says so."""
        seconds: dict[str, list[float]] = {}
        for name, step in self.steps.items():
            try:
                self.jobs[name].result()
                step.seconds()
                seconds[name] = []
            except Exception as error:  # XLA may raise anything; out of memory, most likely
                given.figures.add(f"failed: {name}", str(error)[:300])
        for _ in range(ROUNDS):
            for name, series in seconds.items():
                series.append(self.steps[name].seconds())
        return seconds


def spread(values: list[float], digits: int = 4) -> list[float]:
    return [round(x, digits) for x in (statistics.median(values), min(values), max(values))]


def product_rate(toy: bool) -> float:
    """FLOP/s of a large product in bfloat16, best of some."""
    n = 512 if toy else 8_192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(lambda x: (x @ a) * 0.01)
    x = product(a).block_until_ready()
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            x = product(x)
        x.block_until_ready()
        best = max(best, 10 * 2 * n**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    given = arguments()
    add, toy = given.figures.add, given.toy
    keep_compiled_programs()
    card = jax.devices()[0].device_kind
    sheet = next((rate for name, rate in PEAK_FLOPS.items() if name in card), None)
    product = product_rate(toy)
    add("product", {"card": card, "data_sheet_flops": sheet, "measured_flops": float(f"{product:.4g}")})

    def configured(name, attention="xla"):
        changes = {"vocab_size": 257, "context": 32} if toy else {"vocab_size": 50_257, "context": 1_024}
        return model_config(
            "1x16" if toy else name, **changes, compute_dtype="bfloat16", attention="xla" if toy else attention
        )

    def rates(name, batch_tokens, steps, seconds):
        flop = configured(name).flops_per_token
        for what, series in seconds.items():
            per_second = batch_tokens / statistics.median(series)
            add(
                f"{name}, {batch_tokens} tokens: {what}",
                {
                    "tokens_per_second": round(per_second),
                    "mfu": round(per_second * flop / sheet, 4) if sheet else None,
                    "share_of_product": round(per_second * flop / product, 4),
                    "seconds": spread(series, 5),
                    "compile_seconds": steps[what].compile_seconds,
                    "temporary_gib": steps[what].gibibytes,
                },
            )

    large, larger = (1_024, 2_048) if toy else (2**17, 2**19)
    microbatch = 256 if toy else 2**14
    usual = "xla, unrolled" if toy else "cudnn, unrolled"
    settings = [usual] if toy else list(SETTINGS)

    def own(name, batch_tokens, num_steps, setting=usual, parts=microbatch, noise_scale=True):
        attention, layers._MOST_LOGITS_ON_GPU, layers._MOST_UNROLLED_ON_GPU = SETTINGS[setting]
        with recomputed() if "recomputed" in setting else contextlib.nullcontext():
            return own_step(
                configured(name, attention), batch_tokens, parts, 1 if toy else num_steps, noise_scale=noise_scale
            )

    def by_setting():
        return {name: own("12x768", large, 2, name) for name in settings} | {
            "no noise scale": own("12x768", large, 2, noise_scale=False),
            "microbatches twice as large": own("12x768", large, 2, parts=2 * microbatch),
        }

    def on_and_off(name, batch_tokens, num_steps):
        return {
            usual: own(name, batch_tokens, num_steps),
            "no noise scale": own(name, batch_tokens, num_steps, noise_scale=False),
        }

    def estimators(name, num_steps):
        model = configured(name, "auto")
        loss = functools.partial(tapped.loss_of, model)
        parts = large // microbatch
        split = tapped.plain(loss, parts)
        l1 = geometries.l1(loss, num_microbatches=2)
        spectral = geometries.spectral(loss, num_microbatches=parts, select=lambda path: path.startswith("layers"))
        lines = {
            "none": split,
            "two-batch": tapped.measured(loss, parts),
            "per example": tapped.measured(loss, parts, method="per_example"),
            "norm layers": tapped.measured(loss, parts, method="norm_layers"),
            "ℓ1 every=100": tapped.also(split, l1, 8),
            "spectral every=100": tapped.also(split, spectral, 1),
        }
        if toy:
            lines = {what: lines[what] for what in ("none", "per example", "spectral every=100")}
        return {what: tapped_step(f, model, large, 1 if toy else num_steps) for what, f in lines.items()}

    groups = [  # model, batch, steps; what XLA compiles while the group before is measured
        ("12x768", large, by_setting),
        ("12x768 with taps", large, lambda: estimators("12x768", 1)),
        ("4x256", large, lambda: on_and_off("4x256", large, 4)),
        ("4x256 with taps", large, lambda: estimators("4x256", 2)),
        ("12x768", larger, lambda: on_and_off("12x768", larger, 1)),
        ("4x256", larger, lambda: on_and_off("4x256", larger, 1)),
    ]
    if toy:
        groups = groups[:2]  # all that the others do
    with ThreadPoolExecutor(8) as pool:
        coming = Group.start(groups[0][2](), pool)
        for (name, batch_tokens, _), following in zip(groups, [*groups[1:], None], strict=True):
            group, coming = coming, following and Group.start(following[2](), pool)
            seconds = group.measure(given)
            if "with taps" not in name:
                rates(name, batch_tokens, group.steps, seconds)
            for without in {"no noise scale", "none"} & set(seconds):
                for what, series in seconds.items():
                    if what in (without, *(set(settings) - {usual})) or "twice" in what:
                        continue
                    part = 100 if "every=" in what else 1
                    ratios = [1 + (a / b - 1) / part for a, b in zip(series, seconds[without], strict=True)]
                    what = "noise scale by layer" if what == usual else what
                    add(f"{name}, {batch_tokens} tokens: {what} / without", spread(ratios))
            del group


if __name__ == "__main__":
    sys.exit(main())
