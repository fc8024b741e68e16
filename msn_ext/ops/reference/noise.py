"""The op of noisy training, specified."""

import torch

from msn_ext.ops import ATTEMPTS, NO_LABEL

from .rules import MASK64, counter_bits, splitmix64


def draw_noise(
    input_ids,
    labels,
    samples,
    keep_token_ids,
    starts,
    seed,
    length,
    random=0.0,
    vocabulary=0,
    apart=True,
):
    starts, keep = starts.clone(), set(keep_token_ids.tolist())
    noise = torch.full((*starts.shape, length), -1)
    for d, (row, begin, end) in enumerate(samples.tolist()):
        tokens, response = input_ids[row].tolist(), (labels[row] != NO_LABEL).tolist()
        response = [begin < at < end and response[at] for at in range(len(tokens))]
        size = [0] * (len(tokens) + 1)  # of a segment that starts here
        for at in reversed(range(len(tokens))):
            size[at] = min(size[at + 1] + 1, length) if response[at] else 0
        open_ = [
            at
            for at in range(begin, end)
            if size[at] == length or (response[at] and not response[at - 1])
        ]
        identity = sum(
            splitmix64(tokens[at] & MASK64 ^ splitmix64(at - begin)) for at in range(begin, end)
        )
        key = splitmix64(seed & MASK64) ^ identity & MASK64
        for s in range(starts.shape[1]):
            start = int(starts[d, s])
            if start < 0 and open_:
                start = open_[counter_bits(key, s, 0, 0) % len(open_)]
            if start < 0:
                continue
            if not (start < len(tokens) and response[start]):
                raise ValueError(
                    f"starts[{d}, {s}] is {start}; expected -1 or a place in the sample's response"
                )
            starts[d, s] = start
            for i in range(size[start]):
                noise[d, s, i] = _draw_token(
                    tokens, begin, start + i, key, s, 1 + i, keep, random, vocabulary
                )
            if apart:
                open_ = [at for at in open_ if at + size[at] <= start or at >= start + size[start]]
            else:
                open_ = [at for at in open_ if at != start]
    return starts, noise.to(starts.device)


def _draw_token(tokens, begin, at, key, segment, place, keep, random, vocabulary):
    if tokens[at] in keep:
        return tokens[at]
    from_vocabulary = (counter_bits(key, segment, place, MASK64) >> 10) < random * 2.0**53
    for attempt in range(ATTEMPTS):
        bits = counter_bits(key, segment, place, attempt)
        token = bits % vocabulary if from_vocabulary else tokens[begin + bits % (at - begin)]
        if token not in keep:
            return token
    return tokens[at]
