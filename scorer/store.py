"""Scores kept on disk across runs, so that the no-trace log p(answer | question) is computed once and for all.

One SQLite file a fingerprint: what is stored was said by one base model, in one precision, by one version of the code.
A store may cost time and never a number: a row that does not check is asked anew, and a store that cannot be read or
written is given up with one line on stderr.
"""

import hashlib
import json
import os
import re
import sqlite3
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from scorer.types import Greedy, Item, Score, Unscored

UNKNOWN = {"", "none", "unknown"}
"""What a fingerprint says of weights that nobody knows."""

BUSY_SECONDS = 30
"""How long a process waits for another one's transaction."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS fingerprint (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores
    (key BLOB PRIMARY KEY, tokens INTEGER NOT NULL, payload BLOB NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID;
"""


class StoreError(RuntimeError):
    """The file belongs to another fingerprint: its scores are not those of this base model."""


def default_folder() -> Path:
    """`CONTEXT_RL_CACHE`, else ~/.cache/context_rl/scores."""
    return Path(os.environ.get("CONTEXT_RL_CACHE") or Path.home() / ".cache" / "context_rl" / "scores")


def open_store(folder: Path | None, fingerprint: Mapping[str, str]) -> "ScoreStore | None":
    """The store of this fingerprint in `folder` (None: `default_folder()`), or None where nothing may be stored.

    That is where the fingerprint's "weights" are unknown: a server tells the name of the model that it serves, and the
    same name may stand for other weights tomorrow. Their scores would then be taken for this model's.

    Raises:
        StoreError: the file of this name was written for another fingerprint.
    """
    if fingerprint.get("weights", "").lower() in UNKNOWN:
        return None
    return ScoreStore(default_folder() if folder is None else folder, fingerprint)


class ScoreStore:
    """Scores of one base model on disk; several processes and threads may use one file at once.

    Args:
        folder: made where it is missing.
        fingerprint: `Scorer.fingerprint`; the file is named by its model and its digest.

    Raises:
        StoreError: the file was written for another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]):
        self.fingerprint = json.dumps(dict(sorted(fingerprint.items())))
        self.path = Path(folder) / file_name(fingerprint)
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._bad: set[bytes] = set()  # keys of rows that did not check, to be replaced by the next put
        self._database: sqlite3.Connection | None = None
        self._writable = True
        try:
            self._database = self._open()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def get(self, items: Sequence[Item], greedy: Greedy | None) -> dict[Item, Score]:
        """Those of the items that are stored, with the greedy answer where it is asked for."""
        found: dict[Item, Score] = {}
        with self._lock:
            for item in dict.fromkeys(items):
                if self._database is None:
                    break
                key = key_of(item, greedy)
                try:
                    query = "SELECT tokens, payload, checksum FROM scores WHERE key = ?"
                    row = self._database.execute(query, (key,)).fetchone()
                except sqlite3.Error as error:
                    self._give_up(error)
                    break
                if row is None:
                    continue
                score = unpack(item, greedy, *row)
                if score is None:
                    self._bad.add(key)
                    self._tell("row", "holds a row that does not check; its score is computed anew")
                else:
                    found[item] = score
        return found

    def put(self, items: Sequence[Item], scores: Sequence[Score | Unscored], greedy: Greedy | None) -> None:
        """Stores the scores, all of them or none; what is `Unscored`, or stored already, is passed over."""
        pairs = zip(items, scores, strict=True)
        rows = [(key_of(item, greedy), *pack(item, greedy, score)) for item, score in pairs if isinstance(score, Score)]
        with self._lock:
            if self._database is None or not self._writable or not rows:
                return
            try:
                self._database.execute("BEGIN IMMEDIATE")
                replaced = [(row[0],) for row in rows if row[0] in self._bad]
                self._database.executemany("DELETE FROM scores WHERE key = ?", replaced)
                self._database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)
                self._database.execute("COMMIT")
                self._bad.difference_update(row[0] for row in rows)
            except sqlite3.Error as error:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                # What is stored can still be read; another try would most likely wait and fail at every step.
                self._writable = False
                self._tell("write", f"cannot be written ({error}); new scores are not kept")

    def close(self) -> None:
        """Closes the file; the store is empty and takes nothing from then on. Safe to call twice."""
        with self._lock:
            self._close()

    def _open(self) -> sqlite3.Connection:
        """The database, begun anew where the file is none.

        Raises:
            OSError, sqlite3.Error: it can be neither read nor made.
            StoreError: it was written for another fingerprint.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            # OperationalError is a full disk, a lock or a missing right: the file itself may be sound.
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._set_aside(error)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        # One connection for all threads, each call behind the lock; transactions are begun by hand.
        database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            try:
                # In one transaction, so that no process finds tables without a fingerprint. Of several processes that
                # make the file at once, the first one writes.
                database.executescript(f"BEGIN IMMEDIATE; {SCHEMA}")
                database.execute("INSERT OR IGNORE INTO fingerprint VALUES (1, ?)", (self.fingerprint,))
                database.execute("COMMIT")
            except sqlite3.OperationalError as error:
                # A file or a disk that is read-only may hold all that is needed.
                with suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                self._writable = False
                self._tell("write", f"cannot be written ({error}); new scores are not kept")
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its pages do not check")
            (stored,) = database.execute("SELECT json FROM fingerprint").fetchone() or (None,)
        except BaseException:
            database.close()
            raise
        if stored != self.fingerprint:
            database.close()
            raise StoreError(
                f"{self.path} holds the scores of another base model ({stored}, and this one is {self.fingerprint}); "
                "delete the file, or name another folder in CONTEXT_RL_CACHE"
            )
        return database

    def _set_aside(self, error: sqlite3.Error) -> None:
        broken = self.path.with_name(self.path.name + ".broken")
        self._tell("broken", f"is no sound database ({error}); it is kept as {broken.name}, and a new one begun")
        self.path.replace(broken)
        # A journal that is left behind would be played into the new file.
        for suffix in ("-journal", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _give_up(self, error: Exception) -> None:
        self._close()
        self._tell("all", f"cannot be used ({error}); scores are computed anew")

    def _close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _tell(self, what: str, message: str) -> None:
        """One line on stderr, once a kind of trouble."""
        if what not in self._told:
            self._told.add(what)
            print(f"warning: the score store {self.path} {message}", file=sys.stderr)


def file_name(fingerprint: Mapping[str, str]) -> str:
    """A readable model name and the digest of the whole fingerprint."""
    text = json.dumps(dict(sorted(fingerprint.items())))
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(fingerprint.get("model", "")).name)[:60] or "model"
    return f"{model}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.sqlite"


