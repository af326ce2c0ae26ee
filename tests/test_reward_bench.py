"""The reward bench: saved traces under every formula, spoilt traces, and the command itself on the shipped models.

A failure means that formulas are compared on other traces, groups, thresholds or texts than the table says, or that a
mistake of the user's is answered by a traceback.
"""

import itertools
import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_rl import runs
from context_rl.questions import Questions
from context_rl.rewards import ARMS, Reward
from context_rl.tasks import load_task
from context_rl.tasks.grading import grade_number
from context_rl.traces import QUESTIONS, SCHEMA, inputs_from_row, read_batches, read_questions, write_questions
from eval.rescoring import all_versions
from eval.reward_arms import Arms
from eval.saved_groups import Group, GroupSample, read_groups
from eval.variants import NUMBER, perturbed, shuffled, truncated
from recipes.reward_bench import main
from scorer import open_scorer

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "models" / "tiny-base")
TASK = load_task("symbolic", train_size=24, eval_size=2, seed=1)
SIZE = 4


# --- formulas of our own, named on the command line by their dotted path ---


def rightness(x) -> float:
    return float(x.correct)


def length(x) -> float:
    return float(x.trace_tokens)


def chance(x) -> float:
    return random.Random(x.trace).random()


# --- run folders ---


def made_rows(step: int, examples, rng: random.Random) -> list[dict]:
    """One generation batch as a run would have saved it; the log-probs are made up."""
    rows = []
    for example, number in itertools.product(examples, range(SIZE)):
        logprobs = [-rng.expovariate(1.0) for _ in range(2)]
        right, unscored = rng.random() < math.exp(sum(logprobs)), rng.random() < 0.05
        leaks = rng.random() < 0.5
        row = {
            "step": step,
            "example_id": example.id,
            "trace": f"try {number} of step {step}" + (f": {example.answer}" if leaks else ""),
            "trace_tokens": rng.randint(3, 9),
            "finished": rng.random() < 0.9,
            "token_logprobs": logprobs,
            "baseline_logprobs": [-1.0, -1.5],
            "masked_logprobs": [value - 0.5 for value in logprobs] if leaks else logprobs,
            "base_answer": example.answer if right else "1000",
            "correct": right,
            "reward": 0.0,
            "advantage": 0.0,
        }
        if unscored:
            names = ("token_logprobs", "baseline_logprobs", "masked_logprobs", "base_answer", "correct")
            row |= dict.fromkeys(names) | {"unscored": f"{example.id}: timeout after {step} s"}
        rows.append(row)
    return rows


def make_run(folder: Path, steps: int = 6, per_step: int = 8, processes: int = 1) -> Path:
    """A run of `steps` batches; with two processes a group lies across their files."""
    rng = random.Random(0)
    write_questions(folder / QUESTIONS, TASK.train)
    for step in range(steps):
        first = step * per_step % len(TASK.train)
        rows = made_rows(step + 1, TASK.train[first : first + per_step], rng)
        cut = len(rows) if processes == 1 else len(rows) // 2 + 1
        for process, part in enumerate([rows[:cut], rows[cut:]][:processes]):
            runs.write_traces(folder, step + 1, process, 0, part, SCHEMA)
    return folder


def report(folder: Path, *flags: str) -> dict:
    assert main([str(folder), *flags]) == 0
    return json.loads((folder / "reward_bench" / "reward_bench.json").read_text())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def found(run_folder) -> dict:
    names = [f"test_reward_bench.{name}" for name in ("rightness", "length", "chance")]
    return report(run_folder, *itertools.chain.from_iterable(("--reward", name) for name in names))


# --- statistics of saved traces ---


