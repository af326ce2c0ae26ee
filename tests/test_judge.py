"""A judge behind a chat endpoint: what it is asked, how its words are read, what becomes of its failures.

A failure here means that a run trains on, or reports, a verdict that the judge never gave; that a judge which is down,
wrong or incomprehensible ends as a score and not as a reason; that it is asked, and paid, for what nothing reads or for
what it has answered before; or that its key leaves the request's header.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stub_judge import StubJudge, verdict
from test_training import EXAMPLES, FakeScorer, right

import context_rl.judge.asking as asking
from context_rl.config import ConfigError, ContextConfig
from context_rl.judge import Judge, JudgeError, Judging, check_verdicts
from context_rl.judge.asking import BY_JUDGE
from context_rl.judge.verdicts import parse_verdict
from context_rl.prompts import judge_messages
from context_rl.questions import Questions
from context_rl.rewards import Reward
from context_rl.tasks import DataError, Example, Task
from context_rl.training import check_reward_fits
from eval.reward_stats import GroupStatistics
from eval.run import main as evaluate
from recipes.reward_bench import main as bench
from recipes.train_context import main
from scorer.types import Unscored
from scorer.vllm.http import RequestFailed

KEY = "sk-a-key-that-nobody-may-see"
ROWS = [(f"How many legs have {n} cats?", str(4 * n), f"{4 * n} legs") for n in range(1, 6)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No waiting between attempts, and no key of the machine's own."""
    monkeypatch.setattr(asking, "WAITS_S", (0.01, 0.01, 0.01))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def stub():
    with StubJudge() as server:
        yield server


@pytest.fixture
def judge(stub):
    made = Judge(stub.url, "any", timeout_s=5, concurrency=4)
    yield made
    made.close()


# --- reading a verdict --------------------------------------------------------------------------------------------

