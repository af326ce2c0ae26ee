"""The local scorer against the plainest computation there is: one row, no padding, no cache, log-softmax of all logits.

A failure means that rewards are log-probs of something else than the answer after its prefix.
"""

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
from transformers.cache_utils import DynamicLayer

from scorer import open_scorer
from scorer.local import SHORTEST_ROOT, LocalScorer, batches, common_beginning, forest, to_score, weights_digest
from scorer.types import Greedy, Item, Score, ScorerError, Unscored

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def scorer(request: pytest.FixtureRequest, model_folders) -> LocalScorer:
    return LocalScorer(str(model_folders[request.param]), device="cpu")


@pytest.fixture(scope="module")
def llama(model_folders) -> LocalScorer:
    return LocalScorer(str(model_folders["llama"]), device="cpu")


def random_items(scorer: LocalScorer, n: int, seed: int = 0, longest: int = 100) -> list[Item]:
    """Prefixes of 1 to `longest` tokens and answers of 1 to 12, of any ids."""
    rng = random.Random(seed)
    vocabulary = len(scorer.tokenizer)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(length))

    return [Item(ids(rng.choice([1, 2, 5, 20, longest])), ids(rng.randint(1, 12))) for _ in range(n)]


def text_items(scorer: LocalScorer, n: int) -> list[Item]:
    """Prefixes and answers as the tokenizer makes them."""
    encode = scorer.tokenizer
    texts = [f"Question: how many legs are {i} birds?" + f"\nReasoning: {i} cats." * (i % 4) for i in range(n)]
    answers = [encode(f"Answer: {7 * i}\n", add_special_tokens=False)["input_ids"] for i in range(n)]
    prefixes = [encode(text + "\nAnswer:")["input_ids"] for text in texts]
    return [Item(tuple(p), tuple(a)) for p, a in zip(prefixes, answers, strict=True)]


@torch.no_grad()
def plain_logprobs(scorer: LocalScorer, item: Item) -> list[float]:
    """The reference: a single forward pass over the whole row."""
    ids = torch.tensor([[*item.prefix_ids, *item.answer_ids]])
    logprobs = scorer.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    start = len(item.prefix_ids)
    return [logprobs[position - 1, ids[0, position]].item() for position in range(start, ids.shape[1])]


def assert_equal_scores(left: list, right: list, tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        assert isinstance(a, Score)
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=tolerance, rel=0)
        assert a.greedy_text == b.greedy_text


# --- log-probs ----------------------------------------------------------------------------------------------------


def test_every_token_agrees_with_a_plain_forward_pass(scorer):
    """Failure: an off-by-one of the span, wrong positions under left padding, a mask that lets padding be read."""
    items = random_items(scorer, 60) + text_items(scorer, 20)
    scores = scorer.score(items)
    for item, score in zip(items, scores, strict=True):
        assert isinstance(score, Score)
        assert score.greedy_text is None
        assert score.token_logprobs == pytest.approx(plain_logprobs(scorer, item), abs=TOLERANCE, rel=0)


def test_the_reference_itself_depends_on_order_and_on_every_prefix_token(scorer):
    """Failure: the models are too flat for the tests above to notice a wrong position or a masked token."""
    item = random_items(scorer, 1, seed=3, longest=20)[0]
    item = Item(tuple(range(30, 50)), item.answer_ids)
    here = plain_logprobs(scorer, item)
    swapped = Item(
        (*item.prefix_ids[:2], item.prefix_ids[3], item.prefix_ids[2], *item.prefix_ids[4:]), item.answer_ids
    )
    for other in (swapped, Item(item.prefix_ids[1:], item.answer_ids)):
        assert max(abs(a - b) for a, b in zip(here, plain_logprobs(scorer, other), strict=True)) > 100 * TOLERANCE


