"""HellaSwag: rows of both schemas -> examples. Each docstring says which bug the test's failure means."""

import json
import os
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from context_rl.tasks import DataError, Example, Task, load_task
from context_rl.tasks.hellaswag import tidy

ORIGINAL = {
    "ind": 4,
    "activity_label": "Removing ice from car",
    "ctx_a": "A man writes over the snow covering a window. He wears a hat.",
    "ctx_b": "then, the Man",
    "ctx": "A man writes over the snow covering a window. He wears a hat. then, the Man",
    "split": "train",
    "split_type": "indomain",
    "label": 3,
    "endings": [
        ", adds wax to the car.",
        ", gets into a ski lift.",
        ", puts on a winter coat.",
        ", continues  removing the snow.",
    ],
    "source_id": "activitynet~v_x",
}
REDUCED = {
    "ctx": "[header] How to bake bread [title] Mix the flour. [step] Use a bowl.  then you",
    "endings": ["[title] Add water. [step] Stir it.", "Wait here.", "burn  it. [substeps] Twice.", "[step] Run."],
    "label": 0,
    "activity_label": "",
    "split": "train",
}


def row(n: int, **changed) -> dict:
    """An original row of its own, whose label is n modulo 4."""
    texts = {"ctx_a": f"Person {n} stands up.", "ctx_b": "she", "ctx": f"Person {n} stands up. she"}
    return {**ORIGINAL, **texts, "label": n % 4, "endings": [f"takes {n} {c}." for c in "abcd"], **changed}


