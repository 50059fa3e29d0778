"""What a scan would take, as a table for `--dry-run`."""

from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.analysis.numbers import duration, short
from scaling_jax.scanning.plan import EFFICIENCY, ScanPlan


def plan_table(plan: ScanPlan) -> Rows:
    """A line for each group that isn't done, and the sums."""
    table = Table(title="At most, for each group", title_justify="left", title_style="bold")
    for column in ("model · batch", "runs", "tokens", "FLOPs", "memory, GiB"):
        table.add_column(column, justify="left" if column.startswith("model") else "right")
    for p in plan.groups:
        runs = f"{p.least_runs}–{p.most_runs}"
        table.add_row(p.group.name, runs, short(p.most_tokens), f"{p.most_flops:.2g}", f"{p.bytes_needed / 2**30:.2f}")
    groups = plan.groups
    lines = [
        f"{len(groups)} groups to train, {plan.groups_done} done; {sum(p.least_runs for p in groups)} to "
        f"{sum(p.most_runs for p in groups)} runs, {plan.workers} at a time",
        f"at most {short(sum(p.most_tokens for p in groups))} tokens, {sum(p.most_flops for p in groups):.2g} FLOPs, "
        f"{duration(plan.most_seconds)} at {EFFICIENCY:.0%} of the {plan.flops_per_second / 1e9:,.0f} GFLOP/s that a "
        "large matrix product reaches here",
        "that is if every rate ran to max_tokens; runs end at their targets: the demo takes a thirtieth of its bound",
        f"each run that trains at a time may take {plan.bytes_available / 2**30:.1f} GiB of memory",
    ]
    return Rows(table, *(Text(line) for line in lines))
