"""Where a trace ends in training: at EOS or at a stop string, for the reward and for the loss alike."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from context_rl import prompts
from context_rl.config import ContextConfig


def stop_strings(config: ContextConfig) -> tuple[str, ...]:
    """The run's stop strings: those asked for, else the raw template's own; a chat turn ends by itself."""
    if config.stop_strings is not None:
        return tuple(config.stop_strings)
    return prompts.STOP_STRINGS if config.context_template == "raw" else ()


def cut_at_stop(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[int]:
    """The sampled ids up to the one that completes a stop string; all of them where none occurs."""
    ids = list(ids)
    text = tokenizer.decode(ids)
    if not any(stop in text for stop in stops):
        return ids
    for length in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:length])
        if any(stop in text for stop in stops):
            return ids[:length]
    return ids


def rollout_with_stops(stops: Sequence[str]) -> Callable[[list, GRPOTrainer], dict[str, list]]:
    """A TRL rollout function: the trainer's own generation, with everything after a stop string removed.

    Passing stop strings to transformers' generate would not do: TRL would train on the padding that follows one, and
    where padding is EOS, on an EOS that was never sampled.
    """

    def rollout(batch: list, trainer: GRPOTrainer) -> dict[str, list]:
        prompt_ids, images, fields = trainer._tokenize_prompts(batch)
        sampled, logprobs = trainer._generate_single_turn(prompt_ids, images, fields, trainer.num_generations)
        cut = [cut_at_stop(ids, trainer.processing_class, stops) for ids in sampled]
        if logprobs is not None:
            logprobs = [row[: len(ids)] for row, ids in zip(logprobs, cut, strict=True)]
        return {"prompt_ids": prompt_ids, "completion_ids": cut, "logprobs": logprobs}

    return rollout
