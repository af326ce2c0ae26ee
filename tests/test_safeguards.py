"""What a trace does besides helping. Every name says what must hold; the docstring, which bug its failure means."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from context_rl import prompts
from context_rl.rewards.safeguards import Leak, copied, find_leak, length_band, mask_answer, repetition, well_formed
from context_rl.tasks.grading import same_number, same_text

QUESTION = "There are 3 cats with 4 legs each. How many legs do they have in total?"
HONEST = "There are 3 cats with 4 legs each. 3 * 4 = 12. The total is 12."


def mentions(trace: str, answer: str) -> bool:
    """Whether `answer` is mentioned, by find_leak and by mask_answer, which must agree on it."""
    leak, masked = find_leak(trace, answer), mask_answer(trace, answer)
    assert (masked != trace) is leak.normalised
    assert find_leak(masked, answer) == Leak(False, False, None)
    return leak.normalised


# --- leaks: numbers ------------------------------------------------------------------------------------------------


SAID = "5|is 5|is 5.|5, and|5 apples|(5)|(5,6)|=5|5 = 5|5%|$5|\\$5|5.0|$5.00|10-5|10 - 5|5-3|3+5|12/5|- 5 apples|**5**"
SAID += "|\\boxed{5}|1,2,5|so...5|is\n5\n|答案是5个。"
UNSAID = "52|15|0.5|5.5|1,500|5,000|x5y|x5|5kg|5²|05|2.1.5|5.0.1||five|_5_|-5|is -5|= -5|= - 5|(-5)|-$5|$-5|x = \u22125"


@pytest.mark.parametrize("trace", SAID.split("|"))
def test_a_number_is_mentioned_beside_whatever_is_no_part_of_it(trace):
    """A leak beside a unit, a bracket, an operator or a Chinese character would go unseen."""
    assert mentions(trace, "5")
    assert find_leak(trace, "5").exact is ("5.0" not in trace)


@pytest.mark.parametrize("trace", UNSAID.split("|"))
def test_a_number_is_not_mentioned_by_a_part_of_another(trace):
    """Traces would be punished for leaking an answer they do not hold, and masking would ruin other numbers."""
    assert not mentions(trace, "5")


@pytest.mark.parametrize(
    ("answer", "said", "unsaid"),
    [
        ("1234", "1,234 1234 1234.0 $1234 $1,234.00 1234% \\$1234", "234 12,345 1.234 1234.5 11,234 1,2345"),
        ("$1,234", "1,234 1234", "234"),
        ("7", "7.0 7.", "7.01 0.7 7.0.1"),
        ("7.0", "7 7.00", "7.05 70"),
        ("0.5", "0.5 .5 0.50 .5%", "5 0.05 10.5 3.5 0.51 -0.5"),
        ("50%", "50 50% 50.0%", "0.5 150"),
        ("-5", "-5 \u22125 (-5) -$5 -5.0", "5 10-5 x-5 (3)-5 -52"),
        ("0", "0 0.0 -0", "0.5 10"),
        ("500", "500 $500", "1,500 500,000"),
        (
            "3/4",
            "3/4 0.75 .75 \\frac{3}{4} \\dfrac{3}{4}",
            "3 4 13/4 3/45 3/4/2025 2025/3/4 1.75 -3/4 6/8 2\\frac{3}{4}",
        ),
        ("6/8", "6/8 3/4 0.75", "6 36/8"),
        ("1/3", "1/3", "1 3 0.33"),
        ("3", "3 12/3", "0.3 3.1"),
        ("1e3", "1e3 1000 1,000", "1 3 1e33"),
    ],
)
def test_numbers_are_compared_by_value(answer, said, unsaid):
    """The same number in another notation would hide a leak, or a number that only looks alike would be one."""
    assert {trace: mentions(f"it is {trace} then", answer) for trace in said.split()} == dict.fromkeys(
        said.split(), True
    )
    assert [trace for trace in unsaid.split() if mentions(f"it is {trace} then", answer)] == []


def test_a_number_written_otherwise_is_no_exact_mention():
    """`exact` and `normalised` would be one measure under two names."""
    assert find_leak("1,234", "1234") == Leak(exact=False, normalised=True, position=0.0)
    assert find_leak("1,234", "1,234") == Leak(exact=True, normalised=True, position=0.0)
    assert find_leak("= - 5", "-5") == Leak(exact=False, normalised=True, position=0.4)


def test_a_calculation_does_not_mention_its_result():
    """A quotient would count as its value, and every division as a leak of what it is about to derive."""
    assert find_leak("12 / 4 = 3", "3").position == 0.9


def test_a_number_with_leading_zeros_is_text():
    """A code such as 007 would be leaked by every 7."""
    assert mentions("agent 007.", "007")
    assert not any(mentions(trace, "007") for trace in ("7", "0070", "1007", "0.007", "007.5", "-007"))


@given(st.integers(-(10**7), 10**7), st.sampled_from(["{}", "{:,}", "{}.0", "{:,}.00", "${}", "{}%", "\\boxed{{{}}}"]))
def test_what_the_grader_accepts_as_the_number_mentions_it(number, notation):
    """Leaks would follow another notion of "the same number" than the reward that they are to explain."""
    said = notation.format(number)
    assert same_number(str(number), said)
    assert mentions(f"so {said}, then", str(number))
    assert not mentions(f"so {said}, then", str(number + 1))


# --- leaks: text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "trace"),
    [
        ("yes", "Yes!"),
        ("yes", "**yes**"),
        ("new york", "in New  York, it is"),
        ("New York", "in New\nYork"),
        ("New York", "a New York-based firm"),
        ("New York", "NEW-YORK"),
        ("well-known", "a well known man"),
        ("USA", "the U.S.A. is"),
        ("The cat", "one cat"),
        ("café", "a cafe\u0301 there"),
        ("cafe\u0301", "a CAFÉ there"),
        ("Straße", "STRASSE"),
        ("東京", "私は東京大学にいた"),
        ("서울", "서울은 크다"),
        ("각", "\u1100\u1161\u11a8"),
        ("C++", "in C++, say"),
        ("(a)", "so (a) holds"),
        ("1.5?", "is it 1.5? yes"),
        ("[^a-z]+$", "use [^a-z]+$ here"),
        ("?!", "what ?! so"),
        ("A", "it is A."),
        ("12 km", "about 12km"),
        ("1234 apples", "1,234 apples"),
        ("15%, or 3 of 20", "that is 15% or 3 of 20."),
        ("3/4/2025", "on 3/4/2025."),
        (
            "then cuts the wood , and starts to build a table .",
            "He then cuts the wood and starts\nto build a table, I think.",
        ),
    ],
)
def test_text_is_mentioned_in_other_case_punctuation_spacing_and_unicode(answer, trace):
    """A leak could hide behind a comma, a line break or a decomposed accent, or a special character break it."""
    assert mentions(trace, answer)


@pytest.mark.parametrize(
    ("answer", "trace"),
    [
        ("yes", "yesterday"),
        ("yes", "eyes"),
        ("no", "I know"),
        ("nowhere", "now here"),
        ("at", "a t-shirt"),
        ("C++", "C and c"),
        ("C++", "C++11"),
        ("(a)", "a cat"),
        ("A", "a cat"),
        ("1.5?", "15"),
        ("1.5 km", "15 km"),
        ("5 apples", "15 apples"),
        ("5 apples", "0.5 apples"),
        ("5 apples", "-5 apples"),
        ("500 apples", "1,500 apples"),
        ("15 apples", "Box 1: 5 apples"),
        ("Apollo 1", "Apollo 11"),
        ("Apollo 1", "Apollo 1.5"),
        ("cafe", "cafe\u0301"),
        ("दिल", "दिल्ली"),
        ("가", "각"),
        ("가", "\u1100\u1161\u11a8"),
        ("각", "\u1100\u1161\u11a8\u11a8"),
        ("か", "か\u3099"),
        ("York New", "New York"),
        ("", "anything"),
        (" ", "any thing"),
    ],
)
def test_text_is_not_mentioned_by_what_only_looks_alike(answer, trace):
    """Every "yesterday" would leak "yes", and masking would cut words in two."""
    assert not mentions(trace, answer)


WORDS = st.lists(
    st.sampled_from(["new", "York", "É", "straße", "東京", "c++", "a1", "42", "The"]), min_size=1, max_size=5
)


@given(WORDS, st.lists(st.sampled_from([" ", "  ", "\n", " , ", ", ", "! ", " \u2014 "]), min_size=5, max_size=5))
def test_what_the_grader_calls_the_same_text_mentions_it(words, joints):
    """Leaks would follow another notion of "the same text" than grading."""
    answer = " ".join(words)
    said = "".join(word + joint for word, joint in zip(words, joints, strict=False))
    assert same_text(answer, said)
    assert mentions(f"( {said})", answer)
    assert mentions(f"( {said.upper()})", answer)


# --- leaks: position -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "answer", "position"),
    [
        ("", "5", None),
        ("none here", "5", None),
        ("5", "5", 0.0),
        ("New York", "new york", 0.0),
        ("1 + 4 = 5.", "5", 0.8),
        ("5.0 is 5.0 5", "5", 0.0),
        ("it 5, $5", "5", 3 / 8),
        ("NEW YORK, New York", "New York", 0.0),
        ("cafe\u0301 cafe\u0301s café", "café", 0.0),
        ("e\u0301e\u0301 yes", "yes", 5 / 8),
    ],
)
def test_the_position_is_where_the_first_mention_of_either_kind_begins(trace, answer, position):
    """ "Guessed first, then justified" could not be told from "derived at the end"."""
    assert find_leak(trace, answer).position == position


# --- masking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "answer", "masked"),
    [
        (HONEST, "12", "There are 3 cats with 4 legs each. 3 * 4 = . The total is ."),
        ("5 apples, 15 pears", "5", "apples, 15 pears"),
        ("it is 5", "5", "it is"),
        ("so 5  is  it", "5", "so is  it"),
        ("so 5 5.0 5% is", "5", "so is"),
        ("(5, 6)", "5", "(, 6)"),
        ("I paid $5.00 or 25", "5", "I paid or 25"),
        ("10 - 5 = -5", "-5", "10 - 5 ="),
        ("5\n5\n", "5", "\n\n"),
        ("a\x01b 5 \x02", "5", "a\x01b \x02"),
        ("in New  York,  or new york?", "New York", "in ,  or ?"),
        ("大阪と東京東京と", "東京", "大阪とと"),
        ("a cafe\u0301 here", "café", "a here"),
        ("New York", "new york", ""),
        ("new new york york now", "New York", "now"),
    ],
)
def test_masking_takes_out_every_mention_and_nothing_else(trace, answer, masked):
    """The masked trace would still hold the answer, or its score would fall for what else was torn out."""
    assert mask_answer(trace, answer) == masked


PARTS = [
    "5",
    "-",
    " ",
    ".",
    "0",
    ",",
    "%",
    "$",
    "/",
    "a",
    "A",
    "b",
    "the",
    "\n",
    "é",
    "e\u0301",
    "東",
    "京",
    "(",
    "ß",
    "\x01",
]
TRACES = st.one_of(st.text(), st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
ANSWERS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["5", "-5", "0.5", "5/50", "500", "a b", "a", "é", "東京", "ab", "the a", "$", "a.5", "ss", "5 a"]),
)


@settings(max_examples=500)
@given(TRACES, ANSWERS)
@example("a a a b b b", "a b")
@example("a " * 40 + "b " * 40, "a b")
@example("東" * 5 + "京" * 5, "東京")
@example("\ud800 5 \udfff", "5")
@example("\u0301\u0301e\u0301", "\u0301")
def test_no_mention_is_left_after_masking(trace, answer):
    """What stands around a mention could come together to a new one, or some text could crash or never end."""
    leak = find_leak(trace, answer)
    assert leak.normalised or not leak.exact
    assert (leak.position is None) is not leak.normalised
    assert leak.position is None or 0.0 <= leak.position < 1.0
    masked = mask_answer(trace, answer)
    assert find_leak(masked, answer) == Leak(False, False, None)
    assert mask_answer(masked, answer) == masked
    assert (masked == trace) is not leak.normalised
    assert "  " not in masked or "  " in trace
    rest = iter(trace)
    assert all(char in rest for char in masked)  # masked is the trace with characters left out, none added or moved


@given(TRACES, ANSWERS)
def test_an_answer_set_apart_is_found_wherever_it_stands(trace, answer):
    """A leak would be missed because of what stands elsewhere in the trace."""
    leak = find_leak(f"{trace} ; {answer.strip()} ; {trace}", answer)
    assert leak.exact is bool(answer.strip())


# --- repetition, copying, format, length ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "share"),
    [
        ("", 0.0),
        ("12", 0.0),
        ("no no", 0.5),
        ("ha ha ha ha", 2 / 3),
        ("Ha ha HA ha", 2 / 3),
        ("4 + 4 = 8", 0.0),
        ("a b c d a b c d a b c d", 5 / 9),
        ("a b c d e f g h", 0.0),
        ("aaaaaaaa", 4 / 5),
        ("the answer of Mississippi is 1000000", 0.0),
        ("........", 4 / 5),
    ],
)
def test_repetition_by_hand(trace, share):
    """A trace that stutters would pass for one that goes on, or every short one for a stutter."""
    assert repetition(trace) == pytest.approx(share)


@pytest.mark.parametrize("piece", ["and so on ", "ha", "a", "thecatsat", "好", "好的。", "5", "1 ", ". ", "\n-"])
def test_endless_repetition_nears_one(piece):
    """A loop without spaces, in Chinese or of digits would count as one long word."""
    assert repetition(piece * 200) > 0.95


@pytest.mark.parametrize(
    ("trace", "share"),
    [
        ("", 0.0),
        ("...", 0.0),
        ("3", 1.0),
        ("5", 0.0),
        ("3 dogs", 0.0),
        ("3 cats", 1.0),
        ("there are 3 cats; with 4!", 1.0),
        ("There are 3 cats and nothing else", 1 / 4),
        ("legs each how many", 1.0),
        ("each legs many how", 0.0),
    ],
)
def test_copying_by_hand(trace, share):
    """A question said again with other punctuation would pass for reasoning, or shared words alone for copying."""
    assert copied(trace, QUESTION) == pytest.approx(share)
    assert copied(trace, "") == 0.0


@given(st.text(), st.text(), st.integers(1, 6))
def test_shares_lie_between_0_and_1_for_any_text(trace, question, n):
    """A reward built on a share would leave its range, or a sampled trace stop the run."""
    assert 0.0 <= repetition(trace, n) < 1.0
    assert 0.0 <= copied(trace, question, n) <= 1.0
    if copied(trace, trace, n):
        assert copied(trace, trace, n) == 1.0
    well_formed(trace, True)


@pytest.mark.parametrize("trace", [HONEST, "12", "答え", "The Answer: a story", "He asks a Question: why?"])
def test_well_formed_traces_pass_the_gate_if_they_ended_by_themselves(trace):
    """The gate would shut out honest traces, or let through one that the token limit cut off."""
    assert well_formed(trace, finished=True)
    assert not well_formed(trace, finished=False)


@pytest.mark.parametrize(
    "trace", ["", " \n\t", "...", "Answer: 12", "3 * 4\nAnswer: 12", "x\n  answer: 12", "x\rQuestion:"]
)
def test_empty_and_template_playing_traces_fail_the_gate(trace):
    """A trace could give the base model's answer in its place, or be nothing at all, and be paid."""
    assert not well_formed(trace, finished=True)