def jsonl(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def load(data: str | Path | None = None, **kwargs) -> Task:
    data = None if data is None else str(data)
    return load_task("hellaswag", data=data, **{"train_size": None, "eval_size": None, "seed": 0, **kwargs})


def folder(path: Path, *train: dict, validation: tuple[dict, ...] = (row(900),)) -> Path:
    jsonl(path / "train.jsonl", *train)
    jsonl(path / "validation.jsonl", *validation)
    return path


def only(path: Path, values: dict, **kwargs) -> Example:
    """The example that one training row becomes."""
    return load(folder(path, values), **kwargs).train[0]


def error(data: str | Path | None = None, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load(data, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- a row --------------------------------------------------------------------------------------------------------


def test_an_original_row_becomes_the_harness_s_query_and_choices(tmp_path):
    """Failing: the frozen model reads another text than in published results (label, capital, spaces)."""
    assert only(tmp_path, ORIGINAL) == Example(
        "hellaswag/train/0",
        # capitalize() also takes the other capitals away, as it does in the harness.
        "Removing ice from car: A man writes over the snow covering a window. He wears a hat. Then, the man",
        ", continues removing the snow.",
        choices=(
            ", adds wax to the car.",
            ", gets into a ski lift.",
            ", puts on a winter coat.",
            ", continues removing the snow.",
        ),
        label=3,
    )


def test_an_original_row_of_wikihow_has_no_second_part(tmp_path):
    """Failing: an empty ctx_b leaves a space at the end, or the tags stay in the text."""
    text = "[header] How to bake bread [title] Mix the flour. [step] Use a bowl."
    values = row(0, activity_label="Food", ctx_a=text, ctx_b="", ctx=text)
    assert only(tmp_path, values).question == "Food: How to bake bread. Mix the flour. Use a bowl."


def test_a_reduced_row_is_read_from_its_whole_context(tmp_path):
    """Failing: rows without ctx_a and ctx_b are refused, get a colon without a label, or capitals that are guessed."""
    example = only(tmp_path, REDUCED)
    assert example.question == "How to bake bread. Mix the flour. Use a bowl. then you"
    assert example.choices == ("Add water. Stir it.", "Wait here.", "burn it. Twice.", "Run.")
    assert example.answer == "Add water. Stir it."


@pytest.mark.parametrize(
    ("changed", "start"),
    [({"activity_label": "Baking bread"}, "Baking bread: How to"), ({"activity_label": None}, "How to"),
     ({"ctx_a": None, "ctx_b": None}, "How to")],
)  # fmt: skip
def test_a_label_comes_before_a_reduced_context_only_where_there_is_one(tmp_path, changed, start):
    """Failing: the activity label of a reduced copy is lost, or a missing one is written as "None" or ": "."""
    assert only(tmp_path, {**REDUCED, **changed}).question.startswith(start)


def test_a_row_of_context_endings_and_label_alone_is_read(tmp_path):
    """Failing: a copy with nothing but ctx, endings and label is refused."""
    values = {key: REDUCED[key] for key in ("ctx", "endings", "label")}
    assert only(tmp_path, values).question.startswith("How to bake")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("  a b ", "a b"),
        ("a [title] b", "a. b"),
        ("a. [title] b", "a.. b"),  # the harness's own second full stop
        ("[title] a", "a"),
        ("a[title] b", "a b"),
        ("a [step] b [substeps] c", "a b c"),
        ("a [x] [y] b", "a  b"),  # three spaces are one pair and one more
        ("a [1] (] b", "a (] b"),
        ("a [b [c] d] e", "a d] e"),  # the shortest match
        ("a [step", "a [step"),
        ("[step]", ""),
    ],
)
def test_texts_are_tidied_as_the_harness_does(raw, text):
    """Failing: WikiHow's tags are scored, or text is lost that published results include."""
    assert tidy(raw) == text


@pytest.mark.parametrize("label", [2, "2", " 2 "])
def test_a_label_is_a_number_or_its_digits(tmp_path, label):
    """Failing: the hub's labels, which are strings, are refused or name another ending than a file's numbers do."""
    example = only(tmp_path, row(1, label=label))
    assert (example.label, example.answer) == (2, "takes 1 c.")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"label": ""}, "no label says which ending is right, as in the public test split"),
        ({"label": None}, "no label says"),
        ({"label": 4}, "the label is int 4, not a whole number from 0 to 3"),
        ({"label": -1}, "the label is int -1"),
        ({"label": "4"}, "the label is str '4'"),
        ({"label": "C"}, "the label is str 'C'"),
        ({"label": 1.0}, "the label is float 1.0"),
        ({"label": True}, "the label is bool True"),
        ({"label": [1]}, "the label is list [1]"),
        ({"endings": None}, "column 'endings' is missing, not a list"),
        ({"endings": "a. b."}, "column 'endings' is str 'a. b.', not a list"),
        ({"endings": ["a."]}, "not a list of 2 to 26 texts"),
        ({"endings": [f"{n}" for n in range(27)]}, "not a list of 2 to 26 texts"),
        ({"endings": ["a.", "b.", 7, "d."]}, "endings[2] is int 7, not text"),
        ({"endings": ["a.", "", "c.", "d."]}, "(column 'endings[1]') is empty"),
        ({"endings": ["a.", "b.", "c.", " [step] "]}, "(column 'endings[3]') is empty"),
        ({"endings": ["a.", "b.\nc.", "d."], "label": 0}, "endings[1] has several lines"),
        ({"endings": ["a.", "b\ud800", "c.", "d."]}, "(column 'endings[1]') holds half a character"),
        ({"endings": ["a.", "Go home", "c.", "go home."]}, "endings[1] and endings[3] are the same to the grader"),
        ({"endings": ["a.", "b [step] c.", "b c.", "d."]}, "endings[1] and endings[2] are the same to the grader"),
        ({"ctx_a": "", "ctx_b": ""}, "(column 'ctx_a') is empty"),
        ({"ctx_a": "[header]", "ctx_b": ""}, "(column 'ctx_a') is empty"),
        ({"ctx_a": 5}, "column 'ctx_a' is int 5, not text"),
        ({"ctx_b": None}, "column 'ctx_b' is missing, not text"),
        ({"ctx_a": None, "ctx": None}, "column 'ctx' is missing, not text"),
        ({"ctx_a": None, "ctx": " "}, "(column 'ctx') is empty"),
        ({"activity_label": 5}, "column 'activity_label' is int 5, not text"),
        ({"activity_label": "a\ud800"}, "(column 'ctx_a') holds half a character"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, changed, says):
    """Failing: a broken row is scored as if it were good, left out without a word, or cannot be found in the file."""
    message = error(folder(tmp_path, row(0), row(1, **changed)))
    assert message.startswith(f"{tmp_path}/train.jsonl, line 2: ")
    assert says in message


def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path):
    """Failing: another data set is reported as a broken first row."""
    message = error(jsonl(tmp_path / "a.jsonl", {"question": "q", "label": 1, "ctx_a": "x"}))
    assert "no column 'endings' or 'ctx'; the columns are 'question', 'label', 'ctx_a'" in message