HARD = {
    True: [
        *("yes", "Yes.", " YES!\n", "**Yes**", '"yes"', "- yes", "\u2705 Yes", "\\boxed{yes}", '{"verdict": "yes"}'),
        *(
            "Verdict: yes",
            "**Verdict:** Yes",
            "Final answer: **yes**",
            "The answer is yes.",
            "My final verdict is: yes",
        ),
        *("Yes, there is no difference.", "Yes because both say 4.", "Yes\n\nThere is no difference.", "yes\nyes"),
        *("<think>no ... or?</think>\nyes", "the reply says no, hm\n</think>\n\nYes", "<thinking>no</thinking> yes"),
        *("Reference answer: no\nReply: no\nVerdict: yes", "It names both.\nVerdict: yes, it does."),
    ],
    False: [
        *("no", "No.", "**No**", "NO", "_no_", "Verdict: no", "Verdict: **No**.", "The answer is no.", "\\boxed{no}"),
        *(
            "No, it does not.",
            "No it does not.",
            "No, although it is close",
            "Answer: yes\nVerdict: no",
            "No: 3 is not 4.",
            "<think>yes</think>no",
        ),
    ],
    None: [
        *("", " \n", "maybe", "Not the same.", "yesterday", "None", "nope", "no-one can say", "Yes?", "42"),
        *("yes and no", "yes or no", "yes/no", "Yes. No.", "yes\nno", "No, wait: yes", "No doubt they are the same"),
        *("The reference answer is no, and the reply says no.", "The reply says yes.", "I cannot say no to that."),
        *("<think>yes, it is the same", "<think>yes</think>", "Verdict: yes\nVerdict: no", "Answer: no\nyes"),
        *("Yes, but the total is wrong.", "Yes, except that it names others", "Yes. The two do not say the same."),
        *("Yes, partially.", "Yes, although they aren't equal", "Verdict: yes, mostly"),
    ],
}
SOFT = {
    0.0: ["0", "0/10", "Score: 0"],
    0.7: [
        *("7", " 7\n", "7.", "7.0", "**7**", "7/10", "7 / 10", "**7**/10", "7 out of 10", "7 points", "\\boxed{7}"),
        *("Score: 7", "**Score:** 7/10", "Rating: 7", "The score is 7 out of 10.", "My final score is: 7."),
        *(
            "7 because one fact is missing",
            "Score: 7 - mostly",
            "Rating: 7: mostly",
            "Score: 7. The reply has 2 of 3 facts.",
            "7\n7",
        ),
        *("<think>3? no, 8</think>7", "1. good\n2. short\nScore: 7", "Score: 7/10\nThe reply has 2 of 3 facts."),
    ],
    0.75: ["7.5", "Score: 7.5/10"],
    1.0: ["10", "10.", "10/10", "10.0"],
    None: [
        *("", "seven", "good", "-3", "Score: -3", "11", "Score: 11", "10.5", "1000", "80%", "80/100", "7/100", "4/5"),
        *(
            "7-8",
            "7 to 8",
            "7 or 8",
            "3, 4",
            "7\n8",
            "7,5",
            ".5",
            "7:30",
            "1e1",
            "nan",
            "Infinity",
            "\u0663",
            "<think>7",
        ),
        *("7 - mostly", "7: mostly", "1: The total is right.", "Answer: 9\n3"),
        *("2 of 3 facts are right", "3 birds have 6 legs", "1. The reply is right.", "I counted 8 legs", "yes"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [(kind, t, v) for kind, table in (("hard", HARD), ("soft", SOFT)) for v, texts in table.items() for t in texts],
)
def test_what_a_judges_text_says(kind, text, expected):
    """Failure: a verdict is read into words that give none, or a plain one is not understood."""
    found = parse_verdict(kind, text)
    assert found == expected
    assert type(found) is type(expected)


WRAPPINGS = ("{}", "**{}**", "Score: {}", "{}/10", "Rating: {}/10.", "<think>3</think>\n{}", "The score is {}.")


@given(st.integers(0, 1000), st.sampled_from(WRAPPINGS))
def test_every_number_up_to_ten_is_read_in_every_wrapping(hundredths, wrapping):
    """Failure: some scores are lost, so that the mean is one of the others."""
    number = f"{hundredths / 100:g}"
    assert parse_verdict("soft", wrapping.format(number)) == float(number) / 10


@given(st.text(alphabet="yesno YESNO.,:*/-0123456789\n<>thinkscore", max_size=60), st.booleans())
def test_any_text_is_a_verdict_in_its_range_or_none(text, cut):
    """Failure: an odd reply ends the run with a traceback, or a reward lies outside [0, 1]."""
    assert parse_verdict("hard", text, cut) in (True, False, None)
    score = parse_verdict("soft", text, cut)
    assert score is None or 0 <= score <= 1
    if "yes" not in text.lower() and "no" not in text.lower():
        assert parse_verdict("hard", text, cut) is None
    if not any(c.isdigit() for c in text):
        assert score is None


@pytest.mark.parametrize(("text", "expected"), [("1", None), ("Score: 1", None), ("7.", None), ("7/10 so", None)])
def test_a_score_cut_behind_a_digit_is_none(text, expected):
    """Failure: with --judge_max_tokens 1 a tokenizer that splits digits makes 1 of every 10."""
    assert parse_verdict("soft", text, cut=True) is expected
    assert parse_verdict("hard", "yes", cut=True) is True


# --- asking -------------------------------------------------------------------------------------------------------


def test_the_two_prompts_word_by_word():
    """Failure: a judge that was trained on these words is asked in others."""
    start = "Question: Q {x}\nReference answer: A\nReply: R\n"
    hard = "Does the reply say the same as the reference answer? Answer yes or no."
    soft = (
        "How well does the reply agree with the reference answer, from 0 (not at all) to 10 (fully)? "
        "Answer with one number."
    )
    for kind, asked in (("hard", hard), ("soft", soft)):
        assert judge_messages(kind, "Q {x}", "A", "R") == [{"role": "user", "content": start + asked}]


def test_the_judge_is_asked_the_prompts_and_its_verdicts_come_back(stub, judge):
    """Failure: question, reference and reply are swapped, or another text is sent than the documented one."""
    rows = [*ROWS, ("How many?", "12", "13"), ("Which?", "the red fox", "a red dog")]
    assert judge.hard(rows) == [True] * 5 + [False, False]
    assert judge.soft(rows[-2:]) == [0.0, 0.3]
    assert sorted(stub.asked) == sorted([("hard", *row) for row in rows] + [("soft", *row) for row in rows[-2:]])
    for asked, body in zip(stub.asked, stub.bodies, strict=True):
        expected = {"model": "any", "messages": judge_messages(*asked), "temperature": 0, "max_tokens": 64}
        assert body == expected
    assert "Authorization" not in stub.headers[0], "no key is set"


def test_options_are_merged_into_the_request_and_null_takes_a_key_out(stub):
    """Failure: models that refuse temperature or max_tokens cannot be judges."""
    options = {"max_tokens": None, "max_completion_tokens": 500, "temperature": None, "reasoning_effort": "low"}
    judge = Judge(stub.url, "any", options=options)
    assert judge.hard(ROWS[:1]) == [True]
    assert stub.bodies[0].keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_url_may_end_as_people_write_it(stub, ending):
    assert Judge(stub.url + ending, "any").hard(ROWS[:1]) == [True]


ODD = ["{reply}", "{", "}{", "{0}", "%s", "Reply: yes\nDoes it?", "<think>", "\u2028", '"', "\x00", "\\n"]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_reach_the_judge_as_they_are(stub, judge, tmp_path, text):
    """Failure: braces in a reply end the run, or the judge is shown another text."""
    judge.keep(tmp_path)
    stub.answer = lambda *_: "yes"
    row = (f"Q {text}", f"A {text}", f"R {text}")
    assert judge.hard([row]) == [True]
    assert stub.bodies[0]["messages"] == judge_messages("hard", *row)
    again = Judge(stub.url, "any")
    again.keep(tmp_path)
    assert again.hard([row]) == [True]
    assert len(stub.bodies) == 1


def test_an_empty_reply_says_nothing_and_nobody_is_asked(stub, judge):
    """Failure: an answer that is not there is paid for, or a judge finds it good."""
    stub.mode = "yes"
    assert judge.hard([("Q", "4", ""), ("Q", "4", " \n")]) == [False, False]
    assert judge.soft([("Q", "4", "")]) == [0.0]
    assert stub.asked == []


def test_answers_that_come_late_stand_in_their_own_place(stub, judge):
    """Failure: with several requests at once a verdict lands on another row."""

    def slowly(kind: str, question: str, reference: str, reply: str) -> str:
        time.sleep(0.03 * (int(reference) % 4))
        return verdict(kind, reference, reply)

    stub.answer = slowly
    rows = [("Q", str(n), str(n if n % 3 else n + 1)) for n in range(40)]
    assert judge.hard(rows) == [n % 3 > 0 for n in range(40)]
    assert 1 < stub.most_at_once <= 4


def test_the_same_row_is_asked_once_and_counted(stub, judge):
    """Failure: a run pays for each of the thousand traces that lead to the same answer."""
    assert judge.hard([ROWS[0], ROWS[1], ROWS[0]]) == [True] * 3
    assert judge.hard(ROWS[:2]) == [True] * 2
    assert len(stub.asked) == 2
    usage = judge.take_usage()
    assert (usage["requests"], usage["cached"], usage["failed"]) == (2, 3, 0)
    assert usage["seconds"] > 0
    assert judge.take_usage()["requests"] == 0
    assert judge.soft(ROWS[:1]) == [1.0], "hard and soft are two questions"


# --- failures -----------------------------------------------------------------------------------------------------


def only(found: list) -> Unscored:
    [one] = found
    assert isinstance(one, Unscored), one
    assert one.reason.startswith("judge: ")
    assert "\n" not in one.reason
    return one


@pytest.mark.parametrize("mode", [["503", "429", "ok"], ["drop", "500", "ok"], ["nonsense", "ok"], ["html", "ok"]])
def test_what_may_pass_is_tried_again(stub, judge, mode):
    """Failure: one hiccup of the server and a row has no reward."""
    stub.mode = list(mode)
    assert judge.hard(ROWS[:1]) == [True]
    assert len(stub.asked) == len(mode)


@pytest.mark.parametrize(
    ("mode", "fault", "requests", "reason"),
    [
        ("503", "server_error", 4, "HTTP 503"),
        ("429", "overloaded", 4, "HTTP 429"),
        ("drop", "connection", 4, "connection lost"),
        ("400", "refused", 1, "HTTP 400"),
        ("422", "refused", 1, "HTTP 422"),
        ("html", "garbled", 2, "an answer without a reply: '<html>a login page</html>'"),
        ("empty", "garbled", 2, "an answer without a reply"),
        ("yes and no", "garbled", 2, "neither yes nor no, or both: 'yes and no'"),
        ("hm " * 200, "garbled", 2, "neither yes nor no, or both: 'hm hm"),
    ],
)
def test_what_does_not_pass_is_a_reason_and_no_verdict(stub, judge, mode, fault, requests, reason):
    """Failure: a judge that is down or talks rubbish gives rewards."""
    stub.mode = mode
    found = only(judge.hard(ROWS[:1]))
    assert (found.fault, len(stub.asked)) == (fault, requests)
    assert reason in found.reason
    assert len(found.reason) < 400
    assert judge.take_usage()["failed"] == 1
    stub.mode = "ok"
    assert judge.hard(ROWS[:1]) == [True], "a failure is not remembered"


def test_a_soft_verdict_that_is_none_is_a_reason_too(stub, judge):
    stub.mode = "twelve"
    assert "not one number from 0 to 10: 'twelve'" in only(judge.soft(ROWS[:1])).reason


def test_a_judge_that_hangs_costs_its_timeout_and_no_more(stub):
    """Failure: a run waits for ever."""
    stub.mode = "hang"
    began = time.monotonic()
    found = only(Judge(stub.url, "any", timeout_s=0.2).hard(ROWS[:1]))
    assert found.fault == "timeout"
    assert "timeout after 0.2 s" in found.reason
    assert time.monotonic() - began < 5


def test_a_reply_cut_at_the_limit_says_which_limit(stub, judge):
    """Failure: a model that thinks first looks like one that cannot judge."""
    stub.mode, stub.finish_reason = "Let me think about", "length"
    assert "raise --judge_max_tokens" in only(judge.hard(ROWS[:1])).reason


def test_a_server_may_ask_for_more_time(stub, judge, monkeypatch):
    """Failure: the attempts are over before the server's own Retry-After is."""
    waits: list[float] = []

    def busy(body):
        raise RequestFailed("overloaded", "HTTP 429", wait_s=7.0 if len(waits) < 2 else 1e9)

    monkeypatch.setattr(judge.endpoint, "_post", busy)
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waits.append(seconds) or False)
    assert isinstance(judge._ask(("hard", *ROWS[0]), (1.0, 16.0, 1.0), threading.Event()), Unscored)
    assert waits == [7.0, 16.0, 60.0]


def test_only_the_rows_that_failed_are_unscored(stub, judge):
    """Failure: one bad row takes its batch with it."""
    stub.answer = lambda kind, question, reference, reply: "?" if reference == "12" else "yes"
    found = judge.hard(ROWS)
    assert [isinstance(one, Unscored) for one in found] == [row[1] == "12" for row in ROWS]


def test_when_nobody_answers_the_rest_is_not_asked(stub, judge):
    """Failure: with a judge that is gone, a batch takes rows x attempts x timeout."""
    stub.mode = "503"
    rows = [("Q", "none", f"reply {n}") for n in range(60)]
    found = judge.hard(rows)
    assert all(isinstance(one, Unscored) for one in found)
    assert len(stub.asked) <= 4 * 4 * 3, "four at once, four attempts, and a round or two under way"
    unsent = [one for one in found if one.fault == "not_sent"]
    assert len(unsent) > 30
    assert all("HTTP 503" in one.reason and "not asked" in one.reason for one in unsent)
    stub.mode = "ok"
    assert judge.hard(rows) == [False] * 60


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ("401", "set OPENAI_API_KEY"),
        ("403", "set OPENAI_API_KEY"),
        ("404", "check --judge_url (it mostly ends in /v1) and --judge_model 'any'"),
        ("405", "check --judge_url"),
        ("402", "no credit left"),
        ("307", "it has moved to 'https://elsewhere.example"),
    ],
)
def test_what_every_request_would_get_is_one_line_and_asked_once(stub, judge, status, advice):
    """Failure: a wrong key is tried a thousand times, or the error does not say what to do."""
    stub.mode = status
    with pytest.raises(JudgeError) as caught:
        judge.hard(ROWS[:1])
    message = str(caught.value)
    assert message.startswith(f"the judge at {stub.url} refuses every request: HTTP {status}")
    assert advice in message
    assert "\n" not in message
    assert len(stub.asked) == 1


