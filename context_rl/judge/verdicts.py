"""What a judge's text says: yes or no, or a number from 0 to 10. What it does not say plainly is None, never a guess.

A verdict stands at the beginning of a line, behind a label ("Verdict:", "The score is") or bare, in bold or not, and
ends there or goes on in a way that leaves its meaning alone ("Yes, the two ...", "8/10", "7 because ..."). Lines with
a label win over bare ones; "Answer:" is none, for it may be the reply's. Two lines that say different things say
nothing, and so does one that takes itself back ("No, wait: yes", "Yes, but ..."). Elsewhere in a line "yes", "no" and
numbers are what the judge talks about: the reply may be "no", and "2 of 3 facts are right" is no score of 2.
"""

import re
from collections.abc import Iterable, Sequence

LABEL = (
    r"(?P<label>(?:(?:my|the|final|overall|agreement)\s+)*"
    r"(?:verdict|answer|conclusion|decision|judge?ment|score|rating|grade|result|boxed)\b\W*(?:(?:is|of)\b\W*)?)?"
)
LABEL_OF_THE_REPLY = re.compile(r"answer|result|boxed", re.IGNORECASE)
GOES_ON = r"because|since|as|it|they|the|this|that|there"
HEDGE = re.compile(
    r"\b(?:but|except|however|though|although|partially|partly|mostly|almost|nearly|not)\b|n't\b", re.IGNORECASE
)
"""Takes a yes back. A no stays one."""

STANDS = rf"(?!-\w)(?=\s*(?:[^\w\s?]|$)|\s+(?:{GOES_ON})\b)"
YES_OR_NO = re.compile(rf"\W*{LABEL}(?P<value>yes|no)\b{STANDS}", re.IGNORECASE)
ANY_YES_OR_NO = re.compile(rf"\b(yes|no)\b{STANDS}", re.IGNORECASE)

SCORE = re.compile(
    rf"\W*{LABEL}(?<![-+.,\u2212])(?P<value>[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out\ of)\s*10(?![0-9.,]*[0-9]))?"
    rf"(?:\s+points?)?(?=\s*[.!]?\s*$|\s*[,;(]\s*[^\s0-9]|\s+(?:{GOES_ON})\b|(?P<item>\.\s|\s*[:\-\u2013\u2014]\s*[^\s0-9]))",
    re.IGNORECASE,
)
"""A bare "1. The reply ...", "1: ..." or "1 - ..." may be an item of a list: so goes on a labelled score only."""

MARKUP = re.compile(r"[*_`#\"'{}$\\|~]+")
THOUGHTS_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)


def parse_verdict(kind: str, text: str, cut: bool = False) -> bool | float | None:
    """The verdict in a judge's text: of kind "hard" True or False, "soft" in [0, 1]; None where there is none.

    Args:
        cut: the text ended at the token limit, so that a last digit may be the first of two.
    """
    lines = lines_of(text)
    if kind == "hard":
        return parse_hard(lines, cut and len(lines) > 1)
    return None if cut and re.search(r"[0-9]\.?\Z", text) else parse_soft(lines)


def labelled(match: re.Match[str]) -> bool:
    """Whether the label can only be the judge's own."""
    return bool(match["label"]) and not LABEL_OF_THE_REPLY.search(match["label"])


def parse_hard(lines: Sequence[str], thinks_on: bool) -> bool | None:
    """Yes or no; of a judge that was cut while it `thinks_on`, behind a label only."""
    found = [(line, match) for line in lines if (match := YES_OR_NO.match(line))]
    chosen = [line for line, match in found if labelled(match)]
    if not chosen and not thinks_on:
        chosen = [line for line, _ in found]
    words = {word.lower() for line in chosen for word in ANY_YES_OR_NO.findall(line)}
    if words == {"yes"} and any(HEDGE.search(line) for line in chosen):
        return None
    return words == {"yes"} if len(words) == 1 else None


def parse_soft(lines: Iterable[str]) -> float | None:
    """A number from 0 to 10, over 10."""
    found = [match for line in lines if (match := SCORE.match(line)) and (match["label"] or not match["item"])]
    values = {float(match["value"]) for match in [m for m in found if labelled(m)] or found}
    [value] = values if len(values) == 1 else [11.0]
    return value / 10 if value <= 10 else None


def lines_of(text: str) -> list[str]:
    """The lines of the text behind a reasoning model's thoughts, without markup. Thoughts without an end hide all."""
    said = THOUGHTS_BEGIN.split(THOUGHTS_END.split(text)[-1])[0]
    return [line for line in (MARKUP.sub(" ", line).strip() for line in said.splitlines()) if line]
