"""Rows of question, reference answer and reply -> verdicts of a judge. What it is asked is in `context_rl.prompts`.

hard    does the reply say the same as the reference answer? yes or no
soft    how well does it agree, from 0 to 10? (here in [0, 1])

A judge that fails leaves the row unscored, with the reason: nothing stands in for a verdict. The same question is asked
once; every verdict is kept in the run folder's judge.jsonl, with the judge's own words, and read back from there by a
resumed run.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from context_rl import prompts
from context_rl.judge.endpoint import PASSING, ChatEndpoint, JudgeError, Said
from context_rl.judge.verdicts import parse_verdict
from scorer.types import Unscored
from scorer.vllm.http import SHOW_PROGRESS_AFTER_S, RequestFailed

WAITS_S = (1.0, 4.0, 16.0)
"""Before the second, third and fourth attempt at a request that failed for a reason that may pass."""
TRIES = 2
"""Replies without a verdict after which a row is given up."""
FAILURES_IN_A_ROW = 8
"""Requests without an answer, at least, after which the rest of a batch is not asked."""
NOTHING = {"hard": False, "soft": 0.0}
BY_JUDGE = "judge: "
"""Begins the reason of a row that is unscored for want of a verdict."""

Row = tuple[str, str, str]
"""Question, reference answer, reply."""
Asked = tuple[str, str, str, str]
"""Kind, and the row."""
Verdict = tuple[bool | float, str]
"""The value and the judge's own words."""


