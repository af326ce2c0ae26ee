"""From data to validated examples. Every name says what must hold; the docstring, which bug its failure means."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import given, settings
from hypothesis import strategies as st

from context_rl.tasks import DataError, Example, load_task, rg, splits, symbolic
from context_rl.tasks.grading import as_number, normalise, same_number, same_text

ALL = {"train_size": None, "eval_size": None, "seed": 0}


def write(path: Path, *lines: str, end: str = "\n") -> str:
    path.write_bytes(end.join((*lines, "")).encode())
    return str(path)


def jsonl(path: Path, *rows: dict) -> str:
    return write(path, *(json.dumps(row) for row in rows))


def rows(n: int, start: int = 0) -> list[dict]:
    return [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(start, start + n)]


def answers(data: str, **flags) -> list[str]:
    """Answers in the file's order, whichever part they went to."""
    task = load_task("qa", data=data, **ALL, **flags)
    return [e.answer for e in sorted(task.train + task.held_out, key=lambda e: int(e.id.rpartition(":")[2]))]


def error(task: str = "qa", **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load_task(task, **{**ALL, **kwargs})
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- grading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("1200", "1,200"), ("5", "$5"), ("72", "72.0"), ("72", "72."), ("72", " 72 "), ("0.75", "3/4"), ("3/4", "0.75"),
        ("50%", "50%"), ("50", "50%"), ("0.5", "50%"), ("50%", "0.5"), ("-5", "-$5"), ("-5", "$-5"), ("-5", "\u22125"),
        ("72", "7.2e1"), ("72", "**72**"), ("72", '"72"'), ("0.5", ".5"), ("12", "12 €"), ("72", "\\$72"),
        ("72", "The answer is 72."), ("72", "x = 72"), ("72", "\\boxed{72}"), ("72", "$\\frac{144}{2}$"), ("72", "072"),
        ("72", "72 apples"), ("72", "48 + 24 = 72"), ("1/3", "0.333333"), ("1/3", "2/6"),
    ],
)  # fmt: skip
def test_an_equal_number_is_right_however_it_is_written(gold, text):
    """Failing: right answers count as wrong, and binary reward and accuracy are too low."""
    assert same_number(gold, text)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("72", "73"), ("72", "-72"), ("72", "720"), ("72", "7"), ("72", "72.0001"), ("72", ""), ("72", "seventy"),
        ("50%", "0.5%"), ("50%", "5"), ("72", "72 - 10 = 62"), ("72", "72, then 10"), ("1/3", "0.33"), ("5", "5/0"),
        ("72", "9^9^9^9"), ("72", "$((((((((((72))))))))))$"), ("72", "x"), ("72", "72!"), ("1200", "1.200"),
        ("72", "nan"), ("72", "1e999"), ("8", "2**3**2"),
    ],
)  # fmt: skip
def test_another_number_is_wrong(gold, text):
    """Failing: wrong answers are rewarded."""
    assert not same_number(gold, text)


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_are_equal_exactly_when_they_are(a, b):
    """Failing: the fast path calls different numbers equal, or equal ones different."""
    assert same_number(str(a), f"{b:,}") == (a == b)
    assert same_number(str(a), f"{a}.00")
    assert as_number(f"{a:,}") == a


@settings(deadline=None)
@given(st.fractions(max_denominator=999), st.decimals(-1000, 1000, places=3))
def test_fractions_and_decimals_are_compared_exactly(fraction, decimal):
    """Failing: a float slipped in between (0.1 + 0.2)."""
    text = f"{fraction.numerator}/{fraction.denominator}"
    assert same_number(text, text)
    assert same_number(f"{decimal:f}", f"{Decimal(decimal) * 100:f}%")


@settings(max_examples=300, deadline=10_000)
@given(st.text(alphabet="0123456789.,-+*/^!=()[]{}$%\\ abcxfrt", max_size=60))
def test_no_answer_line_breaks_or_stalls_a_grader(text):
    """Failing: one strange line from the base model stops the training run, or hangs it."""
    assert same_number("72", text) in (True, False)
    assert same_text("72", text) in (True, False)
    number = as_number(text)
    assert number is None or abs(number) < float("inf")


