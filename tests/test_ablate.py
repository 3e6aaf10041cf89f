"""The model of benchmarks/ablate.py is GPT-2 without changes, and the modern model with all of them."""
import importlib
from dataclasses import replace

import pytest
import torch

import model
import model_modern
from plaingpt.formats.weights import gpt_class

ablate = importlib.import_module('benchmarks.ablate')
SMALL = model.GPTConfig(block_size=16, vocab_size=61, n_layer=3, n_head=2, n_embd=32, bias=False)
CONFIGS = {'GPT2': SMALL, 'MODERN': replace(SMALL, tie_weights=False, arch='modern', shortcuts=True)}


@pytest.mark.parametrize('end', CONFIGS)
def test_each_end_of_the_ablation_is_a_model_of_this_project(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate.Mixed, 'changes', getattr(ablate, end))
    config = CONFIGS[end]
    torch.manual_seed(1)
    mixed = ablate.Mixed(config)
    torch.manual_seed(1)
    whole = gpt_class(config)(config)
    assert isinstance(whole, {'GPT2': model.GPT, 'MODERN': model_modern.GPT}[end])
    tokens = torch.randint(61, (3, 17))
    with torch.no_grad():
        for p, other in zip(mixed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, other), 'the same weights at first'
            p.add_(0.3 * torch.randn_like(p))
            other.copy_(p)
        logits, loss = mixed(tokens[:, :-1], tokens[:, 1:])
        others_logits, others_loss = whole(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(logits, others_logits)
    torch.testing.assert_close(loss, others_loss)


def test_each_change_alone_makes_another_model_of_modern() -> None:
    rows = ablate.variants()
    n = len(ablate.CHANGES)
    assert len(rows) == 2 * n + 1
    assert next(iter(rows.values())) == ablate.GPT2 and list(rows.values())[n] == ablate.MODERN
    assert all(len(ablate.MODERN - changes) == 1 for changes in list(rows.values())[n + 1:])
