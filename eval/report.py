"""Which reward should I use? Run folders in, one report out: report.md, pictures, and report.html in one file.

python -m eval.report RUNS... [--out FOLDER] [--by KEY ...] [--accuracy SHARE]

RUNS are run folders or folders of them. Runs that differ in nothing but their seed are an arm. Only run folders are
read; a folder that cannot be is listed with the reason. A missing cell is a dash. What is judged, and by which rule:
`eval/report_rules.py`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import stdev
from typing import Any

from context_rl import runs
from eval.metrics import mean_of
from eval.report_arms import compact, differing, group_arms
from eval.report_arms import setting_text as setting
from eval.report_data import Arm, ArmNumbers, Block, Compared, Estimate, RunFacts, blocks_of
from eval.report_document import Bullets, Figure, Heading, Part, Table, Text, as_markdown
from eval.report_html import as_html
from eval.report_plots import MOST_ARMS, final_accuracy, learning_curves, pictures, shown_arms
from eval.report_rules import LAST_STEPS, RULES, p_text
from eval.report_runs import FAILED, FINISHED, STOPPED, Run, read_runs

MOST_PAIRS = 66
"""Of more pairs only those with the best arm are in the tables; all are in pairs.json."""
LONGEST_TRACE = 400


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")
    parser.add_argument("--by", nargs="+", default=[], metavar="KEY", help="settings that name the arms first")
    parser.add_argument("--accuracy", type=float, help="target of the sample efficiency, a share such as 0.8")
    args = parser.parse_args(argv)
    found = read_runs(args.runs)
    if not any(run.config for run in found):
        print("error: no run folder can be read", file=sys.stderr)
        for run in found:
            print(f"  {run.name}: {run.problem}", file=sys.stderr)
        return 1
    blocks = write_report(found, args.out, args.by, args.accuracy)
    with suppress(BrokenPipeError):  # `| head`
        print_verdicts(blocks, found, args.out)
    return 0


def print_verdicts(blocks: Sequence[Block], found: Sequence[Run], out: Path) -> None:
    """The recommendation on the terminal, what failed, and where the rest is."""
    for block in blocks:
        print("\n".join([f"{block.task}:", *(f"  {line}" for line in block.recommendation.lines)]))
    for run in found:
        if run.status == FAILED:
            print(f"failed: {run.name}: {run.problem}")
    print(f"report: {out / 'report.html'} and {out / 'report.md'}", flush=True)


def write_report(found: Sequence[Run], out: Path, by: Sequence[str] = (), target: float | None = None) -> list[Block]:
    """Writes the report of these runs to the folder `out`; see the module's first lines."""
    arms, notes = group_arms(found, by)
    blocks = blocks_of(arms, target)
    out.mkdir(parents=True, exist_ok=True)
    parts = opening(found, arms, notes)
    for number, block in enumerate(blocks):
        suffix = "" if len(blocks) == 1 else f"-{number + 1}"
        if suffix:
            parts.append(
                Text(
                    f"Part {number + 1}: {block.task}, {len(block.arms)} arms. Arms of different parts answer "
                    "different questions and are not compared."
                )
            )
        parts += block_parts(block, out, suffix, by)
    parts += [Heading("Rules"), Bullets(list(RULES.values()))]
    title = f"Ablation report: {', '.join(dict.fromkeys(block.task for block in blocks))}"
    runs.write_atomically(out / "report.md", as_markdown(title, parts))
    runs.write_atomically(out / "report.html", as_html(title, parts))
    pairs = [vars(c) for block in blocks for comparisons in block.comparisons.values() for c in comparisons]
    runs.write_atomically(out / "pairs.json", json.dumps(finite(pairs), indent=1) + "\n")
    return blocks


def finite(value: Any) -> Any:
    """For JSON, which has no infinity: of a number that is not finite, None."""
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


# --- cells ---


def number(value: float | None, form: str = ".1f", factor: float = 1.0) -> str:
    """A number, a dash where it is not known; never a minus sign before a zero."""
    return "-" if value is None else format(factor * value, form.replace(".", "z.", 1))


def estimated(estimate: Estimate | None, form: str = ".1f", factor: float = 100.0) -> str:
    """A value with its interval, as far as they are known."""
    if estimate is None:
        return "-"
    text = number(estimate.value, form, factor)
    return text if estimate.ci is None else text + interval(estimate.ci, form, factor)


