"""The embedded default task: leg-counting word problems from reasoning-gym, offline and unlimited.

"How many legs are there in total if you have 3 spiders, 12 deers?" needs one lookup and one product an animal and
then a sum: too much for the tiny base model in one step, easy for it when the parts are written out. Questions are
about 25 tokens, worked solutions about 30, which is what lets the whole experiment run on a laptop's CPU.
"""

import hashlib
from collections.abc import Iterator

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

HELD_OUT_SHARE = 0.05
"""Share of all possible questions that neither pre-training nor RL ever sees (see `is_held_out`)."""


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
    """The gold trace: legs of each kind with a running total, e.g. '3 birds have 6 legs. 2 cats have 8 legs, 14 so far.'"""
    parts, total = [], 0
    for animal, count in animals.items():
        legs = count * ANIMALS[animal]
        total += legs
        verb = "have" if count > 1 else "has"
        so_far = f", {total} so far" if parts else ""
        parts.append(f"{count} {plural(animal, count)} {verb} {legs} legs{so_far}.")
    return " ".join(parts)
