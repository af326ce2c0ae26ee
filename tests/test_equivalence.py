"""Which rewards GRPO cannot tell apart: what is said of the formulas, against TRL's own lines and a run of its trainer.

A failure means that an ablation is announced as two experiments where it is one, or the other way round.
"""

import inspect
import itertools
import math
import random
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import byte_level_tokenizer, random_model
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanstd

from context_rl.rewards import ARMS, Option, Reward, RewardError, RewardInputs
from context_rl.rewards.advantages import SCALES
from context_rl.rewards.equivalence import (
    EPSILON,
    KINDS,
    by_argument,
    compare_arms,
    explain,
    on_data,
    outweighing,
    vanishing_parts,
)
from context_rl.rewards.equivalence.argument import FORMS

SIZE = 8


def sampled(seed: int, questions: int = 12, spread: float = 0.8, unscored: float = 0.05) -> list[RewardInputs | None]:
    """Groups of `SIZE` traces with all that any arm asks for: every question has its T, baseline and options.

    No trace is so bad that a perplexity is cut.
    """
    rng = random.Random(seed)
    rows: list[RewardInputs | None] = []
    for question in range(questions):
        base = tuple(min(-0.01, rng.gauss(-1.2, 0.4)) for _ in range(1 + question % 4))
        gold = rng.randrange(10, 99)

        def after(shift: float, base: tuple[float, ...] = base) -> tuple[float, ...]:
            return tuple(min(-0.001, b + shift + rng.gauss(0, spread / 4)) for b in base)

        for _ in range(SIZE):
            shift = max(-3.0, rng.gauss(0.3, spread))
            given = after(shift)
            options = [Option(-rng.uniform(0.5, 6), 3 + place) for place in range(4)]
            options[question % 4] = Option(math.fsum(given), 3 + question % 4)
            row = RewardInputs(
                token_logprobs=given,
                baseline_logprobs=base,
                correct=rng.random() < math.exp(math.fsum(given)),
                answered_number=rng.choice([None, gold, gold + 1, gold + 7]),
                gold_number=float(gold),
                masked_logprobs=after(shift - 0.2),
                options=tuple(options),
                label=question % 4,
                question="How many legs are there in total?",
                answer=str(gold),
                trace=rng.choice([f"so {gold} it is, which is clear", "we add them all", f"first 3, then 4: {gold}"]),
                trace_tokens=rng.randrange(2, 12),
                finished=rng.random() < 0.8,
                judged=len(rows) * 7 % 11 / 10,
            )
            rows.append(None if rng.random() < unscored else row)
    return rows


