"""The page to read traces on: what it holds, that nothing in a trace can break it, and how it works in a browser."""

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_rl.rewards.safeguards import find_leak
from eval.trace_page import mention_pieces, sample_ids, script_json, summary_html, write_page

VOID = {"meta", "link", "input", "br", "img", "hr"}
HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "comment": "<!-- <script> --> ]]> {{data}} {{title}} \\g<0>",
    "quotes": "\"double\" 'single' `back` \\ \\u003c &lt; &amp;",
    "separators": "a\u2028b\u2029c\r\nd\te\x00f",
    "emoji": "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 12 \U0001f600",
    "rtl": "\u0646\u062c\u0645\u0639 12 \u202e\u0648 30\u202c",
    "surrogate": "half \ud83d of a pair",
    "long": "The dog does not want a bath. " * 340,
    "unbroken": "x" * 3000,
}


def row(example_id: str, condition: str, logprobs: list[float] | None, correct: bool | None, **changes) -> dict:
    return {
        "id": example_id,
        "question": f"How much is question {example_id}?",
        "answer": "12",
        "condition": condition,
        "decoding": "greedy" if condition == "none" else "sampled",
        "sample": 0,
        "trace": None if condition == "none" else f"words of {condition} for {example_id}",
        "trace_tokens": None if condition == "none" else 4,
        "answer_tokens": [" 12", "\n"],
        "token_logprobs": logprobs,
        "logprob": None if logprobs is None else sum(logprobs),
        "base_answer": None if logprobs is None else " 12" if correct else " 7",
        "correct": correct,
        "unscored": "too long" if logprobs is None else None,
    } | changes


def evaluation(questions: int) -> list[dict]:
    """Question i gains i/10 - 3 nats; every third is put right, every fifth spoilt, every fourth trace leaks."""
    rows = []
    for i in range(questions):
        before, after = i % 3 != 0, i % 5 != 0
        trace = f"It is 12, says trace {i}." if i % 4 == 0 else f"Trace {i} says nothing."
        rows.append(row(f"t/{i}", "none", [-4.0, -0.5], before))
        rows.append(row(f"t/{i}", "trained", [-7.0 + i / 10, -0.5], after, trace=trace, trace_tokens=200 - i))
        rows.append(row(f"t/{i}", "shuffled", [-9.0, -0.5], False))
        rows.append(row(f"t/{i}", "gold", [-0.1, 0.0], True, decoding="greedy"))
    return rows


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the scripts, the ids and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.scripts, self.ids, self.words, self.attributes = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.attributes += [(tag, *pair) for pair in attrs]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "script":
            self.scripts.append([attributes, ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        elif self.open and self.open[-1] != "style":
            self.words += data

    @property
    def data(self) -> dict:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "data"))


def written(rows: list[dict], folder: Path, title: str = "Traces", **changes) -> Page:
    return Page(write_page(rows, folder / "page.html", title, **changes).read_text(encoding="utf-8"))


# --- the file ---


def test_the_page_is_balanced_html_that_loads_nothing(tmp_path):
    """An element is left open, an id stands twice, or the page asks the network for something."""
    page = written(evaluation(3), tmp_path)
    assert len(page.scripts) == 2
    assert len(set(page.ids)) == len(page.ids)
    loaded = {value for _, name, value in page.attributes if name in ("src", "srcset", "action", "href")}
    assert loaded == {"data:,", "#list-title"}
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    style = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_trace_holds_comes_back_and_breaks_nothing(name, tmp_path):
    """A trace ends the data's script element, runs as a script, or is shown changed."""
    text = HOSTILE[name]
    rows = [
        row("q", "none", [-1.0, 0.0], False, question=text),
        row("q", "trained", [-0.5, 0.0], True, question=text, trace=text, base_answer=text, id="q"),
    ]
    page = written(rows, tmp_path, title=text)
    assert len(page.scripts) == 2
    question = page.data["questions"][0]
    assert question["question"] == question["runs"][1]["base_answer"] == text
    assert "".join(question["runs"][1]["trace"]) == text
    assert page.words.count(text.encode("utf-8", "replace").decode().replace("\r\n", "\n").strip("\x00")[:10]) >= 1


