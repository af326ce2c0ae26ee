"""Dialogues: made here, from files, and what the judge is taught about them.

A failure means that a dialogue is cut, given to the wrong speaker or scored on the wrong reply; that a problem held out
from training is talked about in it; or that the tiny judge is taught a verdict which is wrong.
"""

import itertools
import json
import random

import pytest

from context_rl.tasks import DataError, is_endless, leg_talk, load_task, symbolic
from recipes.tiny_text import CHAT_TEMPLATE, EOS, JUDGE_PROMPT, judge_document, judgement


def load(path=None, **options):
    sizes = {"train_size": 50, "eval_size": 50, "seed": 1}
    return load_task("dialogue", data=None if path is None else str(path), **{**sizes, **options})


def write(path, *dialogues, key="messages"):
    path.write_text("".join(json.dumps({key: messages}) + "\n" for messages in dialogues))
    return path


def turn(role, content):
    return {"role": role, "content": content}


# --- made here ---


def test_made_dialogues_are_graded_by_what_they_say():
    """Failure: another wording is wrong, or another number or animal is right."""
    for talk in itertools.islice(leg_talk.talks(3, held_out=False), 200):
        example = leg_talk.Example("x", talk.question, talk.reply)
        for wording in leg_talk.REPLIES:
            assert leg_talk.same_facts(wording.format(total=talk.total, most=talk.most), example)
        other = next(symbolic.plural(a, 2) for a in talk.animals if symbolic.plural(a, 2) != talk.most)
        assert not leg_talk.same_facts(leg_talk.REPLIES[0].format(total=talk.total, most=other), example)
        assert not leg_talk.same_facts(leg_talk.REPLIES[0].format(total=talk.total + 1, most=talk.most), example)
        assert not leg_talk.same_facts("", example)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("There are 12 legs. The sea slugs have more than the others.", (12, "sea slugs")),
        ("12 legs or 13, the crabs", (None, "crabs")),
        ("the crabs and the bees have 4", (4, None)),
        ("slugs: 4", (4, None)),
    ],
)
def test_what_a_reply_says(reply, said):
    """Failure: a reply that hedges, or names half an animal, counts as having said it."""
    assert leg_talk.facts(reply) == said


def test_held_out_dialogues_are_about_problems_that_training_never_sees():
    """Failure: the same animals in the same numbers are trained on under another greeting."""
    task = load()

    def problem(example):  # its last turn, which holds the animals, without the wording of the question
        return example.question.rpartition("User: ")[2].partition(".")[0]

    assert len({e.question for e in task.train}) == len(task.train) == 50
    assert not {problem(e) for e in task.train} & {problem(e) for e in task.held_out}
    assert [e.question for e in load(seed=2).held_out] == [e.question for e in task.held_out]
    assert [e.question for e in load(seed=2).train] != [e.question for e in task.train]
    assert all(task.grade(e.answer, e) for e in [*task.train, *task.held_out])


def test_only_what_is_made_here_has_no_end():
    """Failure: a run on a file stops at 4,000 rows, or one on made dialogues asks for a number."""
    assert is_endless("dialogue", None)
    assert not is_endless("dialogue", "x.jsonl")
    assert is_endless("symbolic", None)
    assert is_endless("rg:chain_sum", None)
    assert not is_endless("gsm8k", None)
    with pytest.raises(DataError, match="no end"):
        load(train_size=None)


# --- from files ---


def test_the_last_message_is_the_answer_and_the_rest_the_question(tmp_path):
    """Failure: the reply is part of what the models read, a turn is lost, or roles are swapped."""
    first = [turn("system", "Be brief."), turn("user", "Hi {you}\nthere"), turn("assistant", " Hello. ")]
    second = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    task = load(write(tmp_path / "d.jsonl", first, second), eval_data=str(write(tmp_path / "e.jsonl", first)))
    [example] = task.train
    assert (example.question, example.answer) == ("User: 2 + 2?", "4")
    [held_out] = task.held_out
    assert held_out.question == "System: Be brief.\nUser: Hi {you}\nthere"
    assert held_out.answer == "Hello."


