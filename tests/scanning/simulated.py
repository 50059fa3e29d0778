"""A run whose loss is a known function of its steps: it is evaluated and ends as a trained one."""

from scaling_jax.scanning.tried import Outcome
from scaling_jax.training import RunResult, next_evaluation
from scaling_jax.training.journal import ending
from scaling_jax.training.metrics import MetricsLine, course


def simulated(run, loss_after) -> Outcome:
    """The outcome of a run with the loss `loss_after(step)`."""
    lines, status, step = [], None, 0
    while status is None:
        before, step = step, min(next_evaluation(step, run.eval_growth), run.steps_left(0, 0, run.batch_tokens))
        lines.append(MetricsLine.told(before, step, run.batch_tokens, loss_after(step)))
        status = ending(run, lines[-2:])
    return outcome(run, lines, status)


def outcome(run, lines, status) -> Outcome:
    """The outcome of a run with these metrics lines."""
    found, last = course(lines), lines[-1]
    result = RunResult(run.run_id, status, last.step, last.tokens, last.test_loss, "")
    return Outcome(run, result, found.eval_steps.tolist(), found.eval_losses.tolist())
