"""A sample of groups scored anew by a base model: the traces as they are and in spoilt versions."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from context_rl.questions import Questions
from context_rl.rewards import RewardInputs, Spec
from eval.reward_arms import Arms
from eval.reward_stats import AgreementStatistics, DropStatistics, GroupStatistics
from eval.saved_groups import Group, Tally
from eval.variants import VARIANTS, perturbed, shuffled, truncated
from scorer.types import ScorerError


@dataclass(frozen=True)
class Sample:
    """What is scored anew, and how it is counted.

    Attributes:
        specs: the formulas.
        blocks: yields the groups in blocks, in the order of the run; a shuffled trace comes from the same block.
        traces: in all blocks together.
        cluster: of a question, one of `clusters`; see `eval.reward_stats.cluster_of`.
    """

    specs: Mapping[str, Spec]
    blocks: Callable[[], Iterator[list[Group]]]
    traces: int
    cluster: Callable[[str], int]
    clusters: int
    seed: int = 0


def collect(statistics: GroupStatistics, cluster: Callable[[str], int], arms: Arms, groups: Sequence[Group]) -> None:
    """Adds the groups of one generation batch to the statistics."""
    for group, values, masked in arms.values(groups):
        scored = [x for x in group.inputs if x is not None]
        statistics.add(
            cluster(group.question), values, [x.correct for x in scored], [x.trace_tokens for x in scored], masked
        )


def estimates(results: Mapping[str, Any], unfit: Mapping[str, str]) -> dict[str, Any]:
    """Results by formula, ready for JSON, without those that do not fit."""

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value.as_dict()

    return {name: plain(result) for name, result in results.items() if name not in unfit}


def saved_rewards(sample: Sample) -> list[np.ndarray]:
    """The sample's rewards from its saved log-probs, one [A, n] a group; NaN where there are none."""
    arms = Arms(sample.specs)
    values: list[np.ndarray] = []
    for groups in sample.blocks():
        values += arms.steady(groups, {"original": [group.inputs for group in groups]})["original"]
    return values