def test_expressions_that_never_finish_are_not_evaluated():
    """Failing: Math-Verify is given a power tower; off the main thread nothing would ever stop it."""
    began = time.perf_counter()
    for text in ("9^9^9^9", "$9^{9^{9^{9}}}$", "9**9**9**9", "$100000000!$", "$" + "(" * 40 + "1" + ")" * 40 + "$"):
        assert not same_number("7", text)
    assert time.perf_counter() - began < 1


def test_math_verify_works_off_the_main_thread():
    """Failing: grading in a reward thread raises, because signal.alarm wants the main thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(same_number("31", "the answer is 31 in a thread")))
    thread.start()
    thread.join()
    assert results == [True]


def test_a_thousand_plain_gradings_take_less_than_50_ms():
    """Failing: plain numbers go through Math-Verify, and grading slows every step."""
    pairs = [(str(n * 37), f"{n * 41 + 5:,}") for n in range(1000)]
    began = time.process_time()
    for gold, text in pairs:
        same_number(gold, text)
    assert time.process_time() - began < 0.05


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,200", 1200.0), ("$5", 5.0), ("3/4", 0.75), ("50%", 50.0), ("-2.5", -2.5), ("it is 7", 7.0), ("x = 7", 7.0),
     ("", None), ("seven", None), ("nan", None), ("inf", None), ("1/0", None)],
)  # fmt: skip
def test_a_number_is_read_from_an_answer_line(text, number):
    """Failing: the soft numeric reward measures a distance to a number that is not there."""
    assert as_number(text) == number


def test_as_number_agrees_with_the_grader():
    """Failing: a line that is graded right is far from the gold number for the soft reward."""
    for text in ("72", "72.0", "x = 72", "72 apples", "\\boxed{72}", "72 %", "48 + 24 = 72"):
        assert same_number("72", text)
        assert as_number(text) == 72.0


@pytest.mark.parametrize(
    ("gold", "text"),
    [("Paris", "paris."), ("Eiffel Tower", "The Eiffel Tower"), ("O'Neill", "ONeill"), ("A", "(A)"), ("B", "b."),
     ("New  York", "New York"), ("Öl", "öl"), ("café", "cafe\u0301"), ("1,200 km", "1200 km"), ("...", "...")],
)  # fmt: skip
def test_text_is_right_whatever_its_case_punctuation_and_leading_article(gold, text):
    """Failing: right answers count as wrong."""
    assert same_text(gold, text)


@pytest.mark.parametrize(
    ("gold", "text"),
    [("1.5 km", "15 km"), ("-5 C", "5 C"), ("C#", "C"), ("C++", "C"), ("vitamin A", "vitamin"), ("A", "the"),
     ("A", ""), ("...", "!"), ("...", ""), ("Paris", "Paris, Texas"), ("3:15", "315"), ("10²", "102"), ("a", "an")],
)  # fmt: skip
def test_text_that_differs_in_meaning_is_wrong(gold, text):
    """Failing: normalising removed what tells answers apart, as SQuAD's own rules do."""
    assert not same_text(gold, text)


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda t: t.strip()))
def test_normalising_is_stable_and_never_empties_a_text(text):
    """Failing: two different answers both become the empty string and are called equal."""
    assert normalise(text)
    assert same_text(text, f"  {text}\n")


# --- symbolic -----------------------------------------------------------------------------------------------------


def test_symbolic_holds_the_same_questions_out_for_every_seed():
    """Failing: runs with different seeds are compared on different questions."""
    one, two = (load_task("symbolic", train_size=200, eval_size=50, seed=seed) for seed in (0, 5))
    assert one.held_out == two.held_out
    assert [e.question for e in one.train] != [e.question for e in two.train]
    assert one == load_task("symbolic", train_size=200, eval_size=50, seed=0)


def test_symbolic_keeps_train_and_held_out_apart():
    """Failing: the evaluation asks what was trained on, or asks twice."""
    task = load_task("symbolic", train_size=1000, eval_size=200, seed=1)
    train, held_out = ({e.question for e in part} for part in (task.train, task.held_out))
    assert (len(train), len(held_out)) == (1000, 200)
    assert not any(map(symbolic.is_held_out, train))
    assert all(map(symbolic.is_held_out, held_out))
    assert len({e.id for e in task.train + task.held_out}) == 1200


