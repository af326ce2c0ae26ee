"""The adapter to lm-evaluation-harness. Each docstring says which bug the test's failure means.

The harness's own `hf` model on tasks that it loads by itself is the reference for all numbers without a trace.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from fake_vllm import FakeVllm, Wire, true_greedy
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from context_rl import prompts
from context_rl.tasks.types import DataError
from eval.harness import (
    Evaluation,
    HelpedModel,
    LoadedTask,
    LocalGenerator,
    Prompt,
    ServerGenerator,
    evaluate,
    load_task,
    open_generator,
    questions,
    with_trace,
)
from eval.harness.tasks import manager
from scorer.local import LocalScorer
from scorer.types import FAULTS, Greedy, Item, Score, ScorerError, Unscored

DATA = Path(os.environ.get("CONTEXT_RL_DATA") or "/nowhere")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="CONTEXT_RL_DATA names no folder with gsm8k and hellaswag")
YAMLS = Path(lm_eval.__file__).parent / "tasks"
BATCH = 4


@pytest.fixture(scope="module")
def base(repository: Path) -> LocalScorer:
    return LocalScorer(str(repository / "models" / "tiny-base"))


@pytest.fixture(scope="module")
def long_folder(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 4,096 positions, for five examples of GSM8K, whose answers end sometimes."""
    folder = tmp_path_factory.mktemp("long")
    tokenizer = AutoTokenizer.from_pretrained(repository / "models" / "tiny-base")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class FakeScorer:
    """Scores by the length of the answer, remembers what it was asked, and fails where it is told to."""

    def __init__(self, tokenizer: Any, max_length: int = 4096, fails: Callable[[str], bool] = lambda text: False):
        self.tokenizer, self.max_length, self.fails = tokenizer, max_length, fails
        self.asked: list[tuple[str, str]] = []
        self.greedy: list[Greedy | None] = []

    def score(self, items: Sequence[Item], greedy: Greedy | None = None) -> list[Score | Unscored]:
        self.greedy.append(greedy)
        return [self.one(item, greedy) for item in items]

    def one(self, item: Item, greedy: Greedy | None) -> Score | Unscored:
        prefix, answer = self.tokenizer.decode(item.prefix_ids), self.tokenizer.decode(item.answer_ids)
        self.asked.append((prefix, answer))
        if self.fails(prefix + answer):
            return Unscored("the fake fails here", "timeout")
        return Score((-1.0,) * len(item.answer_ids), None if greedy is None else answer)


class FakeGenerator:
    """Answers with a fixed text, remembers what it was asked, and fails where it is told to."""

    def __init__(self, answer: str = " It is 7.\n#### 18\n", fails: Callable[[str], bool] = lambda text: False):
        self.answer, self.fails, self.asked = answer, fails, []

    def generate(self, prompts: Sequence[Prompt], until: list[str], max_tokens: int) -> list[str | Unscored]:
        self.asked += [(prompt.text, tuple(until), max_tokens) for prompt in prompts]
        return [Unscored("the fake fails here", "timeout") if self.fails(p.text) else self.answer for p in prompts]


@pytest.fixture(scope="module")
def tokenizer(repository: Path) -> Any:
    return AutoTokenizer.from_pretrained(repository / "models" / "tiny-base")


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def traces_for(task: LoadedTask, trace: Callable[[int], str | None]) -> dict[tuple[str, int], str | None]:
    return {(task.name, doc_id): trace(doc_id) for doc_id in range(len(task.docs))}


# --- where a trace goes ---

CUE = "Question: How many?\nAnswer:"
WITH_TRACE = [
    # context, query, trace, result
    (CUE, CUE, "Two and two.", "Question: How many?\nReasoning: Two and two.\nAnswer:"),
    (CUE, CUE, "", "Question: How many?\nReasoning: \nAnswer:"),
    (f"{CUE} 3\n\n{CUE}", CUE, "t", f"{CUE} 3\n\nQuestion: How many?\nReasoning: t\nAnswer:"),
    ("Sailing: He turns", "Sailing: He turns", "t", "Reasoning: t\nSailing: He turns"),
    ("A: b c\n\nA: b", "A: b", "t", "A: b c\n\nReasoning: t\nA: b"),
    ("Says:", "Says:", "t", "Reasoning: t\nSays:"),
    ("P.\nQ?\nA: ", "P.\nQ?\nA: ", "t", "P.\nQ?\nReasoning: t\nA: "),
    ("P.\nQ?\n", "P.\nQ?\n", "t", "Reasoning: t\nP.\nQ?\n"),
    (
        "Wie groß? 😀\nAntwort:",
        "Wie groß? 😀\nAntwort:",
        "Größe „3“ 😀",
        "Wie groß? 😀\nReasoning: Größe „3“ 😀\nAntwort:",
    ),
    ("Q?\nA:", "Q?\nA:", "one\ntwo", "Q?\nReasoning: one\ntwo\nA:"),
    ("before", "", "t", "beforeReasoning: t\n"),
]


