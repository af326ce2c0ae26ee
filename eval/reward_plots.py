"""What the reward bench shows: its tables in Markdown, and one picture. Made from the content of reward_bench.json."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

BLACK, BLUE, ORANGE, GREEN, PURPLE = "#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well."""

SPOILT = {
    "shuffled": ("another question's trace", "o", BLUE),
    "truncated": ("first half only", "s", ORANGE),
    "perturbed": ("numbers changed a little", "^", GREEN),
    "empty": ("empty", "D", PURPLE),
}
LONGEST_NAME = 34

HOW_TO_READ = """\
- **AUC**: the chance that of two traces of one question a right one (the base model's answer is right) gets more reward
  than a wrong one, ties half; the mean over groups that have both. 0.5 is chance. Formulas with * read rightness
  itself, so theirs says nothing.
- **rank**: Spearman's correlation with rightness in the same groups; a constant reward counts 0.
- **no spread**: share of groups from which GRPO has no gradient: a standard deviation of at most 1e-8 of the float32
  rewards, as in TRL's `frac_reward_zero_std` (which, in float32 throughout, misses some groups of equal rewards).
- **length**: mean Spearman correlation with the trace's tokens within a group; above 0 longer traces are paid more.
- **masking**: mean fall of the reward when the answer's mentions are cut out of the trace, in pooled within-group
  standard deviations; **AUC masked** is the AUC of what is left. A dash: masking does not apply.
- Brackets are 95 % intervals from drawing questions anew (1,000 draws; questions beyond 1,000 are hashed into as many
  clusters). With fewer than about 20 questions they are too narrow."""


# --- Markdown ---


def as_markdown(result: Mapping[str, Any]) -> str:
    """The whole report."""
    saved, arms = result["saved"], result["arms"]
    lines = [f"# Reward bench: {result['run']}", "", summary(saved), "", HOW_TO_READ, ""]
    lines += ["## The run's own base model (saved log-probs, all traces)", "", *statistics_table(saved, arms), ""]
    for base in result["bases"]:
        lines += [f"## {base['model']}, a sample scored anew ({base['template']} template)", ""]
        lines += [summary(base["versions"]["original"]), "", *statistics_table(base, arms), ""]
        lines += [f"### How much less {base['model']} makes the formulas pay for spoilt traces", ""]
        lines += [
            "In pooled within-group standard deviations of the original rewards; a good reward falls everywhere.",
            "",
        ]
        lines += [*drops_table(base, arms), ""]
    if result["agreement"]:
        lines += ["## Do the base models rank the traces of a group alike?", ""]
        lines += ["Mean Spearman correlation within groups of the sample where either varies.", ""]
        lines += [*agreement_table(result["agreement"]), ""]
    if result["equivalence"]:
        lines += [f"## Arms that GRPO cannot tell apart (scale_rewards: {result['scale_rewards']})", ""]
        lines += [f"From the formulas, and on the first {result['equivalence']['groups']} whole groups of the run.", ""]
        lines += [result["equivalence"]["explanation"], ""]
    return "\n".join(lines)


def summary(part: Mapping[str, Any]) -> str:
    """What was read, in a sentence or two."""
    text = f"{part['rows']:,} traces in {part['groups']:,} groups, {part['questions']:,} questions."
    if part["leak_rate"] is not None:
        right = "No judge was asked which answers are right"
        if part["accuracy"] is not None:
            right = f"The base model is right after {part['accuracy']:.1%} of them"
        text += (
            f" {right}; {part['leak_rate']:.1%} state the answer, {part['early_leak_rate']:.1%} in their first quarter."
        )
    if part["unscored"]:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in part["unscored_reasons"].items())
        text += f" {part['unscored']:,} could not be scored and count nowhere ({reasons})."
    return text


def number(estimate: Mapping[str, Any] | None, form: str = ".3f", interval: bool = True) -> str:
    """An estimate with its interval, a dash where there is none."""
    if estimate is None or estimate["value"] is None:
        return "-"
    text = format(estimate["value"], form)
    if interval and estimate["ci"] is not None:
        text += " [{}, {}]".format(*(format(bound, form) for bound in estimate["ci"]))
    return text