@given(st.recursive(st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.none(), st.lists))
def test_data_comes_back_from_a_script_element(data):
    """Escaping changes the data, or leaves a character that HTML or JavaScript reads as its own."""
    text = script_json(data)
    assert json.loads(text) == data
    assert text.isascii()
    assert not set(text) & set("<>&")


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    """NaN in the data, which no browser parses: an empty page."""
    with pytest.raises(ValueError, match="JSON"):
        write_page([row("q", "none", [float("nan")], False, answer_tokens=["12"])], tmp_path / "p.html", "t", "none")


def test_rows_of_two_scorers_are_refused(tmp_path):
    """Tokens are coloured by the gains of other tokens."""
    rows = [row("q", "none", [-1.0, 0.0], False), row("q", "trained", [-1.0], True)]
    with pytest.raises(ValueError, match=r"q: 1 log-probs in the condition 'trained' for an answer of 2 tokens"):
        write_page(rows, tmp_path / "p.html", "t")


def test_the_data_is_what_the_rows_say(tmp_path):
    """A run is shown with another's trace, gain or verdict; a decoding doubles the run without a trace."""
    rows = evaluation(3)
    question = written([{**rows[0], "decoding": "sampled"}, *rows], tmp_path).data["questions"][0]
    assert [(run["condition"], run["decoding"]) for run in question["runs"]] == [
        ("none", "sampled"),
        ("trained", "sampled"),
        ("shuffled", "sampled"),
        ("gold", "greedy"),
    ]
    none, trained = question["runs"][:2]
    assert (none["gain"], none["flip"], none["trace"], none["leak"]) == (None, None, None, None)
    assert (trained["gain"], trained["flip"], trained["length"], trained["leak"]) == (-3.0, 0, 200, True)
    assert trained["trace"] == ["It is ", "12", ", says trace 0."]
    assert question["tokens"] == [" 12", "\n"]


@given(st.lists(st.sampled_from(["12", " ", "1,2", "New", "York", "\U0001f600", "12.0", "-", "a", "3"]), max_size=12))
def test_pieces_are_the_trace_and_every_second_one_mentions_the_answer(parts):
    """The highlighted words are not those that were counted as a leak, or text is lost between them."""
    for answer in ("12", "New York New York", "\U0001f600"):
        trace = " ".join(parts)
        pieces = mention_pieces(trace, answer)
        assert "".join(pieces) == trace
        assert (len(pieces) > 1) is find_leak(trace, answer).normalised
        assert all(pieces[1::2])


# --- which questions ---


def test_a_sample_is_the_same_every_time_and_the_page_says_so(tmp_path):
    """Two pages of one evaluation show other questions, or a reader takes a sample for all."""
    rows = evaluation(30)
    page, again = written(rows, tmp_path, limit=10), written(rows[::-1], tmp_path, limit=10)
    ids = [question["id"] for question in page.data["questions"]]
    assert len(ids) == 10
    assert set(ids) == {question["id"] for question in again.data["questions"]}
    assert ids == sorted(ids, key=lambda i: int(i[2:])), "the order of the data is kept"
    assert "10 of 30 questions, chosen by hash. The table is of all 30." in page.words
    assert "30 questions." in written(rows, tmp_path, limit=30).words


def test_a_smaller_sample_is_part_of_a_larger_one():
    """A question that one page showed is missing on a longer one."""
    ids = [f"q{i}" for i in range(100)]
    assert sample_ids(ids, 10) < sample_ids(ids, 20) < sample_ids(ids, 100) == set(ids)
    assert sample_ids(ids, 10) != set(ids[:10])


# --- the header ---


def test_the_header_is_the_table_of_facts(tmp_path):
    """The table is that of the sample shown, or a column has slipped."""
    words = written(evaluation(30), tmp_path, limit=5).words
    assert "mean gain, nats" in words
    assert "trained T = 1" in words
    assert "30" in words