def test_a_wrong_model_is_said_before_the_run():
    """Failure: the run finds out at its first batch."""
    with StubJudge(model="right") as stub, pytest.raises(JudgeError, match="--judge_model 'wrong'"):
        Judge(stub.url, "wrong").check(["hard"], "Q", "A")


def test_a_check_says_what_is_odd_about_the_judge(stub, judge):
    """Failure: a judge that finds nothing right looks like a base model that is never right."""
    assert judge.check(["hard", "soft"], "Q", "4 legs") == []
    stub.answer = lambda *_: "no"
    assert Judge(stub.url, "any").check(["hard"], "Q", "4") == [
        "shown the reference answer itself ('4'), the judge says 'no'"
    ]
    with pytest.raises(JudgeError, match="not one number from 0 to 10: 'no'"):
        Judge(stub.url, "any").check(["soft"], "Q", "4")


# --- judge.jsonl --------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_every_verdict_is_written_down_with_the_judges_words_and_read_back(stub, judge, tmp_path):
    """Failure: a number that nobody can check, or a resumed run pays again."""
    stub.answer = lambda kind, *_: "**Yes**, it does." if kind == "hard" else "Score: 8/10"
    judge.hard(ROWS[:1])  # before there is a folder
    judge.keep(tmp_path)
    judge.hard(ROWS[:2])
    judge.soft(ROWS[:1])
    question, reference, reply = ROWS[0]
    first = {"kind": "hard", "model": "any", "options": {"temperature": 0, "max_tokens": 64}}
    first |= {"question": question, "reference": reference, "reply": reply}
    found = lines(tmp_path / "judge.jsonl")
    assert found[0] == first | {"raw": "**Yes**, it does.", "value": True}
    assert found[2] == first | {"kind": "soft", "raw": "Score: 8/10", "value": 0.8}
    assert len(found) == len(stub.asked) == 3

    again = Judge(stub.url, "any")
    again.keep(tmp_path)
    assert again.hard(ROWS[:2]) == [True, True]
    assert again.soft(ROWS[:1]) == [0.8]
    assert len(stub.asked) == 3
    for number, other in enumerate((Judge(stub.url, "another model"), Judge(stub.url, "any", options={"seed": 1}))):
        other.keep(tmp_path)
        other.hard(ROWS[:1])
        assert len(stub.asked) == 4 + number, "another model's verdict, or one under other options, is not this one's"


