"""A fit as JSON values: what fit.json holds. JSON has no infinity, so that an open end of an interval is null."""

import math
from typing import Any

from scaling_jax.fitting import FormFit, JointFit, LossLaw, ScanFit, Tradeoff


def fit_as_json(
    fit: ScanFit, joint: JointFit | None, forms: tuple[FormFit, ...], notes: tuple[str, ...]
) -> dict[str, Any]:
    """Laws and trade-offs, with units in the names or in `formula`; losses in nats per token, batches in tokens."""
    return {
        "law": fit.law and _law(fit.law),
        "joint_law": _law(joint.law) if joint is not None and joint.law is not None else None,
        "forms": [_form(form) for form in forms],
        "points": [
            {
                "model": p.model,
                "loss": p.loss,
                **_tradeoff(p.tradeoff),
                "in_law": p.in_law,
                "not_reached": p.not_reached,
                "bounds": p.bounds,
            }
            for p in fit.points
        ],
        "notes": list(notes),
    }


def finite(value: float) -> float | None:
    """None for infinity and NaN."""
    return float(value) if math.isfinite(value) else None


def _law(law: LossLaw) -> dict[str, Any]:
    return {
        "formula": "b_crit_tokens = b_star * loss**exponent",
        "b_star": law.b_star,
        "b_star_interval": [finite(x) for x in law.b_star_interval],
        "alpha_b": finite(law.alpha_b),
        "exponent": law.exponent,
        "exponent_interval": [finite(x) for x in law.exponent_interval],
        "loss_range": law.loss_range,
        "confidence": law.confidence,
    }


def _form(form: FormFit) -> dict[str, Any]:
    return {
        "form": form.form,
        "formula": "b_crit_tokens = constant * (variable - floor)**exponent",
        "variable": form.variable,
        "constant": form.constant,
        "exponent": form.exponent,
        "floor": form.floor,
        "valid_range": form.valid_range,
        "held_out_error": finite(form.held_out_error),
        "low_loss_error": finite(form.low_loss_error),
        "criterion": finite(form.criterion),
    }


def _tradeoff(tradeoff: Tradeoff) -> dict[str, Any]:
    return {
        "b_crit": finite(tradeoff.b_crit),
        "b_crit_interval": [finite(x) for x in tradeoff.b_crit_interval],
        "cbs20": finite(tradeoff.cbs20),
        "s_min": finite(tradeoff.s_min),
        "e_min": finite(tradeoff.e_min),
        "one_sided": tradeoff.one_sided,
    }
