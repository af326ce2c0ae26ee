"""What a trace does besides helping: it may state the answer, repeat itself, copy the question or break the format.

Pure functions on text that only measure: which share is too much is the caller's to say. Their time is linear.

A **mention** of a number is a number of the same value that stands by itself: "1,234", "$1234.0" and "1234%" mention
1234 (a percent sign is a unit, as in `grading.as_number`); "52", "0.5", "1,500", "x5y", "-5" and "= - 5" do not mention
5. A minus sign after an operand is an operation: "10-5" and "10 - 5" mention 5. So is a quotient: "12/4" mentions 12
and 4, not 3. An answer that is itself a fraction is looked for as it is written, in lowest terms and as a decimal
("3/4", "\\frac{3}{4}", "0.75"; not "6/8"). Numbers in words ("five") and with exponents are not looked for.

A mention of any other answer is the same letters, digits and symbols in the same order, whatever their case, Unicode
form, punctuation and spacing. It follows `grading.normalise`, except that a hyphen may also be a space. An answer of
one Latin letter is looked for as it is written only: every article would mention "(A)".
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from context_rl.tasks.grading import plain_number

# Thai to Khmer, Chinese, Japanese, Korean: a letter of these says nothing about where a word ends.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
PUNCTUATION = "".join(c for c in map(chr, range(0x10000)) if c == "`" or unicodedata.category(c)[0] == "P")

# What is compared of a text: "1.5 km" is not "15 km", but "1,234 km" is "1234 km".
PIECE = re.compile(
    rf"""(?: [^\s{re.escape(PUNCTUATION.replace("%", "").replace("#", ""))}]++
           | [.\-:/](?=[0-9]) | (?!(?<=[0-9]),[0-9]{{3}}(?![0-9])),(?=[0-9]) )+""",
    re.VERBOSE,
)
ONE_UNSPACED = re.compile(f"[{UNSPACED}]")
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
STUTTER = re.compile(r"([^\W\d]{1,4}?)\1{3}")
TEMPLATE_LINE = re.compile(r"(?:\A|[\r\n])[ \t]*(?:Question|Answer):", re.IGNORECASE)
ARTICLE = re.compile(r"\A(?:an?|the)\s+(?=\S)", re.IGNORECASE)
MINUS = re.compile(r"[-\u2212](\ ?)\\?[$€£¥]?\ ?\Z")
NUMBER_BEGINS = re.compile(r"(?<!(?<!\.)\.)(?!(?<=[0-9],)[0-9]{3}(?![0-9]))")
NUMBER_ENDS = re.compile(r"(?!\.[0-9]|,[0-9]{3}(?![0-9]))")
LONGEST_WORD = 30
MASKING_PASSES = 10

Span = tuple[int, int]


@dataclass(frozen=True)
class Leak:
    """Whether and where a trace mentions the answer."""

    exact: bool
    """The answer stands in the trace as it is written, bounded by characters that belong to no word."""
    normalised: bool
    """It does after normalisation; true whenever `exact` is."""
    position: float | None
    """Where the first mention of either kind begins, as a share of the trace's length in [0, 1); None without one."""


def find_leak(trace: str, answer: str) -> Leak:
    """Whether and where the trace mentions the answer. An empty answer is never mentioned."""
    exact, normalised = next(_exact(trace, answer), None), next(_normalised(trace, answer), None)
    starts = [span[0] for span in (exact, normalised) if span]
    return Leak(exact is not None, bool(starts), min(starts) / len(trace) if starts else None)


def mask_answer(trace: str, answer: str) -> str:
    """The trace without any mention of the answer; the trace itself if and only if there is none.

    The spaces around a mention become one, or none at the trace's ends. A cut can bring a new mention together ("New
    [New York] York"), so it is repeated until there is none. What nests the answer in itself more than ten times is cut
    off at the first mention left: the time would else grow with the square of the length.
    """
    for _ in range(MASKING_PASSES):
        spans = sorted({*_exact(trace, answer), *_normalised(trace, answer)})
        if not spans:
            return trace
        trace = _cut(trace, spans)
    while (position := find_leak(trace, answer).position) is not None:
        trace = trace[: round(position * len(trace))]
    return trace


