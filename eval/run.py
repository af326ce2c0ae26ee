"""How much do the traces help? One benchmark, several conditions on the same questions, any number of base models.

    python -m eval.run --run RUN [RUN ...]      # finished runs, seeds of one arm: their task, base model and both q's
    python -m eval.run --task gsm8k --base Qwen/Qwen2.5-1.5B --untrained Qwen/Qwen2.5-0.5B-Instruct --trained FOLDER
    python -m eval.run --task hellaswag --data FOLDER --base A B C --trained FOLDER     # the same traces, three readers

Traces are written once, kept in OUT/traces/, and read by every base model; what it made of a condition is kept in
OUT/rows/. Both are found again by a digest of all that they depend on, so the same command goes on where it was cut
and another base model costs no new traces.

    OUT/report.md, result.json     the tables, and the same as JSON (written last)
    OUT/traces.html                every question with its traces, to read
    OUT/traces/, OUT/rows/         one JSON line a trace, a row
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import transformers

from context_rl import prompts, runs
from context_rl.experiment import USER_ERRORS, load_causal_model
from context_rl.judge import Judge, check_verdicts
from context_rl.rewards.safeguards import mask_answer
from context_rl.tasks import DataError
from eval.benchmarks import Benchmark, Row, load_benchmark
from eval.conditions import Written, shuffle_between_questions, write_traces
from eval.help_report import as_markdown, seeds_markdown, summarise_base, summarise_seeds
from eval.run_options import MAX_UNSCORED, parse_options, possible, settled
from eval.trace_facts import WITHOUT_DECODING
from eval.trace_page import write_page
from scorer import open_scorer
from scorer.checks import revision, weights_digest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation; an error that a user can mend is one line, and the exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        if options.run is not None and len(options.run) > 1:
            over_seeds(options)
        else:
            run(settled(options, options.run[0] if options.run else None))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def over_seeds(options: argparse.Namespace) -> None:
    """The evaluation of each run in its own folder, and what they say together: would other seeds agree?"""
    by_run, task = {}, ""
    for folder in options.run:
        mine = settled(options, folder)
        mine.out = options.out / folder.name if options.out else mine.out
        by_run[str(folder)], task = run(mine), mine.task
    out = options.out or Path("eval_runs") / f"{task.replace(':', '-')}-{len(by_run)}-runs"
    found = summarise_seeds(by_run)
    text = seeds_markdown(task, list(by_run), found)
    out.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(out / "seeds.md", text)
    runs.write_atomically(out / "seeds.json", json.dumps({"runs": list(by_run), **found}, indent=1) + "\n")
    print(text)
    print(f"written to {out}: seeds.md, seeds.json")


def run(options: argparse.Namespace) -> list[Row]:
    """Traces, then every base model's reading of them, then the report; the first base model's rows."""
    judge = open_judge(options)
    benchmark = load_benchmark(
        options.task,
        data=options.data,
        eval_data=options.eval_data,
        question_column=options.question_column,
        answer_column=options.answer_column,
        limit=options.questions,
        fewshot=options.fewshot,
        chat=options.template == "chat",
        max_answer_tokens=options.max_answer_tokens,
        task_options=options.task_options,
        judge=judge,
    )
    if len(benchmark.questions) < 2:
        raise DataError(f"{benchmark.name}: {len(benchmark.questions)} questions, and an evaluation needs at least 2")
    if judge is not None:
        judge.keep(options.out)
        first = benchmark.questions[0]
        benchmark.notes.extend(judge.check(["hard"], first.question, first.answer))
    for note in benchmark.notes:
        print(f"note: {note}")
    conditions = possible(options, benchmark)
    writers = Writers(options, benchmark)
    result: dict[str, Any] = {
        "task": benchmark.name,
        "questions": len(benchmark.questions),
        "conditions": conditions,
        "samples": options.samples,
        "notes": benchmark.notes,
        "bases": {},
    }
    pages: list[Row] = []
    for base in options.base:
        rows, tables = read_by(base, options, benchmark, conditions, writers)
        result["bases"][base] = summarise_base(rows, tables)
        pages = pages or rows
    options.out.mkdir(parents=True, exist_ok=True)
    text = as_markdown(result)
    runs.write_atomically(options.out / "report.md", text)
    write_page(pages, options.out / "traces.html", f"{benchmark.name}: traces read by {options.base[0]}")
    runs.write_atomically(options.out / "result.json", json.dumps(result, indent=1) + "\n")
    print(as_markdown(result, short=True))
    print(f"everything is in {options.out}: report.md, result.json, traces.html, traces/, rows/")
    return pages


def open_judge(options: argparse.Namespace) -> Judge | None:
    """Who says what is right, if it is not the task's own rule."""
    if options.grader == "task":
        return None
    return Judge(options.judge_url, options.judge_model, options=options.judge_options, **options.judge_limits)


def decodings(condition: str, samples: int) -> list[tuple[str, int]]:
    """(decoding, sample) pairs of a condition: greedy once, sampled k times; without a decoding once."""
    if condition in WITHOUT_DECODING:
        return [("greedy", 0)]
    return [("greedy", 0), *(("sampled", k) for k in range(samples))]


# --- traces ---


