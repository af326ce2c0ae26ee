"""Settings from a recipe and the command line. A failure means that a run uses a setting that nobody asked for, or that
a typing error ends in a traceback, or in silence."""

import contextlib
import json
from pathlib import Path

import pytest

from context_rl.config import ConfigError, ContextConfig, parse
from context_rl.rewards import COMBINATORS, FORMULAS, Reward, RewardInputs

CPU = "use_cpu: true\nbf16: false\n"


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe; without text, one that sets only what a CPU needs."""

    def write(text: str = "", name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(CPU + text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def default(recipe) -> Path:
    return Path(recipe("reward: binary\nseed: 5\n", "default.yaml"))


def error(argv: list[str], default: Path) -> str:
    """The message, which is one line for every mistake a user can make."""
    with pytest.raises(ConfigError) as caught:
        parse(argv, default)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- precedence ---------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(recipe, default):
    """Failure: a run under other settings than its command says."""
    path = recipe("reward: gain\nlearning_rate: 3.0e-4\nmodel_name_or_path: from/recipe\nmax_steps: 7\n")
    config, args, model = parse([path, "--reward", "logprob_sum", "--max_steps", "9"], default)
    assert (config.reward, args.max_steps) == ("logprob_sum", 9)
    assert (args.learning_rate, model.model_name_or_path) == (3e-4, "from/recipe")
    assert config.scorer == "local"
    assert args.seed == 42, "a recipe that is given replaces the default recipe; it is not added to it"


def test_without_a_recipe_the_default_recipe_holds(default):
    config, args, _ = parse([], default)
    assert (config.reward, args.seed) == ("binary", 5)
    config, args, _ = parse(["--seed", "6"], default)
    assert (config.reward, args.seed) == ("binary", 6)


def test_the_caller_keeps_its_list_of_words(recipe, default):
    words = [recipe(), "--seed", "3"]
    parse(words, default)
    assert len(words) == 3


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--resume"], "resume", True),
        (["--no_evaluate"], "evaluate", False),
        (["--no-evaluate"], "evaluate", False),
        (["--evaluate", "false"], "evaluate", False),
        (["--train-questions", "12"], "train_questions", 12),
        (["--train_questions=12"], "train_questions", 12),
        (["--stop_strings", "\nA:", "\nQ:"], "stop_strings", ["\nA:", "\nQ:"]),
        (["--scorer_args=--max-model-len 512"], "scorer_args", "--max-model-len 512"),
    ],
)
def test_flags_are_read_in_every_usual_spelling(default, words, name, value):
    assert getattr(parse(words, default)[0], name) == value


def test_server_arguments_may_begin_with_dashes(default):
    """Failure: `--scorer_args "--max-model-len 512"`, the one way to use the flag that comes to mind, is refused."""
    config, _, _ = parse(["--scorer_args", "--max-model-len 512"], default)
    assert config.scorer_args == "--max-model-len 512"


def test_the_repositorys_own_recipe_is_valid(repository):
    """Failure: the command that needs no arguments does not start."""
    config, args, model = parse(["--use_cpu", "true"], repository / "recipes" / "symbolic.yaml")
    assert config.task == "symbolic"
    assert args.per_device_train_batch_size % args.num_generations == 0
    assert (repository / model.model_name_or_path / "config.json").exists()
    assert (repository / config.scorer_model / "config.json").exists()


# --- unknown keys -------------------------------------------------------------------------------------------------


def test_an_unknown_key_in_the_recipe_is_named_with_its_neighbours(recipe, default):
    """Failure: a misspelt setting is left out without a word."""
    path = recipe("max_step: 3\n")
    message = error([path], default)
    assert message.startswith(f"unknown key 'max_step' in {path}; did you mean ")
    assert "max_steps" in message


def test_an_unknown_flag_is_named_with_its_neighbours(default):
    """Failure: argparse takes `--learning` for --learning_rate, or prints four screens of usage."""
    message = error(["--rewards", "gain"], default)
    assert message.startswith("unknown key 'rewards' in the command line; did you mean reward")
    assert "learning_rate" in error(["--learning", "1.0"], default)
    assert error(["--zzzzzz", "1"], default) == "unknown key 'zzzzzz' in the command line"


def test_a_stray_word_is_refused(default):
    assert "stray" in error(["--seed", "1", "stray"], default)


# --- the recipe file ----------------------------------------------------------------------------------------------


def test_a_missing_recipe_is_named(tmp_path, default):
    missing = tmp_path / "nothing.yaml"
    assert error([str(missing)], default) == f"cannot read the recipe {missing}: No such file or directory"


@pytest.mark.parametrize("text", ["", "- reward\n- gain\n", "just words\n", "3\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path, default, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert error([str(path)], default) == f"{path} must hold `key: value` lines"


def test_a_recipe_that_is_no_yaml_is_named(tmp_path, default):
    path = tmp_path / "recipe.yaml"
    path.write_text("reward: [gain\n")
    assert error([str(path)], default).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize("content", [b"task: caf\xe9\n", b"5: 1\n"])
def test_a_recipe_in_another_encoding_or_with_a_number_for_a_key_is_one_line(tmp_path, default, content):
    """Failure: a file saved as Latin-1 ends in a traceback."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    error([str(path)], default)


