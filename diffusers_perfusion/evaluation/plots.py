"""Plots of scores. This module needs matplotlib, and is imported where it is used."""

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

if TYPE_CHECKING:
    from .sweep import Sweep


def plot_front(sweep: "Sweep") -> bytes:
    """Identity against text alignment: a line a temperature, its points named by their bias, the best one ringed.

    Args:
        sweep: what to plot. Its intervals are left out: they are mostly of prompts, which all points have in common.

    Returns:
        A PNG, 960 × 720 pixels.
    """
    # Not pyplot, which would choose a backend for the whole process.
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, temperature in enumerate(sorted({row.temperature for row in sweep.rows})):
        rows = [row for row in sweep.rows if row.temperature == temperature]
        (line,) = axes.plot(
            [row.text.mean for row in rows],
            [row.identity.mean for row in rows],
            marker="o",
            label=f"τ = {temperature}",
        )
        right = number % 2 == 0  # lines of neighbouring temperatures lie close together
        for row in rows:
            axes.annotate(
                f"β {row.bias}",
                (row.text.mean, row.identity.mean),
                xytext=(10, 4) if right else (-10, -4),
                textcoords="offset points",
                ha="left" if right else "right",
                va="bottom" if right else "top",
                color=line.get_color(),
                fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    if best := sweep.best:
        axes.plot(
            [best.text.mean],
            [best.identity.mean],
            linestyle="none",
            marker="o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor="black",
            label=f"best harmonic mean, {best.harmonic_mean:.3f}",
        )
    axes.set_xlabel("text alignment (like the prompt)")
    axes.set_ylabel("identity (like the pictures)")
    axes.margins(0.12)  # room for the names of the points
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