def test_a_summary_may_be_given_as_markdown_or_as_rows():
    """Markdown is shown as it is written, a `|` splits a cell, or markup in a cell is obeyed."""
    text = "# Runs\n\n- <one>\n- two\n\nTwo <b>runs</b>\nof one.\n\n| reward | value | verdict |\n|---|---:|---|\n"
    found = summary_html(text + "| `a \\| b` | -1.50 [-2.00, -1.00] | no change |\n| c | - | better |\nThe end")
    assert found.startswith("<h3>Runs</h3>\n<ul><li>&lt;one&gt;</li><li>two</li></ul>\n")
    assert "<p>Two &lt;b&gt;runs&lt;/b&gt; of one.</p>" in found
    assert '<th scope="row">`a | b`</th><td>\u22121.50 <span class="ci">[\u22122.00, \u22121.00]</span></td>' in found
    assert '<td class="words">no change</td></tr>' in found
    assert found.count("<tr>") == 3
    assert found.endswith("<p>The end</p>")
    given = summary_html([["reward", "value"], ["<i>", 3], ["c", None]])
    assert '<th scope="row">&lt;i&gt;</th><td>3</td>' in given
    assert '<td><span class="dash">\u2013</span></td>' in given
    assert summary_html([]) == ""


def test_trace_and_decoding_are_one_column():
    """A decoding stands under another heading, or the dash of what is not decoded is shown."""
    found = summary_html("| trace | decoding | n |\n|---|---|---:|\n| trained | T = 1 | 3 |\n| none | - | 4 |")
    assert '<th scope="row">trained <span class="ci">T = 1</span></th><td>3</td>' in found
    assert '<th scope="row">no trace</th><td>4</td>' in found
    assert "decoding" not in found


def test_an_evaluation_without_rows_is_a_page(tmp_path):
    """A run that could not evaluate anything ends in a traceback."""
    assert written([], tmp_path).data["questions"] == []


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Headless Chromium. Not among the project's dependencies: pip install playwright, apt-get install chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on the PATH")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path) -> Iterator:
    """opened(rows, width=..., scheme=...) is the page in a browser; nothing may go wrong and nothing out."""
    complaints: list[str] = []
    pages = []

    def open_page(rows: list[dict], width: int = 1280, scheme: str = "light", **changes):
        path = write_page(rows, tmp_path / "page.html", "Traces of a run", **changes)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url in (path.as_uri(), "data:,") else complaints.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def ids(page) -> list[str]:
    return [text.split(" ")[0] for text in page.locator("#list .id").all_inner_texts()]


def test_fifty_questions_are_drawn_at_a_time(opened):
    """2,000 questions are drawn at once and the page hangs, or the last ones can never be seen."""
    page = opened(evaluation(120))
    assert ids(page) == [f"t/{i}" for i in range(50)]
    assert page.inner_text("#status") == "120 questions, the first 50 shown"
    page.click("#more")
    assert page.inner_text("#more") == "Show 20 more"
    page.click("#more")
    assert ids(page) == [f"t/{i}" for i in range(120)]
    assert not page.is_visible("#more")
    assert page.inner_text("#status") == "120 questions"


def test_sorting_changes_the_order(opened):
    """The largest loss is not on top when a reader asks for it."""
    page = opened(evaluation(120))
    for choice, first in [("gain-down", ["t/119", "t/118"]), ("gain-up", ["t/0", "t/1"]), ("length-up", ["t/119"])]:
        page.select_option("#sort", choice)
        assert ids(page)[: len(first)] == first
    page.select_option("#sort", "flip-up")
    assert ids(page)[:3] == ["t/3", "t/6", "t/9"]
    page.select_option("#sort", "flip-down")
    assert ids(page)[:3] == ["t/5", "t/10", "t/20"]
    page.select_option("#sort", "id")
    assert ids(page)[8:11] == ["t/8", "t/9", "t/10"]


def test_filters_and_search_change_what_is_shown(opened):
    """A filter does nothing, or shows the rows that it should hide."""
    page = opened(evaluation(40))
    for control, choice, wanted in [
        ("#outcome", "up", lambda i: i % 3 == 0 and i % 5 != 0),
        ("#outcome", "down", lambda i: i % 3 != 0 and i % 5 == 0),
        ("#outcome", "flipped", lambda i: (i % 3 == 0) != (i % 5 == 0)),
        ("#outcome", "wrong", lambda i: i % 5 == 0),
        ("#outcome", "right", lambda i: i % 5 != 0),
        ("#leak", "yes", lambda i: i % 4 == 0),
        ("#leak", "no", lambda i: i % 4 != 0),
    ]:
        page.select_option(control, choice)
        assert ids(page) == [f"t/{i}" for i in range(40) if wanted(i)]
        page.select_option(control, "all")
    page.fill("#search", "SAYS  t/8")
    page.wait_for_selector("#status:text-is('1 question')")
    assert ids(page) == ["t/8"]
    page.fill("#search", "nowhere to be found")
    page.wait_for_selector("#empty", state="visible")
    page.fill("#search", "")
    page.wait_for_selector("#status:text-is('40 questions')")
    page.select_option("#condition", "gold")
    assert ids(page) == [f"t/{i}" for i in range(40)], "gold traces are not decoded: no decoding may hide them"
    assert "words of gold" in page.inner_text("#list .trace >> nth=0")
    page.select_option("#condition", "all")
    assert page.inner_text("#status") == "160 traces of 40 questions, the first 50 shown"