# --- rewards and their parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_an_unknown_reward_lists_all_there_are(recipe, default, where):
    argv = [recipe("reward: prob\n")] if where == "recipe" else ["--reward", "prob"]
    names = ", ".join([*FORMULAS, *COMBINATORS])
    expected = f"--reward: no reward is called 'prob'; there are: {names}, and your own as package.module.function"
    assert error(argv, default) == expected


def test_a_reward_is_the_same_from_yaml_and_from_the_command_line(recipe, default):
    """Failure: the same experiment differs by the way it was written down."""
    spec = {"sigmoid_threshold": {"tau": 0.25, "width": 2}}
    from_yaml, _, _ = parse([recipe("reward:\n  sigmoid_threshold:\n    tau: 0.25\n    width: 2\n")], default)
    from_json, _, _ = parse(["--reward", json.dumps(spec)], default)
    from_flow, _, _ = parse(["--reward", "{sigmoid_threshold: {tau: 0.25, width: 2}}"], default)
    assert from_yaml.reward == from_json.reward == from_flow.reward == spec
    x = RewardInputs((-0.1,), (-0.2,), False)
    assert Reward(from_json.reward).of(x) == Reward(spec).of(x)


def test_a_json_number_with_an_exponent_is_a_number(default):
    """Failure: '{"tau": 1e-3}', valid JSON, is refused as "not '1e-3'"."""
    config, _, _ = parse(["--reward", '{"threshold": {"tau": 1e-3}}'], default)
    assert config.reward == {"threshold": {"tau": 1e-3}}


def test_no_task_options_are_an_empty_mapping(default):
    config, _, _ = parse([], default)
    assert config.task_options == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{threshold: {tua: 1}}", "--reward: reward 'threshold' takes no 'tua'; it takes: of, tau"),
        ("{threshold: {tau: high}}", "--reward: tau must be a finite number, not 'high'"),
        ("{threshold: [1]}", "--reward: reward 'threshold': its parameters must be a mapping, not [1]"),
        ('{"threshold": {"tau": ', None),
    ],
)
def test_reward_parameters_that_do_not_fit_are_refused(default, value, message):
    """Failure: a parameter is left out without a word, or is found wrong after an hour."""
    found = error(["--reward", value], default)
    assert message is None or found == message


def test_task_options_are_a_mapping_from_either_side(recipe, default):
    from_yaml, _, _ = parse([recipe("task_options: {min_terms: 2, digits: [1, 2]}\n")], default)
    from_json, _, _ = parse(["--task_options", '{"min_terms": 2, "digits": [1, 2]}'], default)
    assert from_yaml.task_options == from_json.task_options == {"min_terms": 2, "digits": [1, 2]}


