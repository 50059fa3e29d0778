"""The local trade-off: steps from one loss of a scan to a lower one, instead of steps from the start.

On the way from one loss to the next, a batch B takes ΔS = ΔS_min·(1 + ΔE_min/ΔS_min/B) steps (McCandlish et al. 2018,
arXiv 1812.06162, appendix D). So the same fit gives ΔE_min/ΔS_min, the local critical batch size: that of the *next*
bit of loss, which noise scale and branches measure too. Whatever comes before the higher loss, such as a warm-up or a
start that follows no hyperbola, is no part of it.
"""

import numpy as np

from scaling_jax.fitting.scan_table import ScanTable

GROWTH = 1.5  # steps grow by this factor within a window, in the median of runs; less, and errors of steps weigh
LEAST_GROWTH = 1.1  # in every run


def local_table(table: ScanTable) -> ScanTable:
    """A table of the steps between two losses, at the geometric middle of both.

    A window starts at each loss of a model, and ends at the next loss at which steps have grown by `GROWTH`. Windows
    overlap, and share runs as the losses of a scan do. Runs that ended above the lower loss are left out.
    """
    windows = []
    for model in dict.fromkeys(table.models):
        rows = [g for g in range(len(table.models)) if table.models[g] == model]
        for k, high in enumerate(rows):
            for low in rows[k + 1 :]:
                both = table.mask[high] & table.mask[low]
                growth = table.log_steps[low] - table.log_steps[high]
                if (
                    both.any()
                    and np.median(growth[both]) >= np.log(GROWTH)
                    and growth[both].min() > np.log(LEAST_GROWTH)
                ):
                    windows.append((model, high, low, both))
                    break
    names = tuple(model for model, *_ in windows)
    high, low = np.array([high for _, high, _, _ in windows], int), np.array([low for _, _, low, _ in windows], int)
    mask = np.array([both for *_, both in windows], bool).reshape(len(windows), table.mask.shape[1])
    losses = np.sqrt(table.losses[high] * table.losses[low])
    steps = np.where(mask, np.exp(table.log_steps[low]) - np.exp(table.log_steps[high]), 1.0)
    targets = np.unique(losses)[::-1]
    return ScanTable(
        models=names,
        losses=losses,
        log_batch=table.log_batch[high],
        log_steps=np.log(steps),
        mask=mask,
        bound=np.zeros_like(mask),
        run_index=table.run_index[high],
        target_index=np.searchsorted(-targets, -losses),
        not_reached=table.not_reached[low],
    )
