"""By our own forward pass a token's logits have the same bits whatever it is computed with: drafts
of any size, other rows, padding, threads, as part of a prompt or step by step.

The sizes are odd, so that panels, vectors and tiles end in the middle. Mutants that are right but
for rounding show that the comparison sees a last bit.
"""

from dataclasses import replace

import pytest
import torch

from helpers.bits import NEW, Row, decoded
from helpers.families import tiny_model
from msn_ext.decoding import BestFirst
from msn_ext.decoding.forward.packed import PackedPlan
from msn_ext.decoding.forward.plan import Plan

VOCABULARY = 211
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=72,
    intermediate_size=106,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
)
MODELS = {
    "llama": ("llama", SIZES),
    "windows": ("gemma3", SIZES | dict(sliding_window=11, query_pre_attn_scalar=12)),
}
DTYPES = torch.float32, torch.bfloat16, torch.float16
DRAFTS = {
    "none": lambda: "none",
    "jacobi": lambda: "jacobi",
    "paper": lambda: "paper",
    "auto": lambda: "auto",
    **{f"auto of {nodes}": lambda nodes=nodes: BestFirst(nodes) for nodes in (2, 5, 16, 64, 200)},
}


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(name: str, dtype: torch.dtype):
    """Weights are smaller than in narrower models, else rounding to 16 bits changes everything."""
    family, settings = MODELS[name]
    model = tiny_model(family, 4, torch.float32, **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5 if weight.dim() > 1 else 1)
    return model.to(dtype)


def prompts(rows: int) -> list[list[int]]:
    """Texts of 5 tokens to more than a chunk of a prompt, that repeat themselves."""
    generator = torch.Generator().manual_seed(rows)
    lengths = (21, 5, 130, 34)[:rows]
    texts = [torch.randint(3, VOCABULARY, (9,), generator=generator).tolist() for _ in lengths]
    return [(text * 15)[:length] for text, length in zip(texts, lengths)]


def plain(model, texts: list[list[int]], **options) -> list[Row]:
    """Every text alone, a token a pass, in one thread."""
    torch.set_num_threads(1)
    return [decoded(model, [text], "none", **options)[0] for text in texts]


def same(found: list[Row], expected: list[Row]) -> bool:
    return all(map(Row.is_bitwise, found, expected))


def different_drafts(model) -> list[str]:
    """Return where drafts, batches or threads change a bit: at best nowhere."""
    wrong, longest, texts = [], 0, prompts(4)
    expected = plain(model, texts)
    for draft, make in DRAFTS.items():
        for batch, threads in ((1, 1), (1, 2), (2, 2), (3, 1), (4, 2)):
            torch.set_num_threads(threads)
            found = decoded(model, texts[:batch], make())
            longest = max(longest, *(max(row.accepts) for row in found))
            if not same(found, expected):
                wrong.append(f"{draft}, {batch} rows, {threads} threads")
    assert longest > 2, "guesses come true"
    return wrong


def different_prompts(model) -> list[str]:
    """Return where it shows how much of a text was a prompt."""
    wrong = []
    for text, row in zip(prompts(4), plain(model, prompts(4))):
        for count in (1, 2, 17, 23):
            read = [*text, *row.tokens[:count].tolist()]
            (found,) = plain(model, [read], max_new_tokens=NEW - count)
            if not found.is_bitwise(row.after(count)):
                wrong.append(f"{len(text)} tokens and {count}")
    return wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_drafts_batches_and_threads(name, dtype):
    assert different_drafts(made(name, dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_and_step_by_step(name, dtype):
    assert different_prompts(made(name, dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_sampled(name, dtype):
    """A row's draws depend on where it stands in its batch, so batches stay as they are."""
    model, texts = made(name, dtype), prompts(3)
    likeliest = plain(model, texts)
    gap = likeliest[0].logits.max(1).values - likeliest[0].logits.mean(1)
    temperature = float(gap.mean()) / 3

    def drawn(draft, threads):
        torch.set_num_threads(threads)
        torch.manual_seed(7)
        return decoded(model, texts, draft, do_sample=True, temperature=temperature, top_k=20)

    expected = drawn("none", 1)
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, likeliest))
    for draft, make in DRAFTS.items():
        for threads in (1, 2):
            assert same(drawn(make(), threads), expected), (draft, threads)


# ---- mutants -------------------------------------------------------------------------------------


def reordered(plan: Plan) -> Plan:
    """Return the same function: the units of every MLP in reverse, and so summed."""
    return replace(
        plan,
        layers=tuple(
            replace(
                layer,
                up=replace(layer.up, weights=tuple(part.flip(0) for part in layer.up.weights)),
                down=replace(layer.down, weights=tuple(w.flip(1) for w in layer.down.weights)),
            )
            for layer in plan.layers
        ),
    )


class TwoOrders:
    """A pass that sums in another order where ``when`` says so."""

    def __init__(self, usual, other, when):
        self._both, self._when = (usual, other), when

    def set_rotary(self, *arguments):
        for one in self._both:
            one.set_rotary(*arguments)

    def set_cache(self, *arguments):
        for one in self._both:
            one.set_cache(*arguments)

    def read(self, row, tokens, *rest):
        self._last = self._both[self._when("read", len(tokens), rest[-1])]
        self._last.read(row, tokens, *rest)

    def step(self, tokens, *rest):
        self._last = self._both[self._when("step", tokens.numel(), rest[-1])]
        self._last.step(tokens, *rest)

    def commit(self, *arguments):
        self._last.commit(*arguments)


MUTANTS = {
    "many rows": (lambda kind, rows, threads: kind == "step" and rows > 32, different_drafts),
    "several threads": (lambda kind, rows, threads: threads > 1, different_drafts),
    "prompts": (lambda kind, rows, threads: kind == "read", different_prompts),
}


# Keys and values in 16 bits are often the same in whatever order their layer's input was summed.
@pytest.mark.parametrize(
    "mutant, dtype",
    [(name, dtype) for name in list(MUTANTS)[:2] for dtype in DTYPES] + [("prompts", DTYPES[0])],
)
def test_another_order_of_sums_shows(mutant, dtype, monkeypatch):
    when, differences = MUTANTS[mutant]
    usual = PackedPlan.forward_pass

    def mutated(packed):
        other = PackedPlan(reordered(packed.plan), packed.weights)
        new = TwoOrders(usual(packed), usual(other), when)
        new.other = other  # its weights stay
        return new

    monkeypatch.setattr(PackedPlan, "forward_pass", mutated)
    assert differences(made("llama", dtype)) != []
