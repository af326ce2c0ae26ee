"""The loop: examples -> TRL data set -> the one reward function -> GRPOTrainer, which is used as it is.

One call of `LikelihoodReward` does what the method says: read the traces that q sampled, ask the frozen base model how
likely the right answer is after each of them, turn that into every reward, hand the chosen one to GRPO, and write all
of it down.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from context_rl import prompts, runs
from context_rl.config import ConfigError, ContextConfig
from context_rl.questions import Questions
from context_rl.rewards import REWARDS, RewardError, RewardInputs, all_rewards, grpo_advantages, make_reward
from context_rl.rollout import rollout_with_stops, stop_strings
from context_rl.tasks import DataError, Example, Task
from context_rl.tasks.grading import as_number
from scorer.types import Score, Unscored, Usage

TRACE_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("example_id", pa.string()),
        ("trace", pa.string()),
        ("trace_tokens", pa.int64()),
        ("token_logprobs", pa.list_(pa.float64())),
        ("baseline_logprobs", pa.list_(pa.float64())),
        ("base_answer", pa.string()),
        ("correct", pa.bool_()),
        ("unscored", pa.string()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        *((f"rewards/{name}", pa.float64()) for name in REWARDS),
    ]
)
"""A row of traces/: one sampled trace. Log-probs are nats, one a token of the answer; `unscored` says why there are
none; `reward` is the formula that trained, with its parameters; `rewards/*` are all formulas with their defaults."""


class StopRun(RuntimeError):
    """The run cannot go on in earnest: too many traces could not be scored."""


# --- the one reward function ---


@dataclass(frozen=True)
class JudgedTrace:
    """One sampled trace and all that is known of it; without a score there is a reason, and no reward."""

    example_id: str
    trace: str
    tokens: int
    base_answer: str | None = None
    inputs: RewardInputs | None = None
    reward: float | None = None
    components: dict[str, float | None] = field(default_factory=dict)
    unscored: str | None = None

    def as_table_row(self, step: int, advantage: float) -> dict[str, Any]:
        """A row of traces/, see `TRACE_SCHEMA`."""
        return {
            "step": step,
            "example_id": self.example_id,
            "trace": self.trace,
            "trace_tokens": self.tokens,
            "token_logprobs": self.inputs and list(self.inputs.token_logprobs),
            "baseline_logprobs": self.inputs and list(self.inputs.baseline_logprobs),
            "base_answer": self.base_answer,
            "correct": self.inputs and self.inputs.correct,
            "unscored": self.unscored,
            "reward": self.reward,
            "advantage": advantage,
            **{f"rewards/{name}": value for name, value in self.components.items()},
        }


class LikelihoodReward:
    """GRPO's reward: scores the sampled traces, trains on one formula, logs them all.

    Called by GRPOTrainer with the rows of this process, each question's traces side by side. Returns one float a row,
    or None for a row that could not be scored: TRL gives it no advantage, and it is counted here.

    Args:
        folder: the run folder; None writes nothing (benchmarks).

    Raises:
        StopRun: when more than `config.max_unscored` of all traces so far (of at least 1,000) went unscored.
    """

    __name__ = "reward"

    def __init__(
        self,
        questions: Questions,
        config: ContextConfig,
        args: GRPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path | None,
    ):
        self.questions, self.config, self.args = questions, config, args
        self.tokenizer, self.folder = tokenizer, folder
        self.formula = make_reward(config.reward, config.reward_params)
        self.stops = stop_strings(config)
        self.seen = self.unscored = 0
        self.seconds, self.usage = 0.0, Usage()
        self.batch_of_step = (-1, -1)

    def __call__(
        self,
        *,
        completion_ids: list[list[int]],
        example_id: list[str],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        began = time.perf_counter()
        traces = [self.trace(ids) for ids in completion_ids]
        self.questions.scorer.take_usage()  # what an evaluation in between has counted is not this call's
        baselines = self.questions.ask_baselines(example_id)
        scores = self.questions.ask(example_id, traces)
        seconds = time.perf_counter() - began
        self.seconds += seconds

        rows = [
            self.judge(*row)
            for row in zip(example_id, traces, map(len, completion_ids), scores, baselines, strict=True)
        ]
        log_metric("time/scoring", seconds)
        usage = self.questions.scorer.take_usage()
        self.usage.add(usage)
        for name, value in usage.metrics().items():
            log_metric(f"scoring/{name}", value)
        self.log(rows, log_metric)
        self.write(rows, trainer_state.global_step + 1)
        self.count(rows)
        return [row.reward for row in rows]

    def trace(self, completion_ids: Sequence[int]) -> str:
        """The text of a trace, from the ids that were sampled."""
        return prompts.parse_trace(self.tokenizer.decode(completion_ids, skip_special_tokens=True), self.stops)

    def judge(
        self, example_id: str, trace: str, tokens: int, score: Score | Unscored, baseline: Score | Unscored
    ) -> JudgedTrace:
        """Every reward of one trace, or the reason why it has none."""
        for result in (score, baseline):
            if isinstance(result, Unscored):
                return JudgedTrace(example_id, trace, tokens, unscored=result.reason)
        inputs = RewardInputs(
            token_logprobs=score.token_logprobs,
            baseline_logprobs=baseline.token_logprobs,
            correct=self.questions.is_correct(example_id, score),
            answered_number=as_number(score.greedy_text or ""),
            gold_number=as_number(self.questions.by_id[example_id].example.answer),
        )
        return JudgedTrace(
            example_id, trace, tokens, score.greedy_text, inputs, self.formula(inputs), all_rewards(inputs)
        )

    def log(self, rows: Sequence[JudgedTrace], log_metric: Callable[[str, float], None]) -> None:
        """Means over the scored rows: every formula, accuracy, and how often the trace made the answer likelier."""
        scored = [row for row in rows if row.inputs is not None]
        for name in REWARDS:
            values = [row.components[name] for row in scored if row.components[name] is not None]
            if values:
                log_metric(f"rewards/{name}", math.fsum(values) / len(values))
        if scored:
            log_metric("accuracy", sum(row.inputs.correct for row in scored) / len(scored))
            log_metric("help_rate", sum(row.components["gain"] > 0 for row in scored) / len(scored))
        log_metric("unscored", (len(rows) - len(scored)) / len(rows))
        log_metric("trace_tokens", sum(row.tokens for row in rows) / len(rows))

    def write(self, rows: Sequence[JudgedTrace], step: int) -> None:
        """The rows of this process into the run's Parquet, with the advantages that GRPO derives from the rewards."""
        # A group may lie across processes, so advantages need everybody's rewards, in TRL's order.
        everyone = gather_object([row.reward for row in rows])
        advantages = grpo_advantages(everyone, self.args.num_generations, str(self.args.scale_rewards))
        if self.folder is None:
            return
        first = self.args.process_index * len(rows)
        mine = advantages[first : first + len(rows)]
        # With several generation batches in a step (gradient accumulation), each is a file of its own.
        self.batch_of_step = (step, self.batch_of_step[1] + 1 if self.batch_of_step[0] == step else 0)
        table = [row.as_table_row(step, advantage) for row, advantage in zip(rows, mine, strict=True)]
        runs.write_traces(self.folder, step, self.args.process_index, self.batch_of_step[1], table, TRACE_SCHEMA)

    def count(self, rows: Sequence[JudgedTrace]) -> None:
        """Stops the run when too many went unscored; the message carries the last reason."""
        reasons = [row.unscored for row in rows if row.unscored is not None]
        self.seen += len(rows)
        self.unscored += len(reasons)
        if reasons and self.unscored > self.config.max_unscored * max(self.seen, 1000):
            raise StopRun(
                f"{self.unscored} of {self.seen} traces could not be scored (--max_unscored "
                f"{self.config.max_unscored}); the last reason: {reasons[-1]}"
            )


