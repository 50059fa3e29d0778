"""Does the whole scan find the true B_crit? SGD on noisy quadratics, where the steps to a loss are known exactly.

    python experiments/quadratic_scan.py

Loss ½ θᵀHθ, one-token gradient Hθ + noise of covariance Σ, SGD at a constant learning rate η. In H's eigenbasis
E θ_i² after S steps of B tokens is (1 − ηh_i)^2S θ_i(0)² + (1 − (1 − ηh_i)^2S)·ηΣ_ii/(B h_i (2 − ηh_i)): the loss that
a run expects, hence the steps S(B, L; η) to a loss, hence the least over all η, to any precision.

True B_crit: the trade-off fit to these exact least steps, at four batches per doubling over the scan's range. That is
what the scan claims to estimate; it differs by noise, few batches, a grid of learning rates and evaluations now and
then, all of which are the instrument's to answer for. Two other numbers are shown beside it, and are not the truth: the
ratio of the curve's ends, lim BS / lim S, would be B_crit if the curve were a hyperbola, which SGD's is within 10 %;
McCandlish et al.'s B_noise = tr(HΣ)/(GᵀHG), where the noiseless path comes to the loss, is the best batch of one next
step, while B_crit belongs to all the steps so far.

The scan is the real one but for `train`: noisy runs are simulated, and kept in memory. Each draw has power-law
curvature, start and noise, the noise's exponent between half of H's (unaligned) and H's own (Σ ∝ H), all scattered by
half an e-fold.

Takes a minute on a CPU core. Expect ratios around 1, most within 5 % of it, all intervals around the truth, and at the
foot how coarser learning rates bias B_crit: 14 % too small at a factor of 2, because the best rate of large batches
lies just below the stability limit, which a grid misses by up to its factor. Searches that guide each other take a
tenth of the tokens here.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from scaling_jax.fitting import ScanFit, Tradeoff, fit_scan, fit_tradeoff
from scaling_jax.results import RunRecord
from scaling_jax.results.measurements import columns, measure
from scaling_jax.results.runs import cell_runs
from scaling_jax.scanning import Experiment, LearningRates, Subject, powers_of_two
from scaling_jax.scanning.experiment import SearchName
from scaling_jax.scanning.search import search_all
from scaling_jax.scanning.tried import Outcome, best_of
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run, RunResult, next_evaluation
from scaling_jax.training.journal import ending
from scaling_jax.training.metrics import MetricsLine, course, jsonable

DRAWS = range(6)
LOSSES = (0.25, 0.15, 0.1)  # of 1 at the start
PLACES = (1, 2, 4, 8)  # of the learning-rate grid in a factor of two
BATCH_TOKENS = powers_of_two(64, 65_536)
EIGENVALUES = 100
MULTIPLICITY = 1000  # of each: how many parameters average out a run's luck


class Quadratic(NamedTuple):
    """A problem in H's eigenbasis, `[EIGENVALUES]` each; each eigenvalue has `multiplicity` parameters."""

    curvature: np.ndarray  # h_i, at most 1
    start: np.ndarray  # sum of θ(0)² over an eigenvalue's parameters
    noise: np.ndarray  # trace of Σ over them, for a batch of one token; off-diagonal elements don't enter the loss
    multiplicity: int = MULTIPLICITY


def draw(seed: int, multiplicity: int = MULTIPLICITY) -> Quadratic:
    """One of the family that the module's docstring describes; its loss is 1 at the start."""
    rng = np.random.default_rng(seed)
    curvature_decay, loss_decay, alignment = rng.uniform((1.0, 0.5, 0.5), (1.5, 1.0, 1.0))
    index = np.arange(1.0, EIGENVALUES + 1)
    curvature = index**-curvature_decay
    start = index**-loss_decay / curvature * rng.lognormal(0.0, 0.5, EIGENVALUES)
    noise = curvature**alignment * rng.lognormal(0.0, 0.5, EIGENVALUES)
    return Quadratic(curvature, start * 2 / (curvature @ start), 400 * noise / noise.sum(), multiplicity)


def expected_loss(problem: Quadratic, batch_tokens: float, rate: float, steps: float) -> float:
    """E L after `steps`, for a learning rate below 2."""
    x = rate * problem.curvature
    kept = _kept(x, steps)
    floor = rate * problem.noise / (batch_tokens * problem.curvature * (2 - x))
    return 0.5 * float(problem.curvature @ (kept * problem.start + (1 - kept) * floor))