class Writers:
    """Who writes the traces, and where they are kept."""

    def __init__(self, options: argparse.Namespace, benchmark: Benchmark):
        self.options, self.benchmark = options, benchmark
        self.loaded: tuple[str, Any, Any] | None = None

    def traces(self, condition: str, decoding: str, sample: int, base: str) -> list[Written | None]:
        """What stands in the trace's place, one a question; None is no trace."""
        questions = self.benchmark.questions
        if condition == "none":
            return [None] * len(questions)
        if condition == "gold":
            return [Written(q.solution or "", True) for q in questions]
        if condition in ("shuffled", "masked"):
            trained = self.written_by(self.options.trained, decoding, sample)
            if condition == "shuffled":
                return list(shuffle_between_questions(trained))
            return [replace(t, text=mask_answer(t.text, q.answer)) for t, q in zip(trained, questions, strict=True)]
        model = {"untrained": self.options.untrained, "trained": self.options.trained, "own": base}[condition]
        return list(self.written_by(model, decoding, sample))

    def written_by(self, model: str, decoding: str, sample: int) -> list[Written]:
        """One trace a question by this model, from OUT/traces/ if they are there."""
        options = self.options
        chat = options.template == "chat" if model in options.base else options.context_template == "chat"
        asked = [self.prompt(q.prompt or q.question, chat) for q in self.benchmark.questions]
        key = digest(identity(model), asked, decoding, sample, options.seed, options.max_trace_tokens)
        path = options.out / "traces" / f"{Path(model).name}.{decoding}{sample}.{key}.jsonl"
        if path.exists():
            return [Written(row["trace"], row["finished"]) for row in runs.read_jsonl(path)]
        q, tokenizer = self.load(model)
        traces = write_traces(
            q,
            tokenizer,
            asked,
            sample=decoding == "sampled",
            max_new_tokens=options.max_trace_tokens,
            stops=() if chat else prompts.STOP_STRINGS,
            seed=options.seed + sample,
            description=f"traces by {Path(model).name}, {decoding} {sample + 1}",
        )
        rows = zip(self.benchmark.questions, traces, strict=True)
        runs.write_jsonl(path, [{"id": q.id, "trace": t.text, "finished": t.finished} for q, t in rows])
        return traces

    @staticmethod
    def prompt(question: str, chat: bool) -> str | list[dict[str, str]]:
        return prompts.trace_messages(question) if chat else prompts.trace_text(question)

    def load(self, model: str) -> tuple[Any, Any]:
        """A model that writes, on the GPU if there is one; one at a time."""
        if self.loaded is None or self.loaded[0] != model:
            self.loaded = None  # the one before makes room
            dtype = getattr(torch, self.options.dtype) if self.options.dtype != "auto" else "auto"
            q, tokenizer = load_causal_model(model, "which is to write traces", dtype=dtype)
            self.loaded = (model, q.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
        return self.loaded[1], self.loaded[2]


# --- reading ---


def read_by(
    base: str, options: argparse.Namespace, benchmark: Benchmark, conditions: Sequence[str], writers: Writers
) -> tuple[list[Row], dict[str, Any]]:
    """All rows of one base model and the harness's own numbers of them, from OUT/rows/ where they are there."""
    jobs = [(c, d, k) for c in conditions for d, k in decodings(c, options.samples)]
    written = {job: writers.traces(*job, base) for job in jobs}
    traces = {job: [t and t.text for t in found] for job, found in written.items()}
    judged = options.grader == "judge"
    setting = (
        identity(base),
        options.dtype,
        options.scorer,
        options.template,
        options.max_answer_tokens,
        options.fewshot,
        *((options.judge_model, options.judge_options, options.judge_limits.get("max_tokens")) if judged else ()),
    )
    asked = [(q.id, q.question, q.answer) for q in benchmark.questions]
    paths = {
        job: options.out
        / "rows"
        / f"{Path(base).name}.{job[0]}.{job[1]}{job[2]}.{digest(*setting, asked, traces[job])}.jsonl"
        for job in jobs
    }
    writers.loaded = None  # the base model may need the memory
    missing = [job for job in jobs if not paths[job].exists()]
    if missing:
        scorer = open_scorer(
            options.scorer,
            model=base,
            dtype=options.dtype,
            url=options.scorer_url,
            python=options.scorer_python,
            memory=options.scorer_memory,
        )
        try:
            for condition, decoding, sample in missing:
                job = (condition, decoding, sample)
                name = f"{Path(base).name} reads {condition}, {decoding} {sample + 1}"
                rows = benchmark.rows(scorer, traces[job], name)
                check_verdicts(rows, MAX_UNSCORED)
                marks = {"condition": condition, "decoding": decoding, "sample": sample}
                pairs = zip(rows, written[job], strict=True)
                marked = [{**row, **marks, **about(trace, scorer.tokenizer)} for row, trace in pairs]
                if name in benchmark.aggregated:
                    text = json.dumps(benchmark.aggregated.pop(name), indent=1, default=str)
                    paths[job].parent.mkdir(parents=True, exist_ok=True)
                    runs.write_atomically(paths[job].with_suffix(".harness.json"), text + "\n")
                runs.write_jsonl(paths[job], marked)
        finally:
            scorer.close()
    kept = {" ".join(map(str, job)): paths[job].with_suffix(".harness.json") for job in jobs}
    tables = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in kept.items() if path.exists()}
    return [row for job in jobs for row in runs.read_jsonl(paths[job])], tables


def about(trace: Written | None, tokenizer: Any) -> Row:
    """A trace's length in the base model's tokens, whoever wrote it, and whether its writer came to an end."""
    if trace is None:
        return {"trace_tokens": None, "finished": None}
    tokens = len(tokenizer(trace.text, add_special_tokens=False)["input_ids"])
    return {"trace_tokens": tokens, "finished": trace.finished}


@lru_cache
def identity(model: str) -> str:
    """A model by its name and its weights, which are read once: a second a gigabyte."""
    return f"{model} {weights_digest(model) or revision(model) or ''}"


def digest(*parts: Any) -> str:
    """Short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
