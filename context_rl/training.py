"""The loop: examples -> TRL data set -> the one reward function -> GRPOTrainer, which is used as it is.

One call of `LikelihoodReward` does what the method says: read the traces that q sampled, ask the frozen base model how
likely the right answer is after each of them, turn that into every reward, hand the chosen one to GRPO, and write all
of it down.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer

from context_rl import prompts, runs
from context_rl.config import ConfigError, ContextConfig
from context_rl.questions import Questions
from context_rl.rewards import LOGGED, Option, Reward, RewardError, RewardInputs, grpo_advantages, no_spread_share
from context_rl.rewards.advantages import SCALES
from context_rl.rewards.equivalence import vanishing_parts
from context_rl.rollout import rollout_with_stops, stop_strings
from context_rl.tasks import DataError, Example, Task
from context_rl.tasks.grading import as_number
from context_rl.traces import SCHEMA, AssessedTrace
from scorer.types import Usage


class StopRun(RuntimeError):
    """The run cannot go on in earnest: too many traces could not be scored."""


# --- the one reward function ---


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
        self.formula = Reward(config.reward)
        self.stops = stop_strings(config)
        self.seen = self.unscored = 0
        self.warned = False
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
        self.judge_usage()
        finished = [self.finished(ids) for ids in completion_ids]
        rows = self.questions.assess(example_id, traces, list(map(len, completion_ids)), finished)
        seconds = time.perf_counter() - began
        self.seconds += seconds

        # A group may lie across processes, and a running quantile is one for all: everybody's rows, in TRL's order.
        everyone = gather_object([row.inputs for row in rows])
        groups = [n // self.args.num_generations for n in range(len(everyone))]
        done = trainer_state.global_step / max(1, trainer_state.max_steps - 1)  # 0 at the first step, 1 at the last
        rewards = self.formula(everyone, groups, done)
        advantages = grpo_advantages(rewards, self.args.num_generations, str(self.args.scale_rewards))
        mine = slice(self.args.process_index * len(rows), (self.args.process_index + 1) * len(rows))

        log_metric("time/scoring", seconds)
        log_metric("no_spread", no_spread_share(rewards, self.args.num_generations))
        usage = self.questions.scorer.take_usage()
        self.usage.add(usage)
        for name, value in usage.metrics().items():
            log_metric(f"scoring/{name}", value)
        for name, value in self.judge_usage().items():
            log_metric(f"judge/{name}", value)
        self.log(rows, log_metric)
        self.log_parts(everyone, groups, log_metric)
        self.write(rows, rewards[mine], advantages[mine], trainer_state.global_step + 1)
        self.count(rows)
        return rewards[mine]

    def judge_usage(self) -> dict[str, float]:
        """What the judge has counted since the last call; nothing where training asks none."""
        judging = self.questions.judging
        return dict(judging.judge.take_usage()) if judging.in_training else {}

    def trace(self, completion_ids: Sequence[int]) -> str:
        """The text of a trace, from the ids that were sampled."""
        return prompts.parse_trace(self.tokenizer.decode(completion_ids, skip_special_tokens=True), self.stops)

    def finished(self, completion_ids: Sequence[int]) -> bool:
        """Whether q ended the trace by itself: below the token limit, or on it with EOS or a stop string."""
        if len(completion_ids) < self.args.max_completion_length:
            return True
        text = self.tokenizer.decode(completion_ids, skip_special_tokens=True)
        return completion_ids[-1] == self.tokenizer.eos_token_id or any(stop in text for stop in self.stops)

    def log(self, rows: Sequence[AssessedTrace], log_metric: Callable[[str, float], None]) -> None:
        """Means over the scored rows: every reward and safeguard, accuracy, how often the trace helped, leaks."""
        scored = [row for row in rows if row.inputs is not None]
        for name in LOGGED:
            values = [row.components[name] for row in scored if row.components[name] is not None]
            if values:
                log_metric(f"rewards/{name}", math.fsum(values) / len(values))
        if scored:
            if all(row.inputs.correct is not None for row in scored):  # else no judge was asked
                log_metric("accuracy", sum(row.inputs.correct for row in scored) / len(scored))
            log_metric("help_rate", sum(row.components["gain"] > 0 for row in scored) / len(scored))
            log_metric("leak/exact", sum(row.inputs.leak.exact for row in scored) / len(scored))
            places = [row.inputs.leak.position for row in scored if row.inputs.leak.position is not None]
            if places:
                log_metric("leak/position", math.fsum(places) / len(places))
        log_metric("unscored", (len(rows) - len(scored)) / len(rows))
        log_metric("trace_tokens", sum(row.tokens for row in rows) / len(rows))

    def log_parts(
        self, rows: Sequence[RewardInputs | None], groups: Sequence[int], log_metric: Callable[[str, float], None]
    ) -> None:
        """What each term of a hybrid pays on average, and where moving thresholds stand; warns once of lame rewards."""
        for name, values in self.formula.weighted_parts(rows, groups).items():
            known = [value for value in values if value is not None]
            if known:
                log_metric(f"reward_parts/{name}", math.fsum(known) / len(known))
        for name, value in self.formula.thresholds.items():
            log_metric(f"reward_parts/{name}", value)
        if not self.warned:
            self.warned = True
            for warning in vanishing_parts(self.formula, rows, self.args.num_generations, str(self.args.scale_rewards)):
                if self.args.process_index == 0:
                    tqdm.write(f"warning, from the first batch: {warning}")

    def write(
        self, rows: Sequence[AssessedTrace], rewards: Sequence[float | None], advantages: Sequence[float], step: int
    ) -> None:
        """The rows of this process into the run's Parquet, with the advantages that GRPO derives from the rewards."""
        if self.folder is None:
            return
        # With several generation batches in a step (gradient accumulation), each is a file of its own.
        self.batch_of_step = (step, self.batch_of_step[1] + 1 if self.batch_of_step[0] == step else 0)
        table = [row.as_row(step, *values) for row, *values in zip(rows, rewards, advantages, strict=True)]
        runs.write_traces(self.folder, step, self.args.process_index, self.batch_of_step[1], table, SCHEMA)

    def count(self, rows: Sequence[AssessedTrace]) -> None:
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


