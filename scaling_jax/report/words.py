"""The law in sentences, for people who read nothing else."""

import math

import numpy as np

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.fitting import CriticalBatch


def law_in_words(analysis: Analysis) -> list[str]:
    """What batch is critical at three losses, what more or less than that costs, and how far the law reaches."""
    law = analysis.fit.law
    if law is None:
        return [
            f"No law could be fitted: {analysis.fit.notes[-1]}.",
            *(_point(p) for p in analysis.fit.points if p.in_law and not p.tradeoff.one_sided),
        ]
    high, low = max(law.loss_range), min(law.loss_range)
    losses = (high, math.sqrt(high * low), low)
    below, above = analysis.fit.band(np.array(losses))
    sentences = [
        f"At a loss of {loss:.2f} nats per token, a batch of {tokens(law(loss))} [{tokens(a)}, {tokens(b)}] tokens is "
        "critical."
        for loss, a, b in zip(losses, below, above, strict=True)
    ]
    growth = sorted(0.9**x for x in law.exponent_interval)
    sentences.append(
        f"The law is B_crit = {law.b_star:.3g} tokens · L^{law.exponent:.2f}, the exponent's interval "
        f"[{law.exponent_interval[0]:.2f}, {law.exponent_interval[1]:.2f}]: each 10 % off the loss makes the critical "
        f"batch {0.9**law.exponent:.2f} [{growth[0]:.2f}, {growth[1]:.2f}] times as large. It was measured from "
        f"{high:.2f} down to {low:.2f}; outside of that it is a guess."
    )
    lowest = min((p for p in analysis.fit.points if p.in_law), key=lambda p: p.loss)
    sentences.append(_cost(lowest))
    if math.isfinite(analysis.noise_ratio):
        sentences.append(
            f"The noise scale, which any single run can measure as it trains, is {analysis.noise_ratio:.2f} times "
            "B_crit in the median over these losses."
        )
    return sentences


def _point(point: CriticalBatch) -> str:
    low, high = point.tradeoff.b_crit_interval
    return (
        f"At a loss of {point.loss:.2f} nats per token, a batch of {tokens(point.tradeoff.b_crit)} "
        f"[{tokens(low)}, {tokens(high)}] tokens is critical for {point.model}."
    )


def _cost(point: CriticalBatch) -> str:
    fit = point.tradeoff
    steps = [f"{fit.steps_at(factor * fit.b_crit):,.0f}" for factor in (0.25, 1, 4)]
    spent = [tokens(fit.tokens_at(factor * fit.b_crit)) for factor in (0.25, 1, 4)]
    return (
        f"What that means for {point.model} at a loss of {point.loss:.2f}, where its own fit has B_crit at "
        f"{tokens(fit.b_crit)} tokens: that batch takes {steps[1]} steps and {spent[1]} tokens, twice the fewest of "
        f"each. At 4 times that batch you pay 2.5 times the tokens ({spent[2]}) to save 38 % of the steps "
        f"({steps[2]} remain); at a quarter of it you pay 2.5 times the steps ({steps[0]}) to save 38 % of the tokens "
        f"({spent[0]} remain)."
    )