class Judge:
    """A model behind a `ChatEndpoint`, and what it has said.

    Args:
        concurrency: requests at once.
        max_tokens: of its reply; a model that thinks first needs a thousand and more.
        options: merged into the request's body; None takes a key out ({"max_tokens": None}).

    Attributes:
        total: requests (repeated ones included), rows answered from memory ("cached"), rows left unscored ("failed")
            and seconds, since the beginning.

    Raises:
        JudgeError: settings that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout_s: float = 60.0,
        concurrency: int = 16,
        max_tokens: int = 64,
        options: Mapping[str, Any] | None = None,
    ):
        self.options = {"temperature": 0, "max_tokens": max_tokens} | dict(options or {})
        self.endpoint = ChatEndpoint(url, model, timeout_s=timeout_s, connections=concurrency, options=self.options)
        self.model, self.concurrency = model, concurrency
        self.known: dict[Asked, Verdict] = {}
        self.path: Path | None = None
        self.total: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def hard(self, rows: Sequence[Row]) -> list[bool | Unscored]:
        """Does the reply say the same as the reference? One verdict a row, in order.

        An empty reply says nothing: False, and nobody is asked.

        Raises:
            JudgeError: the endpoint refuses every request.
        """
        return self._verdicts("hard", rows)

    def soft(self, rows: Sequence[Row]) -> list[float | Unscored]:
        """How well does it, in [0, 1]? An empty reply: 0.0, and nobody is asked. Raises as `hard`."""
        return self._verdicts("soft", rows)

    def check(self, kinds: Sequence[str], question: str, reference: str) -> list[str]:
        """Asks about a reference in its own place, so that a wrong key, model or setting is found before the run.

        Returns:
            What a reader of the results should know: that the judge does not find a text to say the same as itself.

        Raises:
            JudgeError: it gives no verdict.
        """
        notes = []
        for kind in kinds:
            asked = (kind, question, reference, reference)
            if asked not in self.known:
                found = self._ask(asked, WAITS_S[:1], threading.Event())
                if isinstance(found, Unscored):
                    reason = found.reason.removeprefix(BY_JUDGE)
                    where = f"the judge at {self.endpoint.url} (--judge_url, model {self.model!r})"
                    raise JudgeError(f"{where} gives no verdict: {reason}")
                self._keep(asked, found)
            value, raw = self.known[asked]
            if value < 1:
                notes.append(f"shown the reference answer itself ({reference!r:.60}), the judge says {raw!r:.60}")
        return notes

    def take_usage(self) -> Counter[str]:
        """What was counted since the last call of this method."""
        since = Counter({name: value - self._taken[name] for name, value in self.total.items()})
        self._taken = self.total.copy()
        return since

    def close(self) -> None:
        """Closes the connections."""
        self.endpoint.close()

    # --- asking ---

    def _verdicts(self, kind: str, rows: Sequence[Row]) -> list[Any]:
        began = time.perf_counter()
        asked: list[Asked] = [(kind, *row) for row in rows]
        worth = [one for one in asked if one[-1].strip()]
        new = [one for one in dict.fromkeys(worth) if one not in self.known]
        failed = self._ask_all(new) if new else {}
        found = [
            failed[one] if one in failed else self.known[one][0] if one[-1].strip() else NOTHING[kind] for one in asked
        ]
        self.total["requests"] = self.endpoint.requests
        self.total["cached"] += len(worth) - len(new)
        self.total["failed"] += sum(isinstance(one, Unscored) for one in found)
        self.total["seconds"] += time.perf_counter() - began
        return found

    def _ask_all(self, new: Sequence[Asked]) -> dict[Asked, Unscored]:
        """Asks and keeps the verdicts; returns the failures.

        After a full round of requests in a row without any answer (`FAILURES_IN_A_ROW` at least) the rest is not
        asked: with a judge that hangs, each round would take several times the timeout.
        """
        failed: dict[Asked, Unscored] = {}
        in_a_row, over, last = 0, threading.Event(), ""
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        progress = tqdm(total=len(new), desc="judging", unit="reply", leave=False, delay=SHOW_PROGRESS_AFTER_S)
        try:
            futures = {pool.submit(self._ask, one, WAITS_S, over): one for one in new}
            for future in as_completed(futures):
                progress.update()
                found, one = future.result(), futures[future]
                if not isinstance(found, Unscored):
                    in_a_row = 0
                    self._keep(one, found)
                    continue
                if found.fault in PASSING:
                    in_a_row, last = in_a_row + 1, found.reason
                elif found.fault == "not_sent":
                    found = Unscored(f"{last} (not asked, because the requests before it failed)", found.fault)
                else:
                    in_a_row = 0  # it answers
                failed[one] = found
                if in_a_row >= max(self.concurrency, FAILURES_IN_A_ROW):
                    over.set()
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            progress.close()
        return failed

    def _ask(self, asked: Asked, waits_s: Sequence[float], over: threading.Event) -> Verdict | Unscored:
        """One verdict, in a thread of the pool; `over` says that no more are wanted."""
        if over.is_set():
            return Unscored("not asked", "not_sent")
        for _ in range(TRIES):
            try:
                said = self.endpoint.ask(prompts.judge_messages(*asked), waits_s, over)
            except RequestFailed as failure:
                return Unscored(f"{BY_JUDGE}{failure}", failure.fault)
            value = None if said.text is None else parse_verdict(asked[0], said.text, said.cut)
            if value is not None:
                return value, said.text
        return Unscored(f"{BY_JUDGE}{why_none(asked[0], said)}: {said.shown!r:.150}", "garbled")

    # --- judge.jsonl ---

    def keep(self, folder: Path, process: int = 0) -> None:
        """Takes up the verdicts of this model and these options from the folder's files, and writes new ones there.

        A line a verdict: kind, model, options, question, reference, reply, the judge's text as "raw", and the "value".

        Args:
            process: of several, each has a file of its own; all are read.

        Raises:
            JudgeError: a file holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ("judge.jsonl" if process == 0 else f"judge-{process:03d}.jsonl")
        before, self.known = self.known, {}
        for path in sorted(folder.glob("judge*.jsonl")):
            self.known |= read_verdicts(path, self.model, self.options)
        if self.path.exists():
            whole = self.path.read_bytes()
            if not whole.endswith(b"\n"):  # a kill cut the last line short, and the next one must not go on in it
                os.truncate(self.path, whole.rfind(b"\n") + 1)
        for asked, found in before.items():
            if asked not in self.known:
                self._keep(asked, found)

    def _keep(self, asked: Asked, found: Verdict) -> None:
        self.known[asked] = found
        if self.path is None:
            return
        kind, question, reference, reply = asked
        line = {"kind": kind, "model": self.model, "options": self.options, "question": question}
        line |= {"reference": reference, "reply": reply, "raw": found[1], "value": found[0]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def why_none(kind: str, said: Said) -> str:
    """What is wrong with a reply that holds no verdict."""
    if said.cut:
        return "its reply was cut before a verdict (raise --judge_max_tokens)"
    if said.text is None:
        return "an answer without a reply"
    return "neither yes nor no, or both" if kind == "hard" else "not one number from 0 to 10"


def read_verdicts(path: Path, model: str, options: Mapping[str, Any]) -> dict[Asked, Verdict]:
    """The verdicts in a file that a model gave under these options; a last line that a kill cut short is left out.

    Raises:
        JudgeError: naming the line that is none.
    """
    found: dict[Asked, Verdict] = {}
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # behind the last line end: a cut line
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            asked, value = (row["kind"], row["question"], row["reference"], row["reply"]), row["value"]
            good = isinstance(value, bool) if asked[0] == "hard" else 0 <= value <= 1
            if good and (row["model"], row["options"]) == (model, options):
                found[asked] = value if asked[0] == "hard" else float(value), row["raw"]
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise JudgeError(f"{path}, line {number}: not a verdict; remove the line")
    return found
