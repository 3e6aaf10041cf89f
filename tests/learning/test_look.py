"""The tables and lenses that look() shows of a model are what the model's own parts compute: each of them, in every
kind of model."""
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, GPTConfig
from plaingpt.formats.weights import gpt_class
from plaingpt.learning.look import look, predictions

MODERN: dict[str, Any] = {'arch': 'modern', 'bias': False, 'tie_weights': False}
KINDS: dict[str, dict[str, Any]] = {
    'gpt2': {}, 'without biases': {'bias': False}, 'exact GELU': {'gelu': 'exact'}, 'untied': {'tie_weights': False},
    'modern': MODERN, 'modern with shortcuts': {**MODERN, 'shortcuts': True},
}
T = 16
kinds = pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)


@torch.no_grad()
def model_of(kind: dict[str, Any]) -> GPT:
    """Return a model in float64 whose weights are all random, gains and shares too, so that none can be left out
    unseen."""
    config = GPTConfig(**{'block_size': T, 'vocab_size': 61, 'n_layer': 3, 'n_head': 4, 'n_embd': 32, **kind})
    model = gpt_class(config)(config).double().eval()
    for name, p in model.named_parameters():
        p.normal_(1.0 if 'ln_' in name and name.endswith('weight') else 0.0, 0.3)
    return model


def some_tokens() -> Tensor:
    return torch.randint(61, (1, T))


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@kinds
def test_each_table_is_the_one_that_the_kernel_does_not_store(
        kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = F.scaled_dot_product_attention, list[tuple[Tensor, Tensor]]()

    def watched(q: Tensor, k: Tensor, v: Tensor, *others: Any, **more: Any) -> Tensor:
        calls.append((v[0], kernel(q, k, v, *others, **more)[0]))
        return calls[-1][1][None]

    monkeypatch.setattr(F, 'scaled_dot_product_attention', watched)
    model = model_of(kind)
    tables = look(model, some_tokens()).tables
    assert len(tables) == len(calls) == model.config.n_layer
    for table, (v, result) in zip(tables, calls, strict=True):
        same(table @ v, result)  # each (H, T, D)
        same(table.sum(dim=-1), torch.ones(4, T, dtype=torch.float64))
        assert (table >= 0).all() and (table.triu(1) == 0).all(), 'no token sees later tokens'
        assert (table[:, 1:, 0] < 1).all() and table.std() > 0.05, 'the heads look at several tokens'


@kinds
@torch.no_grad()
def test_each_lens_is_what_the_model_would_predict_without_the_layers_above(kind: dict[str, Any]) -> None:
    model, idx = model_of(kind), some_tokens()
    layers = model.transformer.h
    lens = look(model, idx).lens
    assert len(lens) == len(layers) + 1
    for n, logs in enumerate(lens):
        model.transformer.h = layers[:n]
        same(logs, model(idx)[0][0].log_softmax(dim=-1))
    assert torch.equal(lens[-1], model(idx)[0][0].log_softmax(dim=-1)), 'the last one is the model itself'
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(lens)), 'each layer does something'


@kinds
def test_a_model_is_left_as_it_was(kind: dict[str, Any]) -> None:
    model, idx = model_of(kind), some_tokens()
    before = model(idx)[0]
    look(model, idx)
    with pytest.raises(IndexError):
        look(model, idx + 61)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(AssertionError, match='dropout'):
        look(model.train(), idx)


@torch.no_grad()
def test_predictions_are_made_at_the_token_before() -> None:
    model, idx = model_of({}), some_tokens()
    ids = idx[0].tolist()
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    found = predictions(look(model, idx).lens, ids, top=3, n_vocab=61)
    assert len(found) == T - 1
    assert sum(one.nats for one in found) / len(found) == pytest.approx(loss.item())
    p = logits[0].softmax(dim=-1)  # (T - 1, V)
    for t, one in enumerate(found):
        assert [i for i, _ in one.best] == p[t].argsort(descending=True)[:3].tolist()
        assert [q for _, q in one.best] == pytest.approx(p[t].sort(descending=True).values[:3].tolist())
        assert one.rank == p[t].argsort(descending=True).tolist().index(ids[t + 1]) + 1
        assert len(one.lens) == 4 and one.lens[-1][0] == one.best[0][0]
        assert one.lens[-1][1:] == pytest.approx((one.best[0][1], p[t, ids[t + 1]].item()))


def test_ids_that_pad_the_vocabulary_are_never_expected() -> None:
    model = model_of({'tie_weights': False})
    with torch.no_grad():
        model.lm_head.weight[50:] *= 100
    lens = look(model, some_tokens() % 50).lens
    assert (lens[-1].argmax(dim=-1) >= 50).any(), 'padding ids would be expected if probabilities decided'
    found = predictions(lens, [0] * T, top=100, n_vocab=50)
    assert all(len(one.best) == 50 and one.rank <= 50 and i < 50 for one in found for i, _ in one.best)
