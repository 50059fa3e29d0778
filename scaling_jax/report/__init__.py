"""Figures and tables of a finished scan; reads results, runs nothing."""

from pathlib import Path

from scaling_jax.analysis import Analysis


def write_figures(analysis: Analysis, workdir: str | Path) -> list[Path]:
    """The scan's figures as PNG and SVG in `workdir/figures`; returns the PNGs' paths."""
    from scaling_jax.report.batch_scan import batch_scan_figure
    from scaling_jax.report.critical_batch import critical_batch_figure
    from scaling_jax.report.pareto import pareto_figure
    from scaling_jax.report.residuals import residuals_figure
    from scaling_jax.report.style import save

    folder = Path(workdir) / "figures"
    return [
        save(critical_batch_figure(analysis), folder, "critical_batch_size"),
        save(batch_scan_figure(analysis, Path(workdir)), folder, "batch_size_scan"),
        save(residuals_figure(analysis), folder, "residuals"),
        save(pareto_figure(analysis), folder, "time_and_compute"),
    ]