def test_a_failure_is_not_written_down(stub, judge, tmp_path):
    stub.mode = "hm"
    judge.keep(tmp_path)
    judge.hard(ROWS)
    assert not (tmp_path / "judge.jsonl").exists()


def test_processes_write_files_of_their_own_and_read_all(stub, judge, tmp_path):
    """Failure: two processes write into each other's lines."""
    other = Judge(stub.url, "any")
    for process, each in enumerate((judge, other)):
        each.keep(tmp_path, process)
        each.hard([ROWS[process]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge-001.jsonl", "judge.jsonl"]
    resumed = Judge(stub.url, "any")
    resumed.keep(tmp_path)
    resumed.hard(ROWS[:2])
    assert len(stub.asked) == 2


def test_a_line_cut_by_a_kill_is_asked_again_and_spoils_no_other(stub, judge, tmp_path):
    """Failure: a killed run cannot be resumed, or its last line and the next one become one."""
    judge.keep(tmp_path)
    judge.hard(ROWS[:3])
    path = tmp_path / "judge.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = Judge(stub.url, "any")
    again.keep(tmp_path)
    assert again.hard(ROWS[:3]) == [True] * 3
    assert len(stub.asked) == 4
    assert len(lines(path)) == 3


BROKEN = ["{}", "[]", '{"kind": "hard"', "yes", "null"]
TEXTS = dict.fromkeys(("question", "reference", "reply", "raw", "model"), "x") | {"options": {}}
WRONG = [("hard", 1), ("hard", None), ("soft", 1.5), ("soft", "0.5")]
BROKEN += [json.dumps(TEXTS | {"kind": kind, "value": value}) for kind, value in WRONG]


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_verdict_is_named(judge, tmp_path, line):
    (tmp_path / "judge.jsonl").write_text(line + "\n")
    with pytest.raises(JudgeError, match=r"judge.jsonl, line 1: not a verdict; remove the line"):
        judge.keep(tmp_path)


def test_what_was_paid_before_a_kill_is_not_paid_again(stub, tmp_path):
    """Failure: verdicts are written when a batch is done, and a kill loses a thousand of them."""
    stub.answer = lambda kind, question, reference, reply: time.sleep(0.05) or verdict(kind, reference, reply)
    rows = [("Q", "none", f"reply {n}") for n in range(60)]
    script = f"""
        from pathlib import Path
        from context_rl.judge import Judge
        judge = Judge({stub.url!r}, "any", concurrency=2)
        judge.keep(Path({str(tmp_path)!r}))
        judge.hard([("Q", "none", f"reply {{n}}") for n in range(60)])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[1], env=os.environ
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "judge.jsonl").exists() or len(stub.asked) < 20:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    paid = len(lines(tmp_path / "judge.jsonl"))
    assert paid >= 15
    before = len(stub.asked)
    judge = Judge(stub.url, "any")
    judge.keep(tmp_path)
    assert judge.hard(rows) == [False] * 60
    assert len(stub.asked) - before == 60 - paid


# --- the key ------------------------------------------------------------------------------------------------------


def test_the_key_goes_into_the_header_and_nowhere_else(stub, tmp_path, monkeypatch, capfd):
    """Failure: a run folder that is shared gives the user's key away."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    judge = Judge(stub.url, "any")
    judge.keep(tmp_path)
    stub.answer = lambda *_: f"yes\n{KEY}"
    assert judge.hard(ROWS[:1]) == [True]
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in (tmp_path / "judge.jsonl").read_text()
    assert KEY not in f"{judge!r} {vars(judge)!r}"
    stub.mode, stub.answer = "500", None  # the stub repeats the header in its errors, as some servers do
    assert KEY not in only(judge.hard(ROWS[1:2])).reason
    stub.mode = "401"
    with pytest.raises(JudgeError, match="is OPENAI_API_KEY the right key") as caught:
        judge.hard(ROWS[1:2])
    assert KEY not in str(caught.value)
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("key", ["sk-\u00e9", "sk-\x01", "a\nb"])
def test_a_key_that_is_none_is_said_without_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(JudgeError, match="OPENAI_API_KEY holds characters that no key has") as caught:
        Judge("http://127.0.0.1:9/v1", "any")
    assert key not in str(caught.value)


# --- settings -----------------------------------------------------------------------------------------------------

JUDGED = {"grader": "judge", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "any"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grader": "jury"}, "--grader is 'jury'; it can be task or judge"),
        ({"grader": "judge"}, "--grader judge needs --judge_url and --judge_model; --judge_url is not set"),
        (
            {"reward": "judge_soft", "judge_url": "http://x/v1"},
            "the reward judge_soft needs .* --judge_model is not set",
        ),
        ({"reward": {"hybrid": {"gain": 1, "judge_soft": 1}}}, "the reward judge_soft needs"),
        ({"judge_url": "http://x/v1"}, "--judge_url has no effect without --grader judge or the reward judge_soft"),
        ({"judge_training": True}, "--judge_training has no effect"),
        ({"judge_max_tokens": 8}, "--judge_max_tokens has no effect"),
        ({"judge_options": {"seed": 1}}, "--judge_options has no effect"),
        (JUDGED | {"grader": "task", "reward": "judge_soft", "judge_training": True}, "--judge_training has no effect"),
        (JUDGED | {"judge_timeout": 0}, "--judge_timeout is 0; it is a number of seconds above 0"),
        (JUDGED | {"judge_concurrency": 0}, "--judge_concurrency is 0; it must be a whole number"),
        (JUDGED | {"judge_max_tokens": 0}, "--judge_max_tokens is 0; it must be a whole number"),
        (JUDGED | {"judge_url": "127.0.0.1:8000/v1"}, "it must be an address such as http"),
        (JUDGED | {"judge_url": "http://[::1/v1"}, "it must be an address such as http"),
        (JUDGED | {"judge_url": "http://me:secret@host/v1"}, "holds a password or a query"),
        (JUDGED | {"judge_url": "http://host/v1?key=secret"}, "holds a password or a query"),
        (JUDGED | {"judge_options": {"messages": []}}, "--judge_options cannot set 'messages'"),
        (JUDGED | {"judge_options": "[1]"}, "--judge_options is .* must be a mapping"),
    ],
)
def test_a_setting_of_the_judge_that_cannot_be_meant_is_one_line(settings, message):
    """Failure: a run pays a judge that nothing reads, or finds out late that it has none."""
    with pytest.raises(ConfigError, match=message) as caught:
        ContextConfig(**settings)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "more", "asked"),
    [
        ("gain", {}, []),
        ("gain", {"judge_training": True}, ["hard"]),
        ("soft_numeric", {}, []),
        ("binary", {}, ["hard"]),
        ("judge_soft", {}, ["soft"]),
        ("hybrid", {}, ["hard"]),
        ("fallback", {}, ["hard"]),
        ({"gated": {"of": "probability"}}, {}, []),
        ({"gated": {"of": "judge_soft", "gate": ["well_formed", "binary"]}}, {}, ["hard", "soft"]),
        ({"threshold": {"of": "judge_soft", "tau": {"quantile": 0.7}}}, {"grader": "task"}, ["soft"]),
        ("test_reward_bench.length", {}, ["hard"]),
    ],
)
def test_training_asks_for_what_the_reward_reads(reward, more, asked):
    """Failure: the judge is paid for verdicts that train nothing, or a reward misses what it reads."""
    assert ContextConfig(**JUDGED | {"reward": reward} | more).judge_in_training == asked