def test_symbolic_has_solutions_that_end_in_the_answer():
    """Failing: the gold condition of the evaluation shows wrong reasoning."""
    for example in load_task("symbolic", train_size=100, eval_size=0, seed=2).train:
        assert example.solution.endswith((f", {example.answer} so far.", f"{example.answer} legs."))


def test_a_smaller_evaluation_takes_the_first_questions_of_a_larger_one(tmp_path):
    """Failing: results at two evaluation sizes share no questions."""
    data = jsonl(tmp_path / "my.jsonl", *rows(50))
    for kwargs in ({"task": "symbolic"}, {"task": "rg:chain_sum"}, {"task": "qa", "data": data}):
        small, large = (load_task(**kwargs, train_size=5, eval_size=n, seed=0).held_out for n in (3, 8))
        assert small == large[:3]


# --- gsm8k --------------------------------------------------------------------------------------------------------

GSM_ROW = {
    "question": " Natalia sold clips. How many? ",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nTogether <<48*1000+24=48024>>48024.\n#### 48,024",
}


def test_gsm8k_scores_the_number_alone_and_keeps_the_reasoning_apart(tmp_path):
    """Failing: the rationale leaks into the scored span, or calculator marks into the solution."""
    jsonl(tmp_path / "train.jsonl", GSM_ROW)
    jsonl(tmp_path / "test.jsonl", {"question": "Q?", "answer": "#### -3"})
    task = load_task("gsm8k", data=str(tmp_path), **ALL)
    assert task.train == [
        Example(
            "gsm8k/train/0",
            "Natalia sold clips. How many?",
            "48024",
            solution="She sold 48/2 = 24 clips.\nTogether 48024.",
        )
    ]
    assert task.held_out == [Example("gsm8k/test/0", "Q?", "-3")]
    assert task.grade("48,024", task.train[0])
    assert not task.grade("48,025", task.train[0])


@pytest.mark.parametrize("answer", ["no mark", None, 5, "reasoning ####", "#### twelve", "#### 1\n2"])
def test_a_gsm8k_row_without_a_final_number_is_named(tmp_path, answer):
    """Failing: a broken row is scored as if it were good, or cannot be found in the file."""
    data = jsonl(tmp_path / "train.jsonl", GSM_ROW, {"question": "Q?", "answer": answer})
    assert "train.jsonl, line 2" in error("gsm8k", data=data)


def test_real_gsm8k_loads_whole():
    """Failing: a row of the real data set is refused, lost, or graded wrong."""
    folder = os.environ.get("CONTEXT_RL_DATA")
    if not folder:
        pytest.skip("set CONTEXT_RL_DATA to a folder that holds gsm8k/train.jsonl and gsm8k/test.jsonl")
    task = load_task("gsm8k", data=str(Path(folder) / "gsm8k"), **ALL)
    lines = [(Path(folder) / "gsm8k" / f"{split}.jsonl").read_bytes().count(b"\n") for split in ("train", "test")]
    assert [len(task.train), len(task.held_out)] == lines
    assert all("<<" not in e.solution and "####" not in e.solution for e in task.train + task.held_out)
    first = next(e for e in task.train if e.id == "gsm8k/train/0")
    assert first.question.startswith("Natalia sold clips")
    assert first.answer == "72"


# --- qa: what a file may hold -------------------------------------------------------------------------------------