def interval(ci: Sequence[float], form: str, factor: float) -> str:
    return " [{}, {}]".format(*(number(bound, form, factor) for bound in ci))


def change(ends: tuple[float | None, float | None], form: str, factor: float = 1.0) -> str:
    """Beginning and end."""
    return "-" if ends == (None, None) else f"{number(ends[0], form, factor)} to {number(ends[1], form, factor)}"


# --- the parts ---


def opening(found: Sequence[Run], arms: Sequence[Arm], notes: Sequence[str]) -> list[Part]:
    """How much was read, and what was not."""
    counts = [f"{sum(run.status == status for run in found)} {status}" for status in (FINISHED, STOPPED, FAILED)]
    parts: list[Part] = [Text(f"{len(found)} run folders ({', '.join(counts)}) in {len(arms)} arms.")]
    failed = [f"{run.name}: {run.problem}" for run in found if run.status == FAILED]
    stopped = [
        f"{run.name}: stopped early, after step {run.steps[-1]:.0f}"
        if len(run.steps)
        else f"{run.name}: no step logged"
        for run in found
        if run.status == STOPPED
    ]
    if failed:
        parts += [Heading("Failed, or not readable", 3), Bullets(failed)]
    if stopped:
        parts += [Heading("Stopped early: in the curves only", 3), Bullets(stopped)]
    return [*parts, *([Heading("Notes", 3), Bullets(list(notes))] if notes else [])]


def block_parts(block: Block, out: Path, suffix: str, by: Sequence[str]) -> list[Part]:
    """Everything of the arms that answer the same held-out questions."""
    where = f": {block.task}" if suffix else ""
    ends, curves = (
        [Figure(f"{name}{suffix}", caption, pictures(plot, block, out, f"{name}{suffix}"))] if there else []
        for name, caption, plot, there in (
            ("accuracy", final_caption(), final_accuracy, any(n.accuracy for n in block.arms)),
            (
                "curves",
                curves_caption(block),
                learning_curves,
                any(len(f.run.steps) for n in block.arms for f in n.runs),
            ),
        )
    )
    return [
        *(Heading(f"Which one{where}?"), Bullets(block.recommendation.lines)),
        *(Heading("Where the arms end"), Text(SUMMARY), summary_table(block), *ends),
        *(Heading("How they got there"), *curves, Text(TRAINING), training_table(block)),
        *(Heading("Sample efficiency"), Text(target_text(block)), efficiency_table(block)),
        *(Heading("Does the reward rise while accuracy falls?"), *parting(block)),
        *(Heading("Stability"), *stability(block)),
        *(Heading("Pairs of arms"), *pair_parts(block)),
        *(Heading("Traces side by side"), *example_parts(block)),
        *(Heading("What the arms are"), settings_table(block, by)),
        *(Heading("Every run"), Text(EVERY_RUN), runs_table(block)),
    ]


SUMMARY = (
    "Held-out questions, after training. Brackets are 95 % intervals; the last column says over what: with two seeds "
    "and more over seeds and questions that could as well have been drawn, with one seed over questions alone. Gain: "
    "accuracy at T = 1 minus that without a trace, in points. Seeds: finished / stopped early / failed."
)
TRAINING = (
    f"Means over finished seeds; begin and end are the first and the last {LAST_STEPS} logged steps. No gradient: "
    "share of groups whose traces all earn the same. Leak: share of sampled traces that state the answer. Seconds: a "
    "whole run with its evaluation; scoring: its share of the training time."
)
EVERY_RUN = (
    "Slopes are over the last third of the logged steps, for 10 steps; of the accuracy in points. "
    "Parted: the reward rose while accuracy fell."
)


def summary_table(block: Block) -> Table:
    header = [
        "arm",
        "seeds",
        "accuracy, T = 1, %",
        "accuracy, greedy, %",
        "mean log p",
        "gain over no trace",
        "interval over",
    ]
    rows = [
        [
            *(n.name, seeds_cell(n), estimated(n.accuracy), estimated(n.greedy)),
            *(estimated(n.logprob, ".2f", 1.0), estimated(n.gain, "+.1f"), n.accuracy.how if n.accuracy else "-"),
        ]
        for n in block.arms
    ]
    return Table(header, rows, (0, 6))


