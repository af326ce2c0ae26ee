"""A sampled trace with all that is known of it: in memory, as a row of traces/*.parquet, and back again.

Whatever a formula needs is in the row or in questions.jsonl beside it, so that a finished run can be rewarded anew
under another formula, or scored anew by another base model, without its task, its models or its settings.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from context_rl import runs
from context_rl.rewards import LOGGED, Option, RewardInputs
from context_rl.tasks.grading import as_number
from context_rl.tasks.types import DataError, Example

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("example_id", pa.string()),
        ("trace", pa.string()),
        ("trace_tokens", pa.int64()),
        ("finished", pa.bool_()),
        ("token_logprobs", pa.list_(pa.float64())),
        ("baseline_logprobs", pa.list_(pa.float64())),
        ("masked_logprobs", pa.list_(pa.float64())),
        ("option_logprobs", pa.list_(pa.float64())),
        ("base_answer", pa.string()),
        ("correct", pa.bool_()),
        ("judged", pa.float64()),
        ("unscored", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        *((f"rewards/{name}", pa.float64()) for name in LOGGED),
    ]
)
"""A row of traces/: one sampled trace. Log-probs are nats, one a token of the answer (of `option_logprobs` one an
option: the sum); `finished` says that q ended the trace before the token limit; `judged` is a judge's score in [0, 1];
`correct` and `judged` are empty where no judge was asked; `unscored` says why there are no log-probs; `reward` is what
trained; `rewards/*` are the arms of `context_rl.rewards.LOGGED`."""

QUESTIONS, HELD_OUT = "questions.jsonl", "held_out.jsonl"


@dataclass(frozen=True)
class AssessedTrace:
    """One sampled trace and all that is known of it; without a score there is a reason, and no reward."""

    example_id: str
    trace: str
    tokens: int
    finished: bool = True
    base_answer: str | None = None
    inputs: RewardInputs | None = None
    components: Mapping[str, float | None] = field(default_factory=dict)
    unscored: str | None = None

    def as_row(self, step: int, reward: float | None, advantage: float) -> dict[str, Any]:
        """A row of traces/, see `SCHEMA`."""
        x = self.inputs
        return {
            "step": step,
            "example_id": self.example_id,
            "trace": self.trace,
            "trace_tokens": self.tokens,
            "finished": self.finished,
            "token_logprobs": x and list(x.token_logprobs),
            "baseline_logprobs": x and list(x.baseline_logprobs),
            "masked_logprobs": list(x.masked_logprobs) if x and x.masked_logprobs is not None else None,
            "option_logprobs": [option.logprob for option in x.options] if x and x.options else None,
            "base_answer": self.base_answer,
            "correct": x and x.correct,
            "judged": x and x.judged,
            "unscored": self.unscored,
            "reward": reward,
            "advantage": advantage,
            **{f"rewards/{name}": value for name, value in self.components.items()},
        }


def inputs_from_row(row: Mapping[str, Any], example: Example) -> RewardInputs | None:
    """What the trace was rewarded on; None if it could not be scored."""
    if row["token_logprobs"] is None:
        return None
    return inputs_of(
        example,
        trace=row["trace"],
        tokens=row["trace_tokens"],
        finished=row["finished"],
        base_answer=row["base_answer"] or "",
        correct=row["correct"],
        judged=row["judged"],
        logprobs=row["token_logprobs"],
        baseline=row["baseline_logprobs"],
        masked=row["masked_logprobs"],
        options=options_of(example, row["option_logprobs"] or ()),
    )


def inputs_of(
    example: Example,
    *,
    trace: str,
    tokens: int,
    finished: bool,
    base_answer: str,
    correct: bool | None,
    logprobs: Sequence[float],
    baseline: Sequence[float],
    masked: Sequence[float] | None,
    options: tuple[Option, ...],
    judged: float | None = None,
) -> RewardInputs:
    """All that a reward may look at; log-probs are nats, one an answer token."""
    return RewardInputs(
        token_logprobs=tuple(logprobs),
        baseline_logprobs=tuple(baseline),
        correct=correct,
        answered_number=as_number(base_answer),
        gold_number=as_number(example.answer),
        masked_logprobs=None if masked is None else tuple(masked),
        options=options,
        label=example.label,
        question=example.question,
        answer=example.answer,
        trace=trace,
        trace_tokens=tokens,
        finished=finished,
        judged=judged,
    )


def options_of(example: Example, logprobs: Sequence[float]) -> tuple[Option, ...]:
    """The options of a multiple-choice question with their log-probs; none for the log-probs of none."""
    return tuple(Option(v, len(text)) for v, text in zip(logprobs, example.choices, strict=True)) if logprobs else ()


# --- questions.jsonl ---


def write_questions(path: Path, examples: Sequence[Example]) -> None:
    """The questions that a run trains on, or evaluates on, beside its traces."""
    runs.write_jsonl(path, [{k: v for k, v in asdict(e).items() if k != "entry"} for e in examples])


def read_questions(folder: Path) -> dict[str, Example]:
    """The same by id.

    Raises:
        DataError: the folder has none, so it is no run folder (or one of an older version).
    """
    path = folder / QUESTIONS
    if not path.exists():
        raise DataError(f"{folder}: no {QUESTIONS} in it; name the folder of a run")
    rows = runs.read_jsonl(path)
    return {row["id"]: Example(**{**row, "choices": tuple(row["choices"])}) for row in rows}


# --- traces/ ---


def read_batches(folder: Path, columns: Sequence[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """The rows of one generation batch after the other, in order; only one batch is in memory at a time.

    Args:
        columns: those to read; None for all. "step" and "example_id" are always there.

    Raises:
        DataError: no traces, or a file that is no Parquet.
    """
    files = sorted((folder / "traces").glob("step-*.parquet"))
    if not files:
        raise DataError(f"{folder}: no traces/step-*.parquet in it; name the folder of a run that has trained")

    def batch_of(path: Path) -> tuple[str, str]:
        _, step, _, batch = path.stem.split("-")
        return step, batch

    wanted = None if columns is None else list(dict.fromkeys(["step", "example_id", *columns]))
    # A generation batch is one file a process; a group may lie across two of them.
    for _, parts in itertools.groupby(sorted(files, key=lambda p: (batch_of(p), p)), key=batch_of):
        rows: list[dict[str, Any]] = []
        for path in parts:
            try:
                rows += pq.read_table(path, columns=wanted).to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); remove the file") from error
        yield rows
