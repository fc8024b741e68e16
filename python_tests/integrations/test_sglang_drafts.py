"""The drafts for SGLang, without SGLang: what it is handed, and that its verification gives the
model's own text.
"""

import random

import numpy as np
import pytest
import torch

from helpers.families import VOCAB, tiny_model
from helpers.sglang_server import accepted, links, plain_text, tree_logits
from msn_ext import ops
from msn_ext.decoding.drafters import BestFirst, Habits
from msn_ext_sglang.drafts import MAX_DEPTH, Drafts, named_habits
from msn_ext_sglang.guesses import top_guesses
from msn_ext_sglang.texts import CONTEXT, PastTexts


def drafts(width: int = 8, capacity: int = 1000, vocabulary: int = VOCAB, **more) -> Drafts:
    # As SGLang calls its own: it also says how deep that one searches, and how.
    return Drafts(
        min_bfs_breadth=1,
        max_bfs_breadth=10,
        match_type="BFS",
        max_trie_depth=18,
        external_sam_budget=0,
        draft_token_num=width,
        capacity=capacity,
        vocabulary=vocabulary,
        **more,
    )


def get(source: Drafts, texts: dict[str, list[int]], tail: int = 40):
    """Return tokens [B, N] and masks [B, N, N] for the texts so far, of which it gets the ends."""
    tokens, mask = source.batch_get(
        list(texts), [text[-tail:] for text in texts.values()], [*map(len, texts.values())]
    )
    width = source.draft_token_num
    assert tokens.dtype == mask.dtype == np.int64 and tokens.ndim == mask.ndim == 1
    return tokens.reshape(-1, width), mask.reshape(-1, width, width)


def expect_tree(tokens, mask, last: int) -> None:
    """Nothing that SGLang's walk could trip over: each mask row is its parent's and itself."""
    assert tokens[0] == last and ((tokens >= 0) & (tokens < VOCAB)).all()
    assert mask[0].tolist() == [1] + [0] * (len(tokens) - 1)
    siblings = set()
    for node in range(1, len(tokens)):
        above = np.flatnonzero(mask[node, :node])
        assert len(above) and above[0] == 0
        own = mask[above[-1]].copy()
        own[node] = 1
        assert (mask[node] == own).all()
        assert (above[-1], tokens[node]) not in siblings  # else drawn twice as often
        siblings.add((above[-1], tokens[node]))


@pytest.mark.parametrize("width", [2, 3, 16, 64, 65, 256])
def test_trees_are_well_formed_and_of_one_width(width):
    source, numbers = drafts(width), random.Random(width)
    texts = {str(i): numbers.choices(range(VOCAB), k=numbers.randint(1, 50)) for i in range(5)}
    for _ in range(4):
        tokens, mask = get(source, texts, tail=width + 1)
        for row, text in enumerate(texts.values()):
            expect_tree(tokens[row], mask[row], text[-1])
        guesses = torch.randint(0, VOCAB, (5, width, 8)).mul(16).int()
        source.remember(guesses)
        for text in texts.values():
            text += numbers.choices(range(VOCAB), k=numbers.randint(1, width))


def test_what_is_left_over_is_a_chain_of_only_children():
    """A text of one token tells nothing below the deepest noise."""
    tokens, mask = get(drafts(64), {"one": [5]})
    expect_tree(tokens[0], mask[0], 5)
    depth = mask[0].sum(-1) - 1
    assert depth.max() == 63 > MAX_DEPTH  # one below the other, as deep as there are nodes


def test_the_trees_are_those_of_best_first_drafting():
    """By msn_ext's own drafter, fed with the same text and the same guesses."""
    numbers = random.Random(0)
    text = numbers.choices(range(6), k=30)
    source, drafter = drafts(12, capacity=0), BestFirst(12)
    drafter.start(1, VOCAB, torch.device("cpu"))
    lengths = torch.tensor([0])
    history = torch.zeros(1, 200, dtype=torch.int64)
    some_match = 0
    for _ in range(20):
        lengths[0], history[0, : len(text)] = len(text), torch.tensor(text)
        tokens, mask = get(source, {"a": text})
        draft = drafter.propose(history, lengths)
        assert tokens[0].tolist() == draft.tokens[0].tolist()
        if (draft.parents[0, 1:] >= 0).all():
            assert (mask[0].sum(-1) - 1).tolist() == draft.depth.flatten().tolist()
            some_match += 1
        logits = torch.randn(1, 12, VOCAB, generator=torch.Generator().manual_seed(len(text)))
        targets = logits.argmax(-1)
        if (
            len(text) % 3
        ):  # the model agrees with a guess, or one was drawn that it put behind others
            targets[0, 0] = draft.tokens[0, 1]
            logits[0, 0, targets[0, 0]] = 9 if len(text) % 3 == 1 else -9
        length, path, bonus, continuation = ops.verify_tree(draft.tokens, targets, draft.parents)
        guesses = ops.top_guesses(logits)
        drafter.observe(
            _verified(draft, logits, targets, path, length, continuation, history, lengths, guesses)
        )
        source.remember(guesses[0][None])
        text += [*draft.tokens[0, path[0, 1 : int(length)]].tolist(), int(bonus)]
    assert some_match > 10