@pytest.mark.parametrize(("context", "query", "trace", "result"), WITH_TRACE)
def test_a_trace_stands_before_the_cue_or_else_before_the_query(context, query, trace, result):
    """The trace went into a few-shot example, between a context and its ending, or behind the cue."""
    assert with_trace(context, query, trace) == result
    assert with_trace(context, query, None) is context


def test_with_trace_is_the_template_of_training():
    """The benchmark shows the base model a trace in another place than training did."""
    context = prompts.base_prefix("How many?", None)
    for trace in ("Two and two.", ""):
        assert with_trace(context, context, trace) == prompts.base_prefix("How many?", trace)


def test_a_query_that_is_not_the_end_is_refused():
    """A trace was put somewhere into a prompt that the adapter does not understand."""
    with pytest.raises(DataError, match="does not end with the question"):
        with_trace("Question: a\nAnswer: b", "Question: a\nAnswer:", "t")


# --- no trace: the harness's own numbers ---


def reference(task: str, folder: Path | str, splits: dict[str, Path], tmp_path: Path, **settings: Any) -> dict:
    """simple_evaluate with the harness's `hf` model, on a task that the harness loads by itself."""
    files = {split: str(path) for split, path in splits.items()}
    config = {
        "include": str(YAMLS / task / f"{task}.yaml"),
        "task": f"{task}_reference",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    if "train" not in splits:
        config |= {"training_split": None, "fewshot_split": None}
    path = tmp_path / f"{task}_reference.yaml"
    path.write_text(yaml.safe_dump(config))
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=BATCH)
    out = lm_eval.simple_evaluate(model, tasks=[str(path)], task_manager=manager(), **settings)
    return {"metrics": out["results"][f"{task}_reference"], "samples": out["samples"][f"{task}_reference"]}


def assert_same_metrics(ours: Evaluation, theirs: dict) -> None:
    names = [name for name in theirs["metrics"] if "," in name]
    assert names
    assert {n: ours.metrics[n] for n in names} == {n: theirs["metrics"][n] for n in names}


