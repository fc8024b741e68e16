"""A second opinion on noise: the generator, as it was published, and what a seed draws."""


class SplitMix64:
    """The generator as published (Steele, Lea, Flood 2014): a Weyl sequence, then a mix."""

    def __init__(self, seed: int):
        self.state = seed % 2**64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        for shift, factor in [(30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)]:
            z = (z ^ z // 2**shift) * factor % 2**64
        return z ^ z // 2**31


def noise_index(seed: int, row: int, length: int, depth: int, node: int) -> int:
    """Which of ``length`` tokens the ahead noise of a node is."""
    state = seed % 2**64 ^ SplitMix64(row).next()
    for counter in (length + depth, node):
        state = SplitMix64(state).next() ^ counter
    return SplitMix64(state).next() // 2 % length