# --- what is asked, what is right ---------------------------------------------------------------------------------


def test_endings_are_listed_to_the_context_model_alone_and_only_on_request(tmp_path):
    """Failing: the base model reads the choices, or the context model does although it was not to."""
    shown = only(tmp_path, REDUCED, task_options={"show_endings": True})
    assert shown.prompt == (
        "How to bake bread. Mix the flour. Use a bowl. then you\n"
        "A) Add water. Stir it.\nB) Wait here.\nC) burn it. Twice.\nD) Run."
    )
    for options in (None, {}, {"show_endings": False}):
        hidden = only(tmp_path, REDUCED, task_options=options)
        assert hidden.prompt is None
        assert (hidden.question, hidden.choices, hidden.answer) == (shown.question, shown.choices, shown.answer)


def test_the_list_of_endings_does_not_tell_which_is_right(tmp_path):
    """Failing: the right ending's place or mark gives it away, and the context model learns to copy it."""
    prompts = {only(tmp_path, {**REDUCED, "label": n}, task_options={"show_endings": True}).prompt for n in range(4)}
    assert len(prompts) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endings": True}, "no option 'endings'; it has show_endings"),
        ({"show_endings": True, "seed": 1}, "no option 'seed'"),
        ({"show_endings": 1}, "true or false, not 1"),
        ({"show_endings": "true"}, "true or false, not 'true'"),
        ({"show_endings": None}, "true or false, not None"),
    ],
)
def test_other_options_are_refused(options, says):
    """Failing: a mistyped option trains another experiment than the one asked for."""
    assert says in error("nowhere.jsonl", task_options=options)


def test_the_columns_cannot_be_named():
    """Failing: a column is named and quietly not used."""
    message = error("nowhere.jsonl", question_column="ctx", answer_column="label")
    assert "are fixed; leave --question_column, --answer_column out" in message


def test_only_the_right_ending_s_text_is_right(tmp_path):
    """Failing: accuracy counts a wrong ending, a letter, or half an ending."""
    task = load(folder(tmp_path, REDUCED))
    example = task.train[0]
    for line in ("Add water. Stir it.", " add water. stir it ", '"Add water. Stir it."'):
        assert task.grade(line, example)
    for line in (*example.choices[1:], "A", "B) Add water. Stir it.", "Add water.", "0", ""):
        assert not task.grade(line, example)


# --- where rows come from -----------------------------------------------------------------------------------------


def test_ids_count_the_rows_of_a_split_from_0(tmp_path):
    """Failing: a baseline or a saved trace belongs to another question after a change of seed or size."""
    validation = tuple(row(n) for n in range(100, 104))
    task = load(folder(tmp_path, *map(row, range(5)), validation=validation), seed=3)
    train = {e.id: e.question for e in task.train}
    held_out = {e.id: e.question for e in task.held_out}
    assert train == {f"hellaswag/train/{n}": f"Removing ice from car: Person {n} stands up. She" for n in range(5)}
    assert held_out == {
        f"hellaswag/validation/{n}": f"Removing ice from car: Person {100 + n} stands up. She" for n in range(4)
    }
    small = load(tmp_path, train_size=2, eval_size=2, seed=3)
    assert (small.train, small.held_out) == (task.train[:2], task.held_out[:2])


def test_validation_is_held_out_where_there_is_a_test_split_too(tmp_path):
    """Failing: the unlabelled test split is held out and refused, or validation rows go unused."""
    jsonl(folder(tmp_path, row(0)) / "test.jsonl", row(1, label=""))
    task = load(tmp_path)
    assert [e.id for e in task.held_out] == ["hellaswag/validation/0"]
    assert task.notes == (f"{tmp_path}: its split 'test' is not used",)


def test_a_test_split_is_held_out_where_there_is_no_validation(tmp_path):
    """Failing: a labelled test file is passed over, or an unlabelled one gives no reason for the refusal."""
    jsonl(tmp_path / "train.jsonl", row(0))
    jsonl(tmp_path / "test.jsonl", row(1), row(2))
    assert len(load(tmp_path).held_out) == 2
    jsonl(tmp_path / "test.jsonl", row(1, label=""))
    assert "test.jsonl, line 1: no label says" in error(tmp_path)


