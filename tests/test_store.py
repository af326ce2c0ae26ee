"""Scores on disk. A failure means that a run is trained on another item's or another model's number, or that a broken
file stops it."""

import random
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from context_rl.questions import Questions
from context_rl.tasks import Example
from scorer.local import LocalScorer
from scorer.store import ScoreStore, StoreError, default_folder, file_name, open_store
from scorer.types import Greedy, Item, Score, Unscored

FINGERPRINT = {"backend": "local", "model": "org/base model", "weights": "abc", "dtype": "float32"}
GREEDY = Greedy(6)


def items_and_scores(n: int, greedy: bool = False) -> tuple[list[Item], list[Score]]:
    rng = random.Random(0)
    items = [Item((i, i + 1, 2), tuple(range(1 + i % 4))) for i in range(n)]
    texts = ["", "é\x00", " 7", "\ud800"]
    return items, [
        Score(tuple(-rng.expovariate(1) for _ in item.answer_ids), texts[i % 4] if greedy else None)
        for i, item in enumerate(items)
    ]


def bits(score: Score) -> bytes:
    return struct.pack(f"{len(score.token_logprobs)}d", *score.token_logprobs)


def change(store: ScoreStore, statement: str, *values) -> None:
    with sqlite3.connect(store.path) as database:
        assert database.execute(statement, values).rowcount > 0
    database.close()


# --- what goes in comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [None, GREEDY])
def test_scores_come_back_bit_by_bit_from_a_store_that_was_opened_again(tmp_path, greedy):
    """Failure: a resumed run has other baselines than the run that it resumes."""
    items, scores = items_and_scores(50, greedy is not None)
    scores[0] = Score((-0.0,), scores[0].greedy_text)
    scores[4] = Score((-5e-324,), scores[4].greedy_text)
    store = ScoreStore(tmp_path, FINGERPRINT)
    store.put(items, scores, greedy)
    store.close()
    found = ScoreStore(tmp_path, FINGERPRINT).get(items, greedy)
    assert found == dict(zip(items, scores, strict=True))
    assert [bits(found[item]) for item in items] == [bits(score) for score in scores]


def test_another_prefix_answer_or_greedy_answer_is_another_row(tmp_path):
    """Failure: the tokens of prefix and answer run together in the key, or greedy answers of another limit count."""
    store = ScoreStore(tmp_path, FINGERPRINT)
    item, score = Item((1, 2), (3,)), Score((-1.0,), "a")
    store.put([item], [score], GREEDY)
    others = [Item((1,), (2, 3)), Item((12,), (3,)), Item((1, 2), (4,)), Item((1, 2), (3, 3)), Item((2, 1), (3,))]
    assert store.get([*others, item], GREEDY) == {item: score}
    for other in (None, Greedy(7), Greedy(6, stop=".")):
        assert store.get([item], other) == {}


def test_the_group_of_an_item_is_no_part_of_its_key(tmp_path):
    """Failure: renaming the rows of a data set loses every baseline."""
    store = ScoreStore(tmp_path, FINGERPRINT)
    store.put([Item((1,), (2,), group="a")], [Score((-1.0,))], None)
    assert len(store.get([Item((1,), (2,), group="b")], None)) == 1


def test_what_is_unscored_is_not_stored(tmp_path):
    """Failure: a time-out of last week leaves a question without a baseline for ever."""
    store = ScoreStore(tmp_path, FINGERPRINT)
    items = [Item((1,), (2,)), Item((3,), (4,))]
    store.put(items, [Unscored("late", "timeout"), Score((-1.0,))], None)
    assert store.get(items, None) == {items[1]: Score((-1.0,))}


def test_the_first_score_stays(tmp_path):
    """Failure: of two processes that differ in the last bit, the later one changes the other's baseline."""
    store, item = ScoreStore(tmp_path, FINGERPRINT), Item((1,), (2,))
    for value in (-1.0, -2.0):
        store.put([item], [Score((value,))], None)
    assert store.get([item], None) == {item: Score((-1.0,))}


def test_a_score_of_another_length_than_its_answer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 log-probs for an answer of 1 tokens"):
        ScoreStore(tmp_path, FINGERPRINT).put([Item((1,), (2,))], [Score((-1.0, -1.0))], None)


# --- whose scores they are ----------------------------------------------------------------------------------------


def test_every_part_of_the_fingerprint_names_another_file(tmp_path):
    """Failure: bfloat16 scores are taken for float32 ones."""
    names = {file_name(FINGERPRINT | {key: "other"}) for key in FINGERPRINT} | {file_name(FINGERPRINT)}
    assert len(names) == len(FINGERPRINT) + 1
    assert file_name(FINGERPRINT).startswith("base-model-")
    assert file_name(dict(reversed(FINGERPRINT.items()))) == file_name(FINGERPRINT)


