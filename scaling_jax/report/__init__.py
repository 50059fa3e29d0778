"""Figures and tables of a finished scan; reads results, runs nothing."""

from pathlib import Path

from scaling_jax.analysis import Analysis


def write_figures(analysis: Analysis, workdir: str | Path) -> list[Path]:
    """Both figures of Kaplan et al. 2020 as PNG and SVG in `workdir/figures`; returns the PNGs' paths."""
    from scaling_jax.report.batch_scan import batch_scan_figure
    from scaling_jax.report.critical_batch import critical_batch_figure
    from scaling_jax.report.style import save

    folder = Path(workdir) / "figures"
    return [
        save(critical_batch_figure(analysis), folder, "critical_batch_size"),
        save(batch_scan_figure(analysis, Path(workdir)), folder, "batch_size_scan"),
    ]