def test_every_format_gives_the_same_examples(tmp_path):
    """Failing: the answer depends on the file format, e.g. 7 becomes 7.0 in one of them."""
    table = [{"question": f"Frage ü{i}?", "answer": str(i)} for i in range(10)]
    numbers = [row | {"answer": int(row["answer"])} for row in table]
    files = [
        jsonl(tmp_path / "a.jsonl", *table),
        jsonl(tmp_path / "b.jsonl", *numbers),
        write(tmp_path / "c.json", json.dumps(numbers, indent=2)),
        jsonl(tmp_path / "d.json", *numbers),
        write(tmp_path / "e.csv", "question,answer", *(f"{r['question']},{r['answer']}" for r in table)),
        write(tmp_path / "f.tsv", "question\tanswer", *(f"{r['question']}\t{r['answer']}" for r in table), end="\r\n"),
        write(tmp_path / "g.csv", "\ufeffQuestion, Answer ", *(f'"{r["question"]}","{r["answer"]}"' for r in table)),
    ]
    for name, column in (("h", pyarrow.array(range(10))), ("i", pyarrow.array([float(i) for i in range(10)]))):
        questions = pyarrow.array([row["question"] for row in table])
        pyarrow.parquet.write_table(
            pyarrow.table({"question": questions, "answer": column}), tmp_path / f"{name}.parquet"
        )
        files.append(str(tmp_path / f"{name}.parquet"))
    datasets.Dataset.from_list(numbers).save_to_disk(tmp_path / "saved")
    files.append(str(tmp_path / "saved"))
    loaded = [load_task("qa", data=file, **ALL) for file in files]
    pairs = [[[(e.question, e.answer) for e in part] for part in (task.train, task.held_out)] for task in loaded]
    assert all(pair == pairs[0] for pair in pairs)
    assert (len(loaded[0].train), len(loaded[0].held_out)) == (8, 2)


def test_numbers_in_json_become_the_text_a_person_would_write(tmp_path):
    """Failing: the scored span is "7.0" or "1e3" where the answer is 7 or 1000."""
    values = "7", "7.0", "-3", "0.5", "1e3", "12345678901234567890"
    data = write(tmp_path / "n.jsonl", *(f'{{"question": "q{v}", "answer": {v}}}' for v in values))
    assert answers(data) == ["7", "7", "-3", "0.5", "1000", "12345678901234567890"]


def test_csv_fields_stay_the_text_they_are(tmp_path):
    """Failing: leading zeros, trailing zeros or the word null were lost to a guess at types."""
    data = write(tmp_path / "z.csv", "question,answer", "a,007", "b,1.50", "c,NA", "d,null", "e,1e5", "f,True")
    assert answers(data) == ["007", "1.50", "NA", "null", "1e5", "True"]
    task = load_task("qa", data=data, **ALL)
    agent = next(e for e in task.train + task.held_out if e.answer == "007")
    assert not task.grade("7", agent)


def test_ids_are_the_line_numbers_an_editor_shows(tmp_path):
    """Failing: an error or an id points at the wrong row."""
    data = write(tmp_path / "m.csv", "question,answer", '"two', 'lines",1', "", "b,2", "c,3")
    task = load_task("qa", data=data, **ALL)
    assert {e.id: e.question for e in task.train + task.held_out} == {
        "m.csv:2": "two\nlines",
        "m.csv:5": "b",
        "m.csv:6": "c",
    }
    data = write(
        tmp_path / "m.jsonl", '{"question": "a\u2028b", "answer": 1}', "", '{"question": "c", "answer": "x\u2003"}'
    )
    task = load_task("qa", data=data, **ALL)
    assert {e.id: e.answer for e in task.train + task.held_out} == {"m.jsonl:1": "1", "m.jsonl:3": "x"}


GOOD = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"question": "q", "answer": ""}', "is empty"),
        ('{"question": "q", "answer": " \\n "}', "is empty"),
        ('{"question": "q", "answer": null}', "is empty"),
        ('{"question": "q"}', "is empty"),
        ('{"question": "", "answer": "a"}', "question (column 'question') is empty"),
        ('{"question": 5, "answer": "a"}', "--question_column"),
        ('{"question": "q", "answer": ["a"]}', "list ['a']"),
        ('{"question": "q", "answer": {"text": "a"}}', "dict"),
        ('{"question": "q", "answer": NaN}', "nan"),
        ('{"question": "q", "answer": 1e999}', "inf"),
        ('{"question": "q", "answer": true}', "bool True"),
        ('{"question": "q", "answer": "a\\nb"}', "several lines"),
        ('{"question": "q", "answer": "a\\u2028b"}', "several lines"),
        ('{"question": "q", "answer": "x\\n#### 5"}', "--task gsm8k"),
        ('{"question": "q\\ud800", "answer": "a"}', "surrogate"),
        ('{"question": "q", "answer": "a"', "broken JSON"),
        ("[" * 100_000, "JSON"),
        ('["q", "a"]', "must be an object"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "unusable JSON"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, bad, says):
    """Failing: a bad row is dropped without a word, trained on, or reported without its place."""
    message = error(data=write(tmp_path / "my.jsonl", GOOD, "", bad, GOOD))
    assert "my.jsonl, line 3" in message
    assert says in message


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["question,answer", "a,b,c"], "line 2: 3 fields, but the header has 2"),
        (["question,answer", "a,b", "c"], "line 3: 1 fields"),
        (["question,answer", 'a,"b', "c,d"], "line 2: broken quotes"),
        (["question,answer,answer", "a,b,c"], "two columns are named 'answer'"),
        (["question,answer", "a,"], "line 2: the answer (column 'answer') is empty"),
        (["question,answer"], "has no rows"),
        ([], "has no rows"),
        (["question;answer", "a;b"], "'question;answer'"),
    ],
)
def test_a_bad_csv_is_explained(tmp_path, lines, says):
    """Failing: fields move to other columns, or an open quote swallows the rest of the file."""
    assert says in error(data=write(tmp_path / "my.csv", *lines))