def test_a_token_alone_has_the_log_prob_that_softmax_gives_it(llama):
    """Failure: log-probs in another base than e, or of a distribution that does not sum to one."""
    prefix = (40, 41, 42)
    scores = llama.score([Item(prefix, (token,)) for token in range(len(llama.tokenizer))])
    total = sum(torch.tensor([score.token_logprobs[0] for score in scores], dtype=torch.float64).exp())
    assert total == pytest.approx(1, abs=1e-5)


def test_results_come_in_the_order_of_the_items(scorer):
    """Failure: the sort by length is not undone, and traces are paid for one another's answers."""
    items = random_items(scorer, 30, seed=1)
    shuffled = items.copy()
    random.Random(0).shuffle(shuffled)
    by_item = dict(zip(items, scorer.score(items), strict=True))
    assert_equal_scores(scorer.score(shuffled), [by_item[item] for item in shuffled], TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 130, 700])
def test_results_do_not_depend_on_the_batch(scorer, batch_tokens, monkeypatch):
    """Failure: a row is influenced by the rows beside it, so the knob for memory changes the reward."""
    items = random_items(scorer, 25, seed=2)
    whole = scorer.score(items)
    monkeypatch.setattr(scorer, "batch_tokens", batch_tokens)
    assert_equal_scores(scorer.score(items), whole, TOLERANCE)


def test_greedy_answers_do_not_depend_on_the_batch(scorer, monkeypatch, request):
    """Failure: what is carried along after a row's end leaks into its answer."""
    items = random_items(scorer, 25, seed=2)
    greedy = Greedy(6)
    whole = [score.greedy_text for score in scorer.score(items, greedy)]
    for batch_tokens in (1, 130, 700):
        monkeypatch.setattr(scorer, "batch_tokens", batch_tokens)
        assert [score.greedy_text for score in scorer.score(items, greedy)] == whole


def test_asking_for_the_greedy_answer_changes_no_log_prob(scorer):
    """Failure: the cache that both share is not cropped, or is cropped too far."""
    items = random_items(scorer, 25, seed=4)
    plain = [score.token_logprobs for score in scorer.score(items)]
    for score, expected in zip(scorer.score(items, Greedy(8)), plain, strict=True):
        assert score.token_logprobs == pytest.approx(expected, abs=1e-6, rel=0)


def test_each_distinct_item_is_computed_once(llama):
    """Failure: the equal traces of a collapsed policy cost a forward pass each."""
    items = random_items(llama, 9, seed=5)
    assert len(set(items)) == 9
    rows = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[0]) if "logits_to_keep" in kwargs else None,
        with_kwargs=True,
    )
    try:
        scores = llama.score(items * 3 + items[:4])
    finally:
        hook.remove()
    assert sum(rows) == 9
    assert scores == scores[:9] * 3 + scores[:4]


def test_no_items_are_no_work(llama):
    assert llama.score([]) == []


@pytest.fixture(scope="module")
def sliding(tmp_path_factory) -> LocalScorer:
    folder = tmp_path_factory.mktemp("mistral")
    tiny.save_model(folder, "mistral")
    return LocalScorer(str(folder), device="cpu")


def test_a_base_model_with_a_sliding_window_scores_as_it_would_in_one_pass(sliding):
    """Failure: the answer's tokens see other prefix tokens than the window leaves them."""
    items = random_items(sliding, 40)
    for item, score in zip(items, sliding.score(items), strict=True):
        assert score.token_logprobs == pytest.approx(plain_logprobs(sliding, item), abs=TOLERANCE, rel=0)


# --- shared work --------------------------------------------------------------------------------------------------


def grouped_items(scorer: LocalScorer, seed: int = 0) -> list[Item]:
    """Questions with traces of other lengths, with endings of 1 to 20 tokens; two questions begin alike; duplicates."""
    rng = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(len(scorer.tokenizer)) for _ in range(length))

    preamble = ids(35)
    questions = [preamble + ids(5), preamble + ids(9), ids(50), ids(12)]
    items = []
    for number, question in enumerate(questions):
        answers = [ids(1), ids(20), ids(7)][: 1 + number % 3]
        traces = [ids(length) for length in (1, 30, 2, 60, 17)] + [()] * (number == 2)
        items += [Item(question + trace, answer, group=f"q{number}") for trace in traces for answer in answers]
    items += [*items[3:6], Item(items[0].prefix_ids, items[0].answer_ids, group="other")]
    rng.shuffle(items)
    return items