@pytest.fixture
def habits() -> Habits:
    """After any of the texts' last tokens the model says the next number."""
    contexts = torch.tensor([[(n + i) % VOCAB for i in range(3)] for n in range(VOCAB)])
    guesses = torch.full((VOCAB, 8), -1, dtype=torch.int32)
    guesses[:, 0] = (contexts[:, -1] + 1) % VOCAB * 16
    return Habits.count(contexts, guesses, VOCAB, (1, 1, 1))


def test_habits_are_drafted_from(habits):
    """As best-first drafting does, before anything else is known."""
    (tokens,), _ = get(drafts(6, habits=habits), {"a": [9, 2, 7]})
    drafter = BestFirst(6, habits=habits)
    drafter.start(1, VOCAB, torch.device("cpu"))
    draft = drafter.propose(torch.tensor([[9, 2, 7, 0]]), torch.tensor([3]))
    assert tokens.tolist() == draft.tokens[0].tolist() == [7, 8, 9, 10, 11, 12]
    assert get(drafts(6), {"a": [9, 2, 7]})[0].tolist() != [tokens.tolist()]
    with pytest.raises(ValueError, match="habits are of a vocabulary of 24 tokens; .* 25"):
        drafts(6, vocabulary=VOCAB + 1, habits=habits)


def test_habits_are_named_by_the_environment(habits, tmp_path, monkeypatch):
    monkeypatch.delenv("MSN_HABITS", raising=False)
    assert named_habits() is None
    path = tmp_path / "habits.safetensors"
    for content in (None, b"no habits"):
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setenv("MSN_HABITS", str(path))
        with pytest.raises(ValueError, match="MSN_HABITS is .*; expected a file of msn habits"):
            named_habits()
    habits.save(path)
    assert torch.equal(named_habits().on("cpu"), habits.on("cpu"))


def _verified(draft, logits, *known):
    from msn_ext.decoding.drafters import Verified

    return Verified(draft, lambda: logits, *known)


def test_guesses_below_a_tree_are_of_the_last_one_only():
    source = drafts(8)
    get(source, {"a": [1, 2, 3]})
    source.remember(torch.full((1, 8, 8), 5 * 16, dtype=torch.int32))
    get(source, {"a": [1, 2, 3, 4]})
    assert (source._live.denoised >= 0).any()
    get(source, {"a": [1, 2, 3, 4, 6]})  # of the tree before, nobody said anything
    assert (source._live.denoised < 0).all()


def answer_all(source: Drafts, model, prompts: dict[str, list[int]], new: int, remember: bool):
    """Answer prompts that come and go, as SGLang would; return the answers and the passes."""
    texts: dict[str, list[int]] = {}
    answers, passes, waiting, numbers = {}, 0, dict(prompts), random.Random(1)
    while waiting or texts:
        while waiting and len(texts) < 4 and (not texts or numbers.random() < 0.5):
            name, prompt = waiting.popitem()
            texts[name] = prompt + plain_text(model, prompt, 1)  # the prompt's own pass
            if numbers.random() < 0.7:  # else it is known from its tails alone
                source.open(name, prompt, [])
        order = numbers.sample(sorted(texts), len(texts))
        tokens, mask = get(source, {name: texts[name] for name in order}, tail=9)
        guesses = torch.empty(len(order), source.draft_token_num, 8, dtype=torch.int32)
        for row, name in enumerate(order):
            text, tree = texts[name], tokens[row].tolist()
            expect_tree(tokens[row], mask[row], text[-1])
            depth, child, sibling = links(mask[row])
            logits = tree_logits(model, text[:-1], tree, mask[row], depth)
            own = logits.argmax(-1).tolist()
            path = accepted(tree, child, sibling, own.__getitem__)
            text += [*(tree[node] for node in path[1:]), own[path[-1]]]
            guesses[row] = top_guesses(logits)
        passes += len(order)
        if remember:
            source.remember(guesses)
        done = [name for name in order if len(texts[name]) >= len(prompts[name]) + new]
        for name in done:
            answers[name] = texts.pop(name)[len(prompts[name]) :][:new]
        source.erase_match_state(done)
    return answers, passes


