"""Random calls of ``generate``, which are equal to plain decoding or refused for a reason."""

import random
import re
from dataclasses import dataclass, field

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import MaxLengthCriteria, StoppingCriteria

from helpers.drafters import RandomDrafter, random_best_first, random_tree
from helpers.families import FAMILIES, VOCAB, tiny_model
from msn_ext import generate
from msn_ext.generation import DRAFTS

ROTARY = "llama llama-bias-mha qwen2 qwen3 mistral mistral-window phi3 olmo2 granite".split()
LEARNED = "gpt2 opt gptj codegen".split()  # tables of positions, which end somewhere
EAGER_ONLY = "gemma2 gptj codegen".split()  # or which does not change
ROPE = {
    "linear": dict(rope_type="linear", factor=2.0, rope_theta=1e4),
    "yarn": dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=16),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
        rope_theta=1e4,
    ),
    "dynamic": dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
}


class EndsAt(StoppingCriteria):
    """Ends rows at some tokens, or the whole batch at a length."""

    def __init__(self, tokens: list[int], length: int = 1 << 30):
        self.tokens, self.length = torch.tensor(tokens), length

    def __call__(self, input_ids, scores, **kwargs):
        long = input_ids.shape[1] >= self.length
        return torch.isin(input_ids[:, -1], self.tokens) | long


