"""The report's two pictures, each as SVG text for the page and as files: learning curves, and where the arms end."""

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eval.report_arms import Arm, canonical
from eval.report_data import ArmNumbers, Block, smooth

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A7A7A")
"""Okabe and Ito's, which colour-blind readers can tell apart, less the yellow that a white page swallows."""
STYLES = ("-", (0, (4, 1.6)))
MOST_ARMS = len(COLOURS) * len(STYLES)

PANELS = {
    "accuracy": "Accuracy of sampled training traces, %",
    "reward": "Reward",
    "entropy": "Entropy, nats a token",
    "tokens": "Trace length, tokens",
    "leak": "Traces that state the answer, %",
    "no_spread": "Groups without gradient, %",
}
IN_PER_CENT = ("accuracy", "leak", "no_spread")


class Look(NamedTuple):
    """How a picture is drawn: for a wide or a narrow screen, on a light or a dark page."""

    wide: bool = True
    dark: bool = False

    @property
    def ink(self) -> str:
        return "#e8e7e1" if self.dark else "#1d1d1b"

    @property
    def paper(self) -> str:
        return "#171716" if self.dark else "#ffffff"

    @property
    def pale(self) -> str:
        return "#55544f" if self.dark else "#c9c8c2"


LOOKS = tuple(Look(wide, dark) for wide in (True, False) for dark in (False, True))


def shown_arms(arms: Sequence[ArmNumbers]) -> list[ArmNumbers]:
    """All, or the ten that end best and the four that end worst: more lines cannot be told apart."""
    return list(arms) if len(arms) <= MOST_ARMS else [*arms[:10], *arms[-4:]]


def pictures(plot: Callable[[Block, Look], Any], block: Block, folder: Path, name: str) -> dict[Look, str]:
    """Writes name.png and name.svg; returns the SVG of every look, for the page."""
    out = {}
    for look in LOOKS:
        style = {
            "text.color": look.ink,
            "axes.labelcolor": look.ink,
            "axes.edgecolor": look.ink,
            "xtick.color": look.ink,
            "ytick.color": look.ink,
            "axes.facecolor": look.paper,
            "figure.facecolor": look.paper,
            "savefig.facecolor": look.paper,
            "svg.hashsalt": name,
            "font.size": 9.5,
        }
        with plt.rc_context(style):
            figure = plot(block, look)
            if look == Look():
                figure.savefig(folder / f"{name}.png", dpi=140)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        out[look] = text.getvalue()
    (folder / f"{name}.svg").write_text(out[Look()], encoding="utf-8")
    return out


# --- learning curves ---


def learning_curves(block: Block, look: Look) -> Any:
    """Small multiples: one panel a metric, one colour an arm, a band from the lowest to the highest seed."""
    arms = shown_arms(block.arms)
    names = ["\n".join(textwrap.wrap(n.name, 40)) for n in arms]
    panels = [name for name in PANELS if any(run.has(name) for n in block.arms for run in n.arm.runs)]
    columns = 3 if look.wide else 1
    rows = max(1, -(-len(panels) // columns))
    per_row = 3 if look.wide else 1
    lines = sum(max(name.count("\n") + 1 for name in names[i : i + per_row]) for i in range(0, len(names), per_row))
    strip = 0.25 + 0.19 * lines
    width, height = (11.5, 2.75 * rows + strip) if look.wide else (4.6, 2.5 * rows + strip)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    one_reward = len({canonical(n.arm.config.get("reward")) for n in block.arms}) == 1
    handles: list[Any] = []
    for axis, name in zip(axes.flat, panels, strict=False):
        for n in block.arms:
            if n not in arms:
                curve(axis, n.arm, name, look.pale, "-", one_reward)
        for place, n in enumerate(arms):
            colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS)]
            curve(axis, n.arm, name, colour, style, one_reward, width=1.7 if len(arms) <= len(COLOURS) else 1.2)
        title = PANELS[name]
        if name == "reward" and not one_reward:
            title = "Reward, from each arm\u2019s lowest (0) to highest (1)"
        axis.set_title(title, fontsize=9.5, loc="left")
        if name == "accuracy" and block.target is not None:
            axis.axhline(100 * block.target, color=look.ink, linewidth=0.8, linestyle=":", zorder=1)
            axis.annotate(
                "target", (0.01, 100 * block.target), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
            )
        if name in ("tokens", "entropy", *IN_PER_CENT):
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.22, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step")
    for place, name in enumerate(names):
        colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS)]
        handles.append(plt.Line2D([], [], color=colour, linestyle=style, linewidth=2, label=name))
    figure.legend(handles=handles, loc="outside upper left", ncols=per_row, frameon=False, fontsize=9, handlelength=2.6)
    return figure


