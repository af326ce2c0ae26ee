"""Any task of reasoning-gym whose answer is one line, with its own grader."""

import dataclasses
import difflib
import os
import random
import re
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from context_rl.tasks.splits import HELD_OUT_SHARE, check, finish, question_key, text_position
from context_rl.tasks.types import DataError, Example, Task

STREAM_DISTANCE = 10_000_000
CHUNK = 500
"""Items made by one generator object. Some generators make all of theirs at once, so it cannot be the whole stream."""

GIVE_UP_AFTER = 2000
"""Draws in a row without a new question after which there are taken to be no more."""

HASH_ORDERED = frozenset(
    {"intermediate_integration", "isomorphic_strings", "knight_swap"}
    | {"polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Generators that iterate over sets: their items follow PYTHONHASHSEED, not only their seed (reasoning-gym 0.1.25)."""

UNREPEATABLE = frozenset({"codeio"})
"""Generators that give other items in every process, whatever the seeds (reasoning-gym 0.1.25)."""

EVALUATING = frozenset(
    {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"}
    | {"puzzle24", "simple_integration", "spiral_matrix", "string_insertion"}
)
"""Graders that run the answer as Python, by `eval` or SymPy's `parse_expr` (reasoning-gym 0.1.25): see `_is_tame`."""

FUNCTIONS = frozenset({"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt"})


def load(
    name: str, options: dict[str, Any] | None, *, train_size: int | None, eval_size: int | None, seed: int
) -> Task:
    """The reasoning-gym task `name` with `options` for its generator.

    A question is held out by its text, as in `symbolic`: neither seeds nor sizes can bring it into the training part,
    not even where a generator has only a few hundred different questions.

    Raises:
        DataError: unknown name or option, no sizes, answers that are no single line, or a grader that is of no use.
    """
    if train_size is None or eval_size is None:
        raise DataError(f"rg:{name} has no end; give --train_questions and --eval_questions")
    options = dict(options or {})
    _check_name_and_options(name, options)
    score_answer = _create(name, options, seed=0).score_answer

    def grade(text: str, example: Example) -> bool:
        text = text.strip()
        if name in EVALUATING and text != example.answer and not _is_tame(text):
            return False
        try:
            return score_answer(text, example.entry) == 1.0
        except Exception:  # many graders parse the text without a guard; what they cannot parse is no right answer
            return False

    def part(held_out: bool, size: int) -> list[Example]:
        stream = _questions(name, options, 0 if held_out else seed + 1, held_out)
        return [check(example, grade, example.id) for example in islice(stream, size)]

    train, held = part(False, train_size), part(True, eval_size)
    for part_name, examples, size in (("training", train, train_size), ("held-out", held, eval_size)):
        if size and not examples:
            raise DataError(f"rg:{name} has too few different questions for a {part_name} part; change its options")
    for example in (train + held)[:1]:
        if grade("no answer at all", example):
            raise DataError(f"rg:{name} cannot be used: its grader takes any text for right")
    return finish(Task(f"rg:{name}", train, held, grade), train_size, eval_size)


def _is_tame(text: str) -> bool:
    """Whether a model's line may be evaluated: no call but of mathematics, no attribute, no tower of powers."""
    calls = set(re.findall(r"([A-Za-z_]\w+)\s*\(", text))
    tower = re.search(r"(\*\*|\^)\s*[-+\w.()]+\s*(\*\*|\^)|(\*\*|\^)\s*[-+(]*\d{4}", text)
    return calls <= FUNCTIONS and not tower and not re.search(r"__|\.\s*[A-Za-z_]|\blambda\b|!", text)


def _check_name_and_options(name: str, options: dict[str, Any]) -> None:
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.5)
        hint = f"did you mean {' or '.join('rg:' + c for c in close)}?" if close else "see its list of data sets"
        raise DataError(f"reasoning-gym has no task {name!r}; {hint}")
    if name in UNREPEATABLE:
        raise DataError(f"rg:{name} cannot be used: it makes other questions in every run, whatever the seed")
    if name in HASH_ORDERED and os.environ.get("PYTHONHASHSEED") in (None, "", "random"):
        raise DataError(
            f"rg:{name} makes other questions in every run unless PYTHONHASHSEED is fixed; set PYTHONHASHSEED=0"
        )
    known = sorted({f.name for f in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"})
    wrong = sorted(set(options) - set(known))
    if wrong:
        raise DataError(f"rg:{name} has no option {', '.join(map(repr, wrong))}; it has {', '.join(known)}")


def _create(name: str, options: dict[str, Any], seed: int) -> ProceduralDataset:
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=CHUNK, **options)
    except Exception as error:
        raise DataError(f"rg:{name} does not take these task_options: {' '.join(str(error).split())[:200]}") from error


def _questions(name: str, options: dict[str, Any], stream: int, held_out: bool) -> Iterator[Example]:
    """The distinct questions of one stream that are on one side of the split."""
    part = "test" if held_out else f"train/{stream - 1}"
    seen: set[str] = set()
    since_new = 0
    for index, item in _items(lambda seed: _create(name, options, seed), stream * STREAM_DISTANCE):
        question = item["question"].strip()
        key = question_key(question)
        since_new += 1
        if since_new > GIVE_UP_AFTER:
            return
        if key in seen or (text_position(question) < HELD_OUT_SHARE) != held_out:
            continue
        seen.add(key)
        since_new = 0
        yield Example(f"rg:{name}/{part}/{index}", question, _answer(name, item), entry=item)


def _items(create: Callable[[int], Any], first_seed: int) -> Iterator[tuple[int, dict]]:
    """(place in the stream, item). Item i of a generator with seed s comes from Random(s + i), hence the chunks."""
    for start in count(0, CHUNK):
        source = create(first_seed + start)
        for i in range(CHUNK):
            # Some generators also draw from Python's global source of randomness, which nobody else has seeded.
            state = random.getstate()
            random.seed(first_seed + start + i)
            try:
                item = source[i]
            finally:
                random.setstate(state)
            yield start + i, item


def _answer(name: str, item: dict) -> str:
    answer = item["answer"].strip() if isinstance(item["answer"], str) else item["answer"]
    if not isinstance(answer, str) or len(answer.splitlines()) != 1:
        shown = repr(answer)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise DataError(f"rg:{name} has no one-line answer to score (one of its answers is {shown}); use another task")
    return answer