class KeepsCount:
    """A processor that a guess would spoil."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + self.calls % 3


def _tokens(rng: random.Random, most: int) -> list[int]:
    return rng.sample(range(3, VOCAB), rng.randint(1, most))


# What changes the text, and can be followed.
OPTIONS = {
    "repetition_penalty": lambda rng: rng.choice([0.8, 1.1, 1.5]),
    "no_repeat_ngram_size": lambda rng: rng.choice([1, 2, 3, 5]),
    "min_new_tokens": lambda rng: rng.randint(1, 20),
    "bad_words_ids": lambda rng: [_tokens(rng, 2) for _ in range(rng.randint(1, 60))],
    "suppress_tokens": lambda rng: _tokens(rng, 9),
    "begin_suppress_tokens": lambda rng: _tokens(rng, 9),
    "sequence_bias": lambda rng: [
        [list(words), rng.uniform(-9, 9)] for words in {tuple(_tokens(rng, 2)) for _ in range(9)}
    ],
    "exponential_decay_length_penalty": lambda rng: (rng.randint(1, 9), rng.choice([1.05, 1.3])),
    "forced_eos_token_id": lambda rng: rng.choice([2, [2, 5]]),
    "forced_bos_token_id": lambda rng: 1,
    "renormalize_logits": lambda rng: True,
    "remove_invalid_values": lambda rng: True,
    "logits_processor": lambda rng: LogitsProcessorList(
        rng.sample(
            [
                RepetitionPenaltyLogitsProcessor(1.3, rng.randint(0, 9)),
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(0.4),
                TopKLogitsWarper(rng.randint(1, 9)),
                TopPLogitsWarper(0.7),
            ],
            rng.randint(1, 3),
        )
    ),
}
SAMPLING = {
    "temperature": lambda rng: rng.choice([0.4, 0.9, 1.6]),
    "top_k": lambda rng: rng.choice([0, 1, 4, 50]),
    "top_p": lambda rng: rng.choice([0.5, 0.95]),
    "min_p": lambda rng: 0.1,
    "typical_p": lambda rng: 0.8,
    "epsilon_cutoff": lambda rng: 0.02,
    "eta_cutoff": lambda rng: 0.05,
}
# What cannot be followed, with what is said of it. It may come to be followed: then it is equal.
REFUSED = {
    "num_beams": (lambda rng: 2, "num_beams is 2"),
    "prompt_lookup_num_tokens": (lambda rng: 3, "prompt_lookup_num_tokens is 3"),
    "use_cache": (lambda rng: False, "use_cache is False"),
    "cache_implementation": (lambda rng: "static", "cache_implementation is 'static'"),
    "guidance_scale": (lambda rng: 1.5, "ClassifierFreeGuidance"),
    "prefix_allowed_tokens_fn": (
        lambda rng: lambda row, ids: [3 + (int(ids[-1]) + k) % (VOCAB - 3) for k in (1, 2, 5)],
        "PrefixConstrainedLogitsProcessor may keep a state",
    ),
    "logits_processor": (lambda rng: LogitsProcessorList([KeepsCount()]), "KeepsCount may keep"),
}


@dataclass
class Case:
    """A call, and why it may be refused.

    Attributes:
        reasons: of the refusals that the case may meet, patterns of their messages.
    """

    family: str
    seed: int
    model: torch.nn.Module = None
    settings: dict = field(default_factory=dict)
    ids: torch.Tensor = None
    mask: torch.Tensor = None
    options: dict = field(default_factory=dict)
    drafts: list = field(default_factory=list)
    engine: str = "auto"
    through_transformers: bool = False
    in_config: bool = False
    reasons: list[str] = field(default_factory=list)

    @classmethod
    def drawn(cls, seed: int) -> "Case":
        rng = random.Random(f"case {seed}")
        case = cls(rng.choice(list(FAMILIES)), seed)
        case._draw_prompts(rng)
        case._draw_options(rng)
        case._draw_model(rng)
        named = [*DRAFTS]
        objects = (random_tree, RandomDrafter, random_best_first)
        case.drafts = [rng.choice(named), rng.choice(named), rng.choice(objects)(rng)]
        case.engine = rng.choice(["auto", "auto", "torch", "native"])
        if case.engine == "native":
            case.reasons.append("engine is 'native', which .* cannot be decoded by")
        case.through_transformers = rng.random() < 0.3
        case.in_config = rng.random() < 0.3
        return case

    def _draw_prompts(self, rng: random.Random) -> None:
        batch, length = rng.choice([1, 1, 2, 3, 4]), rng.choice([1, 2, 5, 9, 14, 30])
        generator = torch.Generator().manual_seed(self.seed)
        self.ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
        self.mask = torch.ones_like(self.ids)
        # Gemma 2 has eager attention alone, which gives NaN at padding in float64.
        if rng.random() < 0.6 and self.family != "gemma2":
            for row in self.mask:  # all of them at times: a whole column is masked then
                row[: rng.randrange(length)] = 0
        if rng.random() < 0.5:
            self.ids[self.mask == 0] = 0

    def _draw_options(self, rng: random.Random) -> None:
        length = rng.choice([1, 2, 7, 20, 40])
        self.options = {
            "do_sample": rng.random() < 0.3,
            "eos_token_id": rng.choice([None, None, 2, [2, 5], [3, 8, 11]]),
            "pad_token_id": rng.choice([0, 2]),
            **rng.choice([{"max_new_tokens": length}, {"max_length": self.ids.shape[1] + length}]),
        }
        for name in rng.sample(list(OPTIONS), rng.choice([0, 0, 1, 1, 2, 4])):
            self.options[name] = OPTIONS[name](rng)
        if "exponential_decay_length_penalty" in self.options:
            self.options["eos_token_id"] = 2  # which it is of
        if self.options["do_sample"]:
            for name in rng.sample(list(SAMPLING), rng.randint(0, 2)):
                self.options[name] = SAMPLING[name](rng)
            if OPTIONS.keys() & self.options.keys():
                self.options.pop("eta_cutoff", None)  # fails at tokens that others have forbidden
            self.options["num_return_sequences"] = rng.choice([1, 1, 3])
        criteria = [
            EndsAt(_tokens(rng, 3)),
            EndsAt([], self.ids.shape[1] + rng.randint(1, 20)),
            MaxLengthCriteria(self.ids.shape[1] + rng.randint(1, 20)),
        ]
        if rng.random() < 0.3:
            self.options["stopping_criteria"] = rng.sample(criteria, rng.randint(1, 2))
        if rng.random() < 0.08:
            name = rng.choice(list(REFUSED))
            make, reason = REFUSED[name]
            self.options[name] = make(rng)
            self.reasons.append(reason)

    def _draw_model(self, rng: random.Random) -> None:
        settings = self.settings
        longest = self.ids.shape[1] + self.new_tokens
        if self.family not in ("gemma3", "smollm3", *LEARNED[:1], *LEARNED[2:]):
            settings["num_hidden_layers"] = rng.choice([1, 2, 2, 3])
        if self.family in ROTARY:
            settings["tie_word_embeddings"] = rng.random() < 0.3
            settings["hidden_size"] = rng.choice([16, 24, 40])
            if rng.random() < 0.3 and self.family != "phi3":  # which knows longrope alone
                kind = rng.choice(list(ROPE))
                settings["rope_parameters"] = ROPE[kind]
                if kind == "dynamic":
                    self.reasons.append("rope_type='dynamic'")
        if self.family in LEARNED and rng.random() < 0.5:
            tight = max(longest - 1, 1)  # the last token is not read again
            settings["max_position_embeddings"] = tight
            if self.family != "opt":
                settings["n_positions"] = tight
        if rng.random() < 0.1 and self.family != "phi3-longrope":
            settings["is_causal"] = False
        if self.family == "gemma3" and rng.random() < 0.2:
            settings["use_bidirectional_attention"] = True
        rows = len(self.ids) * self.options.get("num_return_sequences", 1)
        if self.family == "phi3-longrope" and rows > 1:
            self.reasons.append("longrope")
        self.model = tiny_model(self.family, self.seed, **settings)
        if self.family not in EAGER_ONLY and rng.random() < 0.25:
            self.model.set_attn_implementation("eager")

    @property
    def new_tokens(self) -> int:
        """Which a criterion of the user's settles, where there is one."""
        for each in self.options.get("stopping_criteria", ()):
            if isinstance(each, MaxLengthCriteria):
                return each.max_length - self.ids.shape[1]
        most = self.options.get("max_new_tokens")
        return most or self.options["max_length"] - self.ids.shape[1]

    def gives_nan(self) -> bool:
        """Whether the model's own prompt pass does: transformers' plain decoding is none then."""
        with torch.no_grad():
            logits = self.model(self.ids, attention_mask=self.mask).logits
        return bool(logits[:, -1].isnan().any())

    def _arguments(self) -> dict:
        """What both ways of decoding are called with; new processors, which may keep a state."""
        options = dict(self.options)
        if "logits_processor" in options:
            options["logits_processor"] = LogitsProcessorList(
                KeepsCount() if isinstance(each, KeepsCount) else each
                for each in options["logits_processor"]
            )
        if self.in_config:
            objects = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
            inside = {name: options.pop(name) for name in list(options) if name not in objects}
            options["generation_config"] = GenerationConfig(**inside)
        return options | {"attention_mask": self.mask, "return_dict_in_generate": True}

    def plain(self):
        torch.manual_seed(self.seed)
        return self.model.generate(self.ids, **self._arguments()).sequences

    def _plain_raises(self) -> bool:
        try:
            self.plain()
        except (ValueError, RuntimeError, IndexError):
            return True
        return False

    def ours(self, draft, engine=None):
        torch.manual_seed(self.seed)
        arguments = self._arguments() | {"draft": draft, "engine": engine or self.engine}
        if self.through_transformers:
            return self.model.generate(self.ids, custom_generate=generate, **arguments)
        return generate(self.model, self.ids, **arguments)

    def __str__(self) -> str:
        return (
            f"{self.seed}: {self.family} {self.settings} {self.model.config._attn_implementation}"
            f" engine={self.engine} through={self.through_transformers} config={self.in_config}\n"
            f"{self.options}\nprompts {self.ids.tolist()}\nmask {self.mask.tolist()}"
        )

    def check(self) -> str:
        """Compare with plain decoding; return "equal", "same" (sampled: for every draft) or the
        refusal that it has.
        """
        nan = self.gives_nan()
        if nan:
            self.reasons.append("hold NaN or infinity.*left padding")
        try:
            outputs = [self.ours(draft) for draft in self.drafts]
        except ValueError as error:
            reason = next((each for each in self.reasons if re.search(each, str(error))), None)
            assert reason or self._plain_raises(), f"refused: {error}\n{self}"
            return reason or "an error in plain decoding"
        if nan:
            assert outputs[0].engine == "native", f"NaN is no text\n{self}"
            self.model.set_attn_implementation("sdpa")
        sampled = self.options["do_sample"] and self.options.get("top_k") != 1
        expected = self.ours("none").sequences if sampled else self.plain()
        for draft, out in zip(self.drafts, outputs):
            assert torch.equal(out.sequences, expected), (
                f"draft={draft}\nours  {out.sequences.tolist()}\nplain {expected.tolist()}\n{self}"
            )
        return "same" if sampled else "equal"
