"""What each drafter proposes and remembers, against its paper's rules followed step by step."""

import itertools
import pathlib
import random
import re

import pytest
import torch
from families import VOCAB, tiny_model

from msn_ext import Draft, Verified, generate, ops
from msn_ext.decoding import BestFirst, Corpus, Lookahead, SamDecoding, TokenRecycling
from msn_ext.decoding.best_first import SOURCES
from msn_ext.decoding.budget import SIZES, Budget, StepTimes
from msn_ext.decoding.sam import SuffixAutomaton
from msn_ext.ops import reference

CPU = torch.device("cpu")


def text(*rows):
    """History [B, C] with rubbish behind the texts, and lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    history = torch.full((len(rows), int(lengths.max()) + 3), -7)
    for b, row in enumerate(rows):
        history[b, : len(row)] = torch.tensor(row)
    return history, lengths


def verify(
    draft: Draft, logits: torch.Tensor, history: torch.Tensor, lengths: torch.Tensor
) -> Verified:
    targets = logits.argmax(-1)
    accepted, path, _, continuation = ops.verify_tree(draft.tokens, targets, draft.parents)
    return Verified(draft, logits, targets, path, accepted, continuation, history, lengths)


# ---- Token Recycling -----------------------------------------------------------------------------


def test_recycling_fills_its_tree_from_the_matrix_and_the_last_duplicate_wins():
    drafter = TokenRecycling()
    drafter.start(2, VOCAB, CPU)
    matrix = torch.zeros(VOCAB, 8, dtype=torch.int64)
    history, lengths = text([4, 5, 6], [9, 8])
    generator = torch.Generator().manual_seed(0)
    wins = 0
    for _ in range(6):
        draft = drafter.propose(history, lengths)
        assert len(draft) == 81 and int(draft.depth.max()) == 6
        assert [int((draft.depth == d).sum()) for d in range(7)] == [1, 8, 21, 25, 15, 8, 3]
        children: dict = {}
        for node, parent in enumerate(draft.parents.tolist()):
            if parent >= 0:
                rank = children[parent] = children.get(parent, -1) + 1
                assert torch.equal(draft.tokens[:, node], matrix[draft.tokens[:, parent], rank])
        assert torch.equal(draft.tokens[:, 0], torch.tensor([6, 8]))
        logits = torch.randn(2, 81, VOCAB, generator=generator)
        drafter.observe(verify(draft, logits, history, lengths))
        for row, scores in zip(draft.tokens.tolist(), logits):
            for token, score in zip(row, scores):
                wins += bool(matrix[token].any())
                matrix[token] = score.topk(8).indices
    assert wins > 100, "no duplicates, nothing was tried"


def test_recycling_keeps_its_matrix_for_the_next_call_only_in_the_same_object():
    model, ids = tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7]])
    settings = dict(
        do_sample=False, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True
    )
    cold = [
        len(generate(model, ids, draft="recycling", **settings).accept_lengths[0]) for _ in range(2)
    ]
    drafter = TokenRecycling()
    warm = [
        len(generate(model, ids, draft=drafter, **settings).accept_lengths[0]) for _ in range(2)
    ]
    assert cold == [warm[0]] * 2 and warm[1] < warm[0]
    small = tiny_model("gpt2", 0)
    drafter.start(1, 11, CPU)  # another vocabulary: another matrix
    generate(small, ids, draft=drafter, **settings)


# ---- best-first ----------------------------------------------------------------------------------

SETTINGS = dict(do_sample=False, max_new_tokens=48, eos_token_id=None, return_dict_in_generate=True)


def passes(draft, prompt=(5, 9, 4, 7), model=None) -> int:
    return len(
        generate(
            model or tiny_model("llama", 3), torch.tensor([prompt]), draft=draft, **SETTINGS
        ).accept_lengths[0]
    )


@pytest.mark.parametrize(
    "known", [None, Corpus.build([[1, 2, 3, 0, 1], [3, 2, 1, 0] * 9], VOCAB, progress=False)]
)
def test_best_first_proposes_what_its_tables_hold_and_fills_them_from_every_pass(known):
    """Its tables, kept here by the reference ops from what it is shown, give its next tree."""
    drafter = BestFirst(budget=24, corpus=known)
    nothing = torch.zeros(8, 0, dtype=torch.int32)
    corpus = (known.tokens, known.heads) if known else (nothing[0], nothing)
    drafter.start(2, VOCAB, CPU)
    generator = torch.Generator().manual_seed(0)
    history, lengths = torch.randint(0, 4, (2, 64), generator=generator), torch.tensor([9, 12])
    drafter.first(history, lengths)
    contexts = torch.zeros(3, 1 << 16, 9, dtype=torch.int32)
    denoised = torch.full((2, 20, 8), -1, dtype=torch.int32)
    gained = []
    for _ in range(5):
        heads = torch.zeros(2, 8, 64, dtype=torch.int32)
        reference.index_suffixes(heads, history, torch.zeros_like(lengths), lengths)
        tables = denoised, contexts, heads, *corpus, drafter._factors
        expected = reference.draft_tree(history, lengths, *tables, 24, 20, 0.05)
        draft = drafter.propose(history, lengths)
        assert torch.equal(draft.tokens, expected[0]) and torch.equal(draft.parents, expected[1])
        assert torch.equal(drafter.probability, expected[2]) and torch.equal(
            drafter.sources, expected[3]
        )
        logits = torch.randn(2, 24, VOCAB, generator=generator)
        logits[..., :4] += 2  # few tokens, so that guesses come true
        verified = verify(draft, logits, history, lengths)
        drafter.observe(verified)
        guesses = reference.top_guesses(logits)
        reference.remember_guesses(
            contexts, history, lengths, draft.tokens, draft.parents, verified.path, guesses
        )
        denoised.fill_(-1)
        for b, row in enumerate(verified.continuation.tolist()):
            for depth, node in enumerate(node for node in row if node >= 0):
                denoised[b, depth] = guesses[b, node]
        for b, (path, count) in enumerate(zip(verified.path, verified.accept_length.tolist())):
            history[b, lengths[b] : lengths[b] + count] = verified.targets[b, path[:count]]
        lengths = lengths + verified.accept_length
        gained += verified.accept_length.tolist()
    assert max(gained) > 1 and (denoised >= 0).any()


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_drafts_alone_and_more_find_more(source):
    alone, nothing = (
        passes(BestFirst(budget=32, sources=(source,))),
        passes(BestFirst(budget=32, sources=(), foresight=0)),
    )
    assert passes(BestFirst(budget=32)) <= alone < nothing


def test_an_object_remembers_from_call_to_call():
    drafter = BestFirst(budget=32)
    cold = passes(BestFirst(budget=32))
    assert passes(drafter) == cold and passes(drafter) < cold
    for vocabulary in (7, VOCAB):  # of another model's tokens nothing is kept
        drafter.start(1, vocabulary, CPU)
        history, lengths = text([4, 5, 6, 4, 5])
        tokens = drafter.propose(history, lengths).tokens
        assert set(tokens.flatten().tolist()) <= {4, 5, 6}


def test_the_size_follows_the_time_of_a_step():
    """Nothing is drafted where a node costs a whole step, the largest tree where nodes are free."""
    free, dear = StepTimes({1: 1.0, 512: 1.0}, "cpu"), StepTimes({1: 1.0, 512: 512.0}, "cpu")
    for times in (free, dear):
        times.observe = lambda tokens, seconds: None
    sizes = {}
    for name, times in (("free", free), ("dear", dear)):
        drafter, sizes[name] = BestFirst(times=times), []
        propose = drafter.propose
        drafter.propose = lambda *text, propose=propose, seen=sizes[name]: (
            draft := propose(*text),
            seen.append(len(draft)),
        )[0]
        passes(drafter)
    assert set(sizes["dear"]) == {1}
    assert sizes["free"][5:] and min(sizes["free"][5:]) > 16


def test_rows_that_have_ended_do_not_count():
    """A row that gains nothing any more would go on promising what it promised last."""
    drafter = BestFirst()
    drafter.start(2, VOCAB, CPU)
    history, lengths = text([1, 2, 3] * 6, [4, 5, 6] * 6)
    history = torch.cat([history, torch.zeros(2, 60, dtype=torch.int64)], 1)
    drafter._choice.choose = lambda expected: (promised.append(expected[-1]), 4)[1]
    promised: list = []
    drafter.propose(history, lengths)
    assert drafter._growing.tolist() == [True, True]
    drafter.propose(history, lengths + torch.tensor([2, 0]))
    assert drafter._growing.tolist() == [True, False]
    assert promised[-1] == pytest.approx(float(drafter.probability[0].sum()) - 1)


@pytest.mark.parametrize("device, kink", [("cpu", 0.6), ("cpu", 1.0), ("cuda", 1.0)])
def test_step_times_learn_what_they_are_shown(device, kink):
    times = StepTimes(None, device)
    truth = lambda tokens: 0.01 * (1 + 0.05 * tokens) * (kink if tokens == 1 else 1)  # noqa: E731
    assert times(1) < times(8) < times(64)
    times.observe(8, 50.0)  # the first step of all allocates, loads, compiles
    for tokens in (8, 1, 64):
        times.observe(tokens, truth(tokens))
        assert times(tokens) == pytest.approx(truth(tokens), rel=0.4)
    for tokens in (1, 8, 64) * 15:
        times.observe(tokens, truth(tokens))
    for tokens in (1, 8, 24, 64):
        assert times(tokens) == pytest.approx(truth(tokens), rel=0.02)
    times.observe(8, 100.0)  # somebody stopped the machine
    assert times(8) == pytest.approx(truth(8), rel=0.25)
    for tokens in (1, 64) * 20:  # another program has come, everything takes longer
        times.observe(tokens, 3 * truth(tokens))
    assert times(64) == pytest.approx(3 * truth(64), rel=0.2) and times(1) == pytest.approx(
        3 * truth(1), rel=0.3
    )


def test_measured_step_times_are_read_between_and_behind():
    times = StepTimes({16: 4.0, 1: 1.0, 8: 2.0, 12: 1.9}, "cuda")
    assert [times(n) for n in (1, 8, 12, 14, 16, 24)] == [1.0, 2.0, 2.0, 3.0, 4.0, 8.0]
    times.observe(8, 50.0)
    assert times(8) == 2.0
    assert StepTimes({4: 2.0}, "cpu")(100) == 2.0


def test_the_budget_is_the_best_rate_and_trusts_what_came_true():
    times = StepTimes({1: 1.0, 101: 2.0}, "cpu")
    expected = [min(2.0, 0.2 * n) for n in range(SIZES[-1])]
    budget = Budget(times, rows=1)
    rate = {n: (1 + expected[n - 1]) / times(n) for n in SIZES}
    assert budget.choose(expected) == max(SIZES, key=rate.get) == 12
    for _ in range(400):
        budget.observe(2.0, 0.0)  # nothing ever comes true
    assert budget.choose(expected) == 1
    assert Budget(times, rows=64).choose(expected) == 1, "a large batch has no time to spare"
    assert Budget(times, rows=1).choose(expected[:1]) == 1


def test_trees_grow_from_step_to_step():
    """Where more nodes pay than are looked at, more are looked at next."""
    budget = Budget(StepTimes({1: 1.0, 512: 1.0}, "cpu"), rows=1)
    seen = []
    for _ in range(4):
        seen.append(budget.reach)
        budget.choose([0.1 * n for n in range(budget.reach)])
    assert seen == [16, 64, 128, 128]


# ---- SAM-Decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", [1, 2, 3, 6])
def test_the_automaton_finds_the_first_place_of_the_longest_match(letters):
    for seed in range(25):
        rng = random.Random(f"{letters} {seed}")
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(rng.randrange(1, 70)):
            tokens.append(rng.randrange(letters))
            automaton.append(tokens[-1])
            size = len(tokens)
            places = (
                (n, [end for end in range(n, size) if tokens[end - n : end] == tokens[size - n :]])
                for n in range(size - 1, 0, -1)
            )
            matched, ends = next(((n, ends) for n, ends in places if ends), (0, []))
            assert automaton.matched == matched
            assert not ends or automaton.follows == ends[0]


def test_sam_copies_four_tokens_for_every_one_that_matched():
    drafter = SamDecoding()
    drafter.start(3, VOCAB, CPU)
    history, lengths = text(
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [1, 2, 3]
    )
    draft = drafter.propose(history, lengths)
    assert draft.tokens.tolist() == [
        [1, 2, 3, 4, 5, 1, 1, 1, 1],
        [2, 3, 4, 5, 6, 7, 8, 9, 1],
        [3] * 9,
    ]
    chain = [*range(-1, 8)]
    assert draft.parents.tolist() == [chain[:5] + [-1] * 4, chain, [-1] * 9]
    history, lengths = text([*range(70), *range(30)], [7] * 3, [7])
    drafter.start(3, VOCAB, CPU)
    assert drafter.propose(history, lengths).depth.max(1).values.tolist() == [59, 1, 0]


# ---- Lookahead -----------------------------------------------------------------------------------


def test_lookahead_window_pool_and_guesses():
    """A model whose answer to a token is fixed (t -> 3 t + 1 mod 8) lets every n-gram be told
    beforehand.
    """
    size, window, ngram = 8, 4, 4
    answer = lambda tokens: (3 * tokens + 1) % size  # noqa: E731
    drafter = Lookahead(window, ngram, guesses=2)
    drafter.start(1, size, CPU)
    history, lengths = text([4, 5, 6, 7])
    level = drafter.first(history, lengths)
    assert level.shape == (1, window + ngram - 3) and torch.isin(level, history[0, :4]).all()
    draft = Draft.of(
        torch.cat([torch.tensor([[7]]), level], 1),
        torch.arange(-1, level.shape[1], dtype=torch.int32),
    )

    def step(draft):
        logits = torch.nn.functional.one_hot(answer(draft.tokens), size).float()
        drafter.observe(verify(draft, logits, history, lengths))

    step(draft)
    root, sizes = 7, []
    for _ in range(12):
        root = int(answer(torch.tensor(root)))
        history[0, 4], lengths = root, torch.tensor([5])
        draft = drafter.propose(history, lengths)
        sizes.append(len(draft))
        step(draft)
    # filling: (columns x levels) 4+1 x 2, then the whole window, then guesses for the root as well
    assert sizes[:2] == [10, 12] and max(sizes) > window * (ngram - 1)
    for pool in drafter._pools:
        assert pool and all(len(entries) <= 2 for entries in pool.values())
        roots = {
            7,
            6,
            3,
            2,
        }  # below the root stands what was expected of another token there (Jacobi)
        assert set(pool) - roots
        for key, entries in pool.items():
            for found in entries:
                chain = found if key in roots else (key, *found)
                for before, after in itertools.pairwise(chain):
                    assert after == int(answer(torch.tensor(before)))


def test_lookahead_sees_its_window_as_the_paper_draws_it():
    """A token of level l, column j, sees levels 1 to l of its column and level 0 up to j."""
    drafter = Lookahead(5, 4, guesses=0)
    drafter.start(1, VOCAB, CPU)
    history, lengths = text([4, 5, 6])
    drafter.first(history, lengths)
    columns = 5
    drafter._levels = [
        torch.zeros(1, n, dtype=torch.int64) for n in (columns - 1, columns, columns)
    ]
    seen = ops.reference.ancestor_matrix(drafter.propose(history, lengths).ancestors)[0]
    for level in range(3):
        for column in range(columns):
            expected = {*range(column + 1)} | {
                columns * above + column for above in range(1, level + 1)
            }
            assert set(seen[columns * level + column].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Lookahead(window=0), "window is 0; expected 1"),
        (lambda: Lookahead(ngram=2), "ngram is 2; expected 3"),
        (lambda: Lookahead(guesses=-1), "guesses is -1; expected 0"),
        (lambda: Lookahead(window=60, guesses=60), "tree of 480 nodes; expected at most 256"),
        (lambda: BestFirst(budget=0), "budget is 0; expected None or 1 to 256"),
        (lambda: BestFirst(budget=8.0), "budget is 8.0"),
        (lambda: BestFirst(sources="suffix"), "sources is 'suffix'; expected a tuple"),
        (
            lambda: BestFirst(factors=torch.full((348,), torch.nan, dtype=torch.float64)),
            "factors holds a value outside",
        ),
        (
            lambda: BestFirst(sources=("suffix", "tables")),
            "sources has 'tables'; expected some of denoised, adjacency, suffix",
        ),
        (lambda: BestFirst(max_depth=-1), "max_depth is -1; expected 0 to 256"),
        (lambda: BestFirst(foresight=2.0), "foresight is 2.0; expected 0 to 1"),
        (
            lambda: BestFirst(factors=torch.ones(3)),
            "factors has shape [3] and dtype torch.float32; expected [348], float64",
        ),
        (lambda: SamDecoding(most=1), "most is 1; expected 2 to 256"),
        (lambda: SamDecoding(growth=0), "growth is 0"),
        (lambda: TokenRecycling(0), "budget is 0; expected 1 to 81"),
        (lambda: TokenRecycling(82), "budget is 82"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---- one's own -----------------------------------------------------------------------------------


def test_the_example_of_the_docs_runs_and_helps():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "drafters.md").read_text(
        encoding="utf-8"
    )
    example = next(
        block.split("```")[0] for block in page.split("```python\n") if "class Known" in block
    )
    names: dict = {}
    exec(example, names)
    model, ids = tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=None)
    expected = model.generate(ids, **settings)
    known = names["Known"]([expected[0].tolist(), [1, 2, 3]])
    out = generate(model, ids, draft=known, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, expected)
    assert len(out.accept_lengths[0]) < 12
