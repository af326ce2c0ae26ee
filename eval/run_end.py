"""What a run shows at its end: the table of help against no help, and the picture of its curves."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from context_rl import runs

CONDITION_LABELS = {
    "none": "none",
    "untrained": "untrained q's",
    "trained": "trained q's",
    "shuffled": "trained, shuffled",
}


def help_table(result: dict[str, Any]) -> Table:
    """The evaluation as a table: one line a condition and decoding, 95 % intervals in brackets."""
    some = next(iter(next(iter(result["eval"].values())).values()))
    table = Table(title=f"Help against no help: {result['task']}, {some['n']} held-out questions, 95 % intervals")
    for column in ("trace", "decoding"):
        table.add_column(column)
    for column in ("accuracy", "mean log p(answer)"):
        table.add_column(column, justify="right", no_wrap=True)
    for condition, by_decoding in result["eval"].items():
        for decoding, s in by_decoding.items():
            if condition == "none" and decoding != "greedy":
                continue
            low, high = s["accuracy_ci"]
            table.add_row(
                CONDITION_LABELS.get(condition, condition),
                "-" if condition == "none" else {"greedy": "greedy", "sampled": "T = 1"}[decoding],
                f"{s['accuracy']:.1%} [{low:.1%}, {high:.1%}]",
                "{:.3f} [{:.3f}, {:.3f}]".format(s["mean_logprob"], *s["mean_logprob_ci"]),
            )
    return table


def print_result(result: dict[str, Any], folder: Path) -> None:
    """The end of a run on the terminal: table, the two differences that matter, where everything is."""
    console = Console(soft_wrap=True)
    if result["eval"]:
        console.print(help_table(result))
    for other, label in (("untrained", "the untrained model's"), ("none", "no trace"), ("shuffled", "shuffled ones")):
        d = result["differences"].get(f"trained_minus_{other}")
        if d is None:
            continue
        change, low, high = (100 * value for value in (d["difference"], *d["ci"]))
        verdict = "no difference shown" if low <= 0 <= high else ("better" if low > 0 else "worse")
        console.print(
            f"trained traces against {label}, T = 1: {change:+.1f} points [{low:+.1f}, {high:+.1f}], {verdict}"
        )
    scoring = "unknown (nothing was logged)" if result["scoring_share"] is None else f"{result['scoring_share']:.0%}"
    console.print(
        f"{result['steps']} steps, reward {result['reward']}; {result['seconds']:.0f} s in all, scoring "
        f"{scoring} of a step, peak memory {result['peak_rss_gb']:.1f} GB"
    )
    console.print(f"everything is in {folder}: curves.png, traces/, eval/, context_model/, result.json", soft_wrap=True)
    console.print(
        f"next: python -m eval.run --run {folder} (more conditions, every trace to read), "
        f"python -m recipes.reward_bench {folder} (other rewards on these traces)",
        soft_wrap=True,
    )


def plot_curves(folder: Path, result: dict[str, Any] | None = None) -> Path:
    """curves.png: reward, accuracy and trace length over the steps, the held-out evaluation at both ends."""
    lines = runs.read_metrics(folder)
    steps = np.array([line["step"] for line in lines])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    draw(left, steps, lines, "reward", "C0", "sampled traces")
    left.set(title=f"Reward{': ' + result['reward'] if result else ''}", xlabel="step")
    draw(middle, steps, lines, "accuracy", "C1", "training questions, sampled traces")
    middle.set(title="Accuracy of the base model's answer", xlabel="step", ylim=(0, 1))
    if result and result.get("eval"):
        ends = {"untrained": 0, "trained": int(steps[-1]) if len(steps) else 0}
        for condition, x in ends.items():
            s = result["eval"][condition]["sampled"]
            low, high = s["accuracy_ci"]
            error = [[s["accuracy"] - low], [high - s["accuracy"]]]
            label = f"held-out questions, n = {s['n']}" if x == 0 else None
            middle.errorbar([x], [s["accuracy"]], error, fmt="o", color="black", capsize=4, label=label)
        s = result["eval"]["none"]["greedy"]
        middle.axhline(s["accuracy"], color="0.5", linestyle="--", label="held-out, no trace")
        middle.axhspan(*s["accuracy_ci"], color="0.5", alpha=0.15, linewidth=0)
    if middle.get_legend_handles_labels()[0]:  # without an evaluation, a judge may not have been asked either
        middle.legend(fontsize=8, loc="lower right")
    draw(right, steps, lines, "trace_tokens", "C2", "tokens of a trace")
    right.set(title="Trace length and entropy", xlabel="step", ylim=(0, None))
    if lines and lines[0].get("entropy") is not None:
        twin = right.twinx()
        draw(twin, steps, lines, "entropy", "C3", "entropy, nats a token (right axis)")
        twin.set_ylim(0, None)
        handles = [*right.get_lines()[-1:], *twin.get_lines()[-1:]]
        right.legend(handles, [h.get_label() for h in handles], fontsize=8, loc="center right")
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw(axis: Any, steps: np.ndarray, lines: list[dict], key: str, colour: str, label: str) -> None:
    """A metric as it was logged, thin, and its running mean over a tenth of the run, thick."""
    known = [(s, line[key]) for s, line in zip(steps, lines, strict=True) if line.get(key) is not None]
    if not known:
        return
    x, y = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    axis.plot(x, y, color=colour, alpha=0.35, linewidth=1)
    window = max(1, len(y) // 10)
    smooth = np.array([y[max(0, i - window + 1) : i + 1].mean() for i in range(len(y))])
    axis.plot(x, smooth, color=colour, linewidth=2, label=label)


def percent(value: float | None, digits: int) -> str:
    """A share in per cent, a dash where it is not known."""
    return "-" if value is None else f"{value:.{digits}%}"
