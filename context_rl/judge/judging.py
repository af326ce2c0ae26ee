"""What a run asks its judge: on held-out questions all that counts, on sampled traces what its reward needs."""

from collections.abc import Collection, Sequence

from context_rl.judge.asking import Judge, Row
from context_rl.judge.endpoint import PASSING, JudgeError
from context_rl.tasks.types import Example
from scorer.types import Unscored


class Judging:
    """A judge and its part in a run. A request costs money, so nothing is asked that nothing reads.

    Args:
        judge: None where nobody may be asked: whether a sampled trace's answer is right is then unknown.
        grades: the judge says which answers are right, and not the task's grader.
        in_training: what is asked about every sampled trace: "hard", "soft".
        max_unscored: share of failed verdicts above which an evaluation stops.
    """

    def __init__(
        self,
        judge: Judge | None,
        *,
        grades: bool = True,
        in_training: Collection[str] = (),
        max_unscored: float = 0.01,
    ):
        self.judge, self.grades, self.in_training, self.max_unscored = judge, grades, in_training, max_unscored
        self.asked = self.failed = 0

    def right(
        self, examples: Sequence[Example], answers: Sequence[str], training: bool
    ) -> Sequence[bool | Unscored | None]:
        """Does each answer say the same as the example's? None where sampled traces are not asked about.

        Raises:
            JudgeError: it cannot work at all; or an evaluation gets no verdict, or too few.
        """
        if training and "hard" not in self.in_training:
            return [None] * len(answers)
        found = self.judge.hard(rows_of(examples, answers))
        if not training:
            self._count([answer for answer in found if isinstance(answer, Unscored)], len(found))
        return found

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> Sequence[float | Unscored | None]:
        """How well each answer of a sampled trace agrees, in [0, 1]; None where that is not asked. Raises as above."""
        if "soft" not in self.in_training:
            return [None] * len(answers)
        return self.judge.soft(rows_of(examples, answers))

    def _count(self, failed: Sequence[Unscored], asked: int) -> None:
        """An evaluation is written down once and for all: one that lacks its verdicts must not be.

        A judge that is gone comes back, and a resumed run asks it again; rows it cannot judge stay so, and are borne.
        """
        self.asked, self.failed = self.asked + asked, self.failed + len(failed)
        gone = sum(one.fault in (*PASSING, "not_sent") for one in failed)
        too_many = gone > self.max_unscored * asked or self.failed > self.max_unscored * max(self.asked, 1000)
        if failed and (too_many or 1 < asked == len(failed)):
            raise JudgeError(
                f"{len(failed)} of {asked} answers got no verdict, and the evaluation stops (--max_unscored "
                f"{self.max_unscored}; what was judged is kept); the last reason: {failed[-1].reason}"
            )


def rows_of(examples: Sequence[Example], answers: Sequence[str]) -> list[Row]:
    """What the judge is shown: question, reference answer, and the reply without the space that the template needs."""
    return [(e.question, e.answer, answer.strip()) for e, answer in zip(examples, answers, strict=True)]
