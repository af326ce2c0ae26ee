"""The evaluation that every run does at its two ends: help against no help on the held-out questions.

In the middle of training a few of these questions get traces too, for whoever wants to read what has changed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl import GRPOTrainer

from context_rl import runs
from context_rl.experiment import Experiment
from context_rl.judge import check_verdicts
from context_rl.rollout import stop_strings
from context_rl.tasks import Example
from context_rl.training import trace_prompt
from eval.conditions import DECODINGS, evaluate_condition, fixed, generate_traces, shuffle_between_questions
from eval.metrics import paired_difference, summarise

WATCHED = 8


class BeforeAfter:
    """The conditions of one run, each written to eval/ when it is done and read back from there on resume."""

    def __init__(self, experiment: Experiment, trainer: GRPOTrainer, folder: Path):
        self.experiment, self.trainer, self.folder = experiment, trainer, folder
        self.rows: dict[str, dict[str, list[dict]]] = {}

    def run(self, condition: str) -> None:
        """Fills `rows[condition][decoding]`. Every process takes every n-th question; all get all rows."""
        path = self.path(condition)
        if path.exists():
            rows = runs.read_jsonl(path)
        else:
            rows = self.evaluated(condition)
            check_verdicts(rows, self.experiment.config.max_unscored)
            if self.experiment.args.process_index == 0:
                runs.write_jsonl(path, rows)
        self.rows[condition] = {d: [row for row in rows if row["decoding"] == d] for d in DECODINGS}

    def evaluated(self, condition: str) -> list[dict]:
        """The rows of a condition, both decodings."""
        examples = self.experiment.task.held_out
        if condition == "none":
            # There is no trace to decode: both decodings are one evaluation.
            once = self.score(condition, "greedy", examples, [None] * len(examples))
            return [{**row, "decoding": decoding} for decoding in DECODINGS for row in once]
        return [row for d in DECODINGS for row in self.score(condition, d, examples, self.traces(condition, d))]

    def path(self, condition: str) -> Path:
        """Where the rows of a condition lie."""
        return self.folder / "eval" / f"{self.experiment.task.name.replace(':', '-')}.{condition}.jsonl"

    def watch(self) -> None:
        """Writes what the model of this moment writes, greedily, about a few fixed questions: condition "halfway".

        Nobody compares these rows, so verdicts that fail are no reason to stop the training.
        """
        by_id = {example.id: example for example in self.experiment.task.held_out}
        examples = [by_id[i] for i in fixed(by_id, WATCHED)]
        rows = self.score("halfway", "greedy", examples, self.written(examples, "halfway", "greedy"))
        if self.experiment.args.process_index == 0:
            runs.write_jsonl(self.path("halfway"), rows)

    def traces(self, condition: str, decoding: str) -> list[str]:
        """What stands in the trace's place, one a held-out question."""
        if condition == "shuffled":
            return shuffle_between_questions([row["trace"] for row in self.rows["trained"][decoding]])
        return self.written(self.experiment.task.held_out, condition, decoding)

    def written(self, examples: Sequence[Example], condition: str, decoding: str) -> list[str]:
        """q's traces as it is now."""
        experiment = self.experiment
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)

        def generate(part: Sequence[Example]) -> list[str]:
            with self.trainer.accelerator.autocast():
                return generate_traces(
                    model,
                    experiment.tokenizer,
                    [trace_prompt(experiment.config, example) for example in part],
                    sample=decoding == "sampled",
                    max_new_tokens=experiment.args.max_completion_length,
                    stops=stop_strings(experiment.config),
                    seed=experiment.args.seed,
                    description=f"{condition} traces, {decoding}",
                )

        return self.share(generate, examples)

    def score(
        self, condition: str, decoding: str, examples: Sequence[Example], traces: Sequence[str | None]
    ) -> list[dict]:
        """The base model's reading of the questions with these traces."""

        def evaluate(part: Sequence[tuple[Example, str | None]]) -> list[dict]:
            ids, chosen = [example.id for example, _ in part], [trace for _, trace in part]
            description = f"scoring {condition}, {decoding}"
            return evaluate_condition(self.experiment.questions, ids, chosen, decoding, description)

        return self.share(evaluate, list(zip(examples, traces, strict=True)))

    def share(self, work: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
        """work(items), done in shares by all processes and put back in order."""
        mine = range(self.experiment.args.process_index, len(items), self.experiment.args.world_size)
        done = gather_object(list(zip(mine, work([items[i] for i in mine]), strict=True)))
        return [value for _, value in sorted(done, key=lambda pair: pair[0])]

    def summary(self) -> dict[str, dict[str, dict]]:
        return {c: {d: summarise(rows) for d, rows in by.items()} for c, by in self.rows.items()}

    def differences(self) -> dict[str, dict]:
        """Paired differences in accuracy at T = 1; empty where the run did not evaluate."""
        if "trained" not in self.rows:
            return {}
        trained = self.rows["trained"]["sampled"]
        return {
            f"trained_minus_{other}": paired_difference(trained, self.rows[other]["sampled"], "correct")
            for other in ("untrained", "none", "shuffled")
        }


class Halfway(TrainerCallback):
    """Calls `BeforeAfter.watch` after half of the steps."""

    def __init__(self, before_after: BeforeAfter):
        self.before_after = before_after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps // 2:
            self.before_after.watch()
