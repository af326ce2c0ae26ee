"""Run folders. A failure means that a killed run loses rows, keeps rows of steps that were taken back, mixes two runs
in one folder, or goes on from a checkpoint that is only half there."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from trl import GRPOConfig, ModelConfig

from context_rl import runs
from context_rl.config import ConfigError, ContextConfig

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("example_id", pa.string()),
        ("trace", pa.string()),
        ("token_logprobs", pa.list_(pa.float64())),
        ("unscored", pa.string()),
        ("reward", pa.float64()),
        ("rewards/gain", pa.float64()),
    ]
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; runs/ is made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(folder: Path, finished: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("settings: {}\n")
    if finished:
        (folder / "result.json").write_text("{}\n")
    return folder


def checkpoint(folder: Path, step: int, state: str | None = "whole") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    text = json.dumps({"global_step": step, "log_history": [1, 2, 3]})
    if state is not None:
        (path / "trainer_state.json").write_text(text if state == "whole" else state)
    return path


# --- which folder -------------------------------------------------------------------------------------------------


def test_a_fresh_name_is_used_as_it_is_and_nothing_is_created(here):
    assert runs.run_folder(None, "symbolic-seed1", False) == Path("runs/symbolic-seed1")
    assert list(here.iterdir()) == []


def test_a_taken_name_gets_a_number(here):
    """Failure: a second run writes into the first one's folder."""
    begun(Path("runs/a"))
    assert runs.run_folder(None, "a", False) == Path("runs/a-2")
    begun(Path("runs/a-2"), finished=True)
    assert runs.run_folder(None, "a", False) == Path("runs/a-3")
    assert runs.run_folder(None, "b", False) == Path("runs/b")


def test_resume_without_a_folder_takes_the_latest_unfinished_run(here):
    begun(Path("runs/a"))
    begun(Path("runs/a-2"))
    begun(Path("runs/a-3"), finished=True)
    assert runs.run_folder(None, "a", True) == Path("runs/a-2")


@pytest.mark.parametrize("finished_runs", [0, 1, 2])
def test_resume_without_an_unfinished_run_is_an_error(here, finished_runs):
    """Failure: `--resume` starts from nothing, or goes over a finished run."""
    for number in range(1, finished_runs + 1):
        begun(Path("runs/a" if number == 1 else f"runs/a-{number}"), finished=True)
    with pytest.raises(ConfigError, match="--resume: no unfinished run runs/a"):
        runs.run_folder(None, "a", True)


def test_a_finished_folder_is_refused_with_and_without_resume(tmp_path):
    """Failure: result.json of one run stands beside the traces of another."""
    folder = begun(tmp_path / "run", finished=True)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="already holds a finished run"):
            runs.run_folder(str(folder), "name", resume)


def test_a_folder_with_something_in_it_is_refused_unless_resumed(tmp_path):
    folder = begun(tmp_path / "run")
    with pytest.raises(ConfigError, match="is not empty; add --resume"):
        runs.run_folder(str(folder), "name", False)
    assert runs.run_folder(str(folder), "name", True) == folder


def test_a_new_or_empty_folder_is_used(tmp_path):
    assert runs.run_folder(str(tmp_path / "new"), "name", False) == tmp_path / "new"
    assert runs.run_folder(str(tmp_path), "name", False) == tmp_path


@pytest.mark.parametrize("content", [None, "empty", "other files"])
def test_resuming_a_folder_without_a_run_is_an_error(tmp_path, content):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
    if content == "other files":
        (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run to go on from"):
        runs.run_folder(str(folder), "name", True)


def test_resume_does_not_choose_a_folder_that_holds_no_run(here):
    """Failure: a run killed before its first file ends in a traceback on --resume, and hides the run before it."""
    run = begun(Path("runs/a"))
    Path("runs/a-2").mkdir()
    assert runs.run_folder(None, "a", True) == run


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_the_latest_checkpoint_is_the_highest_number_and_not_the_last_in_the_alphabet(tmp_path):
    for step in (5, 10, 9, 100):
        checkpoint(tmp_path, step)
    assert runs.latest_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])


@pytest.mark.parametrize(
    "state",
    [None, "", '{"global_step": 30, "log_his', '{"global_step": 29}', '{"epoch": 1.0}'],
    ids=["missing", "empty", "truncated", "another step", "no step"],
)
def test_a_half_written_checkpoint_is_not_the_latest(tmp_path, state):
    """Failure: the run goes on from weights without their optimiser, or does not start at all."""
    checkpoint(tmp_path, 10)
    whole = checkpoint(tmp_path, 20)
    half = checkpoint(tmp_path, 30, state)
    assert runs.latest_checkpoint(tmp_path) == (whole, [half])


def test_a_truncation_anywhere_in_the_last_file_is_seen(tmp_path):
    """Failure: some prefix of trainer_state.json reads as a whole one."""
    path = checkpoint(tmp_path, 7)
    text = (path / "trainer_state.json").read_text()
    for length in range(len(text)):
        (path / "trainer_state.json").write_text(text[:length])
        assert runs.latest_checkpoint(tmp_path) == (None, [path]), length


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert runs.latest_checkpoint(tmp_path) == (None, [])


