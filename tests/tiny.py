"""Random models and freshly trained tokenizers, small enough for a test and different where real ones differ.

model     attention                        positions            tokenizer
llama     as many key heads as query heads rotary               byte-level BPE with GPT-2's pre-tokenizer, no BOS
qwen2     grouped: 4 query heads, 2 key    rotary, biases       byte-level BPE with Qwen2's, every digit a token, no BOS
neox      parallel residual                rotary on a quarter  SentencePiece style: Metaspace, byte fallback, BOS
mistral   a sliding window of 16 tokens    rotary               as llama; not among ARCHITECTURES
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ARCHITECTURES = ("llama", "qwen2", "neox")
MAX_LENGTH = 160
EOS = "<|endoftext|>"

WORDS = [
    "bird",
    "cat",
    "spider",
    "deer",
    "have",
    "has",
    "legs",
    "how",
    "many",
    "are",
    "there",
    "in",
    "total",
    "if",
    "you",
    "so",
    "far",
    "and",
    "more",
    "than",
]
TEXT = [
    f"Question: {' '.join(WORDS[i:] + WORDS[:i])}?\nReasoning: {i} {WORDS[i]}s.\nAnswer: {7 * i}\n" for i in range(20)
]
"""What the tokenizers are trained on: the template, a few words, numbers of one to three digits."""


QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer(single_digits: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS; " 12" is " ", "1", "2" with `single_digits`, else one or two tokens."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not single_digits)
    split = [pre_tokenizers.Split(Regex(QWEN2_PIECES), "isolated")] if single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits nowhere, so that "Answer:" and the space after it become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=[EOS], show_progress=False, min_frequency=2)
    tokenizer.train_from_iterator(["Answer: 1", "Answer: 2", "Answer: 3", "Answer: 4"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def metaspace_tokenizer(append_eos: bool = False, always_space: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece style: a space of its own before every text, BOS, bytes for what it never saw.

    With `always_space` also before a text that begins with a space, as Llama 2 does, whose normaliser does it.
    """
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = metaspace
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=[*special, *bytes_], show_progress=False, min_frequency=2
    )
    trained.train_from_iterator([line for text in TEXT for line in text.splitlines()], trainer)

    # The line end was not in the training text, so it is the byte <0x0A>, as in Llama's vocabulary.
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True))
    if always_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if append_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def tokenizer_of(architecture: str) -> PreTrainedTokenizerFast:
    """The tokenizer that goes with each architecture."""
    if architecture == "neox":
        return metaspace_tokenizer()
    return byte_level_tokenizer(single_digits=architecture == "qwen2")


def random_model(architecture: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """A float32 model with random weights, large enough that attention and positions matter to every log-prob.

    Line end and EOS are made likelier, so that some greedy answers end and others run to their limit.
    """
    torch.manual_seed(seed)
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.25,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, num_key_value_heads=4, **shared))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, num_key_value_heads=2, **shared))
    elif architecture == "mistral":
        model = MistralForCausalLM(
            MistralConfig(num_hidden_layers=2, num_key_value_heads=2, sliding_window=16, **shared)
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=2, rope_parameters=rope, **shared))
    newline = tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.get_output_embeddings().weight[[newline, tokenizer.eos_token_id]] *= 1.5
    return model.eval()


def save_model(folder: Path, architecture: str) -> None:
    """A random model and its tokenizer as a folder that `from_pretrained` reads."""
    tokenizer = tokenizer_of(architecture)
    random_model(architecture, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers rebuilds some tokenizers by the model's type; with another one the tests would test something else.
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert len(loaded) == len(tokenizer)