def test_replies_of_several_lines_are_joined_and_the_note_says_which(tmp_path):
    """Failure: a reply is cut at its first line, or joined in silence."""
    rows = [[turn("user", f"{n}?"), turn("assistant", "one\n\n two ")] for n in range(5)]
    task = load(write(tmp_path / "d.jsonl", *rows))
    assert {e.answer for e in [*task.train, *task.held_out]} == {"one two"}
    assert any("5 replies are joined" in note and "d.jsonl:1" in note for note in task.notes)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("text", "list of at least two messages"),
        ([turn("user", "hi")], "list of at least two messages"),
        ([turn("user", "hi"), turn("user", "ho")], "last message is the user's"),
        ([turn("user", "hi"), turn("tool", "ho")], "message 2: the role is 'tool'"),
        ([turn("user", " "), turn("assistant", "ho")], "message 1: has no text"),
        ([turn("user", "hi"), {"role": "assistant", "content": None}], "message 2: has no text"),
        (["hi", "ho"], "message 1: must be an object"),
    ],
)
def test_a_row_that_is_no_dialogue_is_named(tmp_path, messages, says):
    """Failure: a broken row is skipped, or scored on the wrong turn."""
    good = [turn("user", "hi"), turn("assistant", "ho")]
    with pytest.raises(DataError, match="line 2") as found:
        load(write(tmp_path / "d.jsonl", good, messages))
    assert says in str(found.value)


def test_columns_that_are_missing_or_not_clear_are_named(tmp_path):
    """Failure: some other column is read as the dialogue."""
    rows = [[turn("user", f"{n}?"), turn("assistant", "ho")] for n in range(4)]
    path = write(tmp_path / "d.jsonl", *rows, key="chat")
    with pytest.raises(DataError, match=r"no column of messages recognised.*'chat'.*--question_column"):
        load(path)
    assert load(path, question_column="chat").train
    with pytest.raises(DataError, match=r"no column 'talk' \(--question_column\)"):
        load(path, question_column="talk")
    with pytest.raises(DataError, match="scores the last message"):
        load(path, question_column="chat", answer_column="x")
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({"messages": rows[0], "dialogue": rows[0]}) + "\n")
    with pytest.raises(DataError, match="could be the messages"):
        load(both)


# --- what the judge is taught ---


def test_the_judge_is_taught_the_rule():
    """Failure: a verdict in the judge's training text is not what `leg_talk.share_right` says of the reply."""
    rng, seen = random.Random(0), set()
    for talk in itertools.islice(leg_talk.talks(5, held_out=False), 400):
        asked = judgement(talk, rng)
        reply = asked.question.partition("\nReply: ")[2].partition("\n")[0]
        share = leg_talk.share_right(reply, talk.total, talk.most)
        hard = "Answer yes or no." in asked.question
        assert asked.answer == (("yes" if share == 1 else "no") if hard else str(round(10 * share)))
        assert f"Reference answer: {talk.reply}\n" in asked.question
        seen.add(asked.answer)
    assert seen == {"yes", "no", "0", "5", "10"}


def test_the_judge_reads_a_chat_as_it_has_learnt_it():
    """Failure: an endpoint puts the question into another text than the one that the judge was trained on."""
    from jinja2 import Template

    talk = next(leg_talk.talks(5, held_out=False))
    asked = judgement(talk, random.Random(0))
    rendered = Template(CHAT_TEMPLATE).render(
        messages=[{"role": "user", "content": asked.question}], add_generation_prompt=True
    )
    assert rendered == JUDGE_PROMPT.format(content=asked.question)
    assert judge_document(asked, "") == (rendered, f" {asked.answer}{EOS}")