def test_files_that_cannot_be_read_are_explained(tmp_path):
    """Failing: the user sees a traceback from a codec, a parser or Arrow."""
    (tmp_path / "latin.jsonl").write_bytes(f"{GOOD}\n".encode() + b'{"question": "\xfc"}')
    assert "latin.jsonl, line 2: not UTF-8" in error(data=str(tmp_path / "latin.jsonl"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    assert "broken Parquet" in error(data=str(tmp_path / "x.parquet"))
    assert "use one of .jsonl" in error(data=write(tmp_path / "x.txt", "hello"))
    assert "line 3: broken JSON" in error(data=write(tmp_path / "x.json", "[", '{"question": "q"},', "nonsense]"))
    assert "a list [...] of objects" in error(data=write(tmp_path / "y.json", "{", '"data": []}'))
    assert "no such file" in error(data=str(tmp_path / "missing.jsonl"))
    assert "needs --data" in error()


# --- qa: columns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "used"),
    [
        (("question", "answer", "label"), ("question", "answer", None)),
        (("Problem", "Solution", "Answer"), ("Problem", "Answer", "Solution")),
        (("problem", "solution"), ("problem", "solution", None)),
        (("prompt", "completion", "rationale"), ("prompt", "completion", "rationale")),
        (("input", "output"), ("input", "output", None)),
        (("question", "input", "target", "solution"), ("question", "target", "solution")),
    ],
)
def test_usual_columns_are_recognised(tmp_path, columns, used):
    """Failing: the model is asked or scored on the wrong column."""
    data = jsonl(tmp_path / "c.jsonl", *({c: f"{c}{n}" for c in columns} for n in range(3)))
    task = load_task("qa", data=data, **ALL)
    example = next(e for e in task.train + task.held_out if e.id == "c.jsonl:1")
    assert (example.question, example.answer) == (f"{used[0]}0", f"{used[1]}0")
    assert example.solution == (f"{used[2]}0" if used[2] else None)


def test_columns_that_cannot_be_told_are_listed_with_the_flag(tmp_path):
    """Failing: a guess is made between two columns, or the user is not told how to decide."""
    data = jsonl(tmp_path / "c.jsonl", *({"instruction": f"i{n}", "input": f"x{n}", "output": "o"} for n in range(3)))
    message = error(data=data)
    assert "'instruction' or 'input' could be the question" in message
    assert "'output'" in message
    assert "--question_column" in message
    assert answers(data, question_column="input") == ["o", "o", "o"]
    assert answers(data, question_column="input", answer_column="instruction") == ["i0", "i1", "i2"]
    assert "no column 'nope' (--answer_column)" in error(data=data, question_column="input", answer_column="nope")
    assert "both the question and the answer" in error(data=data, question_column="input", answer_column="input")
    other = jsonl(tmp_path / "d.jsonl", {"ctx": "a", "text": "b"})
    assert "the columns are 'ctx', 'text'; name it with --question_column" in error(data=other)


# --- qa: what is held out -----------------------------------------------------------------------------------------


def test_rows_with_the_same_question_are_never_split(tmp_path):
    """Failing: a held-out question was trained on under another row."""
    twice = [*rows(10), *({**row, "question": row["question"].upper() + " "} for row in rows(10))]
    task = load_task("qa", data=jsonl(tmp_path / "t.jsonl", *twice), **ALL)
    train, held_out = ({splits.question_key(e.question) for e in part} for part in (task.train, task.held_out))
    assert not train & held_out
    assert (len(task.train), len(task.held_out)) == (16, 4)


def test_the_split_is_the_same_for_every_seed_and_order(tmp_path):
    """Failing: two runs hold out different questions, so one trains on what the other is judged by."""
    one = jsonl(tmp_path / "one.jsonl", *rows(40))
    two = jsonl(tmp_path / "two.jsonl", *reversed(rows(40)))
    first, second = (load_task("qa", data=d, **{**ALL, "seed": s}) for d, s in ((one, 0), (two, 9)))
    assert [e.question for e in first.held_out] == [e.question for e in second.held_out]
    assert {e.question for e in first.train} == {e.question for e in second.train}


def test_the_seed_picks_the_training_questions(tmp_path):
    """Failing: seeds do nothing, or the same seed gives other questions on the next run."""
    data = jsonl(tmp_path / "t.jsonl", *rows(100))
    picks = [[e.id for e in load_task("qa", data=data, train_size=20, eval_size=5, seed=s).train] for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert len(picks[0]) == 20


def test_questions_held_out_are_left_out_of_training_and_counted(tmp_path):
    """Failing: the model trains on test questions, or rows vanish without a word."""
    train = jsonl(tmp_path / "train.jsonl", *rows(6))
    jsonl(tmp_path / "test.jsonl", *rows(4, start=4))
    for kwargs in ({"data": str(tmp_path)}, {"data": train, "eval_data": str(tmp_path / "test.jsonl")}):
        task = load_task("qa", **kwargs, **ALL)
        assert (len(task.train), len(task.held_out)) == (4, 4)
        assert task.notes == ("left 2 training rows out: their questions are held out for evaluation",)
    assert "every training question is also held out" in error(data=train, eval_data=train)


def test_one_question_alone_cannot_be_split(tmp_path):
    """Failing: an empty training or held-out part."""
    data = jsonl(tmp_path / "t.jsonl", *(rows(1) * 5))
    assert "one distinct question cannot be split" in error(data=data)
    task = load_task("qa", data=jsonl(tmp_path / "u.jsonl", *rows(2)), **ALL)
    assert (len(task.train), len(task.held_out)) == (1, 1)


def test_asking_for_more_than_there_is_gives_all_and_says_so(tmp_path):
    """Failing: a result on 2 questions looks like one on 1,000."""
    task = load_task("qa", data=jsonl(tmp_path / "t.jsonl", *rows(10)), train_size=100, eval_size=1000, seed=0)
    assert (len(task.train), len(task.held_out)) == (8, 2)
    assert "2 held-out questions, not 1000: there are no more" in task.notes
    assert "cannot be -1" in error("symbolic", train_size=-1, eval_size=1)


def test_folders_are_read_by_their_files_names(tmp_path):
    """Failing: test rows are trained on, or a file of the folder is passed over in silence."""
    jsonl(tmp_path / "train-00000-of-00002.jsonl", *rows(3))
    jsonl(tmp_path / "train-00001-of-00002.jsonl", *rows(3, start=3))
    jsonl(tmp_path / "my_test.jsonl", *rows(2, start=6))
    jsonl(tmp_path / "dev.jsonl", *rows(2, start=8))
    task = load_task("qa", data=str(tmp_path), **ALL)
    assert (len(task.train), len(task.held_out)) == (6, 2)
    assert task.notes == (f"{tmp_path}: its split 'validation' is not used",)
    extra = jsonl(tmp_path / "extra.jsonl", *rows(2))
    assert "what extra.jsonl is for" in error(data=str(tmp_path))
    Path(extra).rename(tmp_path / "train_test.jsonl")
    assert "could be 'test', 'train'" in error(data=str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "no file in it ends in" in error(data=str(tmp_path / "empty"))


def test_files_of_one_name_in_two_folders_give_different_ids(tmp_path):
    """Failing: the no-trace baseline of one question is looked up for another."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    train = jsonl(tmp_path / "a" / "x.jsonl", *rows(3))
    task = load_task("qa", data=train, eval_data=jsonl(tmp_path / "b" / "x.jsonl", *rows(3, start=3)), **ALL)
    assert len({e.id for e in task.train + task.held_out}) == 6
    assert error(data=train, eval_data=jsonl(tmp_path / "b" / "x.jsonl", {"question": "q", "answer": ""})).startswith(
        f"{tmp_path}/b/x.jsonl, line 1"
    )


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: {(name, configuration): splits}; loads nothing else."""
    repositories = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: repositories[name, config])
    return repositories


def test_a_hub_data_set_is_read_by_its_splits(hub):
    """Failing: the hub's test split is trained on, or the configuration is not passed on."""
    hub["me/sums", None] = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows(5)), test=datasets.Dataset.from_list(rows(2, start=5))
    )
    hub["me/sums", "hard"] = datasets.DatasetDict(test=datasets.Dataset.from_list(rows(10)))
    task = load_task("qa", data="me/sums", **ALL)
    assert sorted(e.id for e in task.train) == [f"me/sums/train:{n}" for n in range(1, 6)]
    assert sorted(e.id for e in task.held_out) == ["me/sums/test:1", "me/sums/test:2"]
    hard = load_task("qa", data="me/sums:hard", **ALL)
    assert (len(hard.train), len(hard.held_out)) == (8, 2)
    assert "its only split, 'test'" in hard.notes[0]


