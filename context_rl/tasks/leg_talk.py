"""Made-up dialogues with free-form replies, the embedded data of the task `dialogue`. Made here, offline.

    User: I was at the farm today.
    Assistant: What did you see?
    User: 3 spiders, 1 bird and 12 deers. How many legs is that, and which of them have the most?

A reply says two things, the total and whose legs are the most, in one of several wordings that nothing in the question
tells: to the frozen model even a perfect trace leaves the wording open. What the reply says is known, so that a judge
of free-form replies can be judged itself (`same_facts`).
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from context_rl.tasks import symbolic
from context_rl.tasks.types import Example

KINDS = frozenset(symbolic.plural(animal, 2) for animal in ANIMALS)
OPENINGS = ("I was at the farm today.", "Guess what I saw in the woods!", "I am drawing a picture.", "We play zoo.")
PROMPTINGS = ("What did you see?", "Tell me more.", "Oh, with which animals?", "How nice! Go on.")
ASKED = (
    "How many legs is that, and which of them have the most?",
    "How many legs are there, and whose are the most?",
    "Count the legs, please, and say which animals have the most.",
)
REPLIES = (
    "That makes {total} legs, and the {most} have the most.",
    "{total} legs in all, most of them those of the {most}.",
    "There are {total} legs. The {most} have more than the others.",
    "I count {total} legs; the most are on the {most}.",
)
"""Each names the total first and then one kind of animal."""


@dataclass(frozen=True)
class Talk:
    """A dialogue with what is true in it.

    Attributes:
        animals: kind -> how many.
        total: legs in all.
        most: the kind with the most legs, in the plural.
    """

    question: str
    reply: str
    animals: dict[str, int]
    total: int
    most: str

    @property
    def solution(self) -> str:
        """The gold trace."""
        return f"{symbolic.worked_solution(self.animals)} Most: {self.most}."


def talks(seed: int, held_out: bool) -> Iterator[Talk]:
    """Endless dialogues; those about held-out leg problems, or those about the others (`symbolic.is_held_out`)."""
    rng = random.Random(seed)
    for problem, answer, animals in symbolic.problems(seed, animals=(3, 4)):
        legs = sorted((count * ANIMALS[animal], animal) for animal, count in animals.items())
        if symbolic.is_held_out(problem) != held_out or legs[-1][0] == legs[-2][0]:
            continue
        counted = [f"{count} {symbolic.plural(animal, count)}" for animal, count in animals.items()]
        seen = f"{', '.join(counted[:-1])} and {counted[-1]}"
        turns = (rng.choice(OPENINGS), rng.choice(PROMPTINGS), f"{seen}. {rng.choice(ASKED)}")
        question = "\n".join(f"{who}: {text}" for who, text in zip(("User", "Assistant", "User"), turns, strict=True))
        most = symbolic.plural(legs[-1][1], 2)
        yield Talk(question, say(rng, int(answer), most), animals, int(answer), most)


def say(rng: random.Random, total: int, most: str) -> str:
    """A reply that states these two things, in a wording of its own."""
    return rng.choice(REPLIES).format(total=total, most=most)


def facts(reply: str) -> tuple[int | None, str | None]:
    """(The total, the animals with the most legs) as a reply states them; None for what it says not at all or twice."""
    numbers, words = set(re.findall(r"\d+", reply)), set(re.findall(r"[a-z]+", reply.lower()))
    named = {kind for kind in KINDS if set(kind.split()) <= words}
    return (int(numbers.pop()) if len(numbers) == 1 else None), (named.pop() if len(named) == 1 else None)


def share_right(reply: str, total: int, most: str) -> float:
    """Which share of the two facts a reply has right: 0, 0.5 or 1."""
    said = facts(reply)
    return ((said[0] == total) + (said[1] == most)) / 2


def same_facts(reply: str, example: Example) -> bool:
    """Does a reply say what the reference says? The rule that a judge stands in for."""
    total, most = facts(example.answer)
    return total is not None and most is not None and share_right(reply, total, most) == 1


def examples(seed: int, size: int, held_out: bool, prefix: str) -> list[Example]:
    """`size` different dialogues, those that are held out the same for every run."""
    found: dict[str, Example] = {}
    for talk in talks(seed, held_out):
        if len(found) == size:
            break
        if talk.question not in found:
            found[talk.question] = Example(f"{prefix}/{len(found)}", talk.question, talk.reply, solution=talk.solution)
    return list(found.values())