def test_held_out_data_of_its_own_goes_before_the_folder_s(tmp_path):
    """Failing: --eval_data is read from its unlabelled test split, or not at all."""
    (tmp_path / "other").mkdir()
    folder(tmp_path, row(0))
    jsonl(folder(tmp_path / "other", row(1), validation=(row(2), row(3))) / "test.jsonl", row(4, label=""))
    task = load(tmp_path, eval_data=str(tmp_path / "other"))
    assert sorted(e.answer for e in task.held_out) == ["takes 2 c.", "takes 3 d."]


def test_one_file_is_split_by_the_question_s_text(tmp_path):
    """Failing: a held-out context was trained on, with its other endings."""
    rows = [row(n) for n in range(10)]
    data = jsonl(tmp_path / "all.jsonl", *rows, *({**r, "endings": ["w", "x", "y", "z"]} for r in rows))
    task = load(data)
    assert (len(task.train), len(task.held_out)) == (16, 4)
    assert not {e.question for e in task.train} & {e.question for e in task.held_out}
    assert "no test split: 4 of 20 rows are held out" in task.notes[0]


def test_contexts_held_out_are_left_out_of_training(tmp_path):
    """Failing: the model trains on validation questions."""
    task = load(folder(tmp_path, row(0), row(1), validation=(row(1),)))
    assert [e.id for e in task.train] == ["hellaswag/train/0"]
    assert "left 1 training rows out: their questions are held out for evaluation" in task.notes


def test_parquet_and_json_give_the_same_examples(tmp_path):
    """Failing: lists or labels of one format are read as something else."""
    rows = [row(n) for n in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    one, two = load(tmp_path / "a.parquet"), load(tmp_path / "b.json")
    assert (one.train, one.held_out) == (two.train, two.held_out)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").train == one.train


def test_the_hub_s_data_set_is_the_default_and_its_test_split_is_left_alone(monkeypatch):
    """Failing: the hub's own layout (labels as strings, a test split without) cannot be loaded, or gives other ids."""

    def split(*rows: dict) -> datasets.Dataset:
        return datasets.Dataset.from_list([{**r, "label": str(r["label"])} for r in rows])

    hub = datasets.DatasetDict(
        train=split(row(0), row(1)), test=split(row(2, label=""), row(3, label="")), validation=split(row(4), row(5))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, **kwargs: None)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config=None: {("Rowan/hellaswag", None): hub}[name, config]
    )
    task = load()
    assert {e.id: e.label for e in task.train} == {"hellaswag/train/0": 0, "hellaswag/train/1": 1}
    assert {e.id: e.label for e in task.held_out} == {"hellaswag/validation/0": 0, "hellaswag/validation/1": 1}
    assert task.notes == ("Rowan/hellaswag: its split 'test' is not used",)


def test_real_hellaswag_loads_whole():
    """Failing: a row of the real data set is refused, lost, or keeps its tags."""
    data = os.environ.get("CONTEXT_RL_DATA")
    if not data:
        pytest.skip("set CONTEXT_RL_DATA to a folder that holds hellaswag/train.jsonl and hellaswag/validation.jsonl")
    files = Path(data) / "hellaswag"
    task = load(files, task_options={"show_endings": True})
    lines = [(files / f"{split}.jsonl").read_bytes().count(b"\n") for split in ("train", "validation")]
    assert [len(task.train), len(task.held_out)] == lines
    assert task.notes == ()
    examples = task.train + task.held_out
    assert len({e.id for e in examples}) == len(examples)
    assert all(len(e.choices) == 4 and e.choices[e.label] == e.answer for e in examples)
    assert not any(tag in e.prompt for e in examples for tag in ("[header]", "[title]", "[step]", "[substeps]"))
    assert not any(task.grade(c, e) for e in examples for n, c in enumerate(e.choices) if n != e.label)
    # An order that told which ending is right would show here: chance is 1 in 4.
    assert max(Counter(e.label for e in examples).values()) < 0.3 * len(examples)
    validation = {e.id: e for e in task.held_out}
    assert validation["hellaswag/validation/0"].question == (
        "Pole vault: Pole vault is a sport where you run with a pole and stop and swing your body. A few women"
    )
    assert validation["hellaswag/validation/0"].label == 3
    first = next(e for e in task.train if e.id == "hellaswag/train/0")
    assert first.question.startswith("How to sell videos on istockphoto. Create an account at istockphoto.com. Sign up")
    assert first.answer.startswith("Take the test required by istockphoto")