def seeds_cell(n: ArmNumbers) -> str:
    return " / ".join(str(len(n.arm.of(status))) for status in (FINISHED, STOPPED, FAILED))


def training_table(block: Block) -> Table:
    header = ["arm", "no gradient, first 20 steps, %", "all steps, %", "entropy", "trace tokens", "leak, end, %"]
    rows = [
        [
            *(n.name, number(n.no_spread_first, ".1f", 100), number(n.no_spread, ".1f", 100)),
            *(change(n.ends["entropy"], ".3f"), change(n.ends["tokens"], ".1f"), number(n.ends["leak"][1], ".1f", 100)),
            *(number(n.seconds, ".0f"), number(n.scoring_share, ".0f", 100)),
        ]
        for n in block.arms
    ]
    return Table([*header, "seconds", "scoring, %"], rows)


def target_text(block: Block) -> str:
    if block.target is None:
        return "No target: no arm's accuracy rose above where it began."
    text = f"Target: {100 * block.target:.1f} % accuracy of the sampled training traces"
    if block.untrained is not None:
        text += f", 90 % of the way from untrained ({100 * block.untrained:.1f} %) to the best arm's end"
    return text + (
        ". A run has reached it when its running mean over a tenth of the run first has. Mean over finished seeds and, "
        "in brackets, the lowest and highest seed; where some did not reach it, the mean is of those that did."
    )


def efficiency_table(block: Block) -> Table:
    rows = []
    for n in block.arms:
        finished = [f for f in n.runs if f.run.status == FINISHED and f.run.has("accuracy")]
        there = [f.reached for f in finished if f.reached is not None]
        known = block.target is not None and finished
        cells = (
            [spread_cell([r[i] for r in there]) if there else "not reached" for i in (0, 1)] if known else ["-", "-"]
        )
        rows.append([n.name, f"{len(there)} of {len(finished)}" if known else "-", *cells])
    return Table(["arm", "seeds that reached it", "steps", "training seconds"], rows)


def spread_cell(values: Sequence[float | None]) -> str:
    """Mean, and lowest and highest of two and more; a dash where one is not known."""
    if None in values:
        return "-"
    text = number(mean_of(values), ".0f")
    return text if len(values) < 2 else text + f" [{number(min(values), '.0f')}, {number(max(values), '.0f')}]"


def parting(block: Block) -> list[Part]:
    every = [f for n in block.arms for f in n.runs]
    flagged = [f for f in every if f.parted in ("last third", "whole run")]
    judged = sum(f.parted is not None for f in every)
    text = f"{len(flagged)} of {judged} runs that have steps enough to judge."
    lines = [f"{f.arm}, seed {f.run.seed_text} ({f.run.name}): over the {f.parted}." for f in flagged]
    return [Text(RULES["reward_accuracy"]), Text(text), *([Bullets(lines)] if lines else [])]


def stability(block: Block) -> list[Part]:
    collapsed = [f for n in block.arms for f in n.runs if f.collapsed]
    lines = [f"{f.arm}, seed {f.run.seed_text} ({f.run.name}): {'; '.join(f.collapsed)}." for f in collapsed]
    rows = []
    for n in block.arms:
        values = [f.accuracy for f in n.runs if f.accuracy is not None]
        low_high = f"{number(min(values), '.1f', 100)} to {number(max(values), '.1f', 100)}" if values else "-"
        spread = number(stdev(values) if len(values) > 1 else None, ".1f", 100)
        readable = [f for f in n.runs if f.run.status != FAILED]
        rows.append([n.name, f"{sum(bool(f.collapsed) for f in readable)} of {len(readable)}", spread, low_high])
    header = ["arm", "collapsed runs", "standard deviation over seeds, points", "lowest to highest seed, %"]
    listed: Part = Bullets(lines) if lines else Text("No run collapsed.")
    return [Text(RULES["collapse"]), listed, Text("Spread of the held-out accuracy at T = 1:"), Table(header, rows)]