def test_multiple_choice_has_no_text_to_judge():
    """Failure: a judge is shown an ending that the base model never wrote."""
    choices = Example("h/1", "Tom", "runs", choices=("sits", "runs"), label=1)
    for config in (JUDGED, JUDGED | {"grader": "task", "reward": "judge_soft"}):
        with pytest.raises(DataError, match="h/1: multiple choice"):
            check_reward_fits(Task("hellaswag", EXAMPLES, [choices], right), ContextConfig(**config))
    check_reward_fits(Task("qa", EXAMPLES, [], right), ContextConfig(**JUDGED | {"reward": "judge_soft"}))


# --- questions ----------------------------------------------------------------------------------------------------


def questions_of(judge: Judge | None, tokenizer, **changes) -> Questions:
    return Questions(EXAMPLES, right, FakeScorer(tokenizer), max_answer_tokens=6, judging=Judging(judge, **changes))


@pytest.fixture(scope="module")
def tokenizer(model_folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folders["llama"])


def test_an_evaluation_asks_and_a_sampled_trace_does_not(stub, judge, tokenizer):
    """Failure: the task's rule grades where the judge should, or the judge is paid where nothing reads it."""
    questions = questions_of(judge, tokenizer)
    rows = questions.assess(["s/0", "s/1"], ["a", "b"])
    assert stub.asked == []
    assert [(row.inputs.correct, row.inputs.judged) for row in rows] == [(None, None)] * 2
    assert rows[0].components["binary"] is rows[0].components["judge_soft"] is None
    assert rows[0].components["gain"] is not None
    stub.mode = "yes"
    assert [reading.correct for reading in questions.read(["s/0", "s/1"], ["a", "b"])] == [True, True]
    assert {asked[0] for asked in stub.asked} == {"hard"}
    assert [asked[1:3] for asked in sorted(stub.asked)] == [(e.question, e.answer) for e in EXAMPLES[:2]]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_sampled_trace_without_a_verdict_is_unscored(stub, judge, tokenizer, kind):
    """Failure: a judge that failed pays nothing or everything, in place of leaving the row out."""
    questions = questions_of(judge, tokenizer, in_training=[kind])
    stub.answer = lambda _, question, *__: "hm" if "birds" in question else "yes" if kind == "hard" else "6"
    lost, kept = questions.assess(["s/0", "s/1"], ["a", "b"])
    assert lost.inputs is None
    assert "'hm'" in lost.unscored
    assert kept.unscored is None
    assert (kept.inputs.correct, kept.inputs.judged) == ((True, None) if kind == "hard" else (None, 0.6))
    row = lost.as_row(1, None, 0.0)
    assert row["correct"] is row["judged"] is row["reward"] is row["token_logprobs"] is None


