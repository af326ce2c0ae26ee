"""Every pair of arms: what the formulas and the data say together."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations

from context_rl.rewards.compose import Spec
from context_rl.rewards.equivalence.argument import by_argument
from context_rl.rewards.equivalence.data import Seen, compared, seen
from context_rl.rewards.equivalence.verdicts import KINDS, Verdict
from context_rl.rewards.inputs import RewardError, RewardInputs


def compare_arms(
    arms: Mapping[str, Spec],
    scales: Sequence[str],
    rows: Sequence[RewardInputs | None] | None = None,
    group_size: int | None = None,
) -> list[tuple[str, str, str, Verdict]]:
    """(arm, arm, scale, verdict) of every pair that is not "different".

    With data, `largest` is theirs, and they decide where the formulas prove nothing. Where they say less than was
    proven (a cut, vanishing spreads, a wrong proof) their verdict stands, even "different", and its reason says so. An
    arm that does not fit the data is compared by argument only.
    """
    found = []
    for scale in scales:
        on_rows: dict[str, Seen] = {}
        for name, spec in arms.items() if rows and group_size else ():
            with suppress(RewardError):
                on_rows[name] = seen(spec, rows, group_size, scale)
        for one, other in combinations(arms, 2):
            argument = by_argument(arms[one], arms[other], scale)
            data = compared(on_rows[one], on_rows[other], scale) if {one, other} <= on_rows.keys() else None
            verdict = _agreed(argument, data)
            if verdict:
                found.append((one, other, scale, verdict))
    return found


def _agreed(argument: Verdict | None, data: Verdict | None) -> Verdict | None:
    """The one verdict of both; None where neither finds anything in common."""
    if argument is None or data is None:
        return argument or (data if data and data.kind != "different" else None)
    if KINDS.index(data.kind) <= KINDS.index(argument.kind):
        return replace(argument, largest=data.largest)
    proven = f"the formulas say {argument.kind} ({argument.reason})"
    return replace(data, reason=f"data and formulas contradict each other: {data.reason}; {proven}")


def explain(verdicts: Sequence[tuple[str, str, str, Verdict]]) -> str:
    """A Markdown table of what `compare_arms` returned: arms with one verdict for one reason share a row.

    Two arms that stand together in several rows of a scale are as close as the first of them says.
    """
    rows: dict[tuple[int, int, str], list[tuple[set[str], list[float]]]] = {}
    scales = list(dict.fromkeys(scale for _, _, scale, _ in verdicts))
    for one, other, scale, verdict in verdicts:
        key = scales.index(scale), KINDS.index(verdict.kind), verdict.reason
        together, apart = ({one, other}, [verdict.largest or 0.0]), []
        for members in rows.get(key, []):
            if members[0] & together[0]:
                together = (members[0] | together[0], members[1] + together[1])
            else:
                apart.append(members)
        rows[key] = [*apart, together]
    with_data = any(verdict.largest is not None for *_, verdict in verdicts)
    lines = ["| scale | rewards | to GRPO | largest difference | why |", "|---|---|---|---|---|"]
    for (scale, kind, reason), classes in sorted(rows.items()):
        for names, largest in classes:
            figure = f"{max(largest):.2g}" if with_data else ""
            lines.append(f"| {scales[scale]} | {', '.join(sorted(names))} | {KINDS[kind]} | {figure} | {reason} |")
    return "\n".join(lines) + "\n"