def trace_prompt(config: ContextConfig, example: Example) -> str | list[dict[str, str]]:
    """What q is prompted with: raw text, or messages for its chat template."""
    question = example.prompt or example.question
    return prompts.trace_messages(question) if config.context_template == "chat" else prompts.trace_text(question)


def build_dataset(task: Task, config: ContextConfig) -> Dataset:
    """TRL's data set: the prompt, and the id by which the reward function finds the rest."""
    return Dataset.from_list(
        [{"prompt": trace_prompt(config, example), "example_id": example.id} for example in task.train]
    )


def check_prompts_fit(
    examples: Sequence[Example], config: ContextConfig, tokenizer: PreTrainedTokenizerBase, room: int, trace_tokens: int
) -> None:
    """Raises DataError, naming the row, where a question and a full-length trace exceed the context model's `room`."""
    for example in examples:
        prompt = trace_prompt(config, example)
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
    """Raises DataError, naming the row, where reward or judge do not fit it (a numeric reward of a text)."""
    formula = Reward(config.reward)
    if config.grader == "judge" or "judged" in formula.reads:
        choices = next((example for example in (*task.train, *task.held_out) if example.choices), None)
        if choices is not None:
            raise DataError(
                f"{choices.id}: multiple choice, where the likeliest option is the answer and no text is to be judged; "
                "leave --grader judge out, and take another --reward than judge_soft"
            )
    for example in task.train:
        try:
            formula.of(
                RewardInputs(
                    (-1.0,),
                    (-1.0,),
                    False,
                    gold_number=as_number(example.answer),
                    masked_logprobs=(-1.0,) if config.masked_score else None,
                    options=tuple(Option(-1.0, len(choice)) for choice in example.choices),
                    label=example.label,
                    question=example.question,
                    answer=example.answer,
                    judged=0.0,
                )
            )
        except RewardError as error:
            raise DataError(
                f"{example.id}: {error} (answer {example.answer!r:.80}); choose another --reward"
            ) from error


def check_trainer_settings(args: GRPOConfig) -> None:
    """Raises ConfigError for settings of TRL's that it would refuse late, or under which a resumed run would differ.

    GRPOTrainer starts a resumed run with an empty generation buffer. A checkpoint inside a generation window would
    draw a batch anew that the uninterrupted run had reused.
    """
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError("--multi_objective_aggregation has no meaning here: there is one reward function")
    if args.scale_rewards not in SCALES:
        raise ConfigError(f"--scale_rewards is {args.scale_rewards!r}; it can be {', '.join(SCALES)}")
    window = args.steps_per_generation * args.num_iterations
    every = args.gradient_accumulation_steps * max(1, int(args.save_steps))
    if args.save_strategy == "steps" and every % window:
        raise ConfigError(
            f"--save_steps {args.save_steps} falls inside a generation window of {window} batches; make it a multiple "
            f"of {window // math.gcd(window, args.gradient_accumulation_steps)} steps"
        )


class RunLog(TrainerCallback, ExportableState):
    """metrics.jsonl and the progress bar, in place of transformers' printed dictionaries.

    What the reward has to remember (the window of a running quantile) goes into the checkpoint's trainer_state.json
    with it, and comes back from there.
    """

    def __init__(self, folder: Path | None, reward: Any):
        self.folder, self.reward = folder, reward
        self.bar: tqdm | None = None
        self.step_began = self.step_seconds = self.scoring_logged = 0.0

    def state(self) -> dict[str, Any]:
        """For transformers' checkpoints."""
        formula = getattr(self.reward, "formula", None)
        return {"args": {}, "attributes": {"reward_state": formula.state if formula else []}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get("RunLog", {}).get("attributes", {}).get("reward_state")
        if saved and state.global_step:
            self.reward.formula.state = saved
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