@needs_data
def test_hellaswag_without_traces_is_the_harness_itself(base, repository, tmp_path):
    """Tokens, the split of context and ending, or the aggregation differ from the harness's `hf` model."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=40)
    ours = evaluate(task, HelpedModel(base, traces=traces_for(task, lambda _: None)))
    theirs = reference(
        "hellaswag",
        repository / "models" / "tiny-base",
        {"validation": DATA / "hellaswag" / "validation.jsonl"},
        tmp_path,
        limit=40,
    )
    assert_same_metrics(ours, theirs)
    worst = 0.0
    for row, sample in zip(ours.rows, theirs["samples"], strict=True):
        expected = [response[0][0] for response in sample["resps"]]
        # The harness adds float32 numbers up to hundreds of nats, which rounds by some 1e-5 each time.
        assert row["option_logprobs"] == pytest.approx(expected, abs=1e-4, rel=1e-6)
        worst = max(worst, *(abs(a - b) for a, b in zip(row["option_logprobs"], expected, strict=True)))
        assert row["logprob"] == row["option_logprobs"][sample["target"]]
        assert row["metrics"] == {"acc,none": sample["acc"], "acc_norm,none": sample["acc_norm"]}
        assert row["correct"] is (sample["acc_norm"] == 1.0)
        assert (row["base_answer"] == questions(task)[row["doc_id"]].answer) is row["correct"]
    print(f"hellaswag: largest difference of {4 * len(ours.rows)} log-likelihoods {worst:.2e}")
    assert 0 < sum(row["correct"] for row in ours.rows) < 40
    assert [row["id"] for row in ours.rows[:2]] == ["hellaswag/validation/0", "hellaswag/validation/1"]
    assert "acc_norm" in ours.table


@needs_data
@pytest.mark.parametrize(("shots", "docs"), [(0, 12), (5, 12)])
def test_gsm8k_without_traces_is_the_harness_itself(shots, docs, base, long_folder, repository, tmp_path):
    """Few-shot examples, stop strings, the room for the answer or the filters differ from the harness's `hf` model."""
    scorer = LocalScorer(str(long_folder)) if shots else base
    folder = long_folder if shots else repository / "models" / "tiny-base"
    task = load_task("gsm8k", DATA / "gsm8k", limit=docs, fewshot=shots)
    ours = evaluate(task, HelpedModel(scorer, open_generator(scorer, BATCH)))
    files = {split: DATA / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")}
    theirs = reference("gsm8k", folder, files, tmp_path, limit=docs, num_fewshot=shots)
    assert_same_metrics(ours, theirs)
    strict = [sample for sample in theirs["samples"] if sample["filter"] == "strict-match"]
    assert [row["base_answer"] for row in ours.rows] == [sample["resps"][0][0] for sample in strict]
    assert len({row["base_answer"] for row in ours.rows}) > 1
    assert [sample["arguments"][0][0].count("Question:") for sample in strict] == [shots + 1] * docs
    assert ours.correct_metric == "exact_match,flexible-extract"
    assert all(row["logprob"] is row["option_logprobs"] is row["unscored"] is None for row in ours.rows)


PAIRS = [
    ("How many legs", " 12"),
    ("How many legs ", "12"),
    ("How many legs  ", " has"),
    ("Answer:\n", "bird"),
    ("", "bird has"),
    ("", "<s>bird"),
    ("<s>Question:", " bird"),
    ("How many", " 12\n\n34"),
    ("größer 😀", " é"),
]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "neox"])
def test_log_likelihoods_of_odd_pairs_are_the_harness_itself(architecture, model_folders):
    """A BOS too many or missing, a space on the wrong side, an empty prompt, or a wrong answer to "is it greedy"."""
    scorer = LocalScorer(str(model_folders[architecture]))
    reference = HFLM(pretrained=str(model_folders[architecture]), dtype="float32", device="cpu", batch_size=1)
    pairs = [*PAIRS, *greedy_pairs(reference)]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    ours, theirs = HelpedModel(scorer).loglikelihood(requests), reference.loglikelihood(requests)
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], abs=1e-4)
    assert [b for _, b in ours] == [b for _, b in theirs]
    assert any(b for _, b in ours)


def greedy_pairs(model: HFLM) -> list[tuple[str, str]]:
    """Contexts and what the model says next, where that text has the tokens that were said."""
    pairs = []
    for context in ("Question: how many legs", "bird cat", "so far", "Answer:", "there are 12", "total if you"):
        ids = model.tok_encode(context)
        with torch.inference_mode():
            said = model.model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0].tolist()
        text = model.tok_decode(said, skip_special_tokens=True)[len(model.tok_decode(ids)) :]
        if text and model.tok_encode(context + text) == said:
            pairs.append((context, text))
    return pairs


def test_the_local_generator_leaves_the_scorer_alone(base):
    """The harness's wrapper changed the shared model or tokenizer, so scores differ once answers were generated."""
    scorer = LocalScorer(base.name)
    scorer.tokenizer.pad_token = None  # the wrapper chooses one
    item = Item(tuple(scorer.tokenizer("Question: 3 birds?\nAnswer:")["input_ids"]), (5, 6, 7))
    before = scorer.score([item])
    assert LocalGenerator(scorer).generate([Prompt("Question: 3 birds?\nAnswer:", [])], ["\n"], 4)
    assert scorer.score([item]) == before
    assert scorer.tokenizer.pad_token is None


# --- with a trace: it is in the prompt ---


