"""What a model usually says: counted, kept in a file, and looked up where the text at hand shows
nothing.
"""

import random
import re
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import tiny_model
from helpers.knowledge import guess, only
from msn_ext import BestFirst, Habits, generate, ops
from msn_ext.decoding.drafters import factors
from msn_ext.decoding.drafters.habits import HabitRecorder
from msn_ext.decoding.drafters.tree import follow_likeliest
from msn_ext.demo import HABITS

VOCABULARY = 50
EDGES = [0.0, *ops.EDGES, 1.0]


def said(generator: random.Random, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts of few tokens, and guesses after them, some rows with fewer than eight."""
    contexts = [[generator.randrange(4) for _ in range(3)] for _ in range(rows)]
    guesses = []
    for _ in range(rows):
        tokens = generator.sample(range(VOCABULARY), generator.choice([1, 3, 8]))
        levels = sorted((generator.randrange(12) for _ in tokens), reverse=True)
        guesses.append(only(*(guess(*pair) for pair in zip(tokens, levels))))
    return torch.tensor(contexts), torch.tensor(guesses, dtype=torch.int32)


def counted(contexts: torch.Tensor, guesses: torch.Tensor, order: int, least: int) -> dict:
    """Of every context that stood often enough: probability by token, the plain way."""
    sums, times = defaultdict(lambda: defaultdict(float)), defaultdict(int)
    for context, row in zip(contexts.tolist(), guesses.tolist()):
        key = tuple(context[-order:])
        times[key] += 1
        middle = {g >> 4: (EDGES[g & 15] + EDGES[(g & 15) + 1]) / 2 for g in row if g >= 0}
        for token, share in middle.items():
            sums[key][token] += share / sum(middle.values())
    return {
        key: {token: total / times[key] for token, total in tokens.items()}
        for key, tokens in sums.items()
        if times[key] >= least
    }


@pytest.mark.parametrize("least", [(1, 1, 1), (1, 2, 3)])
def test_habits_are_the_means_of_what_was_said(least):
    contexts, guesses = said(random.Random(0), 120)
    habits = Habits.count(contexts, guesses, VOCABULARY, least)
    for order, times in enumerate(least, 1):
        expected = counted(contexts, guesses, order, times)
        assert {tuple(c) for c in habits.contexts[order - 1].tolist()} == expected.keys()
        for context, row in zip(
            habits.contexts[order - 1].tolist(), habits.guesses[order - 1].tolist()
        ):
            chances = expected[tuple(context)]
            best = sorted(chances.values(), reverse=True)[:8]
            found = [(g >> 4, g & 15) for g in row if g >= 0]
            assert len(found) == len(best) == len({token for token, _ in found})
            for (token, level), chance in zip(found, best):
                assert chances[token] == pytest.approx(chance)
                assert EDGES[level] <= chance + 1e-12 and chance - 1e-12 <= EDGES[level + 1]


def test_the_table_has_every_context_under_its_own_order():
    """Of a table with room for all of them; nothing is said of the ends of a context that was kept
    for its own sake.
    """
    habits = Habits(
        VOCABULARY,
        [torch.tensor([[7]]).int(), torch.empty(0, 2).int(), torch.tensor([[1, 2, 3]]).int()],
        [
            torch.tensor([only(guess(4))]).int(),
            torch.empty(0, 8).int(),
            torch.tensor([only(guess(5))]).int(),
        ],
    )
    table = habits.on(torch.device("cpu"))
    assert habits.on(torch.device("cpu")) is table and len(habits) == 2
    assert [(table[order, :, 0] != 0).sum().item() for order in range(3)] == [1, 0, 1]
    assert guess(4) in table[0] and guess(5) in table[2] and guess(5) not in table[0]


def test_a_frequent_context_is_not_lost_to_a_rare_one():
    """Where two fall into one slot."""
    random_one = random.Random(1)
    contexts = torch.tensor([[0, 0, random_one.randrange(40)] for _ in range(3000)])
    guesses = torch.tensor([only(guess(token % 50, 11)) for *_, token in contexts.tolist()]).int()
    often = contexts.tolist()[0][2]
    contexts[::2, 2] = often
    guesses[::2] = torch.tensor(only(guess(often, 11)))
    habits = Habits.count(contexts, guesses, VOCABULARY)
    assert habits.contexts[0][-1].item() == often


def test_a_file_keeps_everything(tmp_path):
    contexts, guesses = said(random.Random(2), 60)
    habits = Habits.count(contexts, guesses, VOCABULARY)
    habits.factors = factors.load().roll(1)
    for vocabulary in (VOCABULARY, 1 << 17):  # a file of narrow and of wide numbers
        habits.vocabulary = vocabulary
        habits.save(tmp_path / "one.safetensors")
        again = Habits.load(tmp_path / "one.safetensors")
        assert again.vocabulary == vocabulary and torch.equal(again.factors, habits.factors)
        for mine, theirs in zip(
            (*habits.contexts, *habits.guesses), (*again.contexts, *again.guesses)
        ):
            assert torch.equal(mine, theirs)


def damaged(tmp_path, **changes):
    contexts, guesses = said(random.Random(3), 20)
    path = tmp_path / "damaged.safetensors"
    Habits.count(contexts, guesses, VOCABULARY, (1, 1, 1)).save(path)
    tensors = load_file(path)
    about = {"msn_ext habits": "1", "vocabulary": str(VOCABULARY)} | changes.pop("about", {})
    save_file(
        {**tensors, **{k.replace("_", "."): v(tensors) for k, v in changes.items()}}, path, about
    )
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts_1": lambda t: t["contexts.1"].int() + 50}, "contexts have tokens"),
        ({"tokens_3": lambda t: t["tokens.3"].int() + 50}, "guesses have tokens"),
        ({"levels_2": lambda t: t["levels.2"] * 0 + 13}, "level of probability"),
        ({"contexts_2": lambda t: t["contexts.2"][:, :1].clone()}, "contexts have shape"),
        ({"levels_2": lambda t: t["levels.2"][1:].clone()}, "must match"),
        ({"factors": lambda t: t["factors"] * 0}, "factors holds"),
        ({"about": {"msn_ext habits": "9"}}, "version 1"),
        ({"about": {"vocabulary": "many"}}, "many"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, changes, message):
    path = damaged(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} holds no habits.*{message}"):
        Habits.load(path)


def test_what_is_no_file_of_habits_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text holds no habits"):
        Habits.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Habits.load(tmp_path / "none")
    with pytest.raises(OSError):
        Habits.load(tmp_path)


def test_wrong_habits_are_refused():
    model = tiny_model("llama", 0)
    contexts, guesses = said(random.Random(4), 10)
    with pytest.raises(ValueError, match=r"contexts has shape \[10, 2\]; expected \[n, 3\]"):
        Habits.count(contexts[:, 1:], guesses, VOCABULARY)
    with pytest.raises(ValueError, match="guesses have tokens 0 to .*; expected 0 to 3"):
        Habits.count(contexts, guesses.clamp(min=0), 4)
    with pytest.raises(ValueError, match="habits is 7; expected None or what Habits.load"):
        BestFirst(habits=7)
    habits = Habits.count(contexts, guesses, VOCABULARY)
    with pytest.raises(ValueError, match="expected 'adjacency' among them"):
        BestFirst(sources=("suffix",), habits=habits)
    with pytest.raises(ValueError, match="habits are of a vocabulary of 50 tokens, the model has"):
        generate(model, torch.tensor([[1, 2]]), draft=BestFirst(habits=habits), max_new_tokens=2)


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_a_model_that_was_heard_needs_fewer_passes_for_the_same_text(engine):
    """Recorded in a batch with padding and rows that end early, and looked up one by one."""
    model = tiny_model("llama", 0)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :4] = 0
    recorder = HabitRecorder(BestFirst(1))
    options = dict(engine=engine, do_sample=False, max_new_tokens=40, pad_token_id=0)
    alone = dict(attention_mask=torch.ones(1, 6), draft="none")
    eos = generate(model, ids[:1], **alone, **options)[0, 6 + 3].item()
    batch = dict(attention_mask=mask, draft=recorder, return_dict_in_generate=True)
    tokens = 0
    for end in (eos, None):
        answers = generate(model, ids, **batch, eos_token_id=end, **options)
        tokens += sum(int(lengths.sum()) for lengths in answers.accept_lengths)
        # Row 3 has a context of two tokens behind its padding; the longest rows have a last pass.
        tokens -= 1 + (1 if end is not None else 4)
        assert len(recorder) == tokens
    habits = recorder.habits(vocabulary, (1, 1, 1))
    passes = torch.zeros(2, dtype=torch.int64)
    for row in range(4):
        prompt = ids[row : row + 1, mask[row].argmax() :]
        options["attention_mask"] = torch.ones_like(prompt)
        texts = []
        for i, known in enumerate((None, habits)):
            draft = BestFirst(8, habits=known)
            answer = generate(model, prompt, draft=draft, return_dict_in_generate=True, **options)
            texts.append(answer.sequences.tolist())
            passes[i] += len(answer.accept_lengths[0])
        assert texts[0] == texts[1]
    assert passes[1] < 0.8 * passes[0]


def test_the_likeliest_path_is_followed_as_far_as_it_goes():
    """In one row it branches, in the other it is short; children come in the order of chances."""
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5], [9, 7, 9, 9, 9, 9]])
    parents = torch.tensor([[-1, 0, 0, 2, 1, 4], [-1, 0, -1, -1, -1, -1]], dtype=torch.int32)
    chain = torch.full((2, 4), 100)
    follow_likeliest(chain, tokens, parents)
    assert chain.tolist() == [[1, 4, 5, 100], [7, 100, 100, 100]]


def test_the_first_pass_has_habits_for_guesses():
    model = tiny_model("llama", 0)
    recorder = HabitRecorder(BestFirst(1))
    options = dict(do_sample=False, max_new_tokens=12, attention_mask=torch.ones(1, 4))
    ids = torch.tensor([[7, 3, 11, 5]])
    generate(model, ids, draft=recorder, **options)
    habits = recorder.habits(model.config.vocab_size, (1, 1, 1))
    gained = []
    for known in (None, habits):
        draft = BestFirst(8, habits=known)
        out = generate(model, ids, draft=draft, return_dict_in_generate=True, **options)
        gained.append(out.accept_lengths[0][0].item())
    assert gained[0] == 1 < gained[1]


def test_what_the_habits_of_the_package_come_from():
    """They are whole, and the factors of habits in general are theirs."""
    habits = Habits.load(HABITS)
    assert habits.vocabulary == 49152 and 200_000 < len(habits) < 220_000
    torch.testing.assert_close(habits.factors, factors.load_of_habits(), rtol=6e-3, atol=0)
    told = (HABITS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(habits):,} contexts" in told


def test_habits_bring_their_own_factors():
    contexts, guesses = said(random.Random(5), 10)
    habits = Habits.count(contexts, guesses, VOCABULARY)
    assert torch.equal(habits.factors, factors.load_of_habits())
    habits.factors = habits.factors.roll(1)
    assert torch.equal(BestFirst(habits=habits)._factors, habits.factors)
    assert torch.equal(BestFirst(habits=habits, factors=factors.load())._factors, factors.load())
    assert torch.equal(BestFirst()._factors, factors.load())