def _kept(x, steps: float):
    # |1 − x|^2S, by log1p, because x may be tiny.
    with np.errstate(divide="ignore"):
        return np.exp(2 * steps * np.log1p(-np.minimum(x, 2 - x)))


def steps_at(problem: Quadratic, batch_tokens: float, rate: float, loss: float) -> float:
    """S(B, L; η): steps, not whole ones, until the expected loss is `loss`; infinite if it never is."""
    if expected_loss(problem, batch_tokens, rate, math.inf) >= loss:
        return math.inf

    def excess(log_steps):
        return math.log(expected_loss(problem, batch_tokens, rate, math.exp(log_steps)) / loss)

    high = next(high for high in range(1, 100) if excess(high) < 0)
    return math.exp(optimize.brentq(excess, high - 1 if high > 1 else -30, high, xtol=1e-10))


def least_steps(problem: Quadratic, batch_tokens: float, loss: float) -> tuple[float, float]:
    """S(B, L) at the best constant learning rate, and that rate."""

    def floor(log_rate):
        return expected_loss(problem, batch_tokens, math.exp(log_rate), math.inf) - loss

    limit = math.log(2.0) - 1e-9
    if floor(limit) > 0:
        limit = optimize.brentq(floor, limit - 60, limit)
    log_rates = limit - np.geomspace(4.0, 1e-6, 16)
    best = int(np.argmin([steps_at(problem, batch_tokens, math.exp(r), loss) for r in log_rates]))
    found = optimize.minimize_scalar(
        lambda log_rate: math.log(steps_at(problem, batch_tokens, math.exp(log_rate), loss)),
        bounds=(log_rates[max(best - 1, 0)], log_rates[min(best + 1, 15)]),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return math.exp(found.fun), math.exp(found.x)


def true_tradeoff(problem: Quadratic, batch_tokens: tuple[int, ...], loss: float) -> Tradeoff:
    """The fit to exact steps, four batches per doubling over the range of `batch_tokens`."""
    low, high = math.log2(min(batch_tokens)), math.log2(max(batch_tokens))
    dense = 2.0 ** np.linspace(low, high, round(4 * (high - low)) + 1)
    return fit_tradeoff(dense, [least_steps(problem, batch, loss)[0] for batch in dense])


def ratio_of_ends(problem: Quadratic, loss: float) -> float:
    """lim B·S(B) for small batches over lim S(B) for large ones, tokens."""
    return 1e-2 * least_steps(problem, 1e-2, loss)[0] / least_steps(problem, 1e9, loss)[0]


def b_noise(problem: Quadratic, loss: float) -> float:
    """tr(HΣ)/(GᵀHG) in tokens where the noiseless path at its best learning rate has come down to `loss`."""
    steps, rate = least_steps(problem, 1e9, loss)
    h = problem.curvature
    return float(h @ problem.noise / (h**3 @ (_kept(rate * h, steps) * problem.start)))


class NoisyTraining:
    """A `train` for `search`: runs of noisy SGD, simulated exactly from one evaluation to the next; keeps `records`.

    A parameter's distance from the optimum is an autoregression, so k steps are one Gaussian step; the sum of squares
    of an eigenvalue's parameters, which is all that the loss reads, is a noncentral chi-square.
    """

    def __init__(self, problem: Quadratic, seed: int):
        self.problem, self.seed = problem, seed
        self.records: list[RunRecord] = []

    def __call__(self, run: Run) -> Outcome:
        rng = np.random.default_rng([self.seed, run.seed, run.batch_tokens, round(1e9 * run.learning_rate)])
        last_step = run.steps_left(0, 0, run.batch_tokens)
        step, squares, lines, status = 0, self.problem.start, [], None
        while status is None:
            there = min(next_evaluation(step, run.eval_growth), last_step)
            squares = self.after(squares, there - step, run, rng)
            loss = jsonable(0.5 * float(self.problem.curvature @ squares))
            lines.append(MetricsLine.told(step, there, run.batch_tokens, math.nan if loss is None else loss))
            step = there
            status = ending(run, lines[-2:])
        result = RunResult(run.run_id, status, step, step * run.batch_tokens, loss, "")
        self.records.append(RunRecord(Path(run.run_id), run, {}, result, course(lines)))
        return self.records[-1].outcome

    def after(self, squares: np.ndarray, steps: int, run: Run, rng: np.random.Generator) -> np.ndarray:
        """The sums of squares `steps` steps on; infinite once they overflow."""
        shrink = (1 - run.learning_rate * self.problem.curvature) ** 2
        with np.errstate(over="ignore", invalid="ignore"):
            kept = shrink**steps
            added = np.divide(1 - kept, 1 - shrink, out=np.full_like(shrink, steps), where=shrink != 1)
            variance = run.learning_rate**2 * self.problem.noise / run.batch_tokens * added / self.problem.multiplicity
            centre = kept * squares / variance
        if not (np.isfinite(variance) & np.isfinite(centre)).all():
            return np.full_like(squares, math.inf)
        return variance * rng.noncentral_chisquare(self.problem.multiplicity, centre)


def scan_experiment(losses: tuple[float, ...], batch_tokens: tuple[int, ...], **grid: Any) -> Experiment:
    """A scan on a grid of learning rates such as `places=8` or `factor=2**0.125`; its model is a name only."""
    rates = LearningRates(peak=2.0, reference_batch_tokens=36_000, most=60, **grid)
    return Experiment(
        name="quadratic",
        subjects=(Subject(ModelConfig(1, 1, 1, context=1), losses, rates),),
        batch_tokens=batch_tokens,
        max_tokens=100_000_000,
        optimizer=OptimizerConfig("sgd"),
        warmup_steps=0,
    )


def fitted(experiment: Experiment, records: Sequence[RunRecord], **options: Any) -> ScanFit:
    """The measurements and the fit of a scan whose runs are in memory; for the options see `fit_scan`."""
    found = cell_runs(experiment, records)
    return fit_scan(**columns(measure([found[cell] for cell in experiment.cells])), **options)


def run_instrument(problem: Quadratic, experiment: Experiment, seed: int) -> tuple[ScanFit, float]:
    """Search, crossings, measurements and fit, as of any scan; and all tokens as a multiple of the best runs'."""
    train = NoisyTraining(problem, seed)
    searches = search_all(experiment, train).values()
    cost = sum(t.result.tokens for tried in searches for t in tried)
    return fitted(experiment, train.records), cost / sum(best_of(tried).result.tokens for tried in searches)


def main() -> None:
    ratios: dict[tuple[SearchName, int], list[float]] = {(how, n): [] for how in ("grid", "guided") for n in PLACES}
    costs: dict[tuple[SearchName, int], list[float]] = {key: [] for key in ratios}
    print("critical batch size, tokens" + " " * 23 + f"measured at {PLACES[-1]} places")
    print(f"draw  loss  {'ends':>8}{'B_noise':>9}{'true':>8}{'measured':>10}{'95 % interval':>16}{'ratio':>7}")
    for number in DRAWS:
        problem = draw(number)
        truths = [true_tradeoff(problem, BATCH_TOKENS, loss).b_crit for loss in LOSSES]
        for how, places in ratios:
            experiment = scan_experiment(LOSSES, BATCH_TOKENS, places=places, search=how)
            fit, cost = run_instrument(problem, experiment, number)
            found = [point.tradeoff for point in fit.points]
            ratios[how, places] += [here.b_crit / true for here, true in zip(found, truths, strict=True)]
            costs[how, places].append(cost)
        for loss, true, here in zip(LOSSES, truths, found, strict=True):
            low, high = here.b_crit_interval
            print(
                f"{number:4}  {loss:4}  {ratio_of_ends(problem, loss):8,.0f}{b_noise(problem, loss):9,.0f}{true:8,.0f}"
                f"{here.b_crit:10,.0f}{f'{low:,.0f} to {high:,.0f}':>16}{here.b_crit / true:7.3f}",
                flush=True,
            )
    print("\nsearch  learning rates        measured/true: median   least    most    tokens / the best runs'")
    for (how, places), of_true in ratios.items():
        numbers = f"{np.median(of_true):23.3f}{min(of_true):8.3f}{max(of_true):8.3f}{np.mean(costs[how, places]):10.1f}"
        print(f"{how:8}{places} in a factor of 2{numbers}")


if __name__ == "__main__":
    main()