@needs_data
def test_traces_reach_the_prompts_of_options(tokenizer):
    """The options are scored without their trace, with another document's, or behind another context."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=6)
    scorer = FakeScorer(tokenizer)
    evaluate(task, HelpedModel(scorer, traces=traces_for(task, lambda n: None if n == 2 else f"Trace {n}.")))
    docs = task.docs
    expected = [
        ("" if n == 2 else f"Reasoning: Trace {n}.\n") + doc["query"] + " " + option
        for n, doc in enumerate(docs)
        for option in doc["choices"]
    ]
    assert [prefix + answer for prefix, answer in scorer.asked] == expected
    assert [answer for _, answer in scorer.asked] == [" " + option for doc in docs for option in doc["choices"]]
    assert scorer.greedy == [None]


@needs_data
@pytest.mark.parametrize("shots", [0, 2])
def test_traces_reach_the_prompts_of_generation(shots, tokenizer):
    """The answers are generated without their trace, or the trace went into a few-shot example."""
    task = load_task("gsm8k", DATA / "gsm8k", limit=5, fewshot=shots)
    plain, helped = FakeGenerator(), FakeGenerator()
    evaluate(task, HelpedModel(FakeScorer(tokenizer), plain))
    result = evaluate(
        task, HelpedModel(FakeScorer(tokenizer), helped, traces_for(task, lambda n: None if n == 1 else f"T{n}\n"))
    )
    for n, ((before, *_), (after, until, tokens)) in enumerate(zip(plain.asked, helped.asked, strict=True)):
        assert before.endswith(prompts.base_prefix(task.docs[n]["question"], None))
        line = "" if n == 1 else f"Reasoning: T{n}\n\n"
        assert after == before.removesuffix("Answer:") + line + "Answer:"
        assert (until, tokens) == (("Question:", "</s>", "<|im_end|>"), 256)
    assert [row["metrics"]["exact_match,strict-match"] for row in result.rows] == [1, 0, 0, 0, 0]
    assert result.rows[0]["correct"] is True
    assert result.metrics["exact_match,flexible-extract"] == 0.2


@needs_data
def test_a_real_trace_changes_real_scores(base):
    """The whole way is deaf to traces."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=4)
    plain = evaluate(task, HelpedModel(base))
    helped = evaluate(task, HelpedModel(base, traces=traces_for(task, lambda n: questions(task)[n].answer * 2)))
    assert all(h["logprob"] != p["logprob"] for h, p in zip(helped.rows, plain.rows, strict=True))


@needs_data
def test_a_document_without_an_entry_is_an_error(tokenizer):
    """A trace that is missing by mistake was taken for "no help"."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=2)
    with pytest.raises(DataError, match="no trace, and no None, for document 1 of task 'hellaswag'"):
        evaluate(task, HelpedModel(FakeScorer(tokenizer), traces={("hellaswag", 0): "t"}))


@needs_data
def test_the_model_alone_works_in_the_harness(tokenizer):
    """The harness cannot use the model without `evaluate`, or traces are silently left out there."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=3)
    scorer = FakeScorer(tokenizer)
    model = HelpedModel(scorer, traces=traces_for(task, lambda n: f"Trace {n}."))
    with pytest.raises(DataError, match="call prepare"):
        lm_eval.simple_evaluate(model, tasks=[task.task], task_manager=manager(), limit=3)
    model.prepare(task)
    out = lm_eval.simple_evaluate(model, tasks=[task.task], task_manager=manager(), limit=3)
    assert [p.startswith(f"Reasoning: Trace {n // 4}.\n") for n, (p, _) in enumerate(scorer.asked)] == [True] * 12
    assert out["results"]["hellaswag"]["acc,none"] == evaluate(task, model).metrics["acc,none"]


# --- what cannot be answered ---


@needs_data
def test_failed_scores_are_rows_without_numbers(tokenizer):
    """A failed score became a number, took its document's other options along, or moved the other documents."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=6)
    bad = task.docs[3]["choices"][1]
    result = evaluate(task, HelpedModel(FakeScorer(tokenizer, fails=lambda text: text.endswith(bad))))
    whole = evaluate(task, HelpedModel(FakeScorer(tokenizer)))
    row = result.rows[3]
    assert row["unscored"] == "the fake fails here"
    assert row["metrics"] == {}
    assert [row[key] for key in ("correct", "logprob", "option_logprobs", "base_answer")] == [None] * 4
    assert [r for r in result.rows if r["doc_id"] != 3] == [r for r in whole.rows if r["doc_id"] != 3]
    others = [r["metrics"]["acc,none"] for r in whole.rows if r["doc_id"] != 3]
    assert result.metrics["acc,none"] == pytest.approx(sum(others) / 5)
    assert result.metrics["sample_len"] == 5


@needs_data
def test_nothing_answered_is_no_table(tokenizer):
    """An evaluation in which every score failed shows a number."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=2)
    result = evaluate(task, HelpedModel(FakeScorer(tokenizer, fails=lambda _: True)))
    assert (result.results, result.metrics, result.correct_metric) == ({}, {}, None)
    assert [row["unscored"] for row in result.rows] == ["the fake fails here"] * 2


