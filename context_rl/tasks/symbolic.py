"""The embedded default task: leg-counting word problems from reasoning-gym, offline and unlimited.

"How many legs are there in total if you have 3 spiders, 12 deers?" needs one lookup and one product an animal and
then a sum: too much for the tiny base model in one step, easy for it when the parts are written out. Questions are
about 25 tokens, worked solutions about 30, which is what lets the whole experiment run on a laptop's CPU.
"""

import hashlib
from collections.abc import Iterator

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from context_rl.tasks.grading import grade_number
from context_rl.tasks.splits import check, finish
from context_rl.tasks.types import DataError, Example, Task

HELD_OUT_SHARE = 0.05
"""Share of all possible questions that neither pre-training nor RL ever sees (see `is_held_out`)."""

HELD_OUT_STREAM = 1
"""Stream that every run takes its held-out questions from, whatever its own seed."""


def is_held_out(question: str) -> bool:
    """True for the fixed 5 % of questions kept for evaluation.

    The split is a property of the text, not of a seed: reasoning-gym draws item i of seed s from Random(s + i), so two
    data sets with neighbouring seeds share nearly all of their items, and a split by seed would train on the test set.
    """
    first_bytes = hashlib.sha256(question.encode()).digest()[:4]
    return int.from_bytes(first_bytes, "big") < HELD_OUT_SHARE * 2**32


def problems(seed: int, animals: tuple[int, int] = (2, 4)) -> Iterator[tuple[str, str, dict[str, int]]]:
    """Endless (question, answer, {animal: count}), held-out ones included; the same stream for the same seed.

    Args:
        seed: start of the stream; streams are 10 million items apart, so those of different seeds do not overlap.
        animals: fewest and most kinds of animal in a question.
    """
    apart = 10_000_000
    source = reasoning_gym.create_dataset(
        "leg_counting", seed=seed * apart, size=apart, min_animals=animals[0], max_animals=animals[1]
    )
    for item in source:
        # The generator's preamble is the same for every item; its last sentence is the whole question.
        question = "How" + item["question"].strip().rpartition("Now, how")[2]
        yield question, item["answer"], item["metadata"]["animals"]


def plural(animal: str, count: int) -> str:
    """The generator's own plural: an s, also where English would not have one."""
    return animal + ("s" if count > 1 else "")


def worked_solution(animals: dict[str, int]) -> str:
    """The gold trace: legs of each kind, running total, e.g. '3 birds have 6 legs. 2 cats have 8 legs, 14 so far.'"""
    parts, total = [], 0
    for animal, count in animals.items():
        legs = count * ANIMALS[animal]
        total += legs
        verb = "have" if count > 1 else "has"
        so_far = f", {total} so far" if parts else ""
        parts.append(f"{count} {plural(animal, count)} {verb} {legs} legs{so_far}.")
    return " ".join(parts)


def load(*, train_size: int | None, eval_size: int | None, seed: int) -> Task:
    """Distinct questions with gold solutions; the held-out ones are the same for every seed.

    Raises:
        DataError: no sizes were given, and the task has no end.
    """
    if train_size is None or eval_size is None:
        raise DataError("the task 'symbolic' has no end; give --train_questions and --eval_questions")
    train = _examples(seed, train_size, False, f"symbolic/train/{seed}")
    held_out = _examples(HELD_OUT_STREAM, eval_size, True, "symbolic/test")
    return finish(Task("symbolic", train, held_out, grade_number), train_size, eval_size)


def _examples(stream: int, size: int, held_out: bool, prefix: str) -> list[Example]:
    examples: dict[str, Example] = {}
    if size == 0:
        return []
    for question, answer, animals in problems(stream):
        if is_held_out(question) == held_out and question not in examples:
            example = Example(f"{prefix}/{len(examples)}", question, answer, solution=worked_solution(animals))
            examples[question] = check(example, grade_number, example.id)
            if len(examples) == size:
                break
    return list(examples.values())