def test_a_file_copied_from_another_model_is_an_error(tmp_path):
    """Failure: whoever copies a file by hand gets the baselines of another base model."""
    first, other = ScoreStore(tmp_path, FINGERPRINT), FINGERPRINT | {"weights": "def"}
    first.close()
    first.path.replace(tmp_path / file_name(other))
    with pytest.raises(StoreError, match="another base model"):
        ScoreStore(tmp_path, other)


@pytest.mark.parametrize("weights", ["unknown", "None", "", None])
def test_scores_of_unknown_weights_are_not_stored(tmp_path, weights):
    """Failure: a server restarted with other weights under the same name gets the old ones' baselines."""
    fingerprint = {key: value for key, value in FINGERPRINT.items() if key != "weights"}
    assert open_store(tmp_path, fingerprint if weights is None else fingerprint | {"weights": weights}) is None
    assert list(tmp_path.iterdir()) == []
    assert isinstance(open_store(tmp_path, FINGERPRINT), ScoreStore)


def test_the_default_folder_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTEXT_RL_CACHE", str(tmp_path / "here"))
    assert open_store(None, FINGERPRINT).path.parent == tmp_path / "here" == default_folder()
    monkeypatch.delenv("CONTEXT_RL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache/context_rl/scores"


# --- what can break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "payload = zeroblob(length(payload))",
        "payload = substr(payload, 1, length(payload) - 1)",
        "checksum = x'00'",
        "tokens = tokens + 1",
        "payload = 'text'",
    ],
)
def test_a_row_that_does_not_check_is_never_used_and_told_once_and_replaced(tmp_path, capsys, damage):
    """Failure: a flipped bit on the disk becomes a baseline, or leaves its question without one in the store."""
    store, items = ScoreStore(tmp_path, FINGERPRINT), [Item((1,), (2,)), Item((3,), (4,))]
    scores = [Score((-1.0,)), Score((-2.0,))]
    store.put(items, scores, None)
    change(store, f"UPDATE scores SET {damage}")
    assert store.get(items, None) == {}
    assert store.get(items, None) == {}
    assert capsys.readouterr().err.count("does not check") == 1
    store.put(items, scores, None)
    assert store.get(items, None) == dict(zip(items, scores, strict=True))


def test_a_row_under_another_rows_key_is_never_used(tmp_path):
    """Failure: a payload that is whole but of another item passes."""
    store, items = ScoreStore(tmp_path, FINGERPRINT), [Item((1,), (2,)), Item((3,), (4,))]
    store.put(items, [Score((-1.0,)), Score((-2.0,))], None)
    first = "(SELECT payload, checksum FROM scores ORDER BY key LIMIT 1)"
    change(store, f"UPDATE scores SET (payload, checksum) = {first} WHERE key = (SELECT max(key) FROM scores)")
    found = store.get(items, None)
    assert list(found.items()) in ([(items[0], Score((-1.0,)))], [(items[1], Score((-2.0,)))])


@pytest.mark.parametrize("content", [b"no database at all " * 100, b"SQLite format 3\x00" + b"\xff" * 5000, "cut"])
def test_a_broken_file_is_set_aside_and_a_new_one_begun(tmp_path, capsys, content):
    """Failure: one bad file stops every run, or is thrown away though it may hold what somebody wants back."""
    path = tmp_path / file_name(FINGERPRINT)
    items, scores = items_and_scores(3000)
    if content == "cut":
        store = ScoreStore(tmp_path, FINGERPRINT)
        store.put(items, scores, None)
        store.close()
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    store = ScoreStore(tmp_path, FINGERPRINT)
    assert store.get(items[:1], None) == {}
    store.put(items, scores, None)
    assert ScoreStore(tmp_path, FINGERPRINT).get(items, None) == dict(zip(items, scores, strict=True))
    assert (tmp_path / (path.name + ".broken")).read_bytes() == content
    told = capsys.readouterr().err
    assert told.count("warning:") == 1
    assert ".broken" in told


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, capsys):
    """Failure: a run dies because of a cache."""
    (tmp_path / "file").write_text("")
    store = ScoreStore(tmp_path / "file" / "folder", FINGERPRINT)
    store.put([Item((1,), (2,))], [Score((-1.0,))], None)
    assert store.get([Item((1,), (2,))], None) == {}
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("trouble", ["PRAGMA max_page_count = 1", "PRAGMA query_only = ON"])
def test_a_full_or_read_only_disk_costs_one_warning_and_no_stored_score(tmp_path, capsys, trouble):
    """Failure: the run dies, warns at every step, or a half-written transaction is kept."""
    store = ScoreStore(tmp_path, FINGERPRINT)
    items, scores = items_and_scores(3000)
    store.put(items[:5], scores[:5], None)
    store._database.execute(trouble)
    for _ in range(2):
        store.put(items[5:], scores[5:], None)
    assert store.get(items, None) == dict(zip(items[:5], scores[:5], strict=True))
    assert capsys.readouterr().err.count("cannot be written") == 1


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from scorer.store import ScoreStore
from scorer.types import Item, Score
store, who = ScoreStore(Path(sys.argv[1]), {fingerprint!r}), int(sys.argv[2])
print("ready", flush=True)
for block in range(int(sys.argv[3])):
    items = [Item((who, block, i), (1, 2)) for i in range(100)]
    store.put(items, [Score((-float(i + 1), -float(block + 1))) for i in range(100)], None)