def test_the_report_is_complete_and_planted_facts_are_in_it(found, run_folder, capsys):
    """A formula of the catalogue or of the user's is missing, or facts that are known do not come out."""
    saved = found["saved"]
    assert saved["statistics"].keys() | saved["does_not_fit"].keys() == found["arms"].keys() >= ARMS.keys()
    assert all("option" in name or name == "judge_soft" for name in saved["does_not_fit"]), saved["does_not_fit"]
    own = {name.rpartition(".")[2]: s for name, s in saved["statistics"].items() if name.startswith("own: ")}
    assert own["rightness"]["auc"]["value"] == 1.0
    assert own["length"]["length"]["value"] == pytest.approx(1.0)
    low, high = own["chance"]["auc"]["ci"]
    assert low < 0.5 < high
    assert saved["statistics"]["masked_probability"]["masking"]["value"] == pytest.approx(0.0)
    assert saved["statistics"]["probability"]["masking"]["value"] > 0
    assert saved["statistics"]["binary"]["masking"]["value"] is None, "masking does not apply"
    text = (run_folder / "reward_bench" / "reward_bench.md").read_text()
    assert "`option_margin` does not fit: contrastive rewards need multiple-choice" in text
    assert (run_folder / "reward_bench" / "reward_bench.png").stat().st_size > 20_000
    pairs = {frozenset(pair["arms"]): pair["kind"] for pair in found["equivalence"]["pairs"]}
    assert pairs[frozenset(("probability", "probability_gain"))] == "identical"


