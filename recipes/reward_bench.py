"""Which reward formula ranks traces as it should? Rewards a run's saved traces under all of them, without training.

    python -m recipes.reward_bench RUN [--base MODEL ...] [--reward SPEC ...] [--groups N] [--out FOLDER]
    python -m recipes.reward_bench [options] --fresh [recipe.yaml] [--key value ...]

RUN is a run folder: the formulas of `context_rl.rewards.ARMS` are computed from the log-probs that it holds. With base
models a sample of its groups is scored anew by each of them, as it is and in four spoilt versions (`eval.variants`),
which a good reward pays less. `--fresh` (everything after it is a recipe and its flags, as for train_context.py) first
samples one batch of groups from the untrained context model, scored by the recipe's own base model, and benches that.
Writes reward_bench.md, .json and .png into RUN/reward_bench/.

The files are read once, one generation batch at a time, and memory does not grow with the rows (with `--groups 0` it
does: eight bytes a rescored trace, formula and base model). Formulas whose threshold moves see the batches in order,
with batch number / number of batches as the share of training done. On the sample their window or running mean is
filled with the original traces first and then stays where these left it, so that spoilt traces cannot lower the
threshold they are held to.
"""

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train_context.py

import numpy as np
import transformers
import yaml
from accelerate import PartialState

from context_rl import runs
from context_rl.config import Options, parse
from context_rl.experiment import ENDLESS, USER_ERRORS, check_template, prepare
from context_rl.judge import Judging
from context_rl.questions import Questions
from context_rl.rewards import Spec
from context_rl.rewards.equivalence import compare_arms, explain
from context_rl.rollout import stop_strings
from context_rl.tasks import DataError, Example, load_task
from context_rl.tasks.grading import grade_number_or_text
from context_rl.traces import QUESTIONS, SCHEMA, read_questions, write_questions
from context_rl.training import trace_prompt
from eval.conditions import generate_traces
from eval.rescoring import Sample, agreement, collect, estimates, rescore, saved_rewards
from eval.reward_arms import Arms, arms_of
from eval.reward_plots import as_markdown, plot_bench
from eval.reward_stats import GroupStatistics, cluster_of
from eval.saved_groups import Group, GroupSample, Tally, read_groups
from scorer import BACKENDS, open_scorer

DEFAULT_RECIPE = Path(__file__).with_name("symbolic.yaml")
BLOCK = 256
"""Groups that are scored in all versions before the next ones."""
COMPARED = 256
"""Groups by which formulas that GRPO cannot tell apart are found."""


# --- the bench ---


def bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that reward_bench.json holds."""
    settings = settings_of(folder)
    examples = read_questions(folder)
    specs = arms_of(options.reward)
    cluster, clusters = cluster_of(examples)

    arms, tally, kept = Arms(specs), Tally(), GroupSample(options.groups if options.base else 0, options.seed)
    statistics = GroupStatistics(arms.names, clusters)
    compared: list[Group] = []
    for groups in read_groups(folder, examples):
        tally.add(groups)
        collect(statistics, cluster, arms, groups)
        whole = [group for group in groups if None not in group.inputs]
        compared += whole[: COMPARED - len(compared)]
        for group in groups:
            kept.offer(group)
    scale = str(settings.get("scale_rewards", "group"))
    result: dict[str, Any] = {
        "run": str(folder),
        "scale_rewards": scale,
        "seed": options.seed,
        "arms": {name: {"reward": specs[name], "reads_rightness": arms.reads_rightness(name)} for name in specs},
        "saved": {
            **tally.as_dict(),
            "does_not_fit": arms.unfit,
            "statistics": estimates(statistics.results(), arms.unfit),
        },
        "bases": [],
        "agreement": [],
        "equivalence": equivalence(specs, arms.unfit, scale, compared),
    }
    if not options.base:
        return result

    def blocks() -> Iterator[list[Group]]:
        chosen = iter(kept.groups())
        if options.groups == 0:
            chosen = (group for batch in read_groups(folder, examples) for group in batch)
        while block := list(itertools.islice(chosen, BLOCK)):
            yield block

    traces = sum(len(group.traces) for group in kept.groups()) if options.groups else tally.rows
    sample = Sample(specs, blocks, traces, cluster, clusters, options.seed)
    values = {"saved": saved_rewards(sample)}
    unfit = dict(arms.unfit)
    for model in options.base:
        found, values[model] = scored_by(model, sample, options, settings, examples)
        result["bases"].append(found)
        unfit |= found["does_not_fit"]
    result["agreement"] = agreement(sample, values, unfit)
    return result


def scored_by(
    model: str,
    sample: Sample,
    options: argparse.Namespace,
    settings: Mapping[str, Any],
    examples: Mapping[str, Example],
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a base model makes of the sample; it is opened and closed here, so that one at a time is in memory."""
    template = options.template or settings.get("scorer_template") or "raw"
    scorer = open_scorer(
        options.scorer,
        model=model,
        dtype=options.dtype,
        url=options.scorer_url,
        python=options.scorer_python,
        memory=options.scorer_memory,
    )
    try:
        check_template("template", template, model, scorer.tokenizer)
        asked, grade = with_grader(examples, settings)
        # Five versions of every trace would be five verdicts: where a judge grades, none is asked here.
        judging = Judging(None) if settings.get("grader") == "judge" else None
        limit = options.max_answer_tokens or settings.get("max_answer_tokens")
        chat = template == "chat"
        questions = Questions(asked, grade, scorer, chat=chat, max_answer_tokens=limit, judging=judging)
        found, values = rescore(sample, questions, model)
        return {"model": model, "template": template, "fingerprint": scorer.fingerprint, **found}, values
    finally:
        scorer.close()


def with_grader(
    examples: Mapping[str, Example], settings: Mapping[str, Any]
) -> tuple[list[Example], Callable[[str, Example], bool]]:
    """The questions and the grader of their task.

    Every task grades as number or text but reasoning-gym's, whose graders need the generator's own entries.

    Raises:
        DataError: the generator does not make these questions again.
    """
    task = str(settings.get("task", ""))
    if not task.startswith("rg:"):
        return list(examples.values()), grade_number_or_text
    made = load_task(
        task,
        train_size=settings.get("train_questions") or ENDLESS,
        eval_size=0,
        seed=settings["seed"],
        task_options=settings.get("task_options"),
    )
    again = {example.id: example for example in made.train}
    for name, example in examples.items():
        if name not in again or again[name].question != example.question:
            raise DataError(f"{name}: {task} no longer makes this question; use the reasoning-gym that the run had")
    return [again[name] for name in examples], made.grade