def test_gsm8k_comes_from_the_hub_by_default(hub):
    """Failing: another data set or configuration is loaded, or its ids differ from those of a local copy."""
    rows_of = {"train": [GSM_ROW], "test": [{"question": "Q?", "answer": "#### 5"}]}
    hub["openai/gsm8k", "main"] = datasets.DatasetDict({s: datasets.Dataset.from_list(r) for s, r in rows_of.items()})
    task = load_task("gsm8k", **ALL)
    assert [e.id for e in task.train + task.held_out] == ["gsm8k/train/0", "gsm8k/test/0"]


def test_a_hub_out_of_reach_is_one_quick_error(monkeypatch):
    """Failing: half a minute of retries and a traceback for a mistyped file name on a machine without a network."""

    def no_network(*args, **kwargs):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: pytest.fail("tried to load without a network"))
    for task, kwargs in (("gsm8k", {}), ("qa", {"data": "me/sums"})):
        message = error(task, **kwargs)
        assert "the hub cannot be reached (ConnectError)" in message
        assert "HF_HUB_OFFLINE=1" in message


def test_offline_mode_uses_the_cache_or_says_that_it_has_no_copy(hub, monkeypatch):
    """Failing: HF_HUB_OFFLINE=1 refuses a cached data set."""

    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    hub["me/sums", None] = datasets.DatasetDict(train=datasets.Dataset.from_list(rows(10)))
    assert len(load_task("qa", data="me/sums", **ALL).train) == 8

    def not_cached(*args):
        raise ConnectionError("Couldn't reach 'me/sums' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", not_cached)
    assert "not in the cache" in error(data="me/sums")