def test_a_lost_verdict_is_a_row_with_a_reason(stub, judge, tokenizer):
    """Failure: a row of an evaluation that the judge failed on counts as wrong, or stops the evaluation."""
    stub.answer = lambda _, question, *__: "hm" if "birds" in question else "yes"
    lost, kept = questions_of(judge, tokenizer).read(["s/0", "s/1"], ["a", "b"])
    assert isinstance(lost, Unscored)
    assert lost.reason.startswith(BY_JUDGE)
    assert kept.correct is True


@pytest.mark.parametrize(
    ("rows", "lost", "stops"), [(2, 1, False), (2, 2, True), (50, 2, True), (1000, 10, False), (1000, 11, True)]
)
def test_an_evaluation_without_its_verdicts_stops(rows, lost, stops):
    """Failure: an accuracy over the rows that a dying judge happened to answer is written down for good."""
    found = [{"unscored": f"{BY_JUDGE}connection lost"}] * lost + [{"unscored": None}] * (rows - lost)
    with pytest.raises(JudgeError, match=f"{lost} of {rows} answers got no verdict") if stops else nullcontext():
        check_verdicts(found, 0.01)
    check_verdicts([{"unscored": "too long for the base model"}] * rows, 0.01)  # no judge's fault


def test_one_reply_that_the_judge_cannot_take_does_not_end_the_batch(stub):
    """Failure: at one request at a time, a single row that always fails leaves all that come after it unscored."""
    stub.mode = ["ok"] * 3 + ["503"] * 4 + ["ok"]
    found = Judge(stub.url, "any", concurrency=1).hard([(f"Q{n}", "4", "4") for n in range(12)])
    assert [isinstance(one, Unscored) for one in found] == [n == 3 for n in range(12)]


def test_a_word_that_is_no_secret_stays_in_the_replies(stub, monkeypatch):
    """Failure: a local server's dummy key is cut out of the judge's words, and a verdict with it."""
    monkeypatch.setenv("OPENAI_API_KEY", "no")
    stub.answer = lambda *_: "no"
    assert Judge(stub.url, "any").hard(ROWS[:1]) == [False]


def test_a_judge_that_was_cut_while_it_thought_aloud_has_said_nothing():
    """Failure: the word that a judge begins to think with is its verdict."""
    assert parse_verdict("hard", "No, let me check the totals.\nThe reply says 12,", cut=True) is None
    assert parse_verdict("hard", "Verdict: no\nThe reply says 12,", cut=True) is False
    assert parse_verdict("hard", "No, the reply says", cut=True) is False


def test_rewards_say_what_they_miss(tokenizer):
    """Failure: an unknown verdict counts as a wrong answer."""
    [row] = questions_of(None, tokenizer).assess(["s/0"], ["a"])
    for name in ("binary", "judge_soft", "hybrid", "fallback"):
        with pytest.raises(ValueError, match=r"and (the judge was not|none was) asked"):
            Reward(name)([row.inputs], [0])


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train(model_folders, tmp_path, stub):
    """Runs train_context.py on random tiny models, 24 questions of a user's own and the stub; its exit code."""
    data = tmp_path / "mine.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"{n} cats?", "answer": f"{4 * n} legs"}) + "\n" for n in range(30))
    )
    # The random base model's answers are never right: the stub finds something in them by their text.
    stub.answer = lambda kind, _, __, reply: (
        ("yes" if len(reply) % 2 else "no") if kind == "hard" else str(len(reply) % 11)
    )

    def run(*flags: str, out: str = "run", url: str | None = stub.url) -> int:
        judged = [] if url is None else ["--judge_url", url, "--judge_model", "any", "--judge_concurrency", "4"]
        return main([
            *("--task", "qa", "--data", str(data), "--eval_questions", "4", "--max_steps", "3", "--save_steps", "1"),
            *("--model_name_or_path", str(model_folders["llama"]), "--scorer_model", str(model_folders["qwen2"])),
            *("--per_device_train_batch_size", "16", "--num_generations", "4", "--max_completion_length", "12"),
            *("--max_answer_tokens", "12", "--cpu_threads", "2", "--output_dir", str(tmp_path / out), *judged, *flags),
        ])  # fmt: skip

    return run


def trace_rows(folder: Path) -> list[dict]:
    return ds.dataset(folder / "traces").to_table().to_pylist()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def evaluated(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "eval").iterdir()) for row in lines(path)]


def error(capfd) -> str:
    """The one line of the error; a progress bar may stand before it."""
    _, found, line = capfd.readouterr().err.partition("error: ")
    assert found
    assert line.count("\n") == 1
    return line


def asked_in_training(stub: StubJudge, folder: Path) -> list[tuple[str, str, str, str]]:
    """What was asked about the training questions, without the check at the start."""
    held_out = {row["question"] for row in lines(folder / "held_out.jsonl")}
    return [asked for asked in stub.asked if asked[1] not in held_out and asked[2] != asked[3]]