def pair_parts(block: Block) -> list[Part]:
    sampled, greedy = block.comparisons["sampled"], block.comparisons["greedy"]
    if not sampled:
        return [Text("There is one arm.")]
    chosen = list(zip(sampled, greedy, strict=True))
    text = (
        "Accuracy of the first arm minus the second's in points, paired by held-out question and seed, with 95 % "
        f"intervals over seeds and questions. p is Holm's over the pairs ({len(chosen)}), each decoding by itself. "
        "What would have been seen is the smallest difference that 80 % of such experiments would show at this spread."
    )
    if len(chosen) > MOST_PAIRS:
        best = block.arms[0].name
        chosen = [pair for pair in chosen if best in (pair[0].a, pair[0].b)]
        text += f" Of the pairs those with {best} are shown; all are in pairs.json."
    header = ["arms", "seeds", "T = 1", "p", "verdict", "greedy", "p, greedy", "verdict, greedy"]
    rows = [[f"{s.a} - {s.b}", str(s.seeds) if s.items else "-", *pair_cells(s), *pair_cells(g)] for s, g in chosen]
    return [Text(text), Table(header, rows, (0, 4, 7), folded=len(rows) > 20)]


def pair_cells(c: Compared) -> list[str]:
    if c.difference is None:
        return ["-", "-", c.words]
    difference = number(c.difference, "+.1f", 100) + interval(c.ci, "+.1f", 100)
    return [difference, "-" if c.p_holm is None else p_text(c.p_holm), c.words]


def example_parts(block: Block) -> list[Part]:
    kind, rows = block.examples
    if not rows:
        return [Text("No traces that the arms have in common.")]
    during = any("during" in moments for e in rows for moments in e["arms"].values())
    moments = ["before", *(["during"] if during else []), "after"]
    parts: list[Part] = [Text(f"One seed an arm; {kind}. In brackets, whether the base model's answer was right.")]
    names = [n.name for n in shown_arms(block.arms)]
    for e in rows:
        parts.append(Heading(e["id"], 3))
        if e["question"]:
            parts.append(Text(f"{' '.join(e['question'].split())} Answer: {e['answer']}"))
        cells = [[name, *(trace_cell(e["arms"][name].get(m)) for m in moments)] for name in names if name in e["arms"]]
        parts.append(Table(["arm", *moments], cells, range(len(moments) + 1)))
    return parts


def trace_cell(found: tuple[str | None, bool | None] | None) -> str:
    if found is None or found[0] is None:
        return "-"
    text = " ".join(found[0].split()) or "(empty)"
    text = text if len(text) <= LONGEST_TRACE else text[: LONGEST_TRACE - 1] + "\u2026"
    return text + {True: " (right)", False: " (wrong)", None: " (not scored)"}[found[1]]


def settings_table(block: Block, by: Sequence[str]) -> Part:
    configs = [n.arm.config for n in block.arms]
    keys = differing(configs, by) or ["reward"]

    def cell(config: dict[str, Any], key: str) -> str:
        return compact(config.get(key)) if key == "reward" else setting(config.get(key))

    rows = [[n.name, *(cell(n.arm.config, key) for key in keys)] for n in block.arms]
    return Table(["arm", *keys], rows, range(len(keys) + 1))


def runs_table(block: Block) -> Table:
    header = ["run", "arm", "seed", "state", "steps", "T = 1, %", "greedy, %", "steps to target", "slope of reward"]
    rows = [run_row(f) for n in block.arms for f in n.runs]
    return Table([*header, "slope of accuracy", "parted", "collapsed"], rows, (0, 1, 3, 10, 11), folded=len(rows) > 12)


def run_row(f: RunFacts) -> list[str]:
    return [
        *(f.run.name, f.arm, f.run.seed_text, f.run.status),
        number(float(f.run.steps[-1]) if len(f.run.steps) else None, ".0f"),
        *(number(f.accuracy, ".1f", 100), number(f.greedy, ".1f", 100), number(f.reached and f.reached[0], ".0f")),
        *(number(f.reward_slope, "+.3g", 10), number(f.accuracy_slope, "+.2f", 1000)),
        *(f.parted or "-", "; ".join(f.collapsed) or ("no" if f.run.status == FINISHED else "-")),
    ]


def final_caption() -> str:
    return (
        "Held-out accuracy after training. Lines: 95 % intervals; small ticks: single seeds; dashed: no trace at all."
    )


def curves_caption(block: Block) -> str:
    text = (
        "Running means over a tenth of a run. Lines: mean over finished seeds; bands: lowest to highest seed; thin "
        "lines that end in a cross: runs that stopped early."
    )
    if len(block.arms) > MOST_ARMS:
        text += " In colour, the ten arms that end best and the four that end worst; the others are grey."
    return text


if __name__ == "__main__":
    sys.exit(main())