def rewards_of(spec, rows) -> list[float | None]:
    return Reward(spec)(rows, [place // SIZE for place in range(len(rows))])


def plain(logprobs, baseline=(-1.0,), **more) -> RewardInputs:
    return RewardInputs(tuple(logprobs), tuple(baseline), **{"correct": False} | more)


# --- TRL's own advantages -----------------------------------------------------------------------------------------


def trl_lines() -> str:
    """The installed GRPOTrainer's lines from rewards to advantages, to be run as they are."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    begin = source.index('        if self.multi_objective_aggregation == "sum_then_normalize":')
    last = "advantages = torch.nan_to_num(advantages, nan=0.0)\n"
    return textwrap.dedent(source[begin : source.index(last) + len(last)])


TRL_LINES = compile(trl_lines(), "grpo_trainer.py", "exec")


def trl_advantages(rewards: list[float | None], scale: str) -> np.ndarray:
    """[groups, SIZE], in double precision."""
    column = torch.tensor([[math.nan if r is None else r] for r in rewards], dtype=torch.float64)
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_weights=torch.ones(1, dtype=torch.float64),
    )
    names = {
        "self": trainer,
        "torch": torch,
        "nanstd": nanstd,
        "device": "cpu",
        "num_generations": SIZE,
        "rewards_per_func": column,
        "unscorable_mask": torch.isnan(column).all(dim=1),
    }
    exec(TRL_LINES, names)
    return names["advantages"].view(-1, SIZE).numpy()


def deviations(rewards: list[float | None], scale: str) -> np.ndarray:
    """What the advantages were divided by, less TRL's 1e-4; [groups, 1]."""
    table = torch.tensor([math.nan if r is None else r for r in rewards], dtype=torch.float64).view(-1, SIZE)
    return (nanstd(table, dim=1) if scale == "group" else nanstd(table).expand(len(table))).view(-1, 1).numpy()


def same_ranks(a: np.ndarray, b: np.ndarray) -> bool:
    return all((np.argsort(x) == np.argsort(y)).all() for x, y in zip(a, b, strict=True))


def holds(kind: str, one: list[float | None], other: list[float | None], scale: str) -> bool:
    """Whether TRL's advantages of two arms are related as `kind` says; nothing of the module under test is used."""
    a, b = trl_advantages(one, scale), trl_advantages(other, scale)
    largest = max(abs(a).max(), abs(b).max())
    if kind == "identical":
        return bool(abs(a - b).max() <= 1e-9 * largest)
    if kind == "epsilon":
        s, t = deviations(one, scale), deviations(other, scale)
        bound = abs(a) * (s + EPSILON) / s * EPSILON * abs(1 / (s + EPSILON) - 1 / (t + EPSILON))
        return bool((abs(a - b) <= bound + 1e-9 * largest).all())
    if kind == "factor":
        factor = (a * b).sum() / (a * a).sum()
        return bool(factor > 0 and abs(b - factor * a).max() <= 1e-9 * largest)
    scored = np.array([r is not None for r in one]).reshape(-1, SIZE)
    return kind == "order" and same_ranks(np.where(scored, a, np.inf), np.where(scored, b, np.inf))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_said_of_two_shipped_arms_is_true_of_trls_advantages(scale, seed):
    """Failure: a canonical form is wrong, and users are told that two arms are one experiment (or are not)."""
    rows = sampled(seed)
    rewards = {name: rewards_of(spec, rows) for name, spec in ARMS.items()}
    said = 0
    for one, other in itertools.combinations(ARMS, 2):
        verdict = by_argument(ARMS[one], ARMS[other], scale)
        if verdict:
            said += 1
            assert holds(verdict.kind, rewards[one], rewards[other], scale), (one, other, verdict)
    assert said == math.comb(8, 2)  # logprob_sum, its rising functions, and the three relative ones


@pytest.mark.parametrize("scale", SCALES)
def test_the_data_never_say_less_than_the_formulas_and_agree_with_an_independent_check(scale):
    """Failure: `on_data` is stricter or laxer than its words; every user with data then reads a contradiction."""
    rows = sampled(3)
    rewards = {name: rewards_of(spec, rows) for name, spec in ARMS.items()}
    for one, other in itertools.combinations(ARMS, 2):
        argument = by_argument(ARMS[one], ARMS[other], scale)
        data = on_data(ARMS[one], ARMS[other], rows, SIZE, scale)
        if argument:
            assert KINDS.index(data.kind) <= KINDS.index(argument.kind), (one, other, data)
        if data.kind not in ("order", "different"):
            assert holds(data.kind, rewards[one], rewards[other], scale), (one, other, data)
        gap = abs(trl_advantages(rewards[one], scale) - trl_advantages(rewards[other], scale)).max()
        # TRL's nanstd divides its counts, n / (n - 1), in single precision, whatever the rewards are in.
        assert data.largest == pytest.approx(gap, rel=1e-6, abs=1e-9)


def test_the_shipped_arms_that_are_one_experiment_are_these():
    """Failure: an equivalence was lost, or a new arm repeats an old one without anybody being told."""
    rows = sampled(4) + sampled(5, questions=1, spread=0.02)  # the last group is below spread_filter's bar
    close: dict[str, set[tuple[str, str, str]]] = {scale: set() for scale in SCALES}
    for one, other, scale, verdict in compare_arms(ARMS, SCALES, rows, SIZE):
        if verdict.kind != "order":
            close[scale].add((one, other, verdict.kind))
    at_first = ("threshold_linear", "threshold_cosine", "identical")
    shifted = [("logprob_mean", "gain"), ("probability", "probability_gain")]
    assert close["none"] == {*((*pair, "identical") for pair in shifted), at_first}
    assert close["batch"] == {*((*pair, "factor") for pair in shifted), at_first}
    assert close["group"] == close["none"] | {
        ("logprob_sum", "logprob_mean", "epsilon"),
        ("logprob_sum", "gain", "epsilon"),
        ("negative_perplexity", "perplexity_improvement", "epsilon"),
    }


def test_thresholds_that_part_later_are_called_equal_at_the_first_step_only():
    """Failure: a linear and a cosine schedule are reported as one experiment."""
    verdict = on_data(ARMS["threshold_linear"], ARMS["threshold_cosine"], sampled(0), SIZE, "group")
    assert verdict.kind == "identical"
    assert "as at the first step" in verdict.reason


# --- one true run -------------------------------------------------------------------------------------------------


def test_a_run_of_grpo_trainer_has_these_advantages(tmp_path):
    """Failure: TRL's trainer does something to the rewards that the lines above it do not show.

    The reward function pays the rewards of another arm at each step, under another scaling.
    """
    rows = sampled(5, questions=6)
    names = ["logprob_sum", "logprob_mean", "gain", "probability", "negative_perplexity", "perplexity_improvement"]
    plan = list(itertools.product(SCALES, names))
    found: dict[tuple[str, str], np.ndarray] = {}
    steps = iter(plan)

    def scripted(completions, trainer_state, **_):
        if trainer_state.global_step:
            keep(trainer_state.global_step)
        trainer.scale_rewards, name = next(steps)
        return rewards_of(ARMS[name], rows)

    def keep(step):
        found[plan[step - 1]] = np.array(list(trainer._logs["advantages"])[-len(rows) :]).reshape(-1, SIZE)

    tokenizer = byte_level_tokenizer(single_digits=False)
    trainer = GRPOTrainer(
        model=random_model("llama", tokenizer),
        reward_funcs=scripted,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            save_strategy="no",
            per_device_train_batch_size=len(rows),
            num_generations=SIZE,
            max_completion_length=2,
            max_steps=len(plan),
        ),
        train_dataset=Dataset.from_list([{"prompt": "How many legs?"}] * 6),
        processing_class=tokenizer,
    )
    trainer.train()
    keep(len(plan))
    assert len(found) == len(plan)
    assert sum(row is None for row in rows) > 0
    for (scale, name), advantages in found.items():
        # The trainer's rewards are in single precision: off by 6e-8 of their size, over deviations of 0.05 and more.
        expected = trl_advantages(rewards_of(ARMS[name], rows), scale)
        assert abs(advantages - expected).max() < 2e-5, (scale, name)
    for one, other in itertools.combinations(names, 2):
        for scale in SCALES:
            verdict, (a, b) = by_argument(ARMS[one], ARMS[other], scale), (found[scale, one], found[scale, other])
            if verdict.kind == "order":
                scored = np.array([row is not None for row in rows]).reshape(-1, SIZE)
                assert same_ranks(np.where(scored, a, np.inf), np.where(scored, b, np.inf)), (one, other, scale)
            elif verdict.kind == "factor":
                assert abs(b - (a * b).sum() / (a * a).sum() * a).max() < 2e-5
            else:
                assert abs(a - b).max() < (2e-5 if verdict.kind == "identical" else 2e-3), (one, other, scale)


# --- known facts --------------------------------------------------------------------------------------------------


def test_sum_mean_and_gain_are_one_experiment_under_group_scaling():
    """Failure: an "absolute against relative" ablation under TRL's default is sold as two experiments."""
    rows = sampled(6, spread=1.2)
    assert on_data("logprob_mean", "gain", rows, SIZE, "group").kind == "identical"
    for one, other in (("logprob_sum", "logprob_mean"), ("logprob_sum", "gain")):
        verdict = on_data(one, other, rows, SIZE, "group")
        assert verdict.kind == "epsilon"
        assert verdict.largest < 5e-4


def test_perplexity_improvement_is_negative_perplexity_under_group_scaling():
    """Failure: as above, for the relative reward of VR-CLI."""
    rng = random.Random(0)
    rows = [plain([-rng.uniform(0.5, 4.0)], [-1.5]) for _ in range(20 * SIZE)]
    verdict = on_data("negative_perplexity", "perplexity_improvement", rows, SIZE, "group")
    assert verdict.kind == "epsilon"
    assert verdict.largest < 1.5e-4


def test_an_improvement_over_a_hopeless_baseline_has_no_spread_left_for_the_epsilon():
    """Failure: "up to epsilon" is taken on trust where 1 - PPL / PPL0 is 1 for every trace, and teaches nothing."""
    rows = [plain([-0.2 * trace], [-14.0]) for trace in range(SIZE)]
    arms = {"a": "negative_perplexity", "b": "perplexity_improvement"}
    [(*_, verdict)] = compare_arms(arms, ["group"], rows, SIZE)
    assert verdict.kind in ("factor", "order")
    assert verdict.largest > 1
    assert "spreads are so small that TRL's 1e-4 counts" in verdict.reason
    assert "contradict" in verdict.reason


def test_a_hybrid_of_absolute_and_relative_differs_from_its_parts():
    """Failure: the recommended way to make the arms differ does not."""
    rows = sampled(7)
    for part in ("probability", "perplexity_improvement"):
        for scale in SCALES:
            assert by_argument(ARMS["hybrid_absolute_relative"], part, scale) is None
            verdict = on_data(ARMS["hybrid_absolute_relative"], part, rows, SIZE, scale)
            assert verdict.kind == "different"
            assert verdict.largest > 0.1


def test_without_scaling_answers_of_different_lengths_part_sum_and_mean():
    """Failure: T is forgotten. With one length for all, it is one factor, and the data say so."""
    mixed = sampled(8)
    assert on_data("logprob_mean", "gain", mixed, SIZE, "none").kind == "identical"
    assert on_data("logprob_sum", "logprob_mean", mixed, SIZE, "none").kind == "order"
    one_length = [row for row in sampled(8, unscored=0) if len(row.token_logprobs) == 3]
    verdict = on_data("logprob_sum", "logprob_mean", one_length, SIZE, "none")
    assert verdict.kind == "factor"
    assert "best common factor 0.3333" in verdict.reason


def test_batch_scaling_leaves_one_factor_between_mean_and_gain():
    """Failure: batch scaling is offered as the setting that tells them apart; to Adam it hardly does."""
    verdict = on_data("logprob_mean", "gain", sampled(9), SIZE, "batch")
    assert verdict.kind == by_argument("logprob_mean", "gain", "batch").kind == "factor"
    assert verdict.largest > 0.01


LOW_CLIP = {"clip": {"of": "gain", "low": -0.5}}
HALF = {"hybrid": {"logprob_mean": 0.3, "gain": 0.7}}


@pytest.mark.parametrize(
    ("one", "other", "group", "batch", "none"),
    [
        ("binary", "binary", "identical", "identical", "identical"),
        ("threshold", {"threshold": {"tau": 0.5}}, "identical", "identical", "identical"),
        ("threshold", {"threshold": {"tau": 0.4}}, None, None, None),
        (HALF, "gain", "identical", "factor", "identical"),
        (HALF, {"hybrid": {"logprob_mean": 0.3, "gain": 0.7, "clip": [0, 1]}}, None, None, None),
        (HALF, "logprob_sum", "epsilon", "order", "order"),
        ({"hybrid": {"gain": 1, "logprob_sum": 1}}, "logprob_mean", "epsilon", "order", "order"),
        ({"hybrid": {"gain": 2}}, "gain", "epsilon", "epsilon", "factor"),
        ({"hybrid": {"gain": -1}}, "gain", None, None, None),
        ({"hybrid": {"gain": -1}}, {"hybrid": {"probability": -1}}, "order", "order", "order"),
        ({"hybrid": {"leak": -0.5}}, {"hybrid": {"leak": -1}}, "epsilon", "epsilon", "factor"),
        (
            {"hybrid": {"binary": 1, "gain": 2}},
            {"hybrid": {"binary": 2, "logprob_mean": 4}},
            "epsilon",
            "factor",
            "factor",
        ),
        ({"hybrid": {"binary": 1, "gain": 2}}, {"hybrid": {"binary": 2, "logprob_mean": 1}}, None, None, None),
        ({"hybrid": {"probability": 1, "gain": 0}}, "probability", "identical", "identical", "identical"),
        ({"hybrid": {"probability": 0.3, "perplexity_improvement": 0.7}}, "gain", "order", "order", "order"),
        ({"hybrid": {"gain": 1, "logprob_mean": -1}}, {"hybrid": {"probability": 0}}, *["identical"] * 3),
        ({"clip": {"of": "probability", "low": 0, "high": 1}}, "probability_gain", "identical", "factor", "identical"),
        (LOW_CLIP, "gain", None, None, None),
        ("masked", {"masked": {"of": "probability_gain"}}, "identical", "factor", "identical"),
        ({"masked": {"of": "gain"}}, {"masked": {"of": "logprob_sum"}}, "epsilon", "order", "order"),
        ("masked", "probability", None, None, None),
        ({"logprob_mean_min": {"weight": 0}}, "gain", "identical", "factor", "identical"),
        ("logprob_mean_min", {"logprob_mean_min": {"weight": 0.5}}, None, None, None),
        ("option_margin", {"option_margin": {"per": "character"}}, None, None, None),
        ("mean_probability", "probability", None, None, None),
    ],
)
def test_combinations_are_seen_through_and_nothing_is_claimed_beyond(one, other, group, batch, none):
    """Failure: a hybrid of equivalents is taken for something new, or a clip, a sign or a gate for nothing."""
    rows = sampled(10)
    for scale, kind in zip(SCALES, (group, batch, none), strict=True):
        verdicts = [by_argument(one, other, scale), by_argument(other, one, scale)]
        assert [v and v.kind for v in verdicts] == [kind, kind], scale
        constant = all(r is None or abs(r) < 1e-9 for r in rewards_of(other, rows))
        if kind and not constant:
            assert holds(kind, rewards_of(one, rows), rewards_of(other, rows), scale), scale


def test_every_pair_of_a_wrong_spec_or_scale_is_refused():
    """Failure: a misspelt arm is silently unlike all others."""
    with pytest.raises(RewardError, match="no reward is called 'gian'"):
        by_argument("gian", "gain", "group")
    with pytest.raises(RewardError, match="no reward is called 'gian'"):
        compare_arms({"a": "gian", "b": "gain"}, ["group"], sampled(0), SIZE)
    with pytest.raises(ValueError, match="can be group, batch, none"):
        by_argument("gain", "gain", "groups")


# --- data against argument ----------------------------------------------------------------------------------------


def test_a_wrong_argument_is_contradicted_by_the_data(monkeypatch):
    """Failure: the check against data would let a wrong canonical form pass."""
    monkeypatch.setitem(FORMS, "probability", FORMS["logprob_sum"])
    assert by_argument("probability", "logprob_sum", "group").kind == "identical"
    assert not holds("identical", *(rewards_of(name, sampled(0)) for name in ("probability", "logprob_sum")), "group")
    [(*_, verdict)] = compare_arms({"p": "probability", "L": "logprob_sum"}, ["group"], sampled(0), SIZE)
    assert verdict.kind == "order"
    assert "contradict" in verdict.reason
    assert "the formulas say identical" in verdict.reason
    monkeypatch.setitem(FORMS, "probability", {("1", "-PPL"): -1.0, ("1", "L"): 1.0})
    assert by_argument("probability", "logprob_sum", "group") is None


@pytest.mark.parametrize("scale", SCALES)
def test_a_cut_perplexity_is_named_by_the_argument_and_found_by_the_data(scale):
    """Failure: where a trace ruins a certain answer, the arms differ, and the user is told that they do not."""
    rows = [plain([-value], [-0.1]) for value in (0.1, 0.2, 1.0, 2.0, 5.5, 6.0, 9.0, 12.0)]
    argument = by_argument("negative_perplexity", "perplexity_improvement", scale)
    assert "are cut" in argument.reason
    arms = {"a": "negative_perplexity", "b": "perplexity_improvement"}
    [(*_, verdict)] = compare_arms(arms, [scale], rows, SIZE)
    assert verdict.kind == "different"
    assert "contradict" in verdict.reason


def test_a_clip_differs_only_where_it_clips():
    """Failure: a clip is called the same although it bites on these data, or different although it never does."""
    rows = sampled(0)
    assert on_data(LOW_CLIP, "gain", rows, SIZE, "group").kind == "different"
    mild = [row if row is None or row.logprob > row.baseline_logprob else None for row in rows]
    assert on_data(LOW_CLIP, "gain", mild, SIZE, "group").kind == "identical"


def test_a_probability_that_underflows_no_longer_ranks():
    """Failure: the same ranking is claimed where long answers have made every probability 0."""
    rows = [plain([-400.0 - trace] * 2) for trace in range(SIZE)]
    assert by_argument("probability", "logprob_sum", "group").kind == "order"
    assert on_data("probability", "logprob_sum", rows, SIZE, "group").kind == "different"


def test_the_opposite_reward_is_different():
    """Failure: a negative common factor passes for a learning rate."""
    for scale in SCALES:
        verdict = on_data({"hybrid": {"gain": -1}}, "gain", sampled(0), SIZE, scale)
        assert verdict.kind == "different"
        assert "correlation -1.0000" in verdict.reason


def test_a_slightly_different_ranking_is_a_difference():
    """Failure: `logprob_mean_min`, whose advantages are a hundredth off, is called a mere respacing.

    Means -1 and -0.9975, with a hundredth of the worst token -1.01 and -1.01745.
    """
    rows = [plain(logprobs) for logprobs in [(-1.0, -1.0), (0.0, -1.995), *[(-0.5 * n, -0.5 * n) for n in range(3, 9)]]]
    verdict = on_data("logprob_mean_min", "logprob_mean", rows, SIZE, "group")
    assert verdict.kind == "different"
    assert verdict.largest < 0.02


def test_rounding_large_rewards_is_no_difference():
    """Failure: log-probs of thousands of nats make two identical arms differ in their last bits."""
    rows = [plain([-1e4 - 1e-6 * trace], [-9999.7]) for trace in range(4 * SIZE)]
    verdict = on_data("logprob_mean", "gain", rows, SIZE, "group")
    assert verdict.largest > 1e-9 * 0.02  # of advantages up to 0.02
    assert verdict.kind == "identical"


def test_the_share_of_groups_whose_signs_differ_is_counted():
    """Failure: traces that one arm encourages and the other discourages are not reported, or those at 0 are.

    L: mean -2.25, so -2 is above it; exp L: mean 0.19, so exp(-2) is below. Half of the groups are like that.
    """
    mixed, alike = [-0.5, -2.0, -2.0, -4.5], [-1.0, -1.0, -2.0, -2.0]
    rows = [plain([value]) for value in [*mixed * 2, *alike * 2, *alike * 2, *mixed * 2, *[-1.0] * 2 * SIZE]]
    verdict = on_data("logprob_sum", "probability", rows, SIZE, "group")
    assert "signs differ in 33% of groups" in verdict.reason


def test_unscored_traces_and_arms_that_do_not_fit_are_left_out():
    """Failure: a None becomes a reward, or one numeric arm stops the comparison of all others on textual answers."""
    rows = [plain([-0.1 * trace], [-1.0]) if trace % 3 else None for trace in range(2 * SIZE)] + [None] * SIZE
    found = {(one, other): v for one, other, _, v in compare_arms(ARMS, ["group"], rows, SIZE)}
    assert found["logprob_mean", "gain"].largest is not None
    assert not any("soft_numeric" in pair or "option_margin" in pair for pair in found)
    with pytest.raises(RewardError, match="numbers"):
        on_data("soft_numeric", "gain", rows, SIZE, "group")


def test_without_data_the_formulas_speak_and_no_difference_is_made_up():
    """Failure: `largest` is a number although nothing was sampled."""
    found = compare_arms(ARMS, SCALES)
    assert len(found) == 3 * math.comb(8, 2)
    assert all(v.largest is None and v.kind in KINDS for *_, v in found)


def test_the_table_has_a_row_for_a_class_of_arms():
    """Failure: the reader gets three hundred lines, or a pair is missing from them."""
    arms = {name: ARMS[name] for name in ("logprob_mean", "gain", "probability", "binary")}
    without = explain(compare_arms(arms, ["group"])).splitlines()
    assert without[0] == "| scale | rewards | to GRPO | largest difference | why |"
    assert [line.split(" | ")[1:4] for line in without[2:]] == [
        ["gain, logprob_mean", "identical", ""],
        ["gain, logprob_mean, probability", "order", ""],
    ]
    with_data = explain(compare_arms(arms, SCALES, sampled(0), SIZE)).splitlines()
    assert len(with_data) == 2 + 3 * 2
    assert float(with_data[3].split("|")[4]) > 0.1
    assert explain([]).count("\n") == 2


# --- one reward by itself -----------------------------------------------------------------------------------------

HEALTHY = {"hybrid": {"probability": 0.5, "binary": 0.5}}


def warned(spec, rows, scale="group") -> list[str]:
    return vanishing_parts(Reward(spec), rows, SIZE, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "spec", ["gain", HEALTHY, ARMS["hybrid_absolute_relative"], ARMS["guarded"], ARMS["threshold_quantile"], "binary"]
)
def test_healthy_rewards_are_not_warned_of(spec, scale):
    """Failure: every run begins with a warning, and none is read."""
    assert warned(spec, sampled(0), scale) == []


@pytest.mark.parametrize("scale", SCALES)
def test_a_probability_beside_a_log_prob_vanishes_on_long_answers(scale):
    """Failure: a hybrid trains on one of its terms, and the run says it trains on two."""
    rows = [plain([-1.0 - 0.1 * (trace % SIZE)] * 20, [-2.0] * 20) for trace in range(4 * SIZE)]
    [warning] = warned({"hybrid": {"logprob_mean": 0.5, "probability": 0.5}}, rows, scale)
    assert warning.startswith("probability hardly counts")


def test_a_constant_term_is_named():
    """Failure: a gate that everybody passes is taken for part of the reward."""
    rows = [plain([-0.1 * (1 + trace % SIZE)], trace="some words", finished=True) for trace in range(4 * SIZE)]
    [warning] = warned({"hybrid": {"probability": 0.5, "well_formed": 0.5}}, rows)
    assert warning.startswith("well_formed hardly counts: its spread within the groups is 0 of")


@pytest.mark.parametrize("scale", SCALES)
def test_a_term_in_step_with_another_doubles_it(scale):
    """Failure: {gain, logprob_mean} is announced as a mix of relative and absolute."""
    warnings = warned({"hybrid": {"gain": 0.5, "logprob_mean": 0.5, "binary": 0.0}}, sampled(0), scale)
    assert [w.split(":")[0] for w in warnings] == [
        "gain moves in step with the other terms",
        "logprob_mean moves in step with the other terms",
        "binary hardly counts",
    ]


def test_a_term_that_turns_the_others_round_is_no_doubling():
    """Failure: a term that outweighs its opposite, and decides what is rewarded, is called superfluous."""
    [warning] = warned({"hybrid": {"gain": 1.0, "logprob_mean": -3.0}}, sampled(0))
    assert warning.startswith("gain moves in step")


def test_a_clip_is_part_of_what_is_left_when_a_term_is_taken_out():
    """Failure: the clip is dropped with the term, and a clipped hybrid is compared with an unclipped one."""
    spec = {"hybrid": {"gain": 1.0, "leak": -5.0, "clip": [0, 1]}}
    assert warned(spec, sampled(0)) == []
    [warning] = warned({"hybrid": {"gain": 1.0, "repetition": 1e-6, "clip": [0, 0.2]}}, sampled(0))
    assert warning.startswith("repetition hardly counts")
    clipped_away = [plain([-0.1 * (1 + trace % SIZE)], [-3.0]) for trace in range(2 * SIZE)]
    [warning] = warned(spec, clipped_away)
    assert "no spread in 100%" in warning


@pytest.mark.parametrize(("flat", "warns"), [(3, True), (2, False)])
def test_groups_without_spread_are_counted(flat, warns):
    """Failure: a binary reward on questions that are always right or always wrong looks like any other run."""
    rows = [
        plain([-1.0 - 0.1 * place], correct=group >= flat and place < 3) for group in range(4) for place in range(SIZE)
    ]
    warnings = warned("binary", rows)
    assert len(warnings) == warns
    if warns:
        assert "binary has no spread in 75% of the groups" in warnings[0]


def test_probabilities_of_long_answers_have_no_spread():
    """Failure: 1e-9 beside 2e-9 counts as spread, though TRL's 1e-4 swallows it."""
    rows = [plain([-20.0 - trace % SIZE]) for trace in range(4 * SIZE)]
    assert any("no spread in 100%" in warning for warning in warned("probability", rows))
    assert warned("logprob_sum", rows) == []


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        ("threshold", 0.1, "threshold of perplexity_improvement pays everyone: 100% of the traces"),
        ("threshold", 2.9, "threshold of perplexity_improvement pays nobody: 100% of the traces"),
        ("sigmoid_threshold", 3.9, "sigmoid_threshold of perplexity_improvement pays nobody: 100% of the traces"),
        ("tiers", 0.1, "tiers of perplexity_improvement pays everyone: 100% of the traces"),
        ({"gated": {"of": "probability", "gate": "threshold"}}, 2.9, "threshold of perplexity_improvement pays nobody"),
        ({"hybrid": {"probability": 1, "threshold": {"weight": 1, "tau": -1}}}, 2.9, "threshold of perplexity_improve"),
    ],
)
def test_a_threshold_that_all_or_none_reach_is_named_wherever_it_stands(spec, value, expected):
    """Failure: a threshold set for another task pays a constant, silently."""
    rows = [plain([-value - 0.005 * (trace % SIZE)], [-3.0]) for trace in range(4 * SIZE)]
    assert any(warning.startswith(expected) for warning in warned(spec, rows))