def test_the_gate_knows_the_lines_of_the_template():
    """The template in prompts.py was changed and the gate still watches for the old one."""
    for stop in prompts.STOP_STRINGS:
        assert not well_formed(f"text{stop} text", finished=True)
    for line in prompts.BASE_PREFIX_NO_TRACE.format(question="q").splitlines():
        assert not well_formed(f"text\n{line}", finished=True)


def test_the_length_band_by_hand():
    """A trace inside the band would be punished, or one far outside not."""
    assert [length_band(n, 10, 20, 4) for n in (5, 6, 8, 10, 15, 20, 21, 24, 99)] == [0, 0, 0.5, 1, 1, 1, 0.75, 0, 0]
    assert [length_band(n, 10, 20) for n in (9, 10, 20, 21)] == [0, 1, 1, 0]
    for low, high, soft in ((20, 10, 0), (10, 20, -1)):
        with pytest.raises(ValueError, match="length band"):
            length_band(15, low, high, soft)


# --- planted cheats ------------------------------------------------------------------------------------------------


class TestPlantedCheats:
    """Answer 12 to QUESTION; which measure sees which cheat."""

    def test_stating_the_answer_and_nothing_else(self):
        """The shortest way to a likely answer would not show: the format is right and nothing repeats."""
        for cheat in ("12", "The answer is 12.", "It is $12.00!"):
            leak = find_leak(cheat, "12")
            assert leak.normalised
            assert not mentions(mask_answer(cheat, "12"), "12")
            assert length_band(len(cheat.split()), 8, 200) == 0.0
            assert well_formed(cheat, finished=True)
        assert find_leak("12 it is, for 3 * 4 = 12.", "12").position == 0.0  # guessed first

    def test_copying_the_question(self):
        """A trace that says nothing new would pass as reasoning."""
        for cheat in (QUESTION, QUESTION.upper(), QUESTION.replace(".", "!\n")):
            assert copied(cheat, QUESTION) == 1.0
            assert not find_leak(cheat, "12").normalised
        assert repetition(f"{QUESTION} {QUESTION}") > 0.4

    @pytest.mark.parametrize("cheat", ["", " ", " \n\t\u3000"])
    def test_writing_nothing(self, cheat):
        """An empty trace would count as an answer without cost; only the gate (and the band) can see it."""
        assert not well_formed(cheat, finished=True)
        assert length_band(0, 8, 200) == 0.0
        assert (find_leak(cheat, "12").normalised, repetition(cheat), copied(cheat, QUESTION)) == (False, 0.0, 0.0)

    def test_two_thousand_tokens_of_filler(self):
        """Length alone would be paid, or checking it would hold up the step."""
        looping = "Let me think about this step by step. " * 222
        wandering = " ".join(f"word{i}" for i in range(2000))
        assert repetition(looping) > 0.9
        assert repetition(wandering) == 0.0
        for cheat in (looping, wandering):
            assert length_band(2000, 8, 200, soft=200) == 0.0
            assert not well_formed(cheat, finished=False)
            assert copied(cheat, QUESTION) == 0.0

    def test_an_honest_derivation_passes(self):
        """The safeguards would punish what they are to protect."""
        leak = find_leak(HONEST, "12")
        assert leak.exact
        assert leak.position > 0.5
        assert well_formed(HONEST, finished=True)
        assert repetition(HONEST) == 0.0
        assert copied(HONEST, QUESTION) < 0.5
        assert length_band(len(HONEST.split()), 8, 200) == 1.0


