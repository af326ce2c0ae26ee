"""What the tiny models read: problems with their kinds of trace, documents, and each model's mixture.

- The **base model** sees questions with no trace, with good, partial, useless and misleading traces, always followed by
  the right answer. So it answers badly on its own and well from a good trace; a few traces with a slip in them teach it
  not to trust one blindly.
- The **context model** never sees an answer. It first learns to write full solutions, then a mixture of traces most of
  which are useless: RL has behaviour to select. One that only knew full solutions would leave RL nothing to do.
- The **judge** of the dialogues sees a question, a reference and a reply in its chat template, and answers by the rule
  of `leg_talk.share_right`.

Questions held out by `symbolic.is_held_out` are in no model's text.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from context_rl import prompts
from context_rl.tasks import leg_talk, symbolic

EOS = "<|endoftext|>"


# --- problems ---


@dataclass(frozen=True)
class Problem:
    """A question with its answer, a full solution, and the unhelpful things one could write in its place."""

    question: str
    answer: str
    traces: dict[str, str]


def leg_counting(seed: int) -> Iterator[Problem]:
    """The default task with its kinds of trace; held-out questions left out."""
    rng = random.Random(seed)
    for question, answer, animals in symbolic.problems(seed):
        if not symbolic.is_held_out(question):
            traces = leg_traces(symbolic.worked_solution(animals), int(answer), animals, rng)
            yield Problem(question, answer, traces)


def dialogue(seed: int) -> Iterator[Problem]:
    """Dialogues about legs with free-form replies, with the same kinds of trace; none about a held-out problem."""
    rng = random.Random(seed)
    for talk in leg_talk.talks(seed, held_out=False):
        yield Problem(talk.question, talk.reply, leg_traces(talk.solution, talk.total, talk.animals, rng))


def leg_traces(solution: str, total: int, animals: dict[str, int], rng: random.Random) -> dict[str, str]:
    """Kind -> trace."""
    sentences = solution.split(". ")
    names = [symbolic.plural(animal, 2) for animal in animals]
    wrong = max(0, total + rng.choice([-1, 1]) * rng.randint(3, 30))
    return {
        "solution": solution,
        "truncated": ". ".join(sentences[: rng.randint(1, len(sentences) - 1)]) + ".",
        "facts": " ".join(f"A {animal} has {ANIMALS[animal]} legs." for animal in animals),
        "restatement": "The question asks how many legs there are in total.",
        "listing": f"There are {len(names)} kinds of animals: {', '.join(names)}.",
        "guess": f"It must be about {wrong}.",
        "slip": slip(solution, rng),
    }


def judgements(seed: int) -> Iterator[Problem]:
    """What the judge is asked about a reply, hard or soft, and what it should say; none about a held-out problem."""
    rng = random.Random(seed)
    for talk in leg_talk.talks(seed, held_out=False):
        yield judgement(talk, rng)


def judgement(talk: leg_talk.Talk, rng: random.Random) -> Problem:
    """One question to the judge: the reply is right in another wording, wrong in one fact or two, or cut short."""
    kind = rng.choices(["right", "total", "most", "both", "cut"], [40, 25, 15, 12, 8])[0]
    total, most = talk.total, talk.most
    if kind in ("total", "both"):
        total = wrong_number(total, rng)
    if kind in ("most", "both"):
        others = [animal for animal in (talk.animals if rng.random() < 0.7 else ANIMALS)]
        most = rng.choice([name for name in (symbolic.plural(animal, 2) for animal in others) if name != talk.most])
    reply = leg_talk.say(rng, total, most)
    if kind == "cut":
        words = reply.split()
        reply = " ".join(words[: rng.randint(1, len(words) - 1)])
    share = leg_talk.share_right(reply, talk.total, talk.most)
    how = rng.choice(["hard", "soft"])
    verdict = ("yes" if share == 1 else "no") if how == "hard" else str(round(10 * share))
    return Problem(prompts.judge_messages(how, talk.question, talk.reply, reply)[0]["content"], verdict, {})


def wrong_number(number: int, rng: random.Random) -> int:
    """Another number: near it, of other digits in one place, or any."""
    digits = list(str(number))
    digits[rng.randrange(len(digits))] = rng.choice("0123456789")
    other = rng.choice([number + rng.choice([-1, 1]) * rng.randint(1, 12), int("".join(digits)), rng.randint(0, 400)])
    return other if other >= 0 and other != number else number + 2


def slip(solution: str, rng: random.Random) -> str:
    """The solution with one digit of one number changed."""
    places = [i for i, character in enumerate(solution) if character.isdigit()]
    if not places:
        return solution
    place = rng.choice(places)
    other = rng.choice([digit for digit in "0123456789" if digit != solution[place]])
    return solution[:place] + other + solution[place + 1 :]


def gsm_symbolic(seed: int) -> Iterator[Problem]:
    """reasoning-gym's GSM8K-style word problems: longer and harder, so that the models have seen more than one task."""
    rng = random.Random(seed)
    ending = " Give the result as your final answer. Do not include units."
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=seed * 10_000_000, size=10_000_000):
        question = item["question"].removesuffix(ending).strip()
        solution = item["metadata"]["answer_cot"].rpartition("####")[0].strip()
        if not solution:
            continue
        lines = solution.split("\n")
        asked = question.rstrip("?.").rpartition(". ")[2]
        given = question.partition(". ")[0]
        wrong = max(0, round(float(item["answer"])) + rng.choice([-1, 1]) * rng.randint(3, 30))
        yield Problem(
            question,
            item["answer"],
            {
                "solution": solution,
                "truncated": "\n".join(lines[: max(1, len(lines) // 2)])
                if len(lines) > 1
                else solution[: len(solution) // 2],
                "facts": f"Given: {given}.",
                "restatement": f"The question asks: {asked}?",
                "listing": "This is a word problem about numbers.",
                "guess": f"It must be about {wrong}.",
                "slip": slip(solution, rng),
            },
        )


SOURCES: dict[str, Callable[[int], Iterator[Problem]]] = {
    "leg_counting": leg_counting,
    "gsm_symbolic": gsm_symbolic,
    "dialogue": dialogue,
    "judgements": judgements,
}


# --- documents ---


def base_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the base model; kind "none" is the question and its answer alone."""
    trace = problem.traces.get(kind)
    prompt = prompts.base_prefix(problem.question, None) if kind == "none" else prompts.trace_text(problem.question)
    full = prompts.base_prefix(problem.question, trace) + prompts.answer_text(problem.answer) + EOS
    return prompt, full.removeprefix(prompt)


def context_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the context model: a trace, never an answer."""
    return prompts.trace_text(problem.question), f" {problem.traces[kind]}{EOS}"


def judge_document(problem: Problem, kind: str) -> tuple[str, str]:
    """(text without loss, text with loss) for the judge: its chat template and its verdict."""
    return JUDGE_PROMPT.format(content=problem.question), f" {problem.answer}{EOS}"


JUDGE_PROMPT = "user: {content}\nassistant:"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Writes one user message as `JUDGE_PROMPT` does."""


def write_documents(
    source: str, seed: int, count: int, document: Callable[[Problem, str], tuple[str, str]], kinds: dict[str, float]
) -> list[tuple[str, str]]:
    """`count` documents of one source with kinds drawn by their shares."""
    rng = random.Random(seed)
    drawn = rng.choices(list(kinds), list(kinds.values()), k=count)
    return [document(problem, kind) for problem, kind in zip(SOURCES[source](seed), drawn, strict=False)]


# --- mixtures ---


@dataclass(frozen=True)
class Reading:
    """What a model reads.

    Attributes:
        document: (problem, kind of trace) -> (text without loss, text with loss).
        phases: (share of the documents, shares of each kind of trace among them), one after the other.
        sources: name in `SOURCES` -> documents.
        seed: of the models in `models/`, of text and weights.
    """

    document: Callable[[Problem, str], tuple[str, str]]
    phases: tuple[tuple[float, dict[str, float]], ...]
    sources: dict[str, int]
    vocab_size: int
    chat_template: str | None = None
    seed: int = 1


BASE_KINDS = {
    "none": 0.25, "solution": 0.32, "slip": 0.04, "truncated": 0.11, "facts": 0.10,
    "restatement": 0.06, "listing": 0.06, "guess": 0.06,
}  # fmt: skip
# A restatement is the likeliest opening, so that greedy decoding does not find the solutions before RL does.
CONTEXT_KINDS = {
    "solution": 0.15, "truncated": 0.10, "facts": 0.15, "restatement": 0.32, "listing": 0.15, "guess": 0.13,
}  # fmt: skip
FOR_A_BASE = ((1.0, BASE_KINDS),)
FOR_A_CONTEXT = ((0.5, {"solution": 1.0}), (0.5, CONTEXT_KINDS))

MATHEMATICS = {"leg_counting": 2_400_000, "gsm_symbolic": 300_000}
READINGS = {
    "base": Reading(base_document, FOR_A_BASE, MATHEMATICS, 2048),
    "context": Reading(context_document, FOR_A_CONTEXT, MATHEMATICS, 1024),
    "dialogue base": Reading(base_document, FOR_A_BASE, {"dialogue": 1_500_000}, 1024),
    "dialogue context": Reading(context_document, FOR_A_CONTEXT, {"dialogue": 1_500_000}, 1024),
    "judge": Reading(judge_document, ((1.0, {"": 1.0}),), {"judgements": 2_500_000}, 1024, CHAT_TEMPLATE, seed=3),
}