def test_a_real_connection_that_is_refused_fails_fast(tmp_path):
    """Failing: the question put to the hub first is itself retried for half a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import time; from context_rl.tasks import load_task; began = time.time()\n"
        "try: load_task('gsm8k', train_size=1, eval_size=1, seed=0)\n"
        "except ValueError as error: print(error); print(time.time() - began)"
    )
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    env = {k: v for k, v in os.environ.items() if k not in names}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=True)
    message, seconds = done.stdout.splitlines()
    assert "the hub cannot be reached" in message
    assert float(seconds) < 5


# --- reasoning-gym ------------------------------------------------------------------------------------------------


def test_reasoning_gym_parts_are_disjoint_for_neighbouring_seeds_and_small_tasks():
    """Failing: item i of seed s is item i - 1 of seed s + 1, so a split by seed trains on the test set."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    held_out = None
    for seed in (0, 1):
        task = load_task("rg:chain_sum", train_size=60, eval_size=20, seed=seed, task_options=options)
        train = {e.question for e in task.train}
        assert len(train) == 60
        assert held_out in (None, task.held_out)
        held_out = task.held_out
        assert not train & {e.question for e in held_out}
    assert len({e.id for e in task.train + held_out}) == 80


def test_a_reasoning_gym_task_without_more_questions_ends():
    """Failing: loading never returns when a generator has fewer questions than asked for."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = load_task("rg:chain_sum", train_size=1000, eval_size=1000, seed=0, task_options=options)
    # Two digits and a sign between them: 200 questions.
    assert len(task.train) + len(task.held_out) == 200
    assert len(task.notes) == 2


def test_reasoning_gym_grades_by_its_own_rule():
    """Failing: an equally good answer of another form is wrong, or the grader's exceptions stop a run."""
    task = load_task("rg:prime_factorization", train_size=3, eval_size=1, seed=0)
    example = task.train[0]
    assert task.grade(example.answer, example)
    assert not task.grade("no idea", example)  # its grader raises ValueError here