def test_streaming_says_what_all_rows_at_once_say(found, run_folder):
    """A batch, a group or a row is lost, doubled or put into another group on the way through the files."""
    examples = read_questions(run_folder)
    groups: dict[tuple, list] = {}
    for rows in read_batches(run_folder):
        for row in rows:
            x = inputs_from_row(row, examples[row["example_id"]])
            groups.setdefault((row["step"], row["example_id"]), []).append(x)
    saved = found["saved"]
    assert saved["rows"] == sum(map(len, groups.values()))
    assert saved["groups"] == len(groups)
    assert saved["questions"] == len(TASK.train)
    for name in ("probability", "gain", "threshold_tiers", "masked_probability"):
        reward, aucs, spreads = Reward(ARMS[name]), [], []
        for members in groups.values():
            scored = [(reward.of(x), x.correct) for x in members if x is not None]
            pairs = [(a, b) for a, r in scored for b, s in scored if r and not s]
            if pairs:
                aucs.append(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
            if len(scored) > 1:
                spreads.append(len({np.float32(value) for value, _ in scored}) == 1)
        result = saved["statistics"][name]
        assert result["auc"]["groups"] == len(aucs) > 5
        assert result["auc"]["value"] == pytest.approx(sum(aucs) / len(aucs))
        assert result["no_spread"]["value"] == pytest.approx(sum(spreads) / len(spreads))


def test_a_group_across_two_files_is_one_group(found, tmp_path):
    """The traces of a question that two processes sampled are compared in two halves."""
    split = report(make_run(tmp_path / "run", processes=2))
    assert split["saved"]["groups"] == found["saved"]["groups"]
    for name, statistics in split["saved"]["statistics"].items():
        assert statistics == found["saved"]["statistics"][name], name


def test_unscored_rows_are_counted_and_count_nowhere(found):
    """A trace without a score becomes a reward of 0, or vanishes from the report."""
    saved = found["saved"]
    assert saved["unscored"] > 0
    assert saved["unscored_reasons"] == {"timeout after N s": saved["unscored"]}


def test_a_formula_that_fits_some_rows_only_is_listed_with_a_row(tmp_path):
    """A numeric reward is averaged over the numeric answers and looks as if it fitted all."""
    folder = make_run(tmp_path / "run")
    lines = runs.read_jsonl(folder / "questions.jsonl")
    lines[-1] |= {"answer": "a dozen", "question": "How many is that?"}
    runs.write_jsonl(folder / "questions.jsonl", lines)
    saved = report(folder)["saved"]
    assert "soft_numeric" not in saved["statistics"]
    assert "a dozen" in saved["does_not_fit"]["soft_numeric"]
    assert "probability" in saved["statistics"]


def test_multiple_choice_is_rewarded_by_its_options(tmp_path):
    """The options' log-probs are lost on the way, and the contrastive formulas never fit."""
    folder, rng = tmp_path / "run", random.Random(0)
    examples = [replace(example, choices=("yes", example.answer), label=1) for example in TASK.train[:8]]
    write_questions(folder / QUESTIONS, examples)
    rows = made_rows(1, examples, rng)
    for row in rows:
        row["option_logprobs"] = None if row["token_logprobs"] is None else [-1.0, sum(row["token_logprobs"])]
    runs.write_traces(folder, 1, 0, 0, rows, SCHEMA)
    saved = report(folder)["saved"]
    assert saved["does_not_fit"].keys() == {"judge_soft"}
    ranks_alike = saved["statistics"]["logprob_sum"]["auc"]
    assert saved["statistics"]["option_margin"]["auc"] == ranks_alike


def test_moving_thresholds_see_the_batches_in_order(run_folder):
    """A schedule stands still, or a running quantile begins anew with every batch."""
    arms, examples = Arms(ARMS), read_questions(run_folder)
    alone = {name: Reward(ARMS[name]) for name in ("threshold_linear", "threshold_quantile", "spread_filter")}
    batches = list(read_groups(run_folder, examples))
    for number, groups in enumerate(batches):
        together = np.concatenate([values for _, values, _ in arms.values(groups)], axis=1)
        rows = [x for group in groups for x in group.inputs]
        labels = [group.question for group in groups for _ in group.inputs]
        for name, reward in alone.items():
            expected = reward(rows, labels, number / len(batches))
            assert together[arms.names.index(name)].tolist() == [v for v in expected if v is not None], name


def test_masked_rewards_are_those_of_the_masked_reward(run_folder):
    """The table's masked column is not what `{"masked": {"of": ...}}` would pay."""
    arms, [groups, *_] = Arms(ARMS), read_groups(run_folder, read_questions(run_folder))
    found = arms.values(groups)
    rows = [x for group in groups for x in group.inputs if x is not None]
    labels = [group.question for group in groups for x in group.inputs if x is not None]
    masked = np.concatenate([part for _, _, part in found], axis=1)
    assert {"probability", "gain", "threshold_tiers", "hybrid_absolute_relative"} <= arms.maskable
    for name in arms.maskable:
        if arms.rewards[name].alone:
            expected = Reward({"masked": {"of": ARMS[name]}})(rows, labels)
            assert masked[arms.names.index(name)].tolist() == expected, name
    assert np.isnan(masked[arms.names.index("binary")]).all()


# --- the sample and its versions ---


def group_of(question: str, traces: list[str], key: str = "") -> Group:
    none = [None] * len(traces)
    return Group(key or question, question, 0.0, traces, [10] * len(traces), [True] * len(traces), none, none)


def test_the_sample_is_the_same_whatever_the_order():
    """Two benches of one run look at different groups, or a bench of a longer run at the early ones only."""
    groups = [group_of(f"q{i}", ["x"]) for i in range(100)]
    first = GroupSample(10, seed=0)
    for group in groups:
        first.offer(group)
    second = GroupSample(10, seed=0)
    for group in reversed(groups):
        second.offer(group)
    assert first.groups() == second.groups()
    assert len(first.groups()) == 10
    other = GroupSample(10, seed=1)
    for group in groups:
        other.offer(group)
    assert other.groups() != first.groups()
    assert max(int(g.question[1:]) for g in first.groups()) > 50


TEXTS = st.lists(st.sampled_from(["3", "12", "7.50", "1,200", "007", "birds", "legs,", "so\n", "=", "0"]), max_size=12)


@given(TEXTS.map(" ".join), st.integers(0, 3))
def test_perturbed_changes_every_number_and_nothing_else(trace, seed):
    """Some numbers survive (a right chain of sums is called spoilt), or words change as well."""
    changed = perturbed(trace, seed)
    assert changed == perturbed(trace, seed), "the same every time"
    before, after = NUMBER.findall(trace), NUMBER.findall(changed)
    if before:
        assert len(before) == len(after)
        assert NUMBER.sub("N", trace) == NUMBER.sub("N", changed)
        for old, new in zip(before, after, strict=True):
            a, b = (float(number.replace(",", "")) for number in (old, new))
            places = len(old.partition(".")[2])
            assert len(new.partition(".")[2]) == places
            assert 0 < abs(a - b) <= max(10**-places, a / 10) + 1e-9
            assert b >= 0
    elif trace.split():
        assert len(changed.split()) == len(trace.split()) - max(1, len(trace.split()) // 10)
    else:
        assert changed == ""


@pytest.mark.parametrize(
    ("trace", "pattern"),
    [
        ("1,2,3", r"\d,\d,\d"),
        ("$1,200.50", r"\$1,\d{3}\.\d\d"),
        ("007", r"00\d"),
        ("9" * 5000, r"9{4982}\d{18}"),
        ("x2 + 3.14", r"x\d \+ \d\.\d\d"),
    ],
)
def test_perturbed_numbers_are_written_as_they_were(trace, pattern):
    """Commas, zeros or decimals go, so that a spoilt trace is told by its form; or a huge number is a crash."""
    assert re.fullmatch(pattern, perturbed(trace))
    assert perturbed(trace) != trace


def test_truncated_is_the_first_half_of_the_words():
    """The half is of characters, or the second one, or white space is lost."""
    assert truncated("one two\nthree  four five") == "one two"
    assert truncated("one") == ""
    assert truncated("") == ""


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(0, 3))
def test_shuffled_never_gives_a_question_its_own_trace(ids, seed):
    """A shuffled trace is one of the same question, which helps: the drop is too small."""
    sources = shuffled(ids, seed)
    assert sources == shuffled(ids, seed)
    for place, source in enumerate(sources):
        assert (source is None) == (len(set(ids)) == 1)
        assert source is None or ids[source] != ids[place]


def test_versions_keep_groups_and_say_what_cannot_be_shuffled():
    """Traces land in another group, or a lone question is compared with itself."""
    groups = [group_of("a", ["one two three four", "5 and 6"]), group_of("b", ["seven"])]
    versions = all_versions(groups, seed=0)
    assert [group.traces for group in versions["original"]] == [("one two three four", "5 and 6"), ("seven",)]
    assert [group.traces for group in versions["truncated"]] == [("one two", "5"), ("",)]
    assert [group.traces for group in versions["empty"]] == [("", ""), ("",)]
    assert [group.tokens for group in versions["empty"]] == [(0, 0), (0,)]
    assert versions["shuffled"][0].traces == ("seven", "seven")
    assert versions["shuffled"][1].traces[0] in groups[0].traces
    lonely = all_versions(groups[:1], seed=0)["shuffled"][0]
    assert lonely.unscored == ["no other question in the sample"] * 2


def test_spoilt_traces_do_not_lower_the_threshold_they_are_held_to(run_folder):
    """A running quantile takes up the spoilt values, so that spoilt traces pass their own median."""
    batches = list(read_groups(run_folder, read_questions(run_folder)))
    groups = [group for batch in batches for group in batch]
    good = [[x for x in group.inputs if x is not None] for group in groups]
    bad = [[replace(x, token_logprobs=(-20.0, -20.0)) for x in members] for members in good]
    arms = Arms(ARMS)
    values = arms.steady(groups, {"original": good, "spoilt": bad})
    place = arms.names.index("threshold_quantile")
    assert sum(part[place].sum() for part in values["original"]) > 0
    assert sum(part[place].sum() for part in values["spoilt"]) == 0


# --- the command ---


@pytest.fixture(scope="module")
def honest_run(tmp_path_factory) -> Path:
    """A run whose traces are gold solutions, half ones and chatter, and whose scores are the shipped base model's."""
    folder = tmp_path_factory.mktemp("honest") / "run"
    examples = TASK.train[:12]
    scorer = open_scorer("local", model=BASE)
    questions = Questions(examples, grade_number, scorer)
    ids = [example.id for example in examples for _ in range(SIZE)]
    traces = [text for e in examples for text in (e.solution, truncated(e.solution), "I do not know.", e.solution)]
    rows = questions.assess(ids, traces, [len(trace.split()) for trace in traces], [True] * len(traces))
    scorer.close()
    write_questions(folder / QUESTIONS, examples)
    for step in range(2):
        part = slice(step * 6 * SIZE, (step + 1) * 6 * SIZE)
        runs.write_traces(folder, step + 1, 0, 0, [row.as_row(step + 1, 0.0, 0.0) for row in rows[part]], SCHEMA)
    (folder / "config.yaml").write_text("settings: {task: symbolic, scorer_template: raw, scale_rewards: group}\n")
    return folder


def test_the_command_scores_anew_and_good_rewards_fall(honest_run):
    """The base model sees other texts than the run's, or spoilt traces are not the ones that are scored."""
    found = report(honest_run, "--base", BASE, "--groups", "8")
    [base] = found["bases"]
    assert base["versions"]["original"]["rows"] == 8 * SIZE
    assert base["fingerprint"]["backend"] == "local"
    for version in ("shuffled", "truncated", "empty", "perturbed"):
        for name in ("probability", "logprob_sum", "binary"):
            estimate = base["drops"][version][name]
            assert estimate["groups"] == 8
            assert estimate["value"] > 0, (version, name)
        assert base["versions"][version]["accuracy"] < base["versions"]["original"]["accuracy"]
    [pair] = found["agreement"]
    assert pair["scorers"] == ["saved", BASE]
    assert pair["arms"]["probability"]["value"] == pytest.approx(1.0, abs=0.02), "the same model, the same texts"
    everything = report(honest_run, "--base", BASE, "--groups", "0")
    assert everything["bases"][0]["versions"]["original"]["rows"] == 12 * SIZE


def test_a_fresh_sample_is_benched_like_a_run(tmp_path, monkeypatch):
    """--fresh writes a folder that the bench itself cannot read, or ignores the recipe's flags."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "fresh"
    flags = ["--output_dir", str(folder), "--num_generations", "4", "--max_completion_length", "24"]
    flags += ["--per_device_train_batch_size", "16", "--train_questions", "16", "--cpu_threads", "2"]
    assert main(["--groups", "6", "--fresh", "recipes/symbolic.yaml", *flags]) == 0
    found = json.loads((folder / "reward_bench" / "reward_bench.json").read_text())
    assert (found["saved"]["groups"], found["saved"]["rows"]) == (6, 24)
    assert report(folder)["saved"] == found["saved"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no questions.jsonl in it; name the folder of a run"),
        (lambda f: shutil.rmtree(f / "traces"), "no traces/step-*.parquet in it"),
        (lambda f: (f / "traces" / "step-000001-000-00.parquet").write_text("x"), "step-000001-000-00.parquet: cannot"),
        (lambda f: write_questions(f / QUESTIONS, TASK.train[:1]), "questions.jsonl has no"),
        (lambda f: (f / "config.yaml").write_text("settings"), "config.yaml: no readable `settings`"),
        (lambda f: bad_row(f), "row 2 (step 2, "),
        (lambda f: runs.write_traces(f, 1, 0, 0, [{"step": 1, "example_id": "x"}]), "no column 'trace'"),
    ],
)
def test_an_error_of_the_users_is_one_line(tmp_path, capsys, spoil, message):
    """A broken folder is a traceback, or a message that does not say which file and row."""
    folder = make_run(tmp_path / "run", steps=2, per_step=2)
    spoil(folder)
    assert main([str(folder)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def bad_row(folder: Path) -> None:
    rows = made_rows(2, TASK.train[:2], random.Random(3))
    rows[2]["token_logprobs"] = [0.5]
    runs.write_traces(folder, 2, 0, 0, rows, SCHEMA)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either the folder of a run or --fresh"),
        (["RUN", "--fresh"], "give either"),
        (["RUN", "--reward", "no_such"], "no reward is called 'no_such'"),
        (["RUN", "--reward", "{gated: {of: gain}}"], "clip it first"),
        (["RUN", "--reward", "{"], "neither a name nor JSON"),
        (["RUN", "--groups", "-1"], "--groups is -1"),
        (["RUN", "--base", "no/such/model"], "no/such/model"),
        (["RUN", "--base", BASE, "--template", "chat"], "has no chat template; use raw"),
        (["RUN", "--base", BASE, BASE], "--base names a model twice"),
        (["RUN", "--base", "a", "b", "--scorer", "vllm", "--scorer_url", "http://x"], "serves one model"),
        (["RUN", "--groups", "many"], "invalid int value"),
    ],
)
def test_a_wrong_flag_is_one_line(run_folder, capsys, flags, message):
    """A wrong option is argparse's page of usage, or a traceback."""
    assert main([str(run_folder) if flag == "RUN" else flag for flag in flags]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
