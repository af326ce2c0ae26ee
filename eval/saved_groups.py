"""The traces of a finished run in groups, one generation batch after the other, and a sample of them."""

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from context_rl.rewards import RewardInputs
from context_rl.rewards.formulas import early_leak, leak
from context_rl.tasks import DataError, Example
from context_rl.traces import SCHEMA, inputs_from_row, read_batches

COLUMNS = [name for name in SCHEMA.names if not name.startswith("rewards/") and name not in ("reward", "advantage")]


@dataclass(frozen=True)
class Group:
    """The traces of one question in one generation batch.

    Attributes:
        key: of the group, the same in every run of the bench.
        progress: share of the run that was done before its batch.
        inputs: None for a trace that could not be scored, whose `unscored` says why.
    """

    key: str
    question: str
    progress: float
    traces: Sequence[str]
    tokens: Sequence[int]
    finished: Sequence[bool]
    inputs: Sequence[RewardInputs | None]
    unscored: Sequence[str | None]


def read_groups(folder: Path, examples: Mapping[str, Example]) -> Iterator[list[Group]]:
    """The groups of one generation batch after the other, in order.

    Raises:
        DataError: naming the files and the row, where a row cannot be used.
    """
    files = sorted((folder / "traces").glob("step-*.parquet"))
    check_columns(files)
    names = sorted({tuple(path.stem.split("-")[1::2]) for path in files})
    batches = zip(names, read_batches(folder, COLUMNS), strict=True)
    for number, ((step, part), rows) in enumerate(tqdm(batches, total=len(names), desc="traces", unit="batch")):
        where = f"{folder}/traces/step-{step}-*-{part}.parquet"
        found: dict[str, list[tuple[dict, RewardInputs | None]]] = {}
        for place, row in enumerate(rows):
            found.setdefault(row["example_id"], []).append(
                (row, checked_inputs(row, examples, f"{where}: row {place}"))
            )
        yield [
            Group(
                key=f"{step}/{part}/{question}",
                question=question,
                progress=number / len(names),
                traces=[row["trace"] for row, _ in members],
                tokens=[row["trace_tokens"] for row, _ in members],
                finished=[row["finished"] for row, _ in members],
                inputs=[x for _, x in members],
                unscored=[row["unscored"] for row, _ in members],
            )
            for question, members in found.items()
        ]


def check_columns(files: Sequence[Path]) -> None:
    """Raises DataError, naming file and column, where the traces are those of an older version."""
    for path in files[:1]:
        try:
            missing = [name for name in COLUMNS if name not in pq.read_schema(path).names]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); remove the file") from error
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}: traces of an older version; train the run again")


def checked_inputs(row: dict[str, Any], examples: Mapping[str, Example], where: str) -> RewardInputs | None:
    """`inputs_from_row`, whose errors name the row."""
    example = examples.get(row["example_id"])
    if example is None:
        raise DataError(f"{where}: questions.jsonl has no {row['example_id']!r}; put the run's own file back")
    try:
        return inputs_from_row(row, example)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} (step {row['step']}, {row['example_id']}): {error}; remove the file") from error


class GroupSample:
    """The `size` groups with the smallest hashes of seed and key: the same ones whatever the order; 0 keeps none."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.heap: list[tuple[int, str, Group]] = []

    def offer(self, group: Group) -> None:
        digest = hashlib.blake2b(f"{self.seed}/{group.key}".encode(), digest_size=8).digest()
        entry = (-int.from_bytes(digest), group.key, group)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        elif self.heap and entry > self.heap[0]:
            heapq.heapreplace(self.heap, entry)

    def groups(self) -> list[Group]:
        """Those kept, in the order of the run."""
        return [group for _, _, group in sorted(self.heap, key=lambda entry: (entry[2].progress, entry[1]))]


class Tally:
    """What is counted in rows."""

    def __init__(self) -> None:
        self.rows = self.groups = self.graded = self.correct = self.leaks = self.early_leaks = 0
        self.questions: set[str] = set()
        self.unscored: Counter[str] = Counter()

    def add(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.groups += 1
            self.questions.add(group.question)
            self.rows += len(group.inputs)
            for x, reason in zip(group.inputs, group.unscored, strict=True):
                if x is None:
                    why = generic(reason, group.question)
                    self.unscored[why if why in self.unscored or len(self.unscored) < 1000 else "other reasons"] += 1
                    continue
                self.graded += x.correct is not None
                self.correct += bool(x.correct)
                self.leaks += int(leak(x))
                self.early_leaks += int(early_leak(x))

    def as_dict(self) -> dict[str, Any]:
        scored = self.rows - self.unscored.total()
        leaks = {"leak_rate": self.leaks, "early_leak_rate": self.early_leaks}
        return {
            "questions": len(self.questions),
            "groups": self.groups,
            "rows": self.rows,
            "unscored": self.unscored.total(),
            "unscored_reasons": dict(self.unscored.most_common(5)),
            "accuracy": self.correct / self.graded if self.graded else None,
            **{name: count / scored if scored else None for name, count in leaks.items()},
        }


def generic(reason: str | None, question: str) -> str:
    """A reason without its question and numbers, so that reasons can be counted."""
    return re.sub("[0-9]+", "N", (reason or "no reason given").removeprefix(f"{question}: "))[:160]