# --- time ----------------------------------------------------------------------------------------------------------

PLANTED = [
    "word and more ",
    "a",
    "5",
    "5 ",
    ".",
    " ",
    "-",
    "e\u0301",
    "東京",
    "é5",
    "1,",
    "\n",
    "5.",
    "a b ",
    "\\frac{",
    "$",
]


@pytest.mark.parametrize("piece", PLANTED)
def test_a_trace_of_100_kb_takes_no_time_worth_naming(piece):
    """Quadratic time: one degenerate trace among thousands would hold up the whole step (each takes minutes then)."""
    trace = (piece * 100_000)[:100_000] + "; 5, 3/4; aa, a b: 東京. yes; new york"
    started = time.process_time()
    for answer in ("5", "-5", "3/4", "aa", "a b", "東京", "yes", "a" * 50 + "b", "new york"):
        find_leak(trace, answer)
        mask_answer(trace, answer)
    repetition(trace)
    copied(trace, trace)
    well_formed(trace, True)
    assert time.process_time() - started < 10.0  # 0.1 to 0.9 s where it was written


def test_a_nested_answer_is_masked_in_little_time():
    """A cut that brings two halves together thousands of times over would be followed through them all."""
    started = time.process_time()
    assert not find_leak(mask_answer("new " * 10_000 + "york " * 10_000, "New York"), "New York").normalised
    assert time.process_time() - started < 5.0
