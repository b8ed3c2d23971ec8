"""Gradients of micro-batches that are added where they are kept are those that autograd adds."""

import pytest
import torch

from castalia.config.schema import ModelConfig
from castalia.model.init import initialize
from castalia.model.kept_gradient import add_in_place
from castalia.model.transformer import Transformer

TOKENS = torch.randint(257, (3, 2, 17), generator=torch.Generator().manual_seed(0))  # [micro-batches, b, t]


def make_model(**settings) -> Transformer:
    cfg = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, vocab_size=257, init_std=0.1, **settings)
    model = Transformer(cfg)
    initialize(model, cfg, seed=1)
    return model


def gradients(model, in_place: bool) -> dict[str, torch.Tensor]:
    if in_place:
        for part in (model.embed, model.head):
            if part is not None:
                add_in_place(part.weight)
    for micro, tokens in enumerate(TOKENS):
        loss, count = model(tokens[:, :-1], tokens[:, 1:])
        before = model.embed.weight.grad
        (loss / count * (micro + 1)).backward()
        assert before is None or model.embed.weight.grad is before
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_embeddings": True}, {"head_bias": True}, {"logit_softcap": 3.0}, {"embedding_multiplier": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_autograd(settings, dtype):
    twins = [make_model(**settings) for _ in range(2)]
    for model in twins:
        model.compute_dtype = dtype
    expected, found = (gradients(model, in_place) for model, in_place in zip(twins, (False, True), strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-6, atol=1e-8, msg=name)


def test_a_graph_that_is_kept_adds_each_time():
    model = make_model()
    add_in_place(model.head.weight)
    loss, _ = model(TOKENS[0, :, :-1], TOKENS[0, :, 1:])
    loss.backward(retain_graph=True)
    once = model.head.weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(model.head.weight.grad, 3 * once)


def test_without_labels_there_is_no_gradient():
    model = make_model()
    loss, count = model(TOKENS[0, :, :-1], torch.full((2, 16), -100))
    loss.backward()
    assert count == 0
    assert not model.head.weight.grad.any()