@needs_data
def test_long_prompts_are_not_truncated(tokenizer):
    """A prompt that does not fit was cut like the harness does it, and its numbers went into the mean."""
    task = load_task("hellaswag", DATA / "hellaswag", limit=3)
    scorer = FakeScorer(tokenizer, max_length=300)
    result = evaluate(task, HelpedModel(scorer, traces=traces_for(task, lambda n: "word " * (400 if n == 1 else 2))))
    assert [row["unscored"] is None for row in result.rows] == [True, False, True]
    assert "nothing was truncated" in result.rows[1]["unscored"]
    assert "takes 300" in result.rows[1]["unscored"]
    assert result.metrics["sample_len"] == 2
    assert len(scorer.asked) == 8

    task = load_task("gsm8k", DATA / "gsm8k", limit=3, fewshot=0)
    generator = FakeGenerator()
    lengths = [len(tokenizer(prompts.base_prefix(doc["question"], None))["input_ids"]) for doc in task.docs]
    room = FakeScorer(tokenizer, max_length=sorted(lengths)[1] + 256)  # two of them leave room for 256 tokens
    result = evaluate(task, HelpedModel(room, generator))
    assert [row["unscored"] is None for row in result.rows] == [n <= sorted(lengths)[1] for n in lengths]
    assert len(generator.asked) == 2


@needs_data
def test_what_is_left_out_moves_no_other_prompt(tokenizer):
    """Leaving a document out changes the few-shot examples of the others, so that conditions are no longer paired."""
    task = load_task("gsm8k", DATA / "gsm8k", limit=5, fewshot=3)
    asked = []
    for samples, fails in [(None, 9), (None, 9), ([4, 1], 9), (None, 2)]:
        generator = FakeGenerator(fails=lambda text, n=fails: n < 5 and task.docs[n]["question"] in text)
        result = evaluate(task, HelpedModel(FakeScorer(tokenizer), generator), samples=samples)
        asked.append([text for text, *_ in generator.asked])
    assert asked[0] == asked[1] == asked[3]
    assert asked[2] == [asked[0][1], asked[0][4]]
    assert [row["unscored"] is None for row in result.rows] == [True, True, False, True, True]
    assert len({text.split("\n")[0] for text in asked[0]}) > 1
    generator = FakeGenerator()
    rows = evaluate(task, HelpedModel(FakeScorer(tokenizer), generator), samples=[4, 0]).rows
    assert [(row["doc_id"], row["id"], row["correct"]) for row in rows] == [
        (0, "gsm8k/test/0", True),
        (4, "gsm8k/test/4", False),
    ]
    for wrong in ([5], [], [-1]):
        with pytest.raises(ValueError, match="numbers of the 5 documents"):
            evaluate(task, HelpedModel(FakeScorer(tokenizer), generator), samples=wrong)


