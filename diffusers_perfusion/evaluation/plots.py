"""Plots of scores. This module needs matplotlib, and is imported only where a plot is made."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke


class Point(NamedTuple):
    """A point of the plot.

    Attributes:
        label: written beside it.
        text: text alignment.
        identity: identity.
    """

    label: str
    text: float
    identity: float


def plot_pareto_front(lines: Mapping[str, Sequence[Point]], best: Point | None) -> bytes:
    """Plot identity against text alignment.

    Args:
        lines: points to connect, by the label of the line. Their intervals are left out: these are mostly of prompts,
            which all points have in common.
        best: the point to circle, with the label of the circle in the legend; None for no circle.

    Returns:
        A PNG, 960 × 720 pixels.
    """
    # Not pyplot, which would choose a backend for the whole process.
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(lines.items()):
        (line,) = axes.plot(
            [point.text for point in points], [point.identity for point in points], marker="o", label=label
        )
        right = number % 2 == 0  # neighbouring lines lie close together
        for point in points:
            axes.annotate(
                point.label,
                (point.text, point.identity),
                xytext=(10, 4) if right else (-10, -4),
                textcoords="offset points",
                ha="left" if right else "right",
                va="bottom" if right else "top",
                color=line.get_color(),
                fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    if best is not None:
        axes.plot(
            [best.text],
            [best.identity],
            linestyle="none",
            marker="o",
            markersize=15,
            markerfacecolor="none",
            markeredgecolor="black",
            label=best.label,
        )
    axes.set_xlabel("text alignment (like the prompt)")
    axes.set_ylabel("identity (like the subject)")
    axes.margins(0.12)  # room for the labels of the points
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
