"""The plain file and the fast one: both compute the same function, and each difference of their texts says why."""
import ast
import difflib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model
import model_trivialised

ROOT = Path(__file__).parents[1]
MARKS = ('fast:', 'more:')


def config(bias: bool = True) -> model.GPTConfig:
    return model.GPTConfig(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32, bias=bias)


@torch.no_grad()
def twins(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[model.GPT, model_trivialised.GPT]:
    """Return twins with the same parameters, all of them random: gains and biases too, so that none can be left out
    unseen."""
    torch.manual_seed(1)
    fast = model.GPT(config(bias)).to(dtype)
    for name, p in fast.named_parameters():
        p.normal_(1.0 if 'ln_' in name and name.endswith('weight') else 0.0, 0.3)
    plain = model_trivialised.GPT(config(bias)).to(dtype)
    plain.load_state_dict(fast.state_dict(), strict=True)
    return fast, plain


def batch(T: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, each (B, T)."""
    tokens = torch.randint(61, (3, T + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize('bias', [True, False])
def test_either_twin_takes_the_weights_of_the_other(bias: bool) -> None:
    fast, plain = model.GPT(config(bias)), model_trivialised.GPT(config(bias))
    assert list(fast.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fast.state_dict(), strict=True)
    fast.load_state_dict(plain.state_dict(), strict=True)
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in plain.parameters())


# The tolerance is absolute, relative only to the largest gradient of all: some gradients, such as those of the keys'
# biases, are 0 on paper, and so nothing but rounding here. The longest sums have 128 terms, the width of the MLP, and
# there are a dozen in a row: together they round by less than a thousand roundings, and in float64 that is less than
# any mistake.
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('T', [1, 16])
def test_logits_loss_and_every_gradient_of_the_twins_are_equal(T: int, bias: bool, dtype: torch.dtype) -> None:
    x, y = batch(T)
    fast, plain = twins(bias, dtype)
    rounding = 1000 * torch.finfo(dtype).eps
    fast_logits, fast_loss = fast(x, y)
    plain_logits, plain_loss = plain(x, y)
    fast_loss.backward()
    plain_loss.backward()

    torch.testing.assert_close(fast_logits, plain_logits, rtol=0, atol=rounding * plain_logits.abs().max().item())
    torch.testing.assert_close(fast_loss, plain_loss, rtol=rounding, atol=0)
    assert fast_loss > 1, 'a loss near 0 would prove little'
    of_plain = dict(plain.named_parameters())
    scale = max(p.grad.abs().max().item() for p in of_plain.values() if p.grad is not None)
    for name, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, of_plain[name].grad, rtol=0, atol=rounding * scale, msg=name)
        assert p.grad is not None and p.grad.any(), f'{name} has no part in the loss'


@pytest.mark.parametrize(('dtype', 'factor'), [(torch.float32, 100), (torch.float64, 1000)])
@torch.no_grad()
def test_scores_whose_exponentials_overflow_do_no_harm_to_either_twin(dtype: torch.dtype, factor: int) -> None:
    x, y = batch(16)
    fast, plain = twins(dtype=dtype)
    for p in (fast.lm_head.weight, fast.transformer.h[0].get_parameter('attn.c_attn.weight')):
        p *= factor  # the table is tied, and LayerNorm normalises what it embeds
    plain.load_state_dict(fast.state_dict())
    (fast_logits, fast_loss), (plain_logits, plain_loss) = fast(x, y), plain(x, y)
    assert plain_logits.abs().max() > math.log(torch.finfo(dtype).max)
    assert fast_logits.isfinite().all() and plain_logits.isfinite().all()
    if dtype == torch.float64:  # such scores leave float32 three digits
        torch.testing.assert_close(fast_logits, plain_logits, rtol=0, atol=1e-6 * plain_logits.abs().max().item())
        torch.testing.assert_close(fast_loss, plain_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize('bias', [True, False])
def test_the_same_seed_draws_the_same_first_weights_in_both_twins(bias: bool) -> None:
    torch.manual_seed(1337)
    fast = model.GPT(config(bias)).state_dict()
    after_fast = torch.get_rng_state()
    torch.manual_seed(1337)
    plain = model_trivialised.GPT(config(bias)).state_dict()
    assert all(torch.equal(fast[name], plain[name]) for name in fast)
    assert torch.equal(after_fast, torch.get_rng_state()), 'later draws would differ'


def test_the_plain_twin_writes_the_same_text_for_the_same_seed() -> None:
    fast, plain = twins()
    fast, plain, prompt = fast.double(), plain.double(), batch(5)[0]
    plain_text = plain.generate(prompt, 30, seed=3)  # past block_size
    assert torch.equal(fast.generate(prompt, 30, seed=3), plain_text)
    assert not torch.equal(fast.generate(prompt, 30, seed=4), plain_text)


def without_imports_and_docstrings(source: str) -> list[str]:
    """Return the lines of a Python text that compute something or say why: no imports, docstrings or blank lines."""
    tree, lines = ast.parse(source), source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            drop: ast.stmt = node
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            drop = node.body[0]
        else:
            continue
        for number in range(drop.lineno, (drop.end_lineno or drop.lineno) + 1):
            lines[number - 1] = ''
    return [line.rstrip() for line in lines if line.strip()]


def unmarked(plain: str, fast: str) -> list[str]:
    """Return the hunks of `diff plain fast`, except imports and docstrings, that do not state their reason."""
    old, new = without_imports_and_docstrings(plain), without_imports_and_docstrings(fast)
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    hunks = ['\n'.join([*('< ' + line for line in old[a:b]), *('> ' + line for line in new[c:d])])
             for kind, a, b, c, d in changes if kind != 'equal']
    assert hunks
    return [hunk for hunk in hunks if not any(mark in hunk for mark in MARKS)]


def test_every_difference_between_the_twins_is_marked_as_fast_or_more() -> None:
    plain, fast = ((ROOT / name).read_text(encoding='utf-8') for name in ('model_trivialised.py', 'model.py'))
    assert unmarked(plain, fast) == []

    # and a difference that does not state its reason would be found, on either side
    line = '        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)\n'
    other = line.replace('config.bias', 'True')
    assert plain.count(line) == fast.count(line) == 1
    assert unmarked(plain, fast.replace(line, other)) == [f'< {line}> {other}'.rstrip()]
    assert unmarked(plain.replace(line, line + other), fast) == [f'< {other}'.rstrip()]
    assert unmarked(plain, fast.replace(line, '')) == [f'< {line}'.rstrip()]
    # while imports and docstrings may differ
    assert unmarked(plain.replace('import math\n', '').replace('"""One layer', '"""Layer'), fast) == []


def test_the_plain_twin_writes_out_what_it_explains() -> None:
    tree = ast.parse((ROOT / 'model_trivialised.py').read_text(encoding='utf-8'))
    imports = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert imports == {'import math', 'import torch', 'import torch.nn as nn', 'from torch import Tensor',
                       'from model import GPTConfig', 'from plaingpt.chance import draw'}

    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_nn = {node.attr for node in attributes if ast.unparse(node.value) == 'nn'}
    assert of_nn == {'Module', 'ModuleList', 'Parameter', 'Linear', 'Embedding'}
    ready_made = {'functional', 'softmax', 'log_softmax', 'logsumexp', 'var', 'gelu', 'layer_norm', 'cross_entropy'}
    assert not ready_made & {node.attr for node in attributes if ast.unparse(node.value) != 'config'}


@pytest.mark.parametrize('another', [{'gelu': 'exact'}, {'tie_weights': False},
                                     {'arch': 'modern', 'bias': False, 'tie_weights': False}])
def test_the_plain_twin_refuses_another_model_than_gpt_2_rather_than_computing_it_wrongly(
        another: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='another model'):
        model_trivialised.GPT(replace(config(), **another))


@pytest.mark.parametrize(('name', 'most'), [('model', 170), ('train', 125), ('parallel', 110)])
def test_the_plain_files_stay_short(name: str, most: int) -> None:
    assert len((ROOT / f'{name}_trivialised.py').read_text(encoding='utf-8').splitlines()) <= most