def ranked(statistics: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The formulas, the highest AUC first and those that read rightness itself last."""
    return sorted(
        statistics, key=lambda name: (arms[name]["reads_rightness"], -(statistics[name]["auc"]["value"] or 0))
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column on the left, numbers on the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]]


def statistics_table(part: Mapping[str, Any], arms: Mapping[str, Any]) -> list[str]:
    """One line a formula; those that do not fit below it."""
    statistics = part["statistics"]
    header = ["formula", "AUC", "groups", "rank", "no spread", "length", "masking", "AUC masked"]
    rows = []
    for name in ranked(statistics, arms):
        s = statistics[name]
        rows.append(
            [
                *(
                    f"`{name}`" + " *" * arms[name]["reads_rightness"],
                    number(s["auc"]),
                    f"{s['auc']['groups']:,}",
                    number(s["rank"]),
                ),
                *(number(s["no_spread"], ".1%"), number(s["length"], "+.3f"), number(s["masking"], "+.2f")),
                number(s["masked_auc"]),
            ]
        )
    unfit = [f"- `{name}` does not fit: {reason}" for name, reason in part["does_not_fit"].items()]
    return table(header, rows) + (["", *unfit] if unfit else [])


def drops_table(base: Mapping[str, Any], arms: Mapping[str, Any]) -> list[str]:
    """One line a formula, one column a spoilt version."""
    versions = base["drops"]
    rows = [
        [
            f"`{name}`" + " *" * arms[name]["reads_rightness"],
            *(number(versions[version][name], "+.2f") for version in versions),
        ]
        for name in ranked(base["statistics"], arms)
    ]

    def share(version: str) -> str:
        value = base["versions"][version]["accuracy"]
        return "-" if value is None else f"{value:.1%}"

    accuracy = ["right answers (originals: " + share("original") + ")", *map(share, versions)]
    return table(["formula", *versions], [*rows, accuracy])


def agreement_table(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a formula, one column a pair of scorers."""
    header = ["formula", *(" / ".join(pair["scorers"]) for pair in pairs)]
    names = list(pairs[0]["arms"])
    return table(header, [[f"`{name}`", *(number(pair["arms"][name]) for pair in pairs)] for name in names])


# --- the picture ---

Panel = tuple[str, str, Callable[[Any, Sequence[str]], None]]


def plot_bench(result: Mapping[str, Any], path: Path) -> None:
    """One line a formula, one panel a question asked of it; the best at ranking right traces on top."""
    saved = result["saved"]
    statistics = saved["statistics"]
    arms = ranked(statistics, result["arms"])
    panels = [*saved_panels(statistics), *base_panels(result)]
    width, height = 2.9 + 2.75 * len(panels), 2.4 + 0.235 * len(arms)
    labels = [shortened(name) + " *" * result["arms"][name]["reads_rightness"] for name in arms]
    figure, axes = plt.subplots(1, len(panels), figsize=(width, height), sharey=True, layout="constrained")
    for axis, (title, label, draw) in zip(axes, panels, strict=True):
        draw(axis, arms)
        axis.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
        axis.set_xlabel(label, fontsize=9)
        axis.set_yticks(range(len(arms)), labels, fontsize=9)
        axis.tick_params(axis="x", labelsize=8.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.3, linewidth=0.6)
        for place in range(0, len(arms), 2):
            axis.axhspan(place - 0.5, place + 0.5, color="0.955", linewidth=0, zorder=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    figure.suptitle("Which reward pays for reasoning that helps?", fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption(result, round(14.5 * width)), fontsize=9, x=0.01, ha="left", linespacing=1.4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def caption(result: Mapping[str, Any], characters: int) -> str:
    """What the picture is of, in lines of so many characters."""
    saved = result["saved"]
    mixed = max((s["auc"]["groups"] for s in saved["statistics"].values()), default=0)
    text = (
        f"{Path(result['run']).resolve().name}: {saved['rows']:,} traces in {saved['groups']:,} groups, {mixed:,} of "
        "them with right and wrong traces. A trace is right if the base model's own answer after it is. "
        "Lines are 95 % intervals over questions."
    )
    if any(arm["reads_rightness"] for arm in result["arms"].values()):
        text += " * looks at rightness itself, so to rank right traces first is no merit of its own."
    if saved["does_not_fit"]:
        text += f" Left out, as they do not fit these data: {', '.join(saved['does_not_fit'])}."
    return "\n" + "\n".join(textwrap.wrap(text, characters))


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def saved_panels(statistics: Mapping[str, Mapping[str, Any]]) -> list[Panel]:
    """What needs no model: ranking, spread, length."""

    def of(name: str) -> dict[str, Any]:
        return {arm: s[name] for arm, s in statistics.items()}

    def ranking(axis: Any, arms: Sequence[str]) -> None:
        reference(axis, 0.5)
        dots(axis, arms, of("auc"), BLUE, "o", "traces as they are")
        if any(s["masked_auc"]["value"] is not None for s in statistics.values()):
            dots(axis, arms, of("masked_auc"), ORANGE, "o", "answer cut out of the traces", 0.25, hollow=True)
        legend(axis)

    def spread(axis: Any, arms: Sequence[str]) -> None:
        dots(axis, arms, of("no_spread"), BLACK, "o")
        axis.set_xlim(-0.03, 1.03)

    def length(axis: Any, arms: Sequence[str]) -> None:
        reference(axis, 0.0)
        dots(axis, arms, of("length"), BLACK, "o")
        widest = max((abs(bound) for e in of("length").values() for bound in (e["ci"] or [e["value"] or 0])), default=0)
        axis.set_xlim(-max(0.25, 1.1 * widest), max(0.25, 1.1 * widest))

    return [
        (
            "Pays right traces more?",
            "chance that a right trace gets more than a\nwrong one of its question (dashed: a coin's)",
            ranking,
        ),
        ("Leaves nothing to learn?", "share of groups\nin which all traces earn the same", spread),
        ("Pays for length?", "rank correlation with length in a group\n(right: longer traces earn more)", length),
    ]


def base_panels(result: Mapping[str, Any]) -> list[Panel]:
    """What the first base model says of spoilt traces, and whether the scorers agree."""
    if not result["bases"]:
        return []
    base = result["bases"][0]

    def drops(axis: Any, arms: Sequence[str]) -> None:
        reference(axis, 0.0)
        for place, (version, (label, marker, colour)) in enumerate(SPOILT.items()):
            dots(axis, arms, base["drops"][version], colour, marker, label, 0.2 * place - 0.3, size=4)
        low, high = axis.get_xlim()
        if max(-low, high) > 5:  # a perplexity has no bound, and would leave the others no room
            axis.set_xscale("symlog", linthresh=1, linscale=0.8)
            axis.set_xticks([x for x in (-100, -10, -1, 0, 1, 10, 100, 1000) if low <= x <= high])
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            lows = [e["ci"][0] if e["ci"] else e["value"] for drop in base["drops"].values() for e in drop.values()]
            axis.set_xlim(1.2 * min([-0.3, *(x for x in lows if x is not None)]), high)
        legend(axis)

    def agreement(axis: Any, arms: Sequence[str]) -> None:
        for place, (pair, marker, colour) in enumerate(
            zip(result["agreement"], "osD^v", (BLUE, ORANGE, PURPLE, GREEN, BLACK), strict=False)
        ):
            label = " / ".join(shortened(Path(name).name) for name in pair["scorers"])
            dots(axis, arms, pair["arms"], colour, marker, label, 0.18 * place - 0.1, size=4)
        legend(axis)

    name = Path(base["model"]).name
    panels: list[Panel] = [
        (
            "Pays spoilt traces less?",
            f"fall of the reward, in standard deviations\nof a group (scored by {name})",
            drops,
        )
    ]
    if len(result["bases"]) > 1:
        panels.append(("Do base models agree?", "rank correlation in a group\nbetween two scorers' rewards", agreement))
    return panels


def dots(
    axis: Any,
    arms: Sequence[str],
    values: Mapping[str, Mapping[str, Any]],
    colour: str,
    marker: str,
    label: str | None = None,
    shift: float = 0.0,
    hollow: bool = False,
    size: float = 5,
) -> None:
    """A dot and its interval for every formula that has a value."""
    known = [
        (place, values[arm]) for place, arm in enumerate(arms) if arm in values and values[arm]["value"] is not None
    ]
    for place, estimate in known:
        if estimate["ci"] is not None:
            axis.plot(estimate["ci"], [place + shift] * 2, color=colour, linewidth=1.3, alpha=0.75, zorder=2)
    axis.plot(
        [estimate["value"] for _, estimate in known],
        [place + shift for place, _ in known],
        marker,
        color=colour,
        markersize=size,
        markerfacecolor="white" if hollow else colour,
        label=label,
        zorder=3,
    )


def reference(axis: Any, at: float, label: str | None = None) -> None:
    axis.axvline(at, color="0.35", linewidth=1, linestyle="--", zorder=1, label=label)


def legend(axis: Any) -> None:
    """Above the panel's title, so that it covers no dot."""
    axis.legend(
        fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1.045), frameon=False, borderaxespad=0, handlelength=1.2
    )