def test_a_model_s_line_is_never_run_as_a_program(tmp_path):
    """Failing: reasoning-gym's graders pass what a model wrote to eval, which may do anything, or never return."""
    made = tmp_path / "made"
    lines = f"__import__('pathlib').Path({str(made)!r}).touch()", f"open({str(made)!r}, 'w')", "exit()", "9**9**9**9"
    for name in ("string_insertion", "spiral_matrix", "countdown", "puzzle24", "simple_integration"):
        task = load_task(f"rg:{name}", train_size=1, eval_size=0, seed=0)
        for line in (*lines, "(9)**(9**9)", "9**999999999"):
            assert not task.grade(line, task.train[0])
        assert not made.exists()
        assert task.grade(f" {task.train[0].answer}\n", task.train[0])


def test_chunks_continue_a_stream_and_leave_global_randomness_alone():
    """Failing: item 500 repeats item 0, or loading data changes what a seeded training run draws next."""
    random.seed(3)
    expected = random.Random(3).random()
    task = load_task("rg:chain_sum", train_size=rg.CHUNK, eval_size=0, seed=0)
    assert max(int(e.id.rpartition("/")[2]) for e in task.train) > rg.CHUNK
    assert len({e.question for e in task.train}) == rg.CHUNK
    assert random.random() == expected


@pytest.mark.parametrize(
    ("task", "kwargs", "says"),
    [
        ("rg:chain_sums", {}, "did you mean rg:chain_sum"),
        ("rg:sudoku", {}, "has no one-line answer"),
        ("rg:graph_color", {}, "has no one-line answer to score (one of its answers is None)"),
        ("rg:game_of_life_halting", {}, "takes any text for right"),
        ("rg:codeio", {}, "other questions in every run"),
        ("rg:chain_sum", {"task_options": {"min_term": 2}}, "no option 'min_term'; it has allow_negation"),
        ("rg:chain_sum", {"task_options": {"seed": 2}}, "no option 'seed'"),
        ("rg:chain_sum", {"task_options": {"min_terms": 0}}, "min_terms must be positive"),
        ("rg:chain_sum", {"train_size": None}, "--train_questions"),
        ("rg:chain_sum", {"data": "x.jsonl"}, "leave --data out"),
        ("symbolic", {"answer_column": "a"}, "leave --answer_column out"),
        ("symbolic", {"task_options": {"a": 1}}, "no task_options"),
        ("symbolic", {"eval_size": None}, "--eval_questions"),
        ("gsm8", {}, "there are symbolic, gsm8k, hellaswag, qa, dialogue, rg:NAME"),
    ],
)
def test_what_cannot_be_loaded_is_explained(task, kwargs, says):
    """Failing: the user sees a library's traceback, or a run starts on unusable data."""
    assert says in error(task, **{"train_size": 3, "eval_size": 2, **kwargs})


def test_generators_that_follow_the_hash_seed_need_it_fixed(monkeypatch):
    """Failing: two runs with one seed train and evaluate on different questions."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert "set PYTHONHASHSEED=0" in error("rg:word_ladder", train_size=1, eval_size=1)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load_task("rg:word_ladder", train_size=1, eval_size=1, seed=0).train) == 1


def test_a_gold_answer_that_the_grader_refuses_is_an_error():
    """Failing: a question that no answer can satisfy is trained on as always wrong."""
    with pytest.raises(DataError, match=r"my.jsonl, line 3: the gold answer 'x' is wrong"):
        splits.check(Example("id", "q", "x"), lambda text, example: False, "my.jsonl, line 3")