# --- impossible values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("scorer", "vlm", "--scorer is 'vlm'; it can be local or vllm"),
        ("scorer_template", "html", "--scorer_template is 'html'; it can be raw or chat"),
        ("context_template", "html", "--context_template is 'html'; it can be raw or chat"),
        ("scorer_dtype", "int8", "--scorer_dtype is 'int8'; it can be float32 or bfloat16 or float16 or auto"),
        ("eval_questions", "0", "--eval_questions is 0; it must be a whole number, at least 1"),
        ("train_questions", "-3", "--train_questions is -3; it must be a whole number, at least 1"),
        ("max_answer_tokens", "0", "--max_answer_tokens is 0; it must be a whole number, at least 1"),
        ("cpu_threads", "0", "--cpu_threads is 0; it must be a whole number, at least 1"),
        ("max_unscored", "1.0", "--max_unscored is 1.0; it is a share, from 0 to below 1"),
        ("max_unscored", "-0.1", "--max_unscored is -0.1; it is a share, from 0 to below 1"),
        ("max_unscored", "nan", "--max_unscored is nan; it is a share, from 0 to below 1"),
        ("max_steps", "many", "invalid int value: 'many'"),
        ("num_generations", "7", "divisible by num_generations (7)"),
        ("evaluate", "perhaps", "got perhaps"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_possible(default, key, value, part):
    """Failure: it is found out in the middle of a run."""
    message = error([f"--{key}={value}"], default)
    assert part in message
    assert key in message


def test_stop_strings_are_a_list_whoever_writes_them(recipe, default):
    config, _, _ = parse([recipe('stop_strings: ["\\nA:", "\\nQ:"]\n')], default)
    assert config.stop_strings == ["\nA:", "\nQ:"]
    assert parse([recipe("stop_strings: []\n")], default)[0].stop_strings == []
    assert parse([recipe()], default)[0].stop_strings is None


def test_one_stop_string_in_a_recipe_is_not_taken_apart(recipe, default):
    """Failure: every trace ends at the first letter of it, and nobody is told."""
    found = "refused"
    with contextlib.suppress(ConfigError):
        found = parse([recipe('stop_strings: "\\nAnswer:"\n')], default)[0].stop_strings
    assert found in ("refused", ["\nAnswer:"])


def test_an_empty_stop_string_is_refused(default):
    """Failure: every trace is the empty one."""
    assert "stop_strings" in error(["--stop_strings", ""], default)


def test_a_share_of_a_question_is_refused(recipe, default):
    """Failure: a TypeError from inside a task, or a number of questions that nobody asked for."""
    assert "eval_questions" in error([recipe("eval_questions: 1.5\n")], default)


def test_every_field_explains_itself():
    """Failure: `--help` has a line without help."""
    for name, field in ContextConfig.__dataclass_fields__.items():
        assert field.metadata.get("help"), name


# --- recipes on top of others -------------------------------------------------------------------------------------


def test_a_recipe_extends_another_and_wins_over_it(tmp_path, default):
    """Failure: an ablation's recipe silently runs with other settings than the one it builds on."""
    (tmp_path / "below.yaml").write_text("reward: gain\nmax_steps: 7\nseed: 3\n")
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "top.yaml"
    path.write_text("extends: ../below.yaml\nreward: binary\n")
    config, args, _ = parse([str(path), "--seed", "5"], default)
    assert (config.reward, args.max_steps, args.seed) == ("binary", 7, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml\n", "cannot read the recipe"),
        ("extends: top.yaml\n", "go round in a circle"),
        ("extends: 3\n", "extends is 3"),
        ("extends: below.yaml\n", "unknown key 'rewrd' in"),
    ],
)
def test_a_recipe_that_cannot_extend_says_why(tmp_path, default, text, message):
    """Failure: a traceback, an endless loop, or a misspelt key below that nobody hears of."""
    (tmp_path / "below.yaml").write_text("rewrd: gain\n")
    (tmp_path / "top.yaml").write_text(text)
    assert message in error([str(tmp_path / "top.yaml")], default)