def repetition(trace: str, n: int = 4) -> float:
    """Share of the trace's word n-grams that occurred in it before, in [0, 1).

    Case does not count; punctuation marks are words, and so are the letters of scripts without spaces. A trace of fewer
    than 2n words is measured by n-grams of half its length ("ha ha ha ha": 2/3); one word repeats nothing. A word of
    over 30 letters, or with one to four letters four times in a row ("aaaaaaaa"), is read letter by letter.
    """
    words: list[str] = []
    for word in TOKEN.findall(trace.casefold()):
        as_letters = len(word) > LONGEST_WORD or (len(word) > 3 and STUTTER.search(word))
        words.extend(word if as_letters else [word])
    grams = _ngrams(words, min(n, max(1, len(words) // 2)))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def copied(trace: str, question: str, n: int = 4) -> float:
    """Share of the trace's word n-grams that stand in the question, in [0, 1].

    Case and punctuation do not count. A trace of fewer than n words is one n-gram: 1.0 if the question holds it, else
    0.0. A trace without words copies nothing.
    """
    words, source = ([w for w in TOKEN.findall(text.casefold()) if w[0].isalnum()] for text in (trace, question))
    if not words:
        return 0.0
    n = min(n, len(words))
    grams, known = _ngrams(words, n), set(_ngrams(source, n))
    return sum(gram in known for gram in grams) / len(grams)


def well_formed(trace: str, finished: bool) -> bool:
    """The format gate: q ended the trace itself, it has a letter or a digit, and no line of it plays the template.

    Args:
        finished: whether q wrote EOS or a stop string before the token limit.
    """
    return finished and any(map(str.isalnum, trace)) and TEMPLATE_LINE.search(trace) is None


def length_band(tokens: int, low: int, high: int, soft: int = 0) -> float:
    """1 inside [low, high], falling linearly to 0 over `soft` tokens outside; in [0, 1]. ValueError for no band."""
    if low > high or soft < 0:
        raise ValueError(f"a length band needs low <= high and soft >= 0, not [{low}, {high}] and {soft}")
    outside = max(low - tokens, tokens - high, 0)
    return max(0.0, 1.0 - outside / soft) if soft else float(outside == 0)


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


# --- where the mentions are ---


def _exact(trace: str, answer: str) -> Iterator[Span]:
    pattern, start = _literal(answer.strip()), 0
    while pattern and (match := pattern.search(trace, start)):
        if _stands_alone(trace, *match.span()):
            yield match.span()
        start = match.start() + 1


@lru_cache(maxsize=4096)
def _literal(answer: str) -> re.Pattern[str] | None:
    # The look-arounds only spare `_stands_alone` most of its calls.
    return re.compile(rf"(?<![0-9A-Za-z_]){re.escape(answer)}(?![0-9A-Za-z_])") if answer else None


def _normalised(trace: str, answer: str) -> Iterator[Span]:
    negative, pattern = _number(answer)
    if pattern is None:
        yield from _same_letters(trace, answer)
        return
    for match in pattern.finditer(trace):
        minus = _minus(trace, match.start())
        if _bounded(trace, *match.span("size")) and negative in (None, minus is not None):
            yield match.start() if minus is None else minus, match.end()


@lru_cache(maxsize=4096)
def _number(answer: str) -> tuple[bool | None, re.Pattern[str] | None]:
    """Whether the answer is negative (None: 0 is either) and a pattern of its absolute value; no pattern for text."""
    number = plain_number(answer)
    if number is None:
        return None, None
    size, forms = abs(number.value), []
    if number.fraction:
        written = re.findall(r"([0-9]+)\ ?/\ ?([0-9]+)", answer)
        for top, bottom in {(str(size.numerator), str(size.denominator)), *written}:
            forms.append(rf"{top}\ ?/\ ?{bottom}|\\[dt]?frac\{{{top}\}}\{{{bottom}\}}")
    places = next((k for k in range(160) if (size * 10**k).denominator == 1), None)
    if places is not None:  # else a fraction like 1/3
        digits = str(int(size * 10**places)).zfill(places + 1)
        whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
        grouped = "0?" if whole == "0" and decimals else re.sub(r"(?<=[0-9])(?=(?:[0-9]{3})+\Z)", ",?", whole)
        forms.append(grouped + (rf"\.{decimals}0*" if decimals else r"(?:\.0+)?"))
    bounded = rf"(?<![0-9A-Za-z_])(?P<size>{'|'.join(forms)})(?![0-9A-Za-z_])"
    return number.value < 0 if number.value else None, re.compile(rf"(?:\\?[$€£¥]\ ?)?{bounded}(?:\\?%)?")


def _same_letters(trace: str, answer: str) -> Iterator[Span]:
    wanted, _ = _fold(ARTICLE.sub("", answer.strip(), count=1))
    key, _, _ = _squeeze(wanted)
    if not key or (len(key) == 1 and key.isalpha() and key.isascii()):
        return
    folded, origin = _fold(trace)
    text, offsets, starts = _squeeze(folded)
    at = -1
    while (at := text.find(key, at + 1)) >= 0:
        first, last = (bisect_right(offsets, i) - 1 for i in (at, at + len(key) - 1))
        start, end = starts[first] + at - offsets[first], starts[last] + at + len(key) - offsets[last]
        # "now here" is not "nowhere".
        if not _stands_alone(folded, start, end) or (wanted.isalpha() and len(folded[start:end].split()) > 1):
            continue
        if origin is None:
            yield start, end
        elif (start == 0 or origin[start - 1] < origin[start]) and origin[end - 1] < origin[end]:  # whole clusters
            yield origin[start], origin[end]


def _fold(text: str) -> tuple[str, list[int] | None]:
    """The text composed (NFC) and case-folded, and where in `text` each character came from (None: the same place)."""
    # Case folding never turns a character into none, so equal lengths mean that each has kept its place.
    if unicodedata.is_normalized("NFC", text) and len(folded := text.casefold()) == len(text):
        return folded, None
    # A cluster is a character with its combining marks, or the letters (jamo) of one Korean syllable.
    begins = [i for i, c in enumerate(text) if not (i and (unicodedata.combining(c) or "\u1160" <= c <= "\u11ff"))]
    parts, origin = [], []
    for begin, end in pairwise([*begins, len(text)]):
        parts.append(unicodedata.normalize("NFC", text[begin:end]).casefold())
        origin.extend([begin] * len(parts[-1]))
    return "".join(parts), [*origin, len(text)]


def _squeeze(folded: str) -> tuple[str, list[int], list[int]]:
    """The pieces to compare, put together; where each stands in that and where in `folded`."""
    pieces, offsets, starts = [], [], []
    length, end, after_digit = 0, 0, False
    for match in PIECE.finditer(folded):
        piece, start = match.group(), match.start()
        # "Box 1: 5 apples" holds no "15 apples", but "1,234 apples" is 1234 of them.
        if after_digit and piece[0].isdigit() and folded[end:start] != ",":
            piece, start = " " + piece, start - 1
        pieces.append(piece)
        offsets.append(length)
        starts.append(start)
        length += len(piece)
        end, after_digit = match.end(), piece[-1].isdigit()
    return "".join(pieces), offsets, starts


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] is neither part of a word or number nor a number without its sign."""
    if not _bounded(text, start, end):
        return False
    if text[start] in "-\u2212" and end - start > 1:
        return _minus(text, start + 1) == start
    return not (text[start].isdigit() or text[start] in ".$€£¥\\") or _minus(text, start) is None


def _bounded(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start] if start else "", text[end : end + 1]
    # A mark after a letter makes another letter of it, in scripts without spaces too.
    if (before and _in_word(before)) or (after and (_in_word(after) or unicodedata.category(after)[0] == "M")):
        return False
    if text[start].isdigit() and not NUMBER_BEGINS.match(text, start):
        return False
    if text[end - 1].isdigit() and not NUMBER_ENDS.match(text, end):
        return False
    return not ("/" in (before, after) and "/" in text[start:end] and text[start].isdigit())  # the date 3/4/2025


def _in_word(char: str) -> bool:
    return char == "_" or (unicodedata.category(char)[0] in "LMN" and not ONE_UNSPACED.match(char))


def _minus(text: str, start: int) -> int | None:
    """Where the minus sign of the number that begins at `start` stands; None without one."""
    match = MINUS.search(text, max(0, start - 6), start)
    if match is None:
        return None
    before = text[max(0, match.start() - 2) : match.start()]
    if match[1]:  # "= - 5" has a sign; "10 - 5" and the list item "- 5" have none
        return match.start() if before.rstrip(" ")[-1:] in tuple("=(:<>") else None
    return None if before and (before[-1] in ")]}%-\u2212" or _in_word(before[-1])) else match.start()


def _cut(text: str, spans: list[Span]) -> str:
    """The text without these spans (sorted, not empty), the spaces around each made one, or none at the ends."""
    mark = next(c for c in map(chr, range(1, 0x110000)) if c not in text)
    pieces, done = [], 0
    for start, end in spans:
        if start >= done:
            pieces.append(text[done:start])
        done = max(done, end)
    marked = mark.join([*pieces, text[done:]])

    def space(match: re.Match[str]) -> str:
        return " " if " " in match[0] and match.start() > 0 and match.end() < len(marked) else ""

    # The look-behind keeps a long run of spaces from being tried at each of them.
    return re.sub(rf"(?<!\ )\ *+{re.escape(mark)}[\ {re.escape(mark)}]*", space, marked)