"""


def writer(folder, who: int, blocks: int, repository) -> subprocess.Popen:
    code = WRITER.format(path=[str(repository)], fingerprint=FINGERPRINT)
    command = [sys.executable, "-c", code, str(folder), str(who), str(blocks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stored_of(store: ScoreStore, who: int, block: int) -> int:
    """How many of a block's rows are stored; each is checked."""
    items = [Item((who, block, i), (1, 2)) for i in range(100)]
    found = store.get(items, None)
    assert found == {item: Score((-float(item.prefix_ids[2] + 1), -float(block + 1))) for item in found}
    return len(found)


def test_a_kill_in_the_middle_of_writing_leaves_whole_transactions(tmp_path, repository, capsys):
    """Failure: after a killed run the store does not open, or holds parts of what was put."""
    blocks_found = 0
    for attempt in range(5):
        process = writer(tmp_path, attempt, 10**6, repository)
        with process:
            assert process.stdout.readline() == "ready\n"
            threading.Event().wait(0.03 + 0.04 * attempt)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        store = ScoreStore(tmp_path, FINGERPRINT)
        block = 0
        while (stored := stored_of(store, attempt, block)) == 100:
            block += 1
        assert stored == 0, "a transaction was kept in part"
        blocks_found += block
        store.close()
    assert blocks_found > 0
    assert capsys.readouterr().err == ""


def test_processes_write_into_one_file_at_once(tmp_path, repository):
    """Failure: "database is locked" for the second process of a run, or rows lost between the two."""
    processes = [writer(tmp_path, who, 10, repository) for who in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors == [""] * 3
    assert [process.returncode for process in processes] == [0] * 3
    store = ScoreStore(tmp_path, FINGERPRINT)
    assert [stored_of(store, who, block) for who in range(3) for block in range(10)] == [100] * 30


def test_threads_share_one_store(tmp_path):
    """Failure: SQLite objects used in another thread than their own, or two transactions in one."""
    store = ScoreStore(tmp_path, FINGERPRINT)
    items, scores = items_and_scores(400)

    def work(start: int) -> dict[Item, Score]:
        mine = slice(start, start + 50)
        store.put(items[mine], scores[mine], None)
        return store.get(items[mine], None)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(work, range(0, 400, 50)))
    assert {item: score for part in parts for item, score in part.items()} == dict(zip(items, scores, strict=True))


# --- the baselines of questions -----------------------------------------------------------------------------------

EXAMPLES = [Example(f"rows:{i}", f"how many legs have {i} birds?", str(2 * i)) for i in range(4)]


def test_a_second_run_reads_its_baselines_from_the_store(tmp_path, model_folders, monkeypatch):
    """Failure: every run computes the same baselines again, or takes another question's."""
    scorer = LocalScorer(str(model_folders["llama"]), device="cpu")
    ids = [example.id for example in EXAMPLES]
    first = Questions(EXAMPLES, None, scorer, store=open_store(tmp_path, scorer.fingerprint))
    computed = first.ask_baselines(ids[:3])
    assert first.baselines_from_store == 0
    asked = first.ask(ids[:3], [None] * 3)
    assert [score.token_logprobs for score in computed] == [score.token_logprobs for score in asked]

    asked = []
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda items, greedy=None: asked.append(items) or score(items, greedy))
    second = Questions(EXAMPLES, None, scorer, store=open_store(tmp_path, scorer.fingerprint))
    assert second.ask_baselines(ids[2::-1]) == computed[::-1]
    assert (asked, second.baselines_from_store) == ([], 3)
    assert second.ask_baselines([ids[3], ids[0]])[1] == computed[0]
    assert [[item.group for item in items] for items in asked] == [[ids[3]]]
    assert second.baselines_from_store == 3
    assert len(second.store.get([second.item(i, None) for i in ids], None)) == 4


def test_the_traces_of_a_question_are_one_group(model_folders, monkeypatch):
    """Failure: a question's traces go to different replicas, and each reads the question anew."""
    scorer, seen = LocalScorer(str(model_folders["llama"]), device="cpu"), []
    monkeypatch.setattr(scorer, "score", lambda items, greedy: seen.extend(items) or [Score((-1.0,))] * len(items))
    Questions(EXAMPLES, None, scorer).ask(["rows:1", "rows:0", "rows:1"], ["a", "b", None])
    assert [item.group for item in seen] == ["rows:1", "rows:0", "rows:1"]