@pytest.mark.parametrize("remember", [False, True])
def test_greedy_texts_are_the_models_own(remember):
    model, numbers = tiny_model("llama", 3, eos_token_id=None), random.Random(5)
    prompts = {str(i): numbers.choices(range(VOCAB), k=numbers.randint(2, 30)) for i in range(10)}
    want = {name: plain_text(model, prompt, 40) for name, prompt in prompts.items()}
    got, passes = answer_all(drafts(8), model, prompts, 40, remember)
    assert got == want
    assert passes < (0.8 if remember else 0.9) * 10 * 40  # guesses are right now and then


def test_what_the_model_said_is_worth_something():
    model, numbers = tiny_model("llama", 3, eos_token_id=None), random.Random(5)
    prompts = {str(i): numbers.choices(range(VOCAB), k=20) for i in range(6)}
    _, without = answer_all(drafts(8), model, prompts, 40, False)
    _, passes = answer_all(drafts(8), model, prompts, 40, True)
    assert passes < without


def test_an_answer_helps_the_next_request():
    """Others' answers are drafted from, and a request is forgotten when it has gone."""
    numbers = random.Random(2)
    answer = numbers.choices(range(VOCAB), k=60)
    source = drafts(8)
    get(source, {"first": [1, 2, 3, *answer[:1]]})
    assert "first" in source
    source.open("first", [1, 2, 3], answer)
    source.erase_match_state(["first", "never seen"])
    assert "first" not in source
    tokens, mask = get(source, {"second": [9, *answer[20:30]]})
    chain = [t for t, d in zip(tokens[0], mask[0].sum(-1) - 1) if d]
    assert set(answer[30:33]) <= set(chain)
    without = drafts(8, capacity=0)
    tokens_without, _ = get(without, {"second": [9, *answer[20:30]]})
    assert tokens_without.tolist() != tokens.tolist()


def test_processes_draft_the_same_whatever_the_order_they_forget_in():
    """SGLang lists a set of strings, whose order is another in every process."""
    numbers = random.Random(3)
    texts = {f"r{i}": numbers.choices(range(VOCAB), k=30) for i in range(6)}
    trees = []
    for gone in (["r1", "r4", "r2"], ["r4", "r2", "r1"]):
        source = drafts(16)
        for name, text in texts.items():
            source.open(name, text[:10], text[10:])
        source.erase_match_state(list(gone))
        more = {f"n{i}": text[5:20] for i, text in enumerate(texts.values())}
        trees.append([part.tolist() for part in get(source, more)])
    assert trees[0] == trees[1]


def test_a_request_that_does_not_go_on_begins_again():
    """After a retraction under the same name, or where the tail does not reach back far enough."""
    numbers = random.Random(4)
    text = numbers.choices(range(VOCAB), k=50)
    source = drafts(8, capacity=0)
    get(source, {"a": text})
    for other in (text[:20], numbers.choices(range(VOCAB), k=60), text + text + text):
        got, fresh = get(source, {"a": other}), get(drafts(8, capacity=0), {"a": other})
        assert got[0].tolist() == fresh[0].tolist()


def test_memory_is_bounded_over_many_requests():
    source, numbers = drafts(8, capacity=2000), random.Random(6)
    bytes_after = []
    for batch in range(60):
        texts = {f"{batch}.{i}": numbers.choices(range(VOCAB), k=100) for i in range(8)}
        for name, text in texts.items():
            source.open(name, text[:50], text[50:])
        get(source, texts)
        bytes_after.append(source.nbytes)
        source.erase_match_state(list(texts))
    assert len(set(bytes_after[10:])) == 1
    source.reset()
    assert source.nbytes < bytes_after[0]


