"""What a run asks its judge: on held-out questions all that counts, on sampled traces what its reward needs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from context_rl.judge.asking import BY_JUDGE, Judge, Row
from context_rl.judge.endpoint import JudgeError
from context_rl.tasks.types import Example
from scorer.types import Unscored


class Judging:
    """A judge and its part in a run. A request costs money, so nothing is asked that nothing reads.

    Args:
        judge: None where nobody may be asked: whether a sampled trace's answer is right is then unknown.
        grades: the judge says which answers are right, and not the task's grader.
        in_training: what is asked about every sampled trace: "hard", "soft".
    """

    def __init__(self, judge: Judge | None, *, grades: bool = True, in_training: Collection[str] = ()):
        self.judge, self.grades, self.in_training = judge, grades, in_training

    def right(
        self, examples: Sequence[Example], answers: Sequence[str], training: bool
    ) -> Sequence[bool | Unscored | None]:
        """Does each answer say the same as the example's? None where sampled traces are not asked about.

        Raises:
            JudgeError: it cannot work at all.
        """
        if training and "hard" not in self.in_training:
            return [None] * len(answers)
        return self.judge.hard(rows_of(examples, answers))

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> Sequence[float | Unscored | None]:
        """How well each answer of a sampled trace agrees, in [0, 1]; None where that is not asked. Raises as above."""
        if "soft" not in self.in_training:
            return [None] * len(answers)
        return self.judge.soft(rows_of(examples, answers))


def check_verdicts(rows: Sequence[Mapping[str, Any]], max_unscored: float) -> None:
    """Raises JudgeError where rows of an evaluation lack too many verdicts to be written down once and for all.

    Too many are all of them, or more than one and than `max_unscored` of them: some replies no judge can judge.
    """
    failed = [row["unscored"] for row in rows if (row.get("unscored") or "").startswith(BY_JUDGE)]
    if failed and (len(failed) == len(rows) or len(failed) > max(1, max_unscored * len(rows))):
        raise JudgeError(
            f"{len(failed)} of {len(rows)} answers got no verdict, and the evaluation stops (--max_unscored "
            f"{max_unscored}; what was judged is kept); the last reason: {failed[-1]}"
        )


def rows_of(examples: Sequence[Example], answers: Sequence[str]) -> list[Row]:
    """What the judge is shown: question, reference answer, and the reply without the space that the template needs."""
    return [(e.question, e.answer, answer.strip()) for e, answer in zip(examples, answers, strict=True)]