@contextmanager
def forward_tokens(scorer: LocalScorer) -> Iterator[list[int]]:
    """Tokens of each forward pass, padding left out."""
    counts: list[int] = []

    def count(_, args, kwargs) -> None:
        width = kwargs["input_ids"].shape[1]
        counts.append(int(kwargs["attention_mask"][:, -width:].sum()))

    hook = scorer.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


@pytest.mark.parametrize("greedy", [None, Greedy(5)])
@pytest.mark.parametrize("batch_tokens", [1, 200, 2048])
def test_items_that_share_their_beginnings_score_as_they_do_alone(scorer, greedy, batch_tokens, monkeypatch):
    """Failure: a trace continues another question's cache, or the padding behind a question is read or counted."""
    items = grouped_items(scorer)
    alone = [scorer.score([item], greedy)[0] for item in items]
    monkeypatch.setattr(scorer, "batch_tokens", batch_tokens)
    assert_equal_scores(scorer.score(items, greedy), alone, TOLERANCE)
    for item, score in zip(items, alone, strict=True):
        assert score.token_logprobs == pytest.approx(plain_logprobs(scorer, item), abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("greedy", [None, Greedy(5)])
def test_sharing_under_a_sliding_window_scores_as_one_by_one(sliding, greedy):
    """Failure: padding between question and trace moves the window, or answers change the window of one another."""
    items = grouped_items(sliding)
    assert sliding._can_share == "prefixes"
    together = sliding.score(items, greedy)
    assert_equal_scores(together, [sliding.score([item], greedy)[0] for item in items], TOLERANCE)
    for item, score in zip(items, together, strict=True):
        assert score.token_logprobs == pytest.approx(plain_logprobs(sliding, item), abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("greedy", [None, Greedy(5)])
def test_a_cache_that_cannot_be_shared_is_not(llama, greedy, monkeypatch):
    """Failure: a base model with recurrent layers dies at the first question with two endings."""
    items = grouped_items(llama)
    shared = llama.score(items, greedy)
    monkeypatch.setattr(llama, "_can_share", "nothing")
    monkeypatch.delattr(DynamicLayer, "batch_select_indices")  # recurrent layers have none
    llama.take_usage()
    assert_equal_scores(llama.score(items, greedy), shared, TOLERANCE)
    assert llama.take_usage().cached_tokens == 0


def test_each_shared_token_is_read_once(llama):
    """Failure: the sharing is lost, and scoring is slower without any other sign; or its usage is made up."""
    question, traces = tuple(range(20, 60)), [(100, i) for i in range(30, 34)]
    answers = [(1, 2, 3), (4,), (5, 6)]
    items = [Item(question + trace, answer, group="q") for trace in traces for answer in answers]
    llama.score(items[:1])  # what the cache allows is found out in a pass of its own
    llama.take_usage()
    with forward_tokens(llama) as counts:
        llama.score(items + items[:3])
    # The traces have one more token in common, which belongs to the root.
    assert counts == [41, 4 * 1, 4 * (2 + 0 + 1)]
    usage = llama.take_usage()
    assert (usage.items, usage.distinct) == (15, 12)
    assert usage.prompt_tokens == 12 * 42 + 4 * 6
    assert usage.cached_tokens == 12 * 42 - (41 + 4)


def test_the_greedy_answer_is_computed_once_a_prefix(llama):
    """Failure: the four endings of a question cost four equal greedy answers."""
    items = [Item((30, 31, 32), (i, i)) for i in range(5)]
    rows = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        llama.score(items, Greedy(2, stop="\x00"))
    finally:
        hook.remove()
    assert rows[:2] == [1, 5]
    assert set(rows[2:]) <= {1}


def test_logits_exist_only_where_they_are_needed(llama):
    """Failure: padding beside a long answer, or a whole prefix, goes through a head of 150,000 words."""
    items = [Item((30 + i, 31, 32, 33), tuple(range(5, 5 + length))) for i, length in enumerate((1, 20, 3))]
    positions = []
    head = llama.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: positions.append(output[..., 0].numel()))
    try:
        llama.score(items)
    finally:
        hook.remove()
    assert positions == [3, 19 + 2]
    assert not head._forward_pre_hooks


def test_the_forest_holds_every_item_once_behind_a_root_that_it_begins_with(llama):
    """Failure: an item is lost or scored behind another question; a group with too little in common gets a root."""
    items = list(dict.fromkeys(grouped_items(llama)))
    trees = list(forest(items, 120, "roots"))
    assert sorted(map(hash, items)) == sorted(hash(item) for _, tree in trees for item in tree)
    rooted = [(roots[at], item) for roots, tree in trees if roots for item, at in tree.items()]
    assert all(item.prefix_ids[: len(root)] == root and len(item.prefix_ids) > len(root) for root, item in rooted)
    assert {item.group for _, item in rooted} >= {"q0", "q1", "q2"}
    assert "q3" not in {item.group for _, item in rooted}
    assert min(len(root) for root, _ in rooted) >= SHORTEST_ROOT
    assert all(len(roots) * max(map(len, roots)) <= 120 for roots, _ in trees if len(roots) > 1)
    assert len(trees) > 2


@pytest.mark.parametrize(
    ("prefixes", "common"),
    [
        ([(1, 2, 3), (1, 2, 4), (1, 2, 3, 5)], (1, 2)),
        ([(1, 2), (1, 2, 3)], (1,)),
        ([(1,), (1, 2)], ()),
        ([(1, 2), (2, 2)], ()),
    ],
)
def test_a_common_beginning_leaves_every_prefix_a_token(prefixes, common):
    """Failure: a prefix that is the beginning of another one has no position left that predicts its answer."""
    assert common_beginning(set(prefixes)) == common


# --- greedy answers -----------------------------------------------------------------------------------------------


def generated_text(scorer: LocalScorer, prefix: tuple[int, ...], greedy: Greedy) -> tuple[str, bool]:
    """transformers' own greedy answer before the stop string, and whether something ended it before its limit."""
    ids = scorer.model.generate(
        torch.tensor([prefix]),
        attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
        do_sample=False,
        max_new_tokens=greedy.max_new_tokens,
        stop_strings=[greedy.stop],
        tokenizer=scorer.tokenizer,
    )[0, len(prefix) :]
    text = scorer.tokenizer.decode(ids, skip_special_tokens=True)
    return text.split(greedy.stop)[0], len(ids) < greedy.max_new_tokens


def test_greedy_answers_are_those_of_transformers_generate(scorer, request):
    """Failure: `accuracy` and the binary reward are about another answer than the base model's own."""
    items = random_items(scorer, 25, seed=6) + text_items(scorer, 15)
    greedy = Greedy(16)
    expected = [generated_text(scorer, item.prefix_ids, greedy) for item in items]
    ended = [early for _, early in expected]
    assert any(ended), "no answer ends early: the test would not see a row that runs on"
    assert not all(ended), "every answer ends early: the test would not see the limit"
    assert [score.greedy_text for score in scorer.score(items, greedy)] == [text for text, _ in expected]


def test_a_base_model_with_a_sliding_window_gives_greedy_answers_too(sliding):
    """Failure: the run dies at the first prefix that is longer than the window."""
    items = random_items(sliding, 20)
    expected = [generated_text(sliding, item.prefix_ids, Greedy(8))[0] for item in items]
    assert [score.greedy_text for score in sliding.score(items, Greedy(8))] == expected


def test_a_stop_string_of_two_tokens_ends_the_text_too(llama):
    """Failure: the answer carries on behind a stop string that no single token contains."""
    items = random_items(llama, 40, seed=7)
    texts = [score.greedy_text for score in llama.score(items, Greedy(16, stop="\x00"))]
    stop = next(text[2:6] for text in texts if len(text) > 10)
    cut = [score.greedy_text for score in llama.score(items, Greedy(16, stop=stop))]
    assert cut == [text.split(stop)[0] for text in texts]
    assert cut != texts


def test_greedy_decoding_ends_with_the_longest_answer_of_the_batch(llama):
    """Failure: every batch is decoded to its limit, though its answers have long ended."""
    items, greedy = random_items(llama, 8, seed=6), Greedy(60)
    lengths = [
        llama.model.generate(
            torch.tensor([item.prefix_ids]),
            do_sample=False,
            max_new_tokens=60,
            stop_strings=["\n"],
            tokenizer=llama.tokenizer,
        ).shape[1]
        - len(item.prefix_ids)
        for item in items
    ]
    assert len(set(lengths)) > 4
    assert max(lengths) < 60
    passes = []
    hook = llama.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        llama.score(items, greedy)
    finally:
        hook.remove()
    # One for the prefixes, one for the answers, and one a further token of the longest greedy answer.
    assert len(passes) == 2 + max(lengths) - 1


def test_a_greedy_answer_of_one_token_is_one_token(llama):
    """Failure: the limit is off by one."""
    items = random_items(llama, 10, seed=8)
    expected = [generated_text(llama, item.prefix_ids, Greedy(1))[0] for item in items]
    assert [score.greedy_text for score in llama.score(items, Greedy(1))] == expected


# --- what has no score --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Item((), (5,)), "item 2 has 0 prefix and 1 answer tokens"),
        (Item((5,), ()), "item 2 has 1 prefix and 0 answer tokens"),
        (Item((5,) * 150, (6,) * 11), "item 2 has 161 tokens, but the model takes 160"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named_by_its_index(llama, bad, message):
    """Failure: a truncated or empty item gets a number."""
    good = Item((5, 6), (7,))
    with pytest.raises(ValueError, match=message):
        llama.score([good, good, bad])


def test_an_item_that_just_fits_is_scored(llama):
    """Failure: the limit is off by one, or the last position has no rotary angle of its own."""
    item = Item(tuple(i % 300 + 20 for i in range(150)), tuple(range(50, 60)))
    score = llama.score([item])[0]
    assert score.token_logprobs == pytest.approx(plain_logprobs(llama, item), abs=TOLERANCE, rel=0)


def test_room_is_kept_for_the_greedy_answer(llama):
    """Failure: greedy decoding runs past the model's last position."""
    item = Item((5,) * 150, (6,))
    assert isinstance(llama.score([item], Greedy(10))[0], Score)
    with pytest.raises(ValueError, match="item 0"):
        llama.score([item], Greedy(11))


def test_nan_is_unscored_and_spares_the_rows_beside_it(model_folders):
    """Failure: a broken computation trains the policy with a number."""
    scorer = LocalScorer(str(model_folders["llama"]), device="cpu")
    good = [Item((30, 31, 32, 33), (34, 35)), Item((40, 41), (42,))]
    before = scorer.score(good)
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[99] = float("nan")
    first, poisoned_prefix, second, poisoned_answer = scorer.score(
        [good[0], Item((30, 99, 31), (32,)), good[1], Item((30, 31), (99, 33))], Greedy(3)
    )
    assert [s.token_logprobs for s in (first, second)] == [pytest.approx(s.token_logprobs, abs=1e-5) for s in before]
    assert poisoned_prefix == Unscored("answer token 0 has log-prob nan", "not_a_number")
    assert poisoned_answer == Unscored("answer token 1 has log-prob nan", "not_a_number")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.01])
