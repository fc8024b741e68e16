"""Every op once or twice on CUDA with small inputs, compared with the CPU op: what gpu.sh runs
under compute-sanitizer. Inputs are made and results compared on the CPU, so that almost every
kernel the sanitizer sees is ours.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python
    benchmarks/sanitize_ops.py
"""

import argparse
import sys

import torch

from msn_ext import ops

BATCH = 3
NODES = (1, 33, 70, 256)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # times (1 + |value|)
FAR = 1 << 40


class Differs(Exception):
    """Another result than the CPU's."""


def rand_trees(n: int) -> torch.Tensor:
    """[BATCH, n] parents: a random tree, a chain, a tree with padding."""
    rows = []
    for b in range(BATCH):
        parent = [int(torch.randint(0, max(i, 1), ())) if b != 1 else i - 1 for i in range(n)]
        rows.append([-1 if i == 0 or (b == 2 and i % 7 == 6) else parent[i] for i in range(n)])
    return torch.tensor(rows, dtype=torch.int32)


def on(device, value):
    if isinstance(value, torch.Tensor):
        # The whole storage, byte by byte: keeps the strides and the offset, and runs no kernel.
        memory = (
            torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).to(device, copy=True)
        )
        view = torch.empty(0, dtype=value.dtype, device=device)
        return view.set_(
            memory.untyped_storage(), value.storage_offset(), value.shape, value.stride()
        )
    return [on(device, x) for x in value] if isinstance(value, list) else value


