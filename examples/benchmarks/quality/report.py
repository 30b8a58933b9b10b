"""Write tables and plots of what `compare.py` has generated.

python examples/benchmarks/quality/report.py --panel main --output_dir outputs/quality --report_dir results
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pareto_fronts import RESAMPLES, advantage, interval, mean, read_images, score_all
from subjects import FAMILIES, POCKET, PROMPTS, Subject
from variants import ICONS, PANELS

from diffusers_perfusion.evaluation import ClipEncoder, IdentityEncoder
from diffusers_perfusion.evaluation.contact_sheet import make_contact_sheet

# Rows of the contact sheets: what to call them, the variant, and the number of its point.
CONTACT_SHEET = (
    ("base model", "base", 0),
    ("Perfusion, bias 0.7", "perfusion", 0),
    ("Perfusion, bias 1.2", "perfusion", 3),
    ("LoRA r4, scale 0.6", "lora4", 1),
    ("LoRA r4, scale 1", "lora4", 3),
    ("Textual Inversion", "textual inversion", 0),
    ("Custom Diffusion", "custom diffusion", 0),
)


def means(scores):
    """Return each measure of one point with its interval over cells."""
    rng = np.random.default_rng(0)
    resampled = mean(scores[rng.integers(len(scores), size=(RESAMPLES, len(scores)))], 1)
    return [(float(value), interval(resampled[:, k])) for k, value in enumerate(mean(scores, 0))]


def cell(value, ends):
    """Return a number and its interval as text."""
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def settings(point):
    """Return steps and knob as two columns."""
    return f"{point['steps'] or ''} | {'' if point['knob'] is None else point['knob']}"


def points_table(fronts):
    """Return a table of every point of every Pareto front, over all prompts."""
    lines = [
        "| | steps | β or scale | identity | text alignment | asked for and found | natural / plain identity "
        "| lowest of a subject | bytes | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for front in fronts.values():
        for point, scores, ratio in zip(front.points, front.scores, front.ratios(), strict=True):
            identity, text, share = means(scores)
            lines.append(
                f"| {front.name} | {settings(point)} | {cell(*identity)} | {cell(*text)} | {cell(*share)} "
                f"| {cell(*ratio[:2])} | {ratio[2]:.2f} | {front.bytes:,} | {front.seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def families_table(fronts):
    """Return a table of every point of every Pareto front, by families of prompts."""
    lines = [
        "| | steps | β or scale | plain: identity | plain: text alignment | natural: identity "
        "| natural: text alignment | appearance: text alignment | appearance: asked for and found |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for front in fronts.values():
        families = [front.of_family(family).scores for family in FAMILIES]
        for point, *scores in zip(front.points, *families, strict=True):
            plain, natural = (means(of_family)[:2] for of_family in scores[:2])
            appearance = means(scores[2])[1:]
            cells = " | ".join(cell(*measure) for measure in (*plain, *natural, *appearance))
            lines.append(f"| {front.name} | {settings(point)} | {cells} |")
    return "\n".join(lines) + "\n"


def advantage_table(fronts, name):
    """Return a table of how far one Pareto front is above each point of the others, at that point's text scores."""
    lines = [
        f"| {name} against | steps | β or scale | at its text alignment, all prompts | plain prompts "
        "| natural prompts | at its share of asked for and found |",
        "|---|---|---|---|---|---|---|",
    ]
    own = fronts[name]
    for other in fronts.values():
        if other.name == name:
            continue
        for number, point in enumerate(other.points):
            cells = [advantage(own, other, number)]
            cells += [advantage(own.of_family(f), other.of_family(f), number) for f in FAMILIES[:2]]
            cells += [advantage(own, other, number, measure=2)]
            lines.append(f"| {other.name} | {settings(point)} | {' | '.join(cell(*one) for one in cells)} |")
    return "\n".join(lines) + "\n"


def plot(fronts):
    """Plot identity against text alignment."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="text alignment (CLIP-T)", ylabel="identity")
    for front in fronts.values():
        identity, text, _ = front.means.T
        axes.plot(text, identity, marker="o", label=front.name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def contact_sheet(output_dir, icon):
    """Return a contact sheet of a subject: its training images, and the first seed of some points."""
    runs = output_dir / "runs"
    rows = [("images", Subject(icon, output_dir / "subjects" / icon).images())]
    for label, variant, point in CONTACT_SHEET:
        if not (runs / variant / icon / "run.json").exists():
            continue
        run = json.loads((runs / variant / icon / "run.json").read_text())
        generated = read_images(runs / variant / icon / "images.png", run["seeds"])[point]
        rows.append((label, [seeds[0] for seeds in generated]))
    return make_contact_sheet(rows, [prompt.text.format("…") for prompt in PROMPTS], side=96, label_width=150)


def _rounded(scores):
    """Return scores as JSON has them: four digits, and None for what is not comparable."""
    return [[None if np.isnan(value) else round(float(value), 4) for value in cell] for cell in scores]


def main(args=None):
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=PANELS, default="main")
    parser.add_argument("--clip", default=str(POCKET / "evaluators" / "clip"))
    parser.add_argument("--identity", default=str(POCKET / "evaluators" / "identity"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path)
    arguments = parser.parse_args(args)

    clip, identity = ClipEncoder.from_pretrained(arguments.clip), IdentityEncoder.from_pretrained(arguments.identity)
    names = [variant.name for variant in PANELS[arguments.panel]]
    icons = ICONS[arguments.panel]
    fronts = score_all(arguments.output_dir, names, icons, clip, identity)
    report = points_table(fronts) + "\n" + families_table(fronts)
    if "perfusion" in fronts:
        report += "\n" + advantage_table(fronts, "perfusion")
    print(report)
    if arguments.report_dir:
        arguments.report_dir.mkdir(parents=True, exist_ok=True)
        (arguments.report_dir / f"{arguments.panel}.md").write_text(report)
        if arguments.panel in ("main", "flux"):  # the others have more lines than a plot can show
            plot(fronts).savefig(arguments.report_dir / f"{arguments.panel}.png", dpi=120)
        if arguments.panel in ("main", "flux", "transfer"):
            for icon in icons:
                contact_sheet(arguments.output_dir, icon).save(arguments.report_dir / f"{icon}.png")
        rows = [
            {"variant": f.name, **p, "seconds": f.seconds, "bytes": f.bytes, "cells": _rounded(s)}
            for f in fronts.values()
            for p, s in zip(f.points, f.scores, strict=True)
        ]
        (arguments.report_dir / f"{arguments.panel}.json").write_text(
            json.dumps({"icons": icons, "rows": rows}) + "\n"
        )


if __name__ == "__main__":
    main()