def test_vr_clis_tiers_are_one_threshold_on_short_answers():
    """Failure: three tiers set for chapters of a novel are taken for graded pay where perplexity moves by tens of %."""
    rows = [plain([-3.0 + (1 if trace % 2 else -1) * (0.5 + 0.1 * (trace % SIZE))], [-3.0]) for trace in range(32)]
    [warning] = warned("tiers", rows)
    assert "pays all or nothing" in warning
    graded = [plain([-3.0 + 0.004 * (trace % SIZE - 1)], [-3.0]) for trace in range(32)]
    assert warned("tiers", graded) == []


def test_looking_at_a_reward_leaves_its_memory_alone():
    """Failure: a warning at the first batch fills a running quantile's window twice."""
    reward = Reward({"hybrid": {"threshold": {"weight": 1, "of": "gain", "tau": {"quantile": 0.7}}, "gain": 1}})
    vanishing_parts(reward, sampled(0), SIZE)
    assert reward.state == [[]]


def test_a_batch_without_any_score_says_nothing():
    """Failure: the first batch's warning stops a run whose server was still starting."""
    assert warned(HEALTHY, [None] * SIZE) == []
    assert warned(HEALTHY, []) == []


# --- what outweighs the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "scale", "warned"),
    [
        ("perplexity_improvement", "none", True),
        ("negative_perplexity", "batch", True),
        ("gain", "none", True),
        ("perplexity_improvement", "group", False),
        ("probability", "none", False),
        ({"clip": {"of": "gain", "low": -1, "high": 1}}, "none", False),
        ({"hybrid": {"probability": 1, "gain": 0.1}}, "batch", True),
        ("math.prod", "none", False),  # a function of the user's own has no bounds to go by
    ],
)
def test_a_reward_of_wide_range_needs_group_scaling(spec, scale, warned):
    """Failure: a run that will learn nothing starts without a word, or every run is warned of."""
    warnings = outweighing(Reward(spec), scale)
    assert bool(warnings) == warned
    if warned:
        assert f"--scale_rewards {scale}" in warnings[0]