def write_run(folder: Path, steps: int) -> None:
    """What a run of so many steps leaves behind, two generation batches a step and two processes."""
    for step, process, batch in itertools.product(range(1, steps + 1), range(2), range(2)):
        runs.write_traces(folder, step, process, batch, [{"step": step, "reward": 0.5}], SCHEMA)
    for step in range(1, steps + 1):
        runs.append_metrics(folder, {"step": step, "reward": step / 10})


def test_rewind_removes_exactly_what_came_after_the_checkpoint(tmp_path):
    """Failure: rows of steps 5 to 7 stand in the tables twice, or those of steps 1 to 4 not at all."""
    write_run(tmp_path, 7)
    whole = checkpoint(tmp_path, 4)
    half = checkpoint(tmp_path, 6, None)
    unfinished = tmp_path / "traces" / "step-000004-000-01.parquet.tmp"
    unfinished.write_bytes(b"half a table")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rew')
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "symbolic.none.jsonl").write_text('{"id": 1}\n')

    runs.rewind(tmp_path, 4)

    left = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert left == [f"step-{s:06d}-{p:03d}-{b:02d}.parquet" for s in range(1, 5) for p in range(2) for b in range(2)]
    assert [line["step"] for line in runs.read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert whole.exists()
    assert not half.exists()
    assert (tmp_path / "eval" / "symbolic.none.jsonl").read_text() == '{"id": 1}\n'


def test_rewind_to_the_beginning_and_of_an_empty_folder(tmp_path):
    runs.rewind(tmp_path, 0)
    write_run(tmp_path, 2)
    runs.rewind(tmp_path, 0)
    assert list((tmp_path / "traces").iterdir()) == []
    assert runs.read_metrics(tmp_path) == []


def test_rewind_leaves_folders_that_transformers_did_not_write(tmp_path):
    """Failure: a checkpoint that the user kept under a name of his own is deleted on --resume."""
    kept = tmp_path / "checkpoint-best"
    kept.mkdir()
    (kept / "model.safetensors").write_bytes(b"weights")
    runs.rewind(tmp_path, 0)
    assert kept.exists()


def test_a_rewound_run_goes_on_with_every_row_once(tmp_path):
    """Failure: the first line after a resume is glued to the one that the kill cut short."""
    write_run(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    runs.rewind(tmp_path, 2)
    runs.append_metrics(tmp_path, {"step": 3, "reward": 0.3})
    assert runs.read_metrics(tmp_path) == [{"step": s, "reward": s / 10} for s in (1, 2, 3)]


# --- traces -------------------------------------------------------------------------------------------------------

ROW = {
    "step": 3,
    "example_id": "a:1",
    "trace": "2 + 2 = 4,\n\u00e9",
    "token_logprobs": [-0.5, -1.25],
    "unscored": None,
    "reward": 0.125,
    "rewards/gain": 1.5,
}
UNSCORED_ROW = {
    "step": 3,
    "example_id": "b:2",
    "trace": "",
    "token_logprobs": None,
    "unscored": "too long",
    "reward": None,
}


def test_traces_come_back_as_they_were_written(tmp_path):
    """Failure: saved traces cannot be scored again under another formula."""
    path = runs.write_traces(tmp_path, 3, 1, 2, [ROW, UNSCORED_ROW], SCHEMA)
    assert path == tmp_path / "traces" / "step-000003-001-02.parquet"
    assert pq.read_table(path).to_pylist() == [ROW, UNSCORED_ROW | {"rewards/gain": None}]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_unscored_first_row_costs_the_others_nothing(tmp_path):
    """Failure: one unscored trace at the head of a batch deletes every formula's value of the whole batch."""
    path = runs.write_traces(tmp_path, 3, 0, 0, [UNSCORED_ROW, ROW], SCHEMA)
    assert pq.read_table(path).to_pylist() == [UNSCORED_ROW | {"rewards/gain": None}, ROW]


def test_all_files_of_a_run_read_as_one_table(tmp_path):
    """Failure: `pq.read_table("runs/x/traces")` fails as soon as one trace of the run went unscored."""
    runs.write_traces(tmp_path, 1, 0, 0, [ROW], SCHEMA)
    runs.write_traces(tmp_path, 2, 0, 0, [ROW, UNSCORED_ROW], SCHEMA)
    table = pq.read_table(tmp_path / "traces")
    assert table.column("unscored").to_pylist() == [None, None, "too long"]


def test_a_table_that_fails_to_be_written_leaves_no_table(tmp_path, monkeypatch):
    """Failure: a kill in the middle of a write leaves a file that looks whole."""

    def half(table, where, **_):
        Path(where).write_bytes(b"PAR1 half a table")
        raise OSError("No space left on device")

    monkeypatch.setattr(runs.pq, "write_table", half)
    with pytest.raises(OSError, match="No space left"):
        runs.write_traces(tmp_path, 1, 0, 0, [ROW], SCHEMA)
    assert list((tmp_path / "traces").glob("*.parquet")) == []
    runs.rewind(tmp_path, 1)
    assert list((tmp_path / "traces").iterdir()) == []


# --- lines and texts ----------------------------------------------------------------------------------------------


def test_metrics_lose_only_a_last_line_that_was_cut(tmp_path):
    """Failure: one kill makes a run's curves unreadable; or damage in the middle goes unseen."""
    assert runs.read_metrics(tmp_path) == []
    for step in (1, 2):
        runs.append_metrics(tmp_path, {"step": step, "reward": None})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    lines = [{"step": 1, "reward": None}, {"step": 2, "reward": None}]
    assert runs.read_metrics(tmp_path) == lines
    for cut in range(1, len(whole) // 2):
        path.write_text(whole[:-cut])
        # Without its line end alone, the last line still holds everything.
        assert runs.read_metrics(tmp_path) == (lines if cut == 1 else lines[:1]), cut
    path.write_text('{"step": 1, "rew\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        runs.read_metrics(tmp_path)


def test_jsonl_comes_back_line_by_line(tmp_path):
    """Failure: a line end inside a trace ends the row."""
    rows = [{"trace": "two\nlines\u2028\u00e9", "correct": None}, {"trace": "", "correct": True}]
    path = tmp_path / "eval" / "qa.none.jsonl"
    runs.write_jsonl(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows


def test_a_text_changes_at_once_or_not_at_all(tmp_path, monkeypatch):
    """Failure: result.json, whose presence means "done", is there and empty."""
    path = tmp_path / "result.json"
    runs.write_atomically(path, "old\n")
    runs.write_atomically(path, "new\n")
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]

    def half(self, text, **_):
        self.write_bytes(text.encode()[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        runs.write_atomically(path, "newer\n")
    assert path.read_bytes() == b"new\n"


# --- settings -----------------------------------------------------------------------------------------------------

FINGERPRINT = {"backend": "local", "weights": "abc", "dtype": "float32"}


def description(folder: Path, **changes) -> dict:
    grpo = {k: v for k, v in changes.items() if k in GRPOConfig.__dataclass_fields__}
    own = {k: v for k, v in changes.items() if k in ContextConfig.__dataclass_fields__}
    assert len(grpo) + len(own) == len(changes)
    args = GRPOConfig(**{"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none"} | grpo)
    return runs.describe((ContextConfig(**own), args, ModelConfig()), FINGERPRINT, {"train": "a1"})


def save(folder: Path, content: dict) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_the_same_settings_pass_after_a_round_trip_through_yaml(tmp_path):
    """Failure: a tuple, a number such as 1e-06 or a time stamp makes every resumption impossible."""
    begun_with = description(tmp_path, learning_rate=1e-6, reward={"threshold": {"tau": 0.25}})
    save(tmp_path, begun_with)
    runs.check_same_settings(tmp_path, description(tmp_path, learning_rate=1e-6, reward={"threshold": {"tau": 0.25}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-6}, "settings learning_rate = 1e-06, not 2e-06"),
        ({"reward": "gain"}, "settings reward = 'probability', not 'gain'"),
        ({"reward": {"tiers": None}}, "settings reward = 'probability', not {'tiers': None}"),
        ({"seed": 7}, "settings seed = 42, not 7"),
        ({"num_generations": 4}, "settings num_generations = 8, not 4"),
    ],
)
def test_a_changed_setting_is_named(tmp_path, change, message):
    """Failure: half a run under one learning rate and half under another."""
    save(tmp_path, description(tmp_path))
    with pytest.raises(ConfigError) as caught:
        runs.check_same_settings(tmp_path, description(tmp_path, **change))
    assert str(caught.value) == f"--resume: {tmp_path} was begun with {message}"


def test_another_base_model_is_named(tmp_path):
    content = description(tmp_path)
    save(tmp_path, content)
    with pytest.raises(ConfigError, match="begun with scorer weights = 'abc', not 'def'"):
        runs.check_same_settings(tmp_path, content | {"scorer": FINGERPRINT | {"weights": "def"}})


def test_a_setting_that_is_new_or_gone_is_a_changed_one(tmp_path):
    content = description(tmp_path)
    save(tmp_path, content)
    with pytest.raises(ConfigError, match="begun with settings new = None, not 1"):
        runs.check_same_settings(tmp_path, content | {"settings": content["settings"] | {"new": 1}})


def test_settings_that_change_no_trained_number_may_change(tmp_path):
    """Failure: a run cannot be resumed from another folder or with more frequent checkpoints."""
    save(tmp_path, description(tmp_path))
    runs.check_same_settings(
        tmp_path, description(tmp_path / "moved", save_steps=7, logging_steps=3, resume=True, cpu_threads=2)
    )


def test_the_description_says_what_ran_and_holds_no_secret(tmp_path):
    content = description(tmp_path, hub_token="hf_secret")
    assert content["scorer"] == FINGERPRINT
    assert content["versions"]["trl"]
    assert content["settings"]["reward"] == "probability"
    assert content["settings"]["learning_rate"] == 1e-6
    assert "hf_secret" not in yaml.safe_dump(content)
    assert "hub_token" not in content["settings"]