def compare(name: str, device: str, op, *args, tolerance: float = 0.0, **kwargs) -> None:
    """Run an op here and there; compare what it returns, and its arguments, which it may change."""
    there = on(device, [*args])
    results = op(*there, **{k: on(device, x) for k, x in kwargs.items()})
    wanted = op(*args, **kwargs)
    for expected, result in (
        zip(wanted, results) if isinstance(wanted, tuple) else [(wanted, results)]
    ):
        result = result.cpu()
        if tolerance == 0 and not torch.equal(result, expected):
            raise Differs(f"{name}: {device} differs from cpu")
        expected, result = expected.double(), result.double()
        if tolerance and not ((result - expected).abs() <= tolerance * (1 + expected.abs())).all():
            raise Differs(
                f"{name}: {device} differs from cpu by up to {(result - expected).abs().max():.3g}"
            )
    for argument, other in zip(args, there):
        if isinstance(argument, torch.Tensor) and not same(argument, other.cpu()):
            raise Differs(f"{name}: an argument is another on {device} than on the cpu")
    print(f"{name}: same as on the CPU", flush=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def run_outside(device: str, op, *args):
    """Run an op on what points outside: a kernel must not follow; the CPU's ops refuse it."""
    try:
        return op(*args)
    except ValueError:
        if device != "cpu":
            raise


def advance_text(history, lengths, remaining, targets, path, *others) -> tuple:
    gained, status = ops.advance_text(history, lengths, remaining, targets, path, *others)
    return gained.cpu().masked_fill(path.cpu() < 0, 0), status  # without the rubbish at its end


def check_tree(n: int, device: str) -> None:
    parents = rand_trees(n)
    tokens, targets = (torch.randint(0, 3, (BATCH, n)) for _ in range(2))
    compare(f"tree_ancestors N={n}", device, ops.tree_ancestors, parents, validate=False)
    compare(f"verify_tree N={n}", device, ops.verify_tree, tokens, targets, parents)
    compare(
        f"verify_tree N={n}, one tree", device, ops.verify_tree, tokens, targets, parents[1].clone()
    )
    path = ops.verify_tree(tokens, targets, parents)[1]
    text = [
        torch.zeros(BATCH, 40 + n, dtype=torch.int64),
        torch.tensor([0, 40, 7]),
        torch.tensor([99, 0, 2]),
    ]
    depth = torch.randint(-1, 9, (BATCH, n), dtype=torch.int32)
    last = torch.tensor([41, 3, 999])
    place = [text[0], torch.tensor([1, 40, 7]), torch.tensor([0, 3, 9]), last, depth, 3]
    compare(f"place_tree N={n}", device, ops.place_tree, tokens.clone(), *place)
    compare(
        f"advance_text N={n}",
        device,
        advance_text,
        *text,
        targets,
        path,
        (path >= 0).sum(1),
        torch.tensor([2]),
        3,
    )
    broken = parents.clone()
    broken[:, n // 2] = n + 5
    dead = parents.clone()
    dead[:, n // 2] = -1
    want = ops.verify_tree(tokens, targets, dead)
    got = run_outside(device, ops.verify_tree, *on(device, [tokens, targets, broken]))
    if got is not None and not all(torch.equal(a, b.cpu()) for a, b in zip(want, got)):
        raise Differs(f"verify_tree N={n}: a malformed parent does not count as padding")


def check_drafting(n: int, device: str) -> None:
    history = torch.randint(0, 5, (BATCH, 3000))
    lengths = torch.tensor([3000, 1, 777])
    compare("lookup_ngram", device, ops.lookup_ngram, history, lengths, 4, 9)
    depth, rank = (
        torch.randint(0, 7, (BATCH, n), dtype=torch.int32),
        torch.randint(-1, 5, (n,), dtype=torch.int32),
    )
    sources = [torch.randint(-1, 50, (BATCH, 5, 4)), torch.randint(-1, 50, (BATCH, 5)), history]
    shape = [depth, rank, torch.tensor([7])]
    compare(f"fill_tree N={n}", device, ops.fill_tree, *sources, lengths, *shape)
    outside = on(device, torch.tensor([FAR, -FAR, 0]))
    run_outside(device, ops.lookup_ngram, on(device, history), outside, 4, 9)
    run_outside(device, ops.fill_tree, *on(device, sources), outside, *on(device, shape))


def check_best_first(n: int, device: str) -> None:
    tokens, targets, parents = (
        torch.randint(0, 9, (BATCH, n)),
        torch.randint(0, 9, (BATCH, n)),
        rand_trees(n),
    )
    logits = torch.randn(BATCH, n, 300)
    logits[:, :, 7] = logits[:, :, 3]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare(f"top_guesses N={n} {str(dtype)[6:]}", device, ops.top_guesses, logits.to(dtype))
        compare(
            f"verify_logits N={n} {str(dtype)[6:]}",
            device,
            ops.verify_logits,
            logits.to(dtype),
            tokens,
            parents,
        )
    history, lengths = torch.randint(0, 9, (BATCH, 3000)), torch.tensor([3000, 1, 777])
    outside = torch.tensor([FAR, -FAR, 0])
    suffixes, adjacency = (
        torch.zeros(BATCH, 8, 512, dtype=torch.int32),
        torch.zeros(3, 512, 9, dtype=torch.int32),
    )
    suffixes_there, adjacency_there = on(device, suffixes), on(device, adjacency)
    start = torch.tensor([0, 0, 700])
    path, guesses = (
        ops.verify_tree(tokens, targets, parents)[1],
        ops.top_guesses(torch.randn(BATCH, n, 9)),
    )
    draft = [history, lengths, tokens, parents, path, guesses]
    ops.index_suffixes(suffixes, history, start, lengths)
    ops.index_suffixes(suffixes_there, *on(device, [history, start, lengths]))
    ops.remember_guesses(adjacency, *draft)
    ops.remember_guesses(adjacency_there, *on(device, draft))
    denoised, continuation = torch.zeros(BATCH, 20, 8, dtype=torch.int32), path.roll(1, 1)
    denoised_there = on(device, denoised)
    ops.keep_continuation(denoised, guesses, continuation)
    ops.keep_continuation(denoised_there, *on(device, [guesses, continuation]))
    if not (
        torch.equal(denoised, denoised_there.cpu())
        and torch.equal(suffixes, suffixes_there.cpu())
        and torch.equal(adjacency, adjacency_there.cpu())
    ):
        raise Differs(f"tables of N={n}: {device} differs from cpu")
    corpus, corpus_suffixes = (
        torch.randint(-1, 9, (5000,)),
        torch.zeros(1, 8, 4096, dtype=torch.int32),
    )
    ops.index_suffixes(corpus_suffixes, corpus[None], torch.tensor([0]), torch.tensor([5000]))
    factors = torch.rand(348, dtype=torch.float64) + 0.1
    tables = [
        guesses[:, :5].contiguous(),
        adjacency,
        adjacency.flip(0).contiguous(),  # as habits: of other contexts
        suffixes,
        corpus.int(),
        corpus_suffixes[0],
        factors,
    ]
    compare(f"draft_tree N={n}", device, ops.draft_tree, history, lengths, *tables, n, 9, 0.05)
    there = on(device, [history, outside, outside])
    run_outside(device, ops.index_suffixes, suffixes_there, *there)
    there = on(device, [guesses, path + FAR])
    run_outside(device, ops.keep_continuation, denoised_there, *there)
    there = on(device, [history, outside, tokens, parents + n, path + FAR, guesses])
    run_outside(device, ops.remember_guesses, adjacency_there, *there)
    there = on(device, [history, outside, *tables])
    run_outside(device, ops.draft_tree, *there, n, 9, 0.05)
    tables[5] = torch.randint(-(2**31), 2**31, corpus_suffixes[0].shape).int()  # of a damaged file
    compare(
        f"draft_tree N={n}, damaged corpus",
        device,
        ops.draft_tree,
        history,
        lengths,
        *tables,
        n,
        9,
        0.05,
    )


def check_tails(n: int, device: str) -> None:
    tokens, guesses = (
        torch.randint(0, 9, (BATCH, n)),
        torch.randint(0, 1 << 30, (BATCH, n, 8)).int(),
    )
    path, continuation = torch.randint(-1, n, (2, BATCH, n))
    outside, parents = torch.tensor([FAR, -FAR, 0]), rand_trees(n)
    tables, ends = torch.rand(2, 348, dtype=torch.float64), path[:, : (n - 1) // 2].contiguous()
    kept = [
        torch.zeros(BATCH, 20, 8, dtype=torch.int32),
        torch.zeros(BATCH, 348, dtype=torch.float64),
    ]
    kept_there = on(device, kept)
    passed = [tables, guesses, continuation, path, torch.tensor([1, 0, n]), ends]
    ops.keep_tail(*kept, *passed, 2)
    ops.keep_tail(*kept_there, *on(device, passed), 2)
    if not all(torch.equal(x, y.cpu()) for x, y in zip(kept, kept_there)):
        raise Differs(f"keep_tail N={n}: {device} differs from cpu")
    there = on(device, [tables, guesses, path + FAR, path + FAR, outside, ends + FAR])
    run_outside(device, ops.keep_tail, *kept_there, *there, 2)
    history, lengths = torch.randint(0, 9, (BATCH, 3000)), torch.tensor([3000, 1, 777])
    tails, chances = (n - 1) // 3, torch.rand(BATCH, n, dtype=torch.float64)
    rest = n - 2 * tails, tails, 2, -1
    compare(
        f"append_tails N={n}",
        device,
        ops.append_tails,
        tokens,
        parents,
        chances,
        history,
        lengths,
        *rest,
    )
    there = on(device, [tokens, parents + n, chances, history, outside])
    run_outside(device, ops.append_tails, *there, *rest)


def check_noise(n: int, device: str) -> None:
    """``n`` tokens a sample, two of them in a row; no sample, row or start outside is written
    for.
    """
    columns = 2 * n + 7
    tokens = torch.randint(0, 50, (BATCH, columns))
    labels = torch.where(torch.rand(BATCH, columns) < 0.7, tokens, -100)
    samples = torch.tensor(
        [[row, begin, begin + n] for row in range(BATCH) for begin in (0, n + 7)]
    )
    keep, starts = torch.tensor([3, 9]), torch.full((2 * BATCH, 5), -1)
    for apart in (True, False):
        compare(
            f"draw_noise N={n}",
            device,
            ops.draw_noise,
            tokens,
            labels,
            samples,
            keep,
            starts,
            7,
            4,
            0.3,
            50,
            apart,
        )
    samples[0, 0], samples[1, 1:], starts[2, 1] = FAR, torch.tensor([-FAR, FAR]), FAR
    there = on(device, [tokens, labels, samples, keep, starts])
    run_outside(device, ops.draw_noise, *there, 7, 4, 0.3, 50)


def check_commit(n: int, device: str) -> None:
    slots = 20 + n
    caches = [torch.randn(BATCH, 2, slots, 64).half() for _ in range(66)]
    caches += [
        torch.randn(BATCH, slots, 3, 10).transpose(1, 2),
        torch.randn(BATCH, 2, slots, 9)[..., 1:8].bfloat16(),
    ]
    caches += [torch.randint(0, 99, (BATCH, 2, 5, slots), dtype=torch.uint8).transpose(2, 3)]
    path = torch.full((BATCH, n), -1)
    accepted = torch.tensor([min(n, k) for k in (1, 6, 40)])
    for b in range(BATCH):
        path[b, : accepted[b]] = torch.randperm(n)[: accepted[b]].sort().values
    lengths = torch.tensor([20, 0, 11])
    copies = on(device, caches)
    ops.commit_kv(caches, lengths, path, accepted)
    ops.commit_kv(copies, *on(device, [lengths, path, accepted]))
    # Every row starts outside: nothing may change.
    outside = on(device, [torch.tensor([FAR, -1, slots]), path, torch.tensor([FAR, n, n])])
    run_outside(device, ops.commit_kv, copies, *outside)
    if not all(torch.equal(a, b.cpu()) for a, b in zip(caches, copies)):
        raise Differs(f"commit_kv N={n}: {device} differs from cpu")
    outside = on(device, [lengths, path + FAR, torch.full((BATCH,), FAR)])
    run_outside(device, ops.commit_kv, copies, *outside)
    print(f"commit_kv N={n}: same as on the CPU", flush=True)


def check_attention(n: int, device: str) -> None:
    lengths, offsets = torch.tensor([45, 3, 0]), torch.tensor([5, 0, 0])
    ancestors, _ = ops.tree_ancestors(rand_trees(n))
    cases = [
        (torch.float16, 64, 64, 4, {}),
        (torch.float32, 20, 7, 3, {"window": 9, "softcap": 5.0}),
    ]
    if n <= 70:
        cases += [
            (torch.bfloat16, 256, 200, 2, {"offsets": offsets}),
            (torch.float16, 128, 128, 1, {"offsets": offsets, "window": 4}),
        ]
    for dtype, dim, v_dim, heads, options in cases:
        q = torch.randn(BATCH, n, heads, dim).to(dtype).transpose(1, 2)
        kv_heads = 2 if heads == 4 else 1
        k = torch.full((BATCH, kv_heads, 48 + n, dim), torch.nan, dtype=dtype)
        v = torch.full((BATCH, kv_heads, 48 + n, v_dim), torch.nan, dtype=dtype)
        for b in range(BATCH):  # NaN stays in every slot that no node may see
            seen = slice(int(offsets[b]) if "offsets" in options else 0, int(lengths[b]) + n)
            k[b, :, seen] = torch.randn(kv_heads, *k[b, 0, seen].shape).to(dtype)
            v[b, :, seen] = torch.randn(kv_heads, *v[b, 0, seen].shape).to(dtype)
        sinks = torch.randn(heads).to(dtype)
        name = f"tree_attention N={n} {str(dtype)[6:]} D={dim},{v_dim}"
        compare(
            name,
            device,
            ops.tree_attention,
            q,
            k,
            v,
            lengths,
            ancestors,
            sinks=sinks,
            tolerance=TOLERANCE[dtype],
            **options,
        )
        outside = on(device, torch.tensor([FAR, -FAR, 48 + n]))
        # Reads no slot outside.
        there = on(device, [q, k, v])
        run_outside(device, ops.tree_attention, *there, outside, on(device, ancestors))


def check_fused(n: int, device: str) -> None:
    def summed(h, x, *norms):
        h = h.clone()  # changes in place
        return h, ops.residual_norm(h, x, 0.5, *norms)

    def cached(q, k, v, keys, values, *rest):
        keys, values = keys.clone(), values.clone()
        return ops.rotary_cache(q, k, v, keys, values, *rest), keys, values

    prefix, positions = torch.tensor([4, 0, 9]), torch.randint(0, 9, (BATCH, n))
    tables, head = [torch.randn(9, 3) for _ in range(2)], 8
    for dtype, tolerance in TOLERANCE.items():
        name = f"N={n} {str(dtype)[6:]}"
        for size in (4096, 77):
            h, x, weight = (torch.randn(*shape, size).to(dtype) for shape in ((n,), (n,), ()))
            norms = "rms", weight, None, 1e-5, 1.0, "layer", weight, weight, 1e-5, 0.0
            way = dict(tolerance=2 * tolerance)
            compare(f"residual_norm {name}", device, summed, h, x, *norms, **way)
            both = torch.randn(n, 2 * size).to(dtype)
            gated = both[:, :size], both[:, size:], "gelu_tanh"
            compare(f"gated_activation {name}", device, ops.gated_activation, *gated, **way)
        q, k = (torch.randn(BATCH, n, heads, head).to(dtype) for heads in (6, 2))
        caches = [torch.randn(BATCH, 2, 9 + n, head).to(dtype) for _ in range(2)]
        weight = torch.ones(6 * head, dtype=dtype)
        norm = "rms", weight, None, weight[: 2 * head], None, 1e-5, 0.0, False
        rows = [q, k, k + 1, *caches]
        rest = prefix, positions, *tables, *norm
        compare(f"rotary_cache {name}", device, cached, *rows, *rest, tolerance=2 * tolerance)
        outside = on(device, torch.tensor([FAR, -FAR, 10]))  # no such slot, nor position
        there, far = on(device, rows), on(device, [positions + FAR, *tables])
        run_outside(device, ops.rotary_cache, *there, outside, *far)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda", help="what is compared with the CPU; cpu tries this program"
    )
    device = parser.parse_args().device
    torch.manual_seed(0)
    failed = False
    for n in NODES:
        for check in (
            check_tree,
            check_drafting,
            check_best_first,
            check_tails,
            check_noise,
            check_commit,
            check_attention,
            check_fused,
        ):
            try:
                check(n, device)
            except Differs as difference:
                print(difference, flush=True)
                failed = True
    if device == "cuda":
        torch.cuda.synchronize()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