def test_a_value_that_is_no_log_prob_is_unscored(value):
    """Failure: probability above 1, or an infinity, which GRPO turns into a group without gradient."""
    result = to_score([-1.0, value], None)
    assert isinstance(result, Unscored)
    assert result.reason == f"answer token 1 has log-prob {value}"


def test_rounding_above_zero_is_taken_as_probability_one():
    """Failure: certain answers are dropped because float32 rounds their log-prob to 1e-7."""
    assert to_score([1e-7, -0.5], "5") == Score((0.0, -0.5), "5")


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["nothing", "an empty folder", "no weights"])
def test_a_missing_model_is_one_line_that_names_it(content, tmp_path, model_folders):
    """Failure: a typing error in --scorer_model ends in a traceback of three screens."""
    folder = tmp_path / "model"
    if content != "nothing":
        folder.mkdir()
    if content == "no weights":
        for path in model_folders["llama"].glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ScorerError, match="cannot load the base model") as caught:
        LocalScorer(str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert "--scorer_model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_half_copied_weight_file_is_one_line_too(tmp_path, model_folders):
    """Failure: an interrupted download ends in a traceback."""
    for path in model_folders["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ScorerError, match="cannot load the base model"):
        LocalScorer(str(tmp_path), device="cpu")


def test_open_scorer_loads_the_local_back_end_and_refuses_what_it_lacks(model_folders):
    """Failure: a run without a base model, or with one that was not asked for."""
    folder = str(model_folders["llama"])
    scorer = open_scorer("local", model=folder)
    assert isinstance(scorer, LocalScorer)
    assert scorer.fingerprint["model"] == folder
    scorer.close()
    scorer.close()
    with pytest.raises(ScorerError, match="--scorer_model is not set"):
        open_scorer("local", model=None)
    with pytest.raises(ValueError, match="there are local, vllm, vllm_engine"):
        open_scorer("onnx", model=folder)


def test_the_model_is_frozen_and_in_evaluation_mode(llama):
    """Failure: dropout in the reward, or memory for gradients nobody takes."""
    assert not llama.model.training
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    assert llama.max_length == tiny.MAX_LENGTH


def test_the_fingerprint_tells_models_and_precisions_apart(model_folders, tmp_path):
    """Failure: scores of one base model are taken for another's."""
    folder = str(model_folders["llama"])
    same = LocalScorer(folder, device="cpu").fingerprint
    assert same == LocalScorer(folder, device="cpu").fingerprint
    assert same["dtype"] == "float32"
    assert json.loads(json.dumps(same)) == same
    assert LocalScorer(folder, dtype="bfloat16", device="cpu").fingerprint["dtype"] == "bfloat16"
    tokenizer = tiny.tokenizer_of("llama")
    tiny.random_model("llama", tokenizer, seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert LocalScorer(str(tmp_path), device="cpu").fingerprint["weights"] != same["weights"]


def test_a_change_anywhere_in_the_weights_changes_the_fingerprint(tmp_path):
    """Failure: a base model tuned in its middle layers alone passes for the one it was made from."""
    content = bytearray(3 * 2**20)
    digests = []
    for middle in (0, 1):
        content[len(content) // 2] = middle
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.append(weights_digest(str(tmp_path)))
    assert digests[0] != digests[1]


# --- batches ------------------------------------------------------------------------------------------------------


def test_batches_hold_every_item_once_and_keep_to_their_limits():
    """Failure: an item is lost or scored twice, or the memory knob does not bound memory."""
    items = sorted(
        (Item((1,) * (1 + 7 * i % 50), (2,) * (1 + i % 9)) for i in range(60)), key=lambda item: len(item.prefix_ids)
    )
    made = list(batches(items, 120, 1000))
    assert list(itertools.chain(*made)) == items
    assert len(made) > 1
    for batch in made:
        padded = len(batch) * (max(len(i.prefix_ids) for i in batch) + max(len(i.answer_ids) for i in batch))
        assert padded <= 120 or len(batch) == 1


def test_batches_bound_the_logits_of_a_large_vocabulary():
    """Failure: 2^28 float32 logits are 1 GB; without the bound, long answers and 150,000 words take all memory."""
    items = [Item((1,), (2,) * 8)] * 400
    sizes = [len(batch) for batch in batches(items, 10**9, 150_000)]
    assert sum(sizes) == 400
    assert max(sizes) * 8 * 150_000 <= 2**28