def rescore(sample: Sample, questions: Questions, model: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What one base model makes of the sample, ready for JSON; and its rewards of the original traces as above.

    Raises:
        ScorerError: it could score none of the traces.
    """
    arms, in_order = Arms(sample.specs), Arms(sample.specs)
    statistics = GroupStatistics(arms.names, sample.clusters)
    drops = {version: DropStatistics(arms.names, sample.clusters) for version in VARIANTS}
    tallies = {version: Tally() for version in ("original", *VARIANTS)}
    originals: list[np.ndarray] = []
    with tqdm(total=sample.traces * len(tallies), desc=f"scoring with {Path(model).name}", unit="trace") as bar:
        for groups in sample.blocks():
            versions = {v: assessed(questions, asked, bar) for v, asked in all_versions(groups, sample.seed).items()}
            for version, members in versions.items():
                tallies[version].add(members)
            for _, batch in itertools.groupby(versions["original"], key=lambda group: group.progress):
                collect(statistics, sample.cluster, in_order, list(batch))
            values = arms.steady(groups, {v: [group.inputs for group in members] for v, members in versions.items()})
            originals += values["original"]
            for version, drop in drops.items():
                for place, (group, mine, spoilt) in enumerate(
                    zip(versions["original"], values["original"], values[version], strict=True)
                ):
                    pairs = zip(group.inputs, versions[version][place].inputs, strict=True)
                    both = [a is not None and b is not None for a, b in pairs]
                    drop.add(sample.cluster(group.question), mine[:, both], spoilt[:, both])
    original = tallies["original"]
    if original.rows == original.unscored.total():
        reason = next(iter(original.unscored), "there are no groups")
        raise ScorerError(f"{model}: none of the sampled traces could be scored: {reason}")
    unfit = arms.unfit | in_order.unfit
    return {
        "does_not_fit": unfit,
        "versions": {version: tally.as_dict() for version, tally in tallies.items()},
        "statistics": estimates(statistics.results(), unfit),
        "drops": {version: estimates(drop.results(), unfit) for version, drop in drops.items()},
    }, originals


def agreement(
    sample: Sample, values: Mapping[str, Sequence[np.ndarray]], unfit: Mapping[str, str]
) -> list[dict[str, Any]]:
    """For every two scorers how alike they rank the traces of a group, by formula.

    Args:
        values: scorer -> rewards of the sample, one [A, n] a group.
    """
    clusters = [sample.cluster(group.question) for groups in sample.blocks() for group in groups]
    found = []
    for a, b in itertools.combinations(values, 2):
        statistics = AgreementStatistics(list(sample.specs), sample.clusters)
        for cluster, mine, others in zip(clusters, values[a], values[b], strict=True):
            # An unscored trace is NaN under every formula, a formula that does not fit in every trace.
            both = ~(np.isnan(mine).all(0) | np.isnan(others).all(0))
            statistics.add(cluster, mine[:, both], others[:, both])
        found.append({"scorers": [a, b], "arms": estimates(statistics.results(), unfit)})
    return found


def all_versions(groups: Sequence[Group], seed: int) -> dict[str, list[Group]]:
    """The groups as they are and in each spoilt version; traces that have no such version are left unscored.

    A spoilt trace counts as ended by q if the original was, so that a gate on that sees the text alone; its length is
    the original's in proportion to the characters.
    """
    ids = [group.question for group in groups for _ in group.traces]
    flat = [row for group in groups for row in zip(group.traces, group.tokens, group.finished, strict=True)]

    def rewritten(text: Callable[[str], str]) -> list[tuple[str, int, bool]]:
        new = [(text(trace), trace, tokens, finished) for trace, tokens, finished in flat]
        return [(t, round(tokens * len(t) / max(1, len(trace))), finished) for t, trace, tokens, finished in new]

    rows = {
        "original": flat,
        "shuffled": [None if source is None else flat[source] for source in shuffled(ids, seed)],
        "truncated": rewritten(truncated),
        "perturbed": rewritten(lambda trace: perturbed(trace, seed)),
        "empty": rewritten(lambda _: ""),
    }
    found: dict[str, list[Group]] = {}
    for version, members in rows.items():
        of_group = iter(members)
        found[version] = []
        for group in groups:
            mine = list(itertools.islice(of_group, len(group.traces)))
            traces, tokens, finished = zip(*[row or (None, 0, False) for row in mine], strict=True)
            unasked = ["no other question in the sample" if trace is None else None for trace in traces]
            found[version].append(
                replace(group, traces=traces, tokens=tokens, finished=finished, inputs=(), unscored=unasked)
            )
    return found


def assessed(questions: Questions, groups: Sequence[Group], bar: tqdm, at_once: int = 512) -> list[Group]:
    """The groups with what the base model says of their traces."""
    flat = [
        (group.question, *row)
        for group in groups
        for row in zip(group.traces, group.tokens, group.finished, group.unscored, strict=True)
    ]
    inputs: list[RewardInputs | None] = [None] * len(flat)
    reasons = [row[-1] for row in flat]
    asked = [place for place, reason in enumerate(reasons) if reason is None]
    for start in range(0, len(asked), at_once):
        places = asked[start : start + at_once]
        columns = list(zip(*[flat[place][:-1] for place in places], strict=True))
        for place, trace in zip(places, questions.assess(*columns), strict=True):
            inputs[place], reasons[place] = trace.inputs, trace.unscored
        bar.update(len(places))
    rest = iter(zip(inputs, reasons, strict=True))
    found = []
    for group in groups:
        mine = list(itertools.islice(rest, len(group.traces)))
        found.append(replace(group, inputs=[x for x, _ in mine], unscored=[reason for _, reason in mine]))
    return found