def settings_of(folder: Path) -> dict[str, Any]:
    """The run's settings; empty for a folder that has traces and questions only."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: no readable `settings` in it; put the run's own file back") from error


def equivalence(
    specs: Mapping[str, Spec], unfit: Mapping[str, str], scale: str, groups: Sequence[Group]
) -> dict[str, Any] | None:
    """The formulas that GRPO cannot tell apart, by argument and on these traces; None where there are no whole groups.

    Pairs that only rank alike (kind "order"), or that data tell apart against the formulas, train differently: they are
    listed, not explained.
    """
    if not groups:
        return None
    size = Counter(len(group.inputs) for group in groups).most_common(1)[0][0]
    rows = [x for group in groups if len(group.inputs) == size for x in group.inputs]
    found = compare_arms({name: spec for name, spec in specs.items() if name not in unfit}, [scale], rows, size)
    return {
        "groups": len(rows) // size,
        "explanation": explain([pair for pair in found if pair[3].kind in ("identical", "epsilon", "factor")]),
        "pairs": [{"arms": [a, b], "kind": v.kind, "reason": v.reason, "largest": v.largest} for a, b, _, v in found],
    }


# --- a fresh sample ---


def sample_fresh(argv: Sequence[str], count: int) -> Path:
    """A folder like a run's with one batch by the untrained q: `num_generations` traces of `count` questions each."""
    config, args, model_config = parse([*argv, "--no_evaluate"], DEFAULT_RECIPE)
    asked_for = None if args.output_dir in (None, "trainer_output") else args.output_dir
    name = f"{config.task.replace(':', '-')}-fresh-seed{args.seed}"
    folder = runs.run_folder(asked_for, name, resume=False)
    args.output_dir = str(folder)
    with prepare(config, args, model_config) as experiment:
        examples = experiment.task.train[: count or None]
        rows = [example for example in examples for _ in range(args.num_generations)]
        traces = generate_traces(
            experiment.model.to(PartialState().device),
            experiment.tokenizer,
            [trace_prompt(config, example) for example in rows],
            sample=True,
            max_new_tokens=args.max_completion_length,
            stops=stop_strings(config),
            seed=args.seed,
            description="traces of the untrained model",
        )
        tokens = [len(ids) for ids in experiment.tokenizer(traces, add_special_tokens=False)["input_ids"]]
        finished = [length < args.max_completion_length for length in tokens]
        found = experiment.questions.assess([example.id for example in rows], traces, tokens, finished)
        data = {"train": runs.rows_digest((e.id, e.question, e.answer) for e in examples)}
        description = runs.describe((config, args, model_config), experiment.questions.scorer.fingerprint, data)
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(folder / "config.yaml", yaml.safe_dump(description, sort_keys=False))
        write_questions(folder / QUESTIONS, examples)
        if (judge := experiment.questions.judging.judge) is not None:
            judge.keep(folder)
        runs.write_traces(folder, 0, 0, 0, [trace.as_row(0, None, 0.0) for trace in found], SCHEMA)
    return folder


# --- the command ---


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Options(
        prog="python -m recipes.reward_bench",
        description="Rewards a run's saved traces under every formula, without training.",
    )
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="a run folder")
    add("--out", type=Path, help="where to write; unset: RUN/reward_bench")
    add("--reward", action="append", default=[], metavar="SPEC", help="one more: a name, or a mapping in JSON or YAML")
    add("--base", nargs="+", default=[], metavar="MODEL", help="base models that score a sample anew, in all versions")
    add("--groups", type=int, default=256, help="size of the sample, and of a fresh one; 0: all (default 256)")
    add("--seed", type=int, default=0, help="of the sample and of the spoilt versions")
    add("--scorer", choices=BACKENDS, default="local", help="how the base models are run")
    add("--dtype", default="float32", help="of the base models: float32 | bfloat16 | float16 | auto")
    add("--template", choices=("raw", "chat"), help="unset: the run's own scorer_template")
    add("--max_answer_tokens", type=int, help="unset: the run's own")
    add("--scorer_python", help="vllm: interpreter of the server's environment")
    add("--scorer_url", nargs="+", help="vllm: running servers of the one base model")
    add("--scorer_memory", type=float, help="vLLM of ours: share of the GPU's memory")
    add("--fresh", nargs=argparse.REMAINDER, help="last: sample anew with [recipe.yaml] [--key value ...]")
    options = parser.parse_args(argv)
    if (options.run is None) == (options.fresh is None):
        parser.error("give either the folder of a run or --fresh with a recipe")
    if options.groups < 0:
        parser.error(f"--groups is {options.groups}; it must be 0 (all) or more")
    if options.scorer_url and len(options.base) > 1:
        parser.error("--scorer_url serves one model; give one --base, or leave the URL out")
    if len(set(options.base)) != len(options.base):
        parser.error("--base names a model twice")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; an error that a user can mend is one line, and the exit code 1."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        folder = sample_fresh(options.fresh, options.groups) if options.fresh is not None else options.run
        result = bench(folder, options)
        out = options.out or folder / "reward_bench"
        out.mkdir(parents=True, exist_ok=True)
        text = as_markdown(result)
        runs.write_atomically(out / "reward_bench.json", json.dumps(result, indent=1) + "\n")
        runs.write_atomically(out / "reward_bench.md", text)
        plot_bench(result, out / "reward_bench.png")
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    print(f"written to {out}: reward_bench.md, .json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