def test_a_run_trains_on_the_judges_scores_and_is_evaluated_by_its_verdicts(train, stub, tmp_path, capfd):
    """Failure: another number trains than the judge gave, the task's rule evaluates, or nobody can look it up."""
    assert train("--grader", "judge", "--reward", "judge_soft") == 0
    folder = tmp_path / "run"
    said = {(v["kind"], v["question"], v["reply"]): v["value"] for v in lines(folder / "judge.jsonl")}
    questions = {q["id"]: q["question"] for name in ("questions", "held_out") for q in lines(folder / f"{name}.jsonl")}
    rows = trace_rows(folder)
    assert len(rows) == 48
    for row in rows:
        value = said.get(("soft", questions[row["example_id"]], row["base_answer"].strip()), 0.0)
        assert row["reward"] == row["judged"] == row["rewards/judge_soft"] == value
        assert row["correct"] is row["rewards/binary"] is row["rewards/gated"] is None
        assert row["rewards/gain"] is not None
    assert len({row["reward"] for row in rows}) > 5
    assert {asked[0] for asked in asked_in_training(stub, folder)} == {"soft"}
    items = evaluated(folder)
    for row in items:
        assert row["correct"] is said.get(("hard", questions[row["id"]], row["base_answer"].strip()), False)
    assert 0 < sum(row["correct"] for row in items) < len(items)
    steps = metrics(folder)
    for line in steps:
        assert "accuracy" not in line
        assert line["rewards/judge_soft"] == pytest.approx(line["reward"], abs=1e-6)
    assert all(line["judge/requests"] + line["judge/cached"] <= 16 and line["judge/failed"] == 0 for line in steps)
    assert sum(line["judge/requests"] for line in steps) == len(asked_in_training(stub, folder))
    settings = yaml.safe_load((folder / "config.yaml").read_text())["settings"]
    assert (settings["grader"], settings["judge_url"], settings["judge_model"]) == ("judge", stub.url, "any")
    assert "shown the reference answer itself" in capfd.readouterr().out
    assert any("shown the reference answer itself" in note for note in result(folder)["notes"])


def test_binary_is_the_judges_verdict(train, stub, tmp_path):
    """Failure: with --grader judge the base model is still paid by the task's rule, which finds nothing right here."""
    assert train("--grader", "judge", "--reward", "binary", "--no_evaluate") == 0
    rows = trace_rows(tmp_path / "run")
    expected = [bool(len(row["base_answer"].strip()) % 2) for row in rows]
    assert [row["correct"] for row in rows] == expected
    assert [row["reward"] for row in rows] == list(map(float, expected))
    assert {asked[0] for asked in stub.asked} == {"hard"}
    for line in metrics(tmp_path / "run"):
        assert line["accuracy"] == pytest.approx(line["reward"])


def test_a_likelihood_reward_asks_nothing_in_training(train, stub, tmp_path):
    """Failure: every sampled trace is paid for, though its likelihood trains."""
    assert train("--grader", "judge", "--reward", "gain") == 0
    folder = tmp_path / "run"
    assert asked_in_training(stub, folder) == []
    assert all(row["correct"] is None and row["reward"] is not None for row in trace_rows(folder))
    assert not any(key.startswith("judge/") or key == "accuracy" for line in metrics(folder) for key in line)
    assert 0 <= result(folder)["eval"]["trained"]["greedy"]["accuracy"] <= 1
    before = len(stub.asked)
    assert train("--grader", "judge", "--reward", "gain", "--no_evaluate", out="silent") == 0
    assert len(stub.asked) == before


def test_the_accuracy_curve_can_be_asked_for(train, stub, tmp_path):
    assert train("--grader", "judge", "--reward", "gain", "--judge_training", "--no_evaluate") == 0
    assert {asked[0] for asked in stub.asked} == {"hard"}
    rows = trace_rows(tmp_path / "run")
    assert all(row["correct"] is bool(len(row["base_answer"].strip()) % 2) for row in rows)
    assert all(line["accuracy"] > 0 for line in metrics(tmp_path / "run"))


def test_judge_soft_trains_beside_the_tasks_own_grader(train, stub, tmp_path):
    """Failure: a judge that scores also grades, or is asked for verdicts at the evaluation."""
    assert train("--reward", "judge_soft") == 0
    assert {asked[0] for asked in stub.asked} == {"soft"}
    assert all(row["correct"] is False for row in trace_rows(tmp_path / "run"))


def test_a_judge_that_dies_stops_the_run_and_the_resumed_one_is_as_if_it_had_not(train, stub, tmp_path, capfd):
    """Failure: rewards are invented for hours, the run cannot go on, or it pays again for what it knew."""
    flags = ("--grader", "judge", "--reward", "{hybrid: {binary: 1, judge_soft: 1}}")
    assert train(*flags, out="whole") == 0
    whole = sorted(trace_rows(tmp_path / "whole"), key=str)
    ids = {row["example_id"] for row in whole if row["step"] == 2}
    second = {q["question"] for q in lines(tmp_path / "whole/questions.jsonl") if q["id"] in ids}
    first_of_step_2 = next(n for n, asked in enumerate(stub.asked) if asked[1] in second and asked[2] != asked[3])
    stub.dies_after = len(stub.asked) + first_of_step_2 + 3
    capfd.readouterr()
    assert train(*flags) == 1
    folder = tmp_path / "run"
    message = error(capfd)
    assert "traces could not be scored (--max_unscored 0.01); the last reason: judge: connection lost" in message
    assert not (folder / "result.json").exists()
    lost = [row for row in trace_rows(folder) if row["unscored"] is not None]
    assert {row["step"] for row in lost} == {2}
    assert len(lost) > 10
    for row in lost:
        assert row["unscored"].startswith("judge: ")
        assert row["reward"] is row["correct"] is row["judged"] is row["rewards/binary"] is None
        assert row["advantage"] == 0.0
    known = {tuple(v[k] for k in ("kind", "question", "reference", "reply")) for v in lines(folder / "judge.jsonl")}

    before, stub.dies_after = len(stub.asked), None
    assert train(*flags, "--resume") == 0
    again = [asked for asked in stub.asked[before:] if asked in known]
    assert {asked[2] == asked[3] for asked in again} == {True}, "only the check at the start"
    assert result(folder)["resumed_from"] == "checkpoint-1"
    keys = ("step", "example_id", "trace", "base_answer", "correct", "judged", "reward", "advantage", "unscored")
    pick = [[[row[key] for key in keys] for row in sorted(rows, key=str)] for rows in (trace_rows(folder), whole)]
    assert pick[0] == pick[1]