def key_of(item: Item, greedy: Greedy | None) -> bytes:
    """Digest of what a score is asked for: prefix ids, answer ids, and how the greedy answer is made, if at all."""
    asked = None if greedy is None else [greedy.max_new_tokens, greedy.stop]
    text = json.dumps([list(item.prefix_ids), list(item.answer_ids), asked])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def pack(item: Item, greedy: Greedy | None, score: Score) -> tuple[int, bytes, bytes]:
    """Answer length, payload (float64 log-probs, then the greedy text, if any), checksum over key and payload."""
    if len(score.token_logprobs) != len(item.answer_ids):
        raise ValueError(f"{len(score.token_logprobs)} log-probs for an answer of {len(item.answer_ids)} tokens")
    payload = struct.pack(f"<{len(score.token_logprobs)}d", *score.token_logprobs)
    if score.greedy_text is not None:
        # A marker, because an empty answer is another thing than none; surrogates, because decoding may leave some.
        payload += b"\x01" + score.greedy_text.encode("utf-8", "surrogatepass")
    return len(item.answer_ids), payload, checksum(key_of(item, greedy), payload)


def unpack(item: Item, greedy: Greedy | None, tokens: int, payload: bytes, check: bytes) -> Score | None:
    """The score that `pack` made a row of; None where the row is not this item's, whole and unchanged."""
    if not isinstance(payload, bytes) or tokens != len(item.answer_ids):
        return None
    values, text = payload[: 8 * tokens], payload[8 * tokens :]
    if check != checksum(key_of(item, greedy), payload) or len(values) != 8 * tokens:
        return None
    if (text[:1] == b"\x01") != (greedy is not None):
        return None
    said = text[1:].decode("utf-8", "surrogatepass") if greedy is not None else None
    return Score(struct.unpack(f"<{tokens}d", values), said)


def checksum(key: bytes, payload: bytes) -> bytes:
    """Over both, so that a payload under another row's key does not check."""
    return hashlib.blake2b(key + payload, digest_size=16).digest()