# --- GRPOTrainer ---


def trace_prompt(config: ContextConfig, question: str) -> str | list[dict[str, str]]:
    """What q is prompted with: raw text, or messages for its chat template."""
    return prompts.trace_messages(question) if config.context_template == "chat" else prompts.trace_text(question)


def build_dataset(task: Task, config: ContextConfig) -> Dataset:
    """TRL's data set: the prompt, and the id by which the reward function finds the rest."""
    return Dataset.from_list(
        [{"prompt": trace_prompt(config, example.question), "example_id": example.id} for example in task.train]
    )


def check_prompts_fit(
    examples: Sequence[Example], config: ContextConfig, tokenizer: PreTrainedTokenizerBase, room: int, trace_tokens: int
) -> None:
    """Raises DataError, naming the row, where a question and a full-length trace exceed the context model's `room`."""
    for example in examples:
        prompt = trace_prompt(config, example.question)
        ids = (
            tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        if len(ids) + trace_tokens > room:
            raise DataError(
                f"{example.id}: the prompt does not fit: {len(ids)} tokens and a trace of up to {trace_tokens} "
                f"(--max_completion_length) exceed the context model's {room}"
            )


def check_reward_fits(task: Task, config: ContextConfig) -> None:
    """Raises DataError, naming the row, where the reward has no value for an answer (a numeric one of a text)."""
    formula = make_reward(config.reward, config.reward_params)
    for example in task.train:
        try:
            formula(RewardInputs((-1.0,), (-1.0,), False, None, as_number(example.answer)))
        except RewardError as error:
            raise DataError(f"{example.id}: {error}, not {example.answer!r}; choose another --reward") from error


def check_resumable(args: GRPOConfig) -> None:
    """Raises ConfigError for settings under which a resumed run would not equal an uninterrupted one.

    GRPOTrainer starts a resumed run with an empty generation buffer. A checkpoint inside a generation window would
    draw a batch anew that the uninterrupted run had reused.
    """
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError("--multi_objective_aggregation has no meaning here: there is one reward function")
    window = args.steps_per_generation * args.num_iterations
    every = args.gradient_accumulation_steps * max(1, int(args.save_steps))
    if args.save_strategy == "steps" and every % window:
        raise ConfigError(
            f"--save_steps {args.save_steps} falls inside a generation window of {window} batches; make it a multiple "
            f"of {window // math.gcd(window, args.gradient_accumulation_steps)} steps"
        )


class RunLog(TrainerCallback):
    """metrics.jsonl and the progress bar, in place of transformers' printed dictionaries."""

    def __init__(self, folder: Path | None, reward: Any):
        self.folder, self.reward = folder, reward
        self.bar: tqdm | None = None
        self.step_began = self.step_seconds = self.scoring_logged = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_seconds += time.perf_counter() - self.step_began
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # A step that reuses a generation batch has a loss and no reward; the summary at the end has neither.
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if self.folder is not None:
            # Sums since the last line, where TRL's own times are means over calls.
            spent = {"seconds/step": self.step_seconds, "seconds/scoring": self.reward.seconds - self.scoring_logged}
            runs.append_metrics(self.folder, {"step": state.global_step, **logs, **spent})
            self.step_seconds, self.scoring_logged = 0.0, self.reward.seconds
        if self.bar is not None:
            shown = {"reward": "reward", "accuracy": "accuracy", "tokens": "trace_tokens", "help": "help_rate"}
            self.bar.set_postfix({k: f"{logs[v]:.3g}" for k, v in shown.items() if logs.get(v) is not None})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def build_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward: Any,
    args: GRPOConfig,
    peft_config: Any,
    folder: Path | None,
) -> GRPOTrainer:
    """TRL's trainer with the one reward function, our log in place of its printer, and stop strings if any."""
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[RunLog(folder, reward)],
        rollout_func=rollout_with_stops(reward.stops) if reward.stops else None,
    )
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    return trainer