def curve(axis: Any, arm: Arm, name: str, colour: str, style: Any, one_reward: bool, width: float = 0.8) -> None:
    """An arm's finished runs as mean and band, others as a thin line that ends in a cross."""
    lines = {run.folder: (run.steps, smooth(run, name)) for run in arm.runs if run.has(name)}
    factor, shift = (100.0 if name in IN_PER_CENT else 1.0), 0.0
    if name == "reward" and not one_reward and lines:
        values = np.concatenate([y for _, y in lines.values()])
        low, high = np.nanmin(values), np.nanmax(values)
        factor, shift = (1 / (high - low) if high > low else 1.0), low
    scaled = {folder: (x, factor * (y - shift)) for folder, (x, y) in lines.items()}
    whole = [scaled[run.folder] for run in arm.finished if run.folder in scaled]
    if whole:
        x = np.unique(np.concatenate([steps for steps, _ in whole]))
        y = np.array([np.interp(x, steps, values, left=np.nan, right=np.nan) for steps, values in whole])
        known = (~np.isnan(y)).all(0)  # only where all runs are: a mean of fewer would jump
        x, y = x[known], y[:, known]
        axis.plot(x, y.mean(0), color=colour, linestyle=style, linewidth=width, zorder=3 if width > 1 else 1)
        if len(y) > 1 and width > 1:
            axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.16, linewidth=0, zorder=2)
    for run in arm.runs:
        if run not in arm.finished and run.folder in scaled:
            x, y = scaled[run.folder]
            axis.plot(x, y, color=colour, linestyle=style, linewidth=0.8, zorder=2)
            axis.plot(x[-1:], y[-1:], "x", color=colour, markersize=6, zorder=4)


# --- where the arms end ---


def final_accuracy(block: Block, look: Look) -> Any:
    """A line an arm: held-out accuracy at T = 1 and greedy with intervals, each seed a small dot."""
    arms = [n for n in block.arms if n.accuracy is not None]
    names = ["\n".join(textwrap.wrap(n.name, 46 if look.wide else 24)) for n in arms]
    height = 1.1 + len(names) * (0.2 + 0.16 * max((name.count("\n") + 1 for name in names), default=1))
    figure, axis = plt.subplots(figsize=(9 if look.wide else 4.6, height), layout="constrained")
    marks = (("accuracy", -0.13, COLOURS[0], "o", "T = 1"), ("greedy", 0.17, COLOURS[1], "s", "greedy"))
    for attribute, shift, colour, marker, label in marks:
        for place, n in enumerate(arms):
            estimate = getattr(n, attribute)
            if estimate is None:
                continue
            if estimate.ci:
                axis.plot([100 * e for e in estimate.ci], [place + shift] * 2, color=colour, linewidth=1.4, zorder=2)
            first = label if place == 0 else None
            axis.plot(
                [100 * estimate.value], [place + shift], marker, color=colour, markersize=5.5, label=first, zorder=3
            )
            seeds = [100 * v for v in (getattr(f, attribute) for f in n.runs) if v is not None]
            if len(seeds) > 1:
                axis.plot(seeds, [place + shift] * len(seeds), "|", color=colour, markersize=6, alpha=0.8, zorder=2)
    without = [(place, 100 * n.none) for place, n in enumerate(arms) if n.none is not None]
    for number, (place, value) in enumerate(without):  # base models may differ between arms
        ends, label = [place - 0.45, place + 0.45], None if number else "no trace"
        axis.plot([value] * 2, ends, color=look.ink, linewidth=1, linestyle="--", label=label)
    axis.set_yticks(range(len(arms)), names, fontsize=9 if look.wide else 8)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(arms) - 0.45, -0.55)
    axis.set_xlabel("held-out accuracy, %")
    axis.grid(axis="x", alpha=0.22, linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure
