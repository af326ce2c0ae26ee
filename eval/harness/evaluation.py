"""One task, one model: rows for paired comparisons, and the table as the harness computes it.

The requests are built once for all documents and answered first; then the harness runs on the answers of the documents
that have them all. So a document that fails moves no other document's few-shot examples (the harness draws them one
document after the other from one random stream), nothing is asked twice, and filters, metrics, standard errors and
aggregation are the harness's.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.utils import make_table

from eval.harness.model import Answer, HelpedModel
from eval.harness.questions import LoadedTask
from scorer.types import Unscored

CORRECT = ("exact_match,flexible-extract", "acc_norm,none", "acc,none", "exact_match,none")
"""The metric that `correct` is read from: the first that a task has, or else its first exact_match of any filter.

GSM8K by its last number, not by "#### n": the strict filter asks for a format that only the few-shot examples show, and
a trace is to be judged by the answer it leads to. Multiple choice by log-likelihood a character, as is usual."""


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a task.

    Attributes:
        rows: one a document, in their order: "id" (task/split/number), "doc_id", "metrics" ("metric,filter" -> number),
            "correct" (None for a task whose metrics are no yes or no), "logprob" of the right option or target (nats;
            None for generated answers and for several right ones), "option_logprobs", "base_answer" (the text, or the
            chosen option: by log-likelihood a character where `correct` is), "unscored" (a reason; the others None).
        results: the harness's own, without samples: "results", "configs", "versions", "n-shot", "n-samples", ... Empty
            where no document has an answer.
        correct_metric: "metric,filter" that `correct` comes from.
    """

    rows: list[dict[str, Any]]
    results: dict[str, Any]
    correct_metric: str | None

    @property
    def metrics(self) -> dict[str, Any]:
        """The task's aggregated numbers by "metric,filter", with the harness's standard errors."""
        return next(iter(self.results.get("results", {}).values()), {})

    @property
    def table(self) -> str:
        """The harness's table in Markdown."""
        return make_table(self.results) if self.results else "no document has an answer"


def evaluate(
    task: LoadedTask, model: HelpedModel, samples: Sequence[int] | None = None, bootstrap_iters: int = 100_000
) -> Evaluation:
    """Asks the model about every document, or those numbered in `samples`.

    A document's prompt has the few-shot examples of a full run, whatever `samples` or failures leave out.

    Args:
        bootstrap_iters: as the harness's; means, the usual case, need none.

    Raises:
        ValueError: a number in `samples` is no document's, or there is none.
        DataError, ScorerError: as `HelpedModel.answers`.
    """
    wanted = sorted(set(range(len(task.docs)) if samples is None else samples))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(task.docs):
        raise ValueError(f"samples must be numbers of the {len(task.docs)} documents of {task.name!r}, got {samples!r}")
    model.prepare(task)
    requests = build_requests(task, set(wanted))
    answers = {(r.doc_id, r.idx): a for r, a in zip(requests, model.answers(requests), strict=True)}
    reasons: dict[int, str] = {}
    for (doc_id, _), answer in answers.items():
        if isinstance(answer, Unscored):
            reasons.setdefault(doc_id, answer.reason)
    kept = [doc_id for doc_id in wanted if doc_id not in reasons]
    results: dict[str, Any] = {}
    by_doc: dict[int, list[Mapping[str, Any]]] = {}
    if kept:
        results = run_harness(task, requests, answers, kept, bootstrap_iters)
        for sample in results.pop("samples")[task.name]:
            by_doc.setdefault(sample["doc_id"], []).append(sample)
    correct = correct_metric(by_doc[kept[0]]) if kept else None
    rows = [to_row(task, doc_id, by_doc.get(doc_id, []), correct, reasons.get(doc_id)) for doc_id in wanted]
    return Evaluation(rows, results, correct)


def build_requests(task: LoadedTask, wanted: set[int]) -> list[Instance]:
    """The harness's requests for the wanted documents, out of those for all: the same each time."""
    task.task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    task.task.build_all_requests(limit=len(task.docs))
    return [request for request in task.task.instances if request.doc_id in wanted]


def run_harness(
    task: LoadedTask,
    requests: Sequence[Instance],
    answers: Mapping[tuple[int, int], Answer],
    kept: Sequence[int],
    bootstrap_iters: int,
) -> dict[str, Any]:
    """`lm_eval.evaluator.evaluate` on given answers."""
    place = {doc_id: n for n, doc_id in enumerate(kept)}
    numbered = [
        # With `samples` the harness numbers requests by their place among them.
        replace(r, metadata=(r.task_name, place[r.doc_id], r.repeats), resps=[], filtered_resps={})
        for r in requests
        if r.doc_id in place
    ]
    given = {(place[doc_id], idx): answer for (doc_id, idx), answer in answers.items() if doc_id in place}
    everything = len(kept) == len(task.docs)  # the harness looks each document up in the list of samples
    with built(task, numbered):
        return dict(
            evaluator.evaluate(
                Given(given),
                {"tasks": {task.name: task.task}},
                limit=len(kept) if everything else None,
                samples=None if everything else {task.name: list(kept)},
                log_samples=True,
                bootstrap_iters=bootstrap_iters,
            )
        )


@contextlib.contextmanager
def built(task: LoadedTask, requests: list[Instance]) -> Iterator[None]:
    """The task has these requests and builds no others."""
    task.task._instances = requests
    task.task.build_all_requests = lambda **_: None
    try:
        yield
    finally:
        del task.task.build_all_requests


class Given(LM):
    """A model of the harness whose answers are known: (document, number of the request) -> answer."""

    def __init__(self, answers: Mapping[tuple[int, int], Answer]):
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        return [self.answers[request.doc_id, request.idx] for request in requests]

    generate_until = loglikelihood_rolling = loglikelihood


# --- rows ---


def to_row(
    task: LoadedTask, doc_id: int, samples: Sequence[Mapping[str, Any]], correct: str | None, reason: str | None
) -> dict[str, Any]:
    metrics = metrics_of(samples)
    value = metrics.get(correct) if correct else None
    row = {
        "id": f"{task.name}/{task.split}/{doc_id}",
        "doc_id": doc_id,
        "metrics": metrics,
        "correct": None if value not in (0.0, 1.0) else value == 1.0,
        "logprob": None,
        "option_logprobs": None,
        "base_answer": None,
        "unscored": reason,
    }
    return row | (said(task, samples[0], by_character=correct == "acc_norm,none") if samples else {})


def metrics_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One document's numbers. What the harness keeps as pairs (for F1, say) means nothing for a single one."""
    pairs = ((f"{name},{sample['filter']}", sample[name]) for sample in samples for name in sample["metrics"])
    return {key: float(value) for key, value in pairs if isinstance(value, bool | int | float | np.number)}


def correct_metric(samples: Sequence[Mapping[str, Any]]) -> str | None:
    names = metrics_of(samples)
    return next((n for n in (*CORRECT, *(n for n in names if n.startswith("exact_match,"))) if n in names), None)


def said(task: LoadedTask, sample: Mapping[str, Any], by_character: bool) -> dict[str, Any]:
    """What the base model answered: a text, or log-likelihoods."""
    responses = [response[0] for response in sample["resps"]]
    if isinstance(responses[0], str):
        return {"base_answer": responses[0]}
    logprobs = [logprob for logprob, _ in responses]
    if task.task.OUTPUT_TYPE != "multiple_choice":
        return {"logprob": logprobs[0]}
    options = task.task.doc_to_choice(sample["doc"])
    logprobs = logprobs[: len(options)]  # the rest are options on their own, for mutual information
    rated = np.array(logprobs) / [float(len(option)) if by_character else 1.0 for option in options]
    gold = sample["target"]
    gold = options.index(gold) if isinstance(gold, str) else gold
    return {
        "logprob": logprobs[gold] if isinstance(gold, int) else None,
        "option_logprobs": logprobs,
        "base_answer": options[int(np.argmax(rated))],
    }