def test_failures_within_the_harness_alone_are_errors(tokenizer):
    """Without `evaluate`, a failed request was answered with something."""
    model = HelpedModel(FakeScorer(tokenizer, fails=lambda _: True), FakeGenerator(fails=lambda _: True))
    with pytest.raises(ScorerError, match="2 of 2 requests have no answer, the first: the fake fails here"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", " b"), i) for i in range(2)])
    with pytest.raises(ScorerError, match="1 of 1"):
        model.generate_until([Instance("generate_until", {}, ("a", {"until": ["\n"]}), 0)])
    with pytest.raises(DataError, match="whole documents have no place for a trace"):
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a",), 0)])
    with pytest.raises(DataError, match="give the model a generator"):
        HelpedModel(FakeScorer(tokenizer)).generate_until([Instance("generate_until", {}, ("a", {}), 0)])
    with pytest.raises(DataError, match="greedily"):
        model.generate_until([Instance("generate_until", {}, ("a", {"do_sample": True, "temperature": 0.7}), 0)])


# --- tasks and their data ---


def gsm8k(n: int, answer: str | None = "2 + 2 = <<2+2=4>>4\n#### 4") -> dict:
    return {"question": f"How many are {n}?", "answer": answer}


def swag(n: int, **changed: Any) -> dict:
    row = {"activity_label": "Sailing", "ctx_a": f"He {n} sails.", "ctx_b": "he", "endings": list("abcd"), "label": "1"}
    return {**row, **changed}


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_tasks_that_cannot_be_used_say_so():
    """A mistake in a task's name or kind ends in a traceback of the harness, or in numbers without traces."""
    for name, said in [
        ("gsm9k", "knows no task 'gsm9k'; is it one of gsm8k"),
        ("mmlu", "'mmlu' is several tasks; name one of them"),
        ("wikitext", "whole documents have no place for a trace"),
        ("nowhere/task.yaml", "there is no file"),
        ("gsm8k", "give its files with --data FOLDER"),
    ]:
        with pytest.raises(DataError) as error:
            load_task(name)
        assert said in one_line(error)


def test_files_that_cannot_be_used_say_so(tmp_path):
    """A missing split, a broken file or a row without its label ends in a traceback, or counts as a wrong answer."""
    write(tmp_path / "test_only" / "test.jsonl", gsm8k(1))
    write(tmp_path / "few" / "test.jsonl", gsm8k(1))
    write(tmp_path / "few" / "train.jsonl", gsm8k(2))
    write(tmp_path / "train_only" / "train.jsonl", gsm8k(1))
    write(tmp_path / "no_answer.jsonl", gsm8k(1), gsm8k(2, None))
    write(tmp_path / "no_number.jsonl", gsm8k(1), gsm8k(2, "It is 4."))
    write(tmp_path / "columns.jsonl", {"q": "a", "a": "b"})
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": ')
    (tmp_path / "text.txt").write_text("no data")
    write(tmp_path / "swag.jsonl", swag(1), {k: v for k, v in swag(2).items() if k != "label"})
    write(tmp_path / "unlabelled.jsonl", swag(1), swag(2, label=""))
    write(tmp_path / "fifth.jsonl", swag(1), swag(2, label=4))
    for name, data, shots, said in [
        ("gsm8k", "nowhere", 0, "there is no file or folder"),
        ("gsm8k", "test_only", None, "split 'train': put train.jsonl"),
        ("gsm8k", "few", None, "1 examples, too few to show 5"),
        ("gsm8k", "train_only", 0, "split 'test': put test.jsonl or .json or .parquet into"),
        ("gsm8k", "no_answer.jsonl", 5, "give a folder with a file for each, or fewshot 0"),
        ("gsm8k", "no_answer.jsonl", 0, "gsm8k/test/1: the document has no answer"),
        ("gsm8k", "no_number.jsonl", 0, "gsm8k/test/1: the answer has no number after '####'"),
        ("gsm8k", "columns.jsonl", 0, "do the files have the columns of its data set?"),
        ("gsm8k", "broken.jsonl", 0, "cannot read"),
        ("gsm8k", "text.txt", 0, "split 'test'"),
        ("hellaswag", "swag.jsonl", 0, "cannot read"),
        ("hellaswag", "unlabelled.jsonl", 0, "cannot read"),
        ("hellaswag", "fifth.jsonl", 0, "hellaswag/validation/1: label 4 is none of the 4 options"),
        ("hellaswag", "fifth.jsonl", -1, "fewshot count documents"),
    ]:
        with pytest.raises(DataError) as error:
            load_task(name, tmp_path / data, fewshot=shots)
        assert said in one_line(error), (name, data)


def test_local_files_of_each_kind_are_read(tmp_path):
    """A format or a spelling of a split's file name is not found, or another split's columns get in the way."""
    pandas = pytest.importorskip("pandas")
    rows = [swag(n) for n in range(3)]
    write(tmp_path / "a" / "validation.jsonl", *rows)
    write(tmp_path / "a" / "train.jsonl", {"other": "columns"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "val.json").write_text(json.dumps(rows))
    (tmp_path / "c").mkdir()
    pandas.DataFrame(rows).to_parquet(tmp_path / "c" / "validation-00000-of-00001.parquet")
    for folder in "abc":
        task = load_task("hellaswag", tmp_path / folder, limit=2)
        assert [q.question for q in questions(task)] == ["Sailing: He 0 sails. He", "Sailing: He 1 sails. He"]
        assert [(q.answer, q.solution) for q in questions(task)] == [("b", None)] * 2


def test_questions_of_gsm8k_hold_no_answer_marks(tmp_path):
    """q sees the answer, or the gold trace ends with it in the data set's own notation."""
    path = write(tmp_path / "gsm.jsonl", gsm8k(1, "She has <<2*500=1000>>1,000.\nThat is it.\n#### 1,000"))
    [question] = questions(load_task("gsm8k", path, fewshot=0))
    assert (question.question, question.answer) == ("How many are 1?", "1000")
    assert question.solution == "She has 1,000.\nThat is it."


ARC = [
    {
        "id": str(n),
        "question": f"Which of {n} animals flies?",
        "choices": {"text": ["the bird", "the cat", "a deer"], "label": ["A", "B", "C"]},
        "answerKey": "A" if n % 2 else "C",
    }
    for n in range(5)
]


def test_another_task_of_the_harness_needs_no_code(base, tmp_path):
    """Only the two tasks that were built for work."""
    for split in ("train", "validation", "test"):
        write(tmp_path / "arc" / f"{split}.jsonl", *ARC)
    task = load_task("arc_easy", tmp_path / "arc", limit=4, fewshot=1)
    assert [q.answer for q in questions(task)] == ["a deer", "the bird", "a deer", "the bird"]
    assert questions(task)[0].question == "Which of 0 animals flies?"
    scorer = FakeScorer(base.tokenizer)
    evaluate(task, HelpedModel(scorer, traces=traces_for(task, lambda n: f"Birds fly {n}.")))
    prefix, answer = scorer.asked[0]
    assert prefix.endswith("\n\nQuestion: Which of 0 animals flies?\nReasoning: Birds fly 0.\nAnswer:")
    assert prefix.count("Reasoning:") == 1
    assert answer == " the bird"
    plain = evaluate(task, HelpedModel(base))
    assert plain.correct_metric == "acc_norm,none"
    assert all(len(row["option_logprobs"]) == 3 and row["unscored"] is None for row in plain.rows)


def own_task(folder: Path, rows: list[dict], **config: Any) -> Path:
    """A task in the harness's YAML format on files of its own."""
    data = write(folder / "data.jsonl", *rows)
    path = folder / "task.yaml"
    shared = {"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path.write_text(yaml.safe_dump({**shared, "test_split": "test", "num_fewshot": 0, **config}))
    return path


def test_tasks_of_other_kinds_in_the_harness_format(base, tmp_path):
    """A user's own task fails: a single continuation with "is it greedy", or mutual information."""
    metric = {"aggregation": "mean", "higher_is_better": True}
    cats = "A cat has 4 legs. How many legs do 3 cats have?\nAnswer:"  # tiny-base says 36
    rows = [{"text": f"Question: {cats}", "last": last} for last in ("36", "3", "12")]
    single = own_task(
        tmp_path / "a",
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{last}}",
        metric_list=[{"metric": "acc", **metric}, {"metric": "perplexity", "aggregation": "perplexity"}],
    )
    task = load_task(str(single))
    assert questions(task)[0].question == cats.removesuffix("\nAnswer:")
    assert [q.answer for q in questions(task)] == ["36", "3", "12"]
    model = HFLM(pretrained=base.name, dtype="float32", device="cpu", batch_size=1)
    theirs = lm_eval.simple_evaluate(model, tasks=[str(single)], task_manager=manager())["results"]["own"]
    ours = evaluate(task, HelpedModel(base))
    assert ours.metrics["acc,none"] == theirs["acc,none"] == 2 / 3
    assert ours.metrics["perplexity,none"] == pytest.approx(theirs["perplexity,none"], rel=1e-5)
    assert [row["correct"] for row in ours.rows] == [True, True, False]
    assert all(row["logprob"] < 0 and row["option_logprobs"] is row["base_answer"] is None for row in ours.rows)

    choice = own_task(
        tmp_path / "b",
        [{"q": f"{n} + 1?", "gold": 1} for n in range(3)],
        output_type="multiple_choice",
        doc_to_text="{{q}}\nAnswer:",
        doc_to_choice=["no", "yes it is"],
        doc_to_target="gold",
        metric_list=[{"metric": "acc_mutual_info", **metric}, {"metric": "acc", **metric}],
    )
    task = load_task(str(choice))
    scorer = FakeScorer(base.tokenizer)
    result = evaluate(task, HelpedModel(scorer, traces=traces_for(task, lambda n: f"T{n}")))
    assert [answer for prefix, answer in scorer.asked if "Reasoning" not in prefix] == [" no", " yes it is"] * 3
    assert [answer for prefix, answer in scorer.asked if "Reasoning" in prefix] == [" no", " yes it is"] * 3
    assert all(len(row["option_logprobs"]) == 2 for row in result.rows)


def test_generation_tasks_that_sample_are_refused(tmp_path):
    """A task that wants sampled answers was run greedily without a word."""
    kwargs = {"until": ["\n"], "do_sample": True, "temperature": 0.7}
    settings = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    path = own_task(tmp_path, [{"q": "a", "a": "b"}], generation_kwargs=kwargs, **settings)
    with pytest.raises(DataError, match="greedily"):
        load_task(str(path))


def test_the_harness_is_quiet(capfd, tmp_path):
    """Every step of the harness is reported on the screen."""
    load_task("hellaswag", write(tmp_path / "swag.jsonl", swag(1)))
    assert "lm_eval" not in capfd.readouterr().out
    assert logging.getLogger("lm_eval").level == logging.WARNING


# --- answers from a server ---


@pytest.fixture
def server():
    fake = FakeVllm()
    yield fake
    fake.stop()


def generator(server: FakeVllm, tokenizer: Any, **settings: Any) -> ServerGenerator:
    served = SimpleNamespace(url=server.url, served_name="fake", tokenizer=tokenizer)
    return ServerGenerator(served, **{"timeout_s": 2.0, "concurrency": 2, **settings})


PROMPTS = [Prompt("", [3, 5, n]) for n in range(6)]
SPOKEN = [true_greedy((3, 5, n), 20)[1] for n in range(6)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("eval.harness.generators.BACKOFF_S", 0.0)


def test_a_server_answers_greedily_and_is_cut_at_the_stop(server, tokenizer):
    """Sampling, penalties of a generation_config.json, a stop string in the answer, or answers in another order."""
    assert generator(server, tokenizer).generate(PROMPTS, ["Question:"], 20) == SPOKEN
    letter = SPOKEN[0][1]
    cut = generator(server, tokenizer).generate(PROMPTS, [letter], 20)
    assert cut == [text.partition(letter)[0] for text in SPOKEN]
    body = server.bodies[0]
    assert (body["temperature"], body["repetition_penalty"], body["max_tokens"]) == (0, 1.0, 20)
    assert body["stop"] == ["Question:", tokenizer.eos_token]
    assert body["stop_token_ids"] == [tokenizer.eos_token_id]


def test_a_server_is_asked_again(server, tokenizer):
    """One hiccup of the server costs a document."""
    failures = iter([500, 503])
    server.fault = lambda body, reply: (status, "hiccup") if (status := next(failures, None)) else (200, reply)
    assert generator(server, tokenizer).generate(PROMPTS, [], 20) == SPOKEN


GARBLED = [
    "no JSON",
    {"choices": []},
    {"choices": [{"text": None, "finish_reason": "stop"}]},
    {"choices": [{"text": "half an ans", "finish_reason": "abort"}]},
    {"choices": [{"text": "a", "finish_reason": "stop"}] * 2},
    [],
]


@pytest.mark.parametrize("reply", GARBLED)
def test_a_reply_that_is_no_answer_is_unscored(reply, server, tokenizer):
    """Something else than a finished answer was taken for one, or for the empty answer."""
    server.fault = lambda body, right: (200, reply if body["prompt"] == [[3, 5, 2]] else right)
    answers = generator(server, tokenizer).generate(PROMPTS, [], 20)
    assert isinstance(answers[2], Unscored)
    assert answers[2].fault in FAULTS
    assert [a for n, a in enumerate(answers) if n != 2] == [a for n, a in enumerate(SPOKEN) if n != 2]


def test_a_refused_prompt_is_unscored_and_not_sent_again(server, tokenizer):
    """A prompt that the server will never take is sent over and over, or takes the others along."""
    server.fault = lambda body, right: (400, "too long") if body["prompt"] == [[3, 5, 2]] else (200, right)
    answers = generator(server, tokenizer).generate(PROMPTS, [], 20)
    assert answers[2].fault == "refused"
    assert len(server.bodies) == len(PROMPTS)


@pytest.mark.parametrize("how", [Wire.RESET, Wire.SLOW, Wire.DRIP])
def test_a_server_that_does_not_answer_ends_the_evaluation(how, server, tokenizer):
    """A dead or hung server became empty answers, or each prompt waited for its own timeout."""
    server.fault = lambda body, right: (200, how)
    with pytest.raises(ScorerError, match="no vLLM server answers"):
        generator(server, tokenizer, timeout_s=0.3).generate(PROMPTS * 20, [], 20)
    assert len(server.bodies) < 20


def test_nobody_listens(tokenizer):
    """A wrong address became empty answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    served = SimpleNamespace(url=url, served_name="fake", tokenizer=tokenizer)
    with pytest.raises(ScorerError, match="no vLLM server answers"):
        ServerGenerator(served, timeout_s=2.0).generate(PROMPTS, [], 20)


def test_a_scorer_that_cannot_generate_is_named(tokenizer):
    """A generation task with a scorer that only scores fails somewhere deep, or not at all."""
    with pytest.raises(ScorerError, match="FakeScorer generates no answers for a benchmark"):
        open_generator(FakeScorer(tokenizer))
