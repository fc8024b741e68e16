"""What add_noise refuses: models that are not causal, losses that are not cross-entropy, names."""

import pytest
import torch

from helpers.families import VOCAB
from helpers.trainers import trainer_for
from msn_ext import NoisyCollator, add_noise

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SIZES = dict(vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, intermediate_size=16)


def bert(kind: str, **settings):
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1, **settings)
    return getattr(transformers, kind)(config)


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        )
    )


def modernbert():
    config = transformers.ModernBertConfig(**SIZES, num_hidden_layers=1, pad_token_id=0)
    return transformers.ModernBertForMaskedLM(config)


@pytest.mark.parametrize(
    "model, why",
    [
        (lambda: bert("BertForMaskedLM"), "BertForMaskedLM, which does not generate text"),
        (lambda: bert("BertLMHeadModel"), "BertLMHeadModel, which looks at the tokens after"),
        (modernbert, "ModernBertForMaskedLM, which does not generate text"),
        (t5, "T5ForConditionalGeneration, an encoder-decoder model"),
    ],
    ids=["masked", "both ways", "modern", "encoder-decoder"],
)
@pytest.mark.parametrize("layout", ["replace", "branch"])
def test_models_that_are_not_causal(tmp_path, model, why, layout):
    trainer = trainer_for(tmp_path, model())
    with pytest.raises(ValueError, match=f"{why}.*expected a causal language model"):
        add_noise(trainer, layout=layout)
    assert not isinstance(trainer.data_collator, NoisyCollator)


def test_a_model_that_is_told_to_be_causal(tmp_path):
    add_noise(trainer_for(tmp_path, bert("BertLMHeadModel", is_decoder=True)), layout="replace")


def test_a_misspelt_setting_is_named(tmp_path):
    trainer = trainer_for(tmp_path)
    with pytest.raises(TypeError, match=r"add_noise\(\) has no setting 'layuot'; expected.*layout"):
        add_noise(trainer, layuot="branch")
    with pytest.raises(TypeError, match="has no setting 'config'"):
        add_noise(trainer, config=trainer.model.config)


class Halved(transformers.Trainer):
    """With a loss of its own, as people write them."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) / 2


class Further(Halved):
    pass


@pytest.mark.parametrize("kind", [Halved, Further])
def test_weights_do_not_take_the_place_of_a_loss_of_ones_own(tmp_path, kind):
    """Without weights that loss is the one that is learned."""
    with pytest.raises(ValueError, match="the trainer has the compute_loss of Halved"):
        add_noise(trainer_for(tmp_path, kind=kind), loss_weights=(1.0, 0.5))
    add_noise(trainer_for(tmp_path, kind=kind))


def test_a_loss_that_was_put_into_a_trainer(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: torch.zeros((), requires_grad=True)
    with pytest.raises(ValueError, match="the trainer has a compute_loss of its own"):
        add_noise(trainer, loss_weights=(1.0, 0.5))