def test_gains_and_verdicts_are_shown_in_words_too(opened):
    """A reader who cannot see colours, or cannot hover, does not learn what a trace did to which token."""
    page = opened(evaluation(6))
    first, fourth = page.locator(".item").nth(0), page.locator(".item").nth(3)
    assert "Gain by token in nats: \u201c12\u201d \u22123.00, line end 0.00." in first.locator(".key").text_content()
    token = first.locator(".toks .tok").nth(0)
    assert token.get_attribute("title") == (
        "\u201c12\u201d: log p \u22124.00 without, \u22127.00 with, gain \u22123.00 nats"
    )
    assert "l3" in token.get_attribute("class")
    assert first.locator("mark").all_inner_texts() == ["12", "states the answer"]
    texts = fourth.locator(".key dd").all_inner_texts()
    assert [text.split()[-1] for text in texts[2:4]] == ["wrong", "right"]


def test_a_question_opens_by_keyboard_with_its_conditions_side_by_side(opened):
    """Only a mouse can compare conditions, or a condition is missing."""
    page = opened(evaluation(6))
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.locator(".toggle").nth(0).focus()
    page.keyboard.press("Enter")
    runs = page.locator(".item").nth(0).locator(".run")
    assert runs.locator("h4").all_inner_texts() == [
        "no trace",
        "trained T = 1",
        "trained, shuffled T = 1",
        "gold",
    ]
    assert "+3.90" in runs.nth(3).locator(".steps").inner_text()
    boxes = [runs.nth(n).bounding_box() for n in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert page.locator(".toggle").nth(0).get_attribute("aria-expanded") == "true"
    page.keyboard.press("Enter")
    assert not runs.nth(0).is_visible()


@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_text_is_shown_as_text_and_stays_inside_the_page(opened, width):
    """A trace runs as a script, or a long word makes the page scroll sideways."""
    rows = evaluation(3)
    for name, text in HOSTILE.items():
        answer = text[:300]
        tokens = [" " + answer, "\n"]
        shared = {"question": text[:4000], "answer": answer, "answer_tokens": tokens}
        rows.append(row(f"{name}/{'id' * 60}", "none", [-1.0, 0.0], False, **shared))
        rows.append(row(f"{name}/{'id' * 60}", "trained", [-0.5, -4.0], True, trace=text, base_answer=text, **shared))
    page = opened(rows, width=width)
    for toggle in page.locator(".toggle").all():
        toggle.click()
    for trace in ("script", "emoji", "rtl"):
        shown = page.locator(".item", has_text=f"{trace}/idid").locator(".trace").nth(0).text_content()
        assert shown == HOSTILE[trace]
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_the_scale_can_be_read_and_told_from_its_opposite(opened, scheme):
    """Text on a token has a contrast below WCAG's 4.5, or a loss looks like a gain to a colour-blind reader."""
    page = opened(evaluation(3), scheme=scheme)
    colours = (
        "nodes => nodes.map(node => { let back = node;"
        " while (getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;"
        " return [getComputedStyle(node).color, getComputedStyle(back).backgroundColor]; })"
    )
    scale = page.eval_on_selector_all("#scale .tok", colours)
    others = page.eval_on_selector_all("#status, .id, .toggle, .ci, .dash, .verdict, .note, mark, .key dt", colours)

    def rgb(text: str) -> list[float]:
        return [int(part) / 255 for part in text[4:-1].split(",")]

    def luminance(text: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(text)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text, back in scale + others:
        high, low = sorted((luminance(text), luminance(back)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, back)
    # Blue against orange: the difference of blue and red is what every common colour blindness leaves.
    blueness = [rgb(back)[2] - rgb(back)[0] for _, back in scale]
    assert blueness == sorted(blueness)
    assert blueness[2] < -0.05
    assert blueness[4] > 0.05