def test_the_past_is_a_ring_behind_what_stays():
    """However often it went round, the newest answer is found, and most of what stays."""
    numbers = random.Random(7)
    corpus = numbers.choices(range(VOCAB), k=100)
    source, found = drafts(16, capacity=100), [0, 0]
    source.load_external_corpus_named("stays", [corpus])
    source.commit_external_corpus_load("stays", 100)
    for round_ in range(100):
        answer = numbers.choices(range(VOCAB), k=numbers.randint(12, 130))
        source.open("a", [1], answer)
        source.erase_match_state(["a"])
        past = source._past.tokens.tolist()
        assert past[:102] == [-1, *corpus, -1] and len(past) <= 102 + 100
        place = numbers.randint(10, 99)
        for at, known in enumerate((corpus[: place + 1], answer)):
            tokens, mask = get(source, {f"q{round_}": [0, *known[-10:-1]]})
            found[at] += known[-1] in tokens[0][mask[0].sum(-1) == 2]
            source.erase_match_state([f"q{round_}"])
    assert found[0] > 90 and found[1] > 97
    assert PastTexts(0, torch.zeros(0, dtype=torch.int64)).tokens.tolist() == []


def test_an_answer_is_kept_with_what_came_before_it():
    source = drafts(8, capacity=200)
    source.open("a", list(range(20)) * 2, [7] * 5)
    source.erase_match_state(["a"])
    want = [*(list(range(20)) * 2)[-CONTEXT:], *[7] * 5, -1]
    assert source._past.tokens.tolist() == want
    source.open("b", [1, 2, 3], [])
    source.erase_match_state(["b"])  # nothing was answered
    assert source._past.tokens.tolist() == want


def test_external_corpora_come_and_go():
    numbers = random.Random(8)
    first, second = (numbers.choices(range(VOCAB), k=100) for _ in range(2))
    source = drafts(8, external_corpus_max_tokens=301)
    text = {"a": [1, *first[40:50]]}
    nothing = get(source, text)[0].tolist()
    assert source.load_external_corpus_named("one", [first[:60], first[60:]]) == 100
    assert get(source, text)[0].tolist() == nothing  # loaded, and not yet committed
    source.commit_external_corpus_load("one", 100)
    tokens, _ = get(source, text)
    assert set(first[50:53]) <= set(tokens[0].tolist())
    separated = [-(2**31), *second]  # what SGLang puts between documents
    assert source.load_external_corpus_named("two", [second, separated]) == 201
    assert source.remaining_token_budget == 201
    with pytest.raises(ValueError, match="'three' has 202 tokens; expected at most 201"):
        source.load_external_corpus_named("three", [second, separated, [1]])
    source.remove_external_corpus("one")
    assert source.list_external_corpora() == {}
    assert get(source, text)[0].tolist() == nothing


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(width=1), "draft_token_num is 1; expected 2 to 256"),
        (dict(width=257), "draft_token_num is 257; expected 2 to 256"),
        (dict(capacity=-1), "capacity is -1; expected 0 or more"),
        (dict(vocabulary=0), "vocabulary is 0; expected the model's vocab_size"),
    ],
)
def test_settings_that_cannot_be_right_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        drafts(**wrong)


def test_what_cannot_be_right_is_named():
    source = drafts(8)
    source.remember(torch.zeros(1, 8, 8, dtype=torch.int32))  # before there was a tree: of a reset
    get(source, {"a": [1, 2]})
    with pytest.raises(ValueError, match=r"guesses has shape \[1, 7, 8\].*expected \[1, 8, 8\]"):
        source.remember(torch.zeros(1, 7, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="'c' has a token 24; expected less than the vocabulary"):
        source.load_external_corpus_named("c", [[1, VOCAB]])
    with pytest.raises(ValueError, match="no external corpus 'c'; there are \\[\\]"):
        source.remove_external_corpus("c")


@pytest.mark.parametrize("vocabulary", [1, 5, 8, 9, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_guesses_are_those_of_our_op(vocabulary, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    # Different numbers, exact in all dtypes, some of them forbidden.
    logits = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(20)])
    logits = (logits / 2).to(dtype).masked_fill(logits < vocabulary // 3, -torch.inf)
    got, want = top_guesses(logits), ops.top_guesses(logits.float())
    assert got.dtype == torch.int32
    if vocabulary // 3 <= 1:
        assert got.tolist() == want.tolist()
    finite = (want >= 0) & (logits.gather(-1, (want >> 4).clamp(min=0).long()) > -torch.inf)
    assert (got[finite] == want[finite]).all()


def test_equals_that_are_cut_in_two_are_left_out():
    """``topk`` may choose any of them, and each process another."""
    logits = torch.tensor([3.0, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1])
    assert (top_guesses(logits) >> 4).tolist() == [0, 3, -1, -1, -1, -1, -1, -1]
    equals = torch.tensor([1.0, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0])
    assert (top_guesses(equals) >> 4).tolist() == [1, 2, 0, 3, 4, 5, 6, 7]
