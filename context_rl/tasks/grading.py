"""Is the base model's answer line right?

The line is taken as it is, without outer white space, quotes and the asterisks of bold type. Where the answer is a
number and the whole line is one ("1,200", "$5", "72.0", "3/4", "50%"), the two are compared as exact fractions, without
tolerance. Any other line is compared with a number through Math-Verify, which takes the last expression in it ("The
answer is 72.", "x = 72", "\\boxed{72}"): the only extraction there is. Text is compared after `normalise`.
"""

import logging
import math
import re
import threading
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import math_verify
import sympy

from context_rl.tasks.types import Example

# It warns about every line it gives up on, which a young model writes by the hundred, and about calls without timeouts.
logging.getLogger("math_verify").setLevel(logging.ERROR)

PLAIN_NUMBER = re.compile(
    r"""(?P<sign>[-+\u2212]?)\ ?\\?[$€£¥]?\ ?(?P<sign_after>-?)
    (?P<digits>(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*|0)(?:\.[0-9]*)?|\.[0-9]+)(?P<exponent>[eE][-+]?[0-9]{1,2})?
    (?:\ ?/\ ?(?P<denominator>[1-9][0-9]*))?
    \ ?(?:(?P<percent>\\?%)|[€£¥])?\.?""",
    re.VERBOSE,
)
"""Leading zeros make no plain number: "007" is a name, and as a gold answer it is compared as text."""

LONGEST_NUMBER = 60
LONGEST_EXPRESSION = 120
DEEPEST_NESTING = 4
KNOWN_COMMANDS = frozenset({"frac", "dfrac", "tfrac", "boxed", "text", "times", "cdot", "div", "left", "right"})

BOLD = re.compile(r"(?<!\S)\*\*([^*\s](?:[^*]*[^*\s])?)\*\*(?!\w)")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
QUOTES = "\"'`*\u2018\u2019\u201c\u201d"


class Number(NamedTuple):
    """A plain number as written: 50 % is (50, percent)."""

    value: Fraction
    percent: bool
    fraction: bool


def _bare(text: str) -> str:
    return BOLD.sub(r"\1", text.strip()).strip(QUOTES).strip()


@lru_cache(maxsize=65_536)
def plain_number(text: str) -> Number | None:
    """The number that the whole text is, or None. Currency signs and thousands separators carry no meaning."""
    text = _bare(text)
    match = PLAIN_NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if match is None or (match["sign"] and match["sign_after"]):
        return None
    value = Fraction(match["digits"].replace(",", "").rstrip(".") + (match["exponent"] or ""))
    if match["denominator"]:
        value /= int(match["denominator"])
    if (match["sign"] or match["sign_after"]) not in ("", "+"):
        value = -value
    return Number(value, bool(match["percent"]), bool(match["denominator"]))


def is_number(answer: str) -> bool:
    """True if a gold answer is to be graded as a number."""
    return plain_number(answer) is not None


def as_number(text: str) -> float | None:
    """The number in an answer line, found as `same_number` finds it, for rewards that ask how near it is.

    A percent sign counts as a unit: "50%" is 50.0. None where there is no number (or no finite real one).
    """
    plain = plain_number(text)
    if plain is not None:
        return float(plain.value)
    values = _last_numbers(_bare(text))
    return float(values[0]) if values else None


@lru_cache(maxsize=65_536)
def same_number(gold: str, text: str) -> bool:
    """Whether the text gives the number `gold`; False if `gold` is no plain number.

    A percent sign on one side only may be a unit or a factor: "50%" equals "50" and "0.5".
    """
    right, given = plain_number(gold), plain_number(text)
    if right is None:
        return False
    if given is not None:
        if right.percent == given.percent:
            equal = right.value == given.value
        else:
            percent, other = (right, given) if right.percent else (given, right)
            equal = other.value in (percent.value, percent.value / 100)
        # "0.333333" for 1/3 is left to Math-Verify, which rounds to six places.
        if equal or right.fraction == given.fraction:
            return equal
    expression = sympy.Rational(right.value.numerator, right.value.denominator)
    return math_verify.verify(expression, list(_last_numbers(_bare(text))), timeout_seconds=_timeout())


def _timeout() -> int | None:
    """Math-Verify's timeouts are SIGALRM: they raise ValueError outside the main thread, where `_is_tame` must do."""
    return 2 if threading.current_thread() is threading.main_thread() else None


def _is_tame(text: str) -> bool:
    """Whether Math-Verify can be trusted to finish: no power, factorial, sum or deep nesting ("9^9^9^9" never ends)."""
    if len(text) > LONGEST_EXPRESSION or not any(c.isdigit() for c in text) or "^" in text or "**" in text:
        return False
    if re.search(r"[0-9a-z)}]!", text) or not set(re.findall(r"\\([a-zA-Z]+)", text)) <= KNOWN_COMMANDS:
        return False
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest <= DEEPEST_NESTING


@lru_cache(maxsize=65_536)
def _last_numbers(text: str) -> tuple[sympy.Expr, ...]:
    """What Math-Verify reads as the line's last expression, if that is a real number or an equation that ends in one.

    Expressions with free symbols are dropped: to compare one with a number it simplifies, which can take for ever.
    """
    parsed = math_verify.parse(text, parsing_timeout=_timeout()) if _is_tame(text) else []
    values = [found.rhs if isinstance(found, sympy.Equality) else found for found in parsed]
    return tuple(value for value in values if _is_finite_number(value))


def _is_finite_number(value: object) -> bool:
    try:
        return isinstance(value, sympy.Expr) and not value.free_symbols and math.isfinite(float(value))
    except Exception:  # SymPy trips over odd expressions in many ways, each of which means "no number"
        return False


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no article, single spaces; with three departures.

    Each of SQuAD's rules that is left out here calls different answers equal: . , - : / stay before a digit ("1.5 km"
    is not "15 km", "-5 C" is not "5 C"), % and # stay ("C#" is not "C"), and an article goes only from the beginning
    ("vitamin A" is not "vitamin"). Symbols such as + and < are no punctuation. The result is never empty unless the
    text is.
    """
    folded = " ".join(THOUSANDS.sub("", unicodedata.normalize("NFC", text).casefold()).split())
    kept = [
        char
        for char, after in pairwise(folded + " ")
        if char in "%#" or (char in ".,-:/" and after.isdigit()) or not unicodedata.category(char).startswith("P")
    ]
    words = "".join(kept).split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words) or folded


@lru_cache(maxsize=65_536)
def same_text(gold: str, text: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(gold) == normalise(text)


def grade_number(text: str, example: Example) -> bool:
    """For tasks whose every answer is a number."""
    return same_number(example.answer, text)


def grade_number_or_text(text: str, example: Example) -> bool:
    """As a number if the gold answer is one, else as text."""
    return (same_number if is_number(example.answer) else same_text)(example.answer, text)