def test_a_judge_that_dies_in_an_evaluation_leaves_none_half_done(train, stub, tmp_path, capfd):
    """Failure: a resumed run takes up an accuracy over the rows that were judged before."""
    stub.dies_after = 3
    assert train("--grader", "judge", "--reward", "gain") == 1
    assert "answers got no verdict, and the evaluation stops" in error(capfd)
    assert not (tmp_path / "run/eval").exists()
    stub.dies_after = None
    assert train("--grader", "judge", "--reward", "gain", "--resume") == 0
    assert result(tmp_path / "run")["eval"]["none"]["greedy"]["n"] == 4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "mode", "expected"),
    [
        (["--judge_url", "nobody"], "ok", ["Connection refused", "http://127.0.0.1:", "--judge_url"]),
        ([], "401", ["refuses every request: HTTP 401", "set OPENAI_API_KEY"]),
        ([], "404", ["HTTP 404", "--judge_model 'any'"]),
        ([], "hm", ["neither yes nor no, or both: 'hm'"]),
        (["--task", "hellaswag"], "ok", ["multiple choice"]),
        (["--judge_model", ""], "ok", ["--judge_model is not set"]),
        (["--judge_options", "[1]"], "ok", ["--judge_options is"]),
    ],
)
def test_a_mistake_with_the_judge_is_one_line_and_leaves_no_folder(train, stub, tmp_path, capfd, flags, mode, expected):
    """Failure: minutes of training before a typing error in the URL is found."""
    if "--task" in flags and "CONTEXT_RL_DATA" not in os.environ:
        pytest.skip("CONTEXT_RL_DATA names no folder with hellaswag/")
    if "--task" in flags:
        flags = [*flags, "--data", os.environ["CONTEXT_RL_DATA"] + "/hellaswag", "--train_questions", "16"]
    stub.mode = mode
    flags = [f"http://127.0.0.1:{free_port()}/v1" if flag == "nobody" else flag for flag in flags]
    assert train("--grader", "judge", *flags) == 1
    message = error(capfd)
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_no_file_of_a_run_holds_the_key(train, stub, tmp_path, monkeypatch, capfd):
    """Failure: config.yaml, a log or a verdict gives the key away."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert train("--grader", "judge", "--reward", "binary", "--max_steps", "1") == 0
    assert {headers["Authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())


# --- afterwards ---------------------------------------------------------------------------------------------------


def test_the_bench_rewards_a_judged_run_anew_and_says_what_nobody_judged(train, stub, tmp_path, model_folders):
    """Failure: the judge's scores are lost with the run, or unknown verdicts count as wrong ones."""
    assert train("--grader", "judge", "--reward", "judge_soft", "--no_evaluate") == 0
    before, folder = len(stub.asked), tmp_path / "run"
    assert bench([str(folder), "--base", str(model_folders["qwen2"]), "--groups", "4"]) == 0
    assert len(stub.asked) == before, "five versions of every trace would be five verdicts"
    found = json.loads((folder / "reward_bench/reward_bench.json").read_text())
    assert found["saved"]["accuracy"] is None
    assert found["saved"]["statistics"]["judge_soft"]["no_spread"]["groups"] == 12
    assert found["saved"]["statistics"]["gain"]["auc"] == {"value": None, "ci": None, "groups": 0}
    assert "the judge was not asked" in found["saved"]["does_not_fit"]["binary"]
    assert {"binary", "judge_soft"} <= found["bases"][0]["does_not_fit"].keys()
    assert "No judge was asked which answers are right" in (folder / "reward_bench/reward_bench.md").read_text()


def test_a_group_with_an_unknown_verdict_says_nothing_about_right_and_wrong():
    """Failure: None is ranked among the wrong answers."""
    statistics = GroupStatistics(["gain"], 1)
    for verdicts in ([True, None, False], [None, None, None], [True, False, False]):
        statistics.add(0, np.array([[0.3, 0.2, 0.1]]), verdicts, [5, 6, 7])
    found = statistics.results()["gain"]
    assert (found["auc"].groups, found["no_spread"].groups) == (1, 3)


def test_an_evaluation_of_a_judged_run_asks_its_judge(train, stub, tmp_path, capfd):
    """Failure: the two evaluations of one run grade by different rules."""
    assert train("--grader", "judge", "--reward", "gain", "--max_steps", "1") == 0
    folder = tmp_path / "run"
    words = ["--run", str(folder), "--samples", "0", "--conditions", "none", "trained"]
    before = len(stub.asked)
    assert evaluate(words) == 0
    found = [row for path in (folder / "eval_run/rows").iterdir() for row in lines(path)]
    assert len(found) == 2 * 6
    assert all(row["correct"] is bool(len(row["base_answer"].strip()) % 2) for row in found)
    assert len(stub.asked) > before
    assert (folder / "eval_run/judge.jsonl").exists()
    before = len(stub.asked)
    said = (folder / "eval_run/judge.jsonl").read_text()
    assert evaluate(words) == 0
    assert len(stub.asked) == before
    assert (folder / "eval_run/judge.jsonl").read_text() == said

    with StubJudge() as other:
        other.mode = "no"
        assert evaluate([*words, "--judge_url", other.url, "--judge_model", "other"]) == 0
        assert {body["model"] for body in other.bodies} == {"other"}
    assert evaluate([*words, "--grader", "task", "--out", str(tmp_path / "task")]) == 0
    assert len(stub.asked) == before
    capfd.readouterr()
    for flags, message in (
        (["--grader", "task", "--judge_url", stub.url], "--judge_url has no effect without --grader judge"),
        (["--task", "gsm8k"], "gsm8k is graded by lm-evaluation-harness, which asks no judge; add --grader task"),
    ):
        assert evaluate([*words, *flags]) == 1
        assert message in error(capfd)
    base = ["--task", "symbolic", "--base", "nowhere", "--grader", "judge"]
    assert evaluate(base) == 1
    assert "--grader judge needs --judge_url and --judge_model" in error(capfd)
