"""The modern model and its plain twin compute the same function; its file says why it differs from model.py."""
import ast
import difflib
import re
from pathlib import Path

import pytest
import torch

import model
import model_modern
import model_modern_trivialised as plain
from plaingpt import muon

ROOT = Path(__file__).parents[1]
MARK = 'gain:'


def config(shortcuts: bool = True) -> model.GPTConfig:
    return model.GPTConfig(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32, bias=False, tie_weights=False,
                           arch='modern', shortcuts=shortcuts)


@torch.no_grad()
def twins(shortcuts: bool) -> tuple[model_modern.GPT, plain.GPT]:
    """Return twins with the same parameters, in float64, all of them random: none is 0, so that none can be left out
    unseen."""
    torch.manual_seed(1)
    fast = model_modern.GPT(config(shortcuts)).double()
    for p in fast.parameters():
        p.normal_(0.0, 0.5)
    other = plain.GPT(config(shortcuts)).double()
    other.load_state_dict(fast.state_dict(), strict=True)
    return fast, other


@pytest.mark.parametrize('shortcuts', [True, False])
@pytest.mark.parametrize('T', [1, 16, 40])  # one token, a block, and more than a block: each token sees the last 16
def test_logits_loss_and_every_gradient_of_the_modern_twins_are_equal(T: int, shortcuts: bool) -> None:
    tokens = torch.randint(61, (3, T + 1), generator=torch.Generator().manual_seed(2))
    fast, other = twins(shortcuts)
    fast_logits, fast_loss = fast(tokens[:, :-1], tokens[:, 1:])
    plain_logits, plain_loss = other(tokens[:, :-1], tokens[:, 1:])
    fast_loss.backward()
    plain_loss.backward()
    torch.testing.assert_close(fast_logits, plain_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(fast_loss, plain_loss, rtol=0, atol=1e-9)
    of_plain = dict(other.named_parameters())
    for name, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, of_plain[name].grad, rtol=0, atol=1e-9, msg=name)
        assert p.grad is not None
        assert p.grad.any() or (T == 1 and 'c_attn' not in name), f'{name} has no part in the loss'


def test_the_same_seed_draws_the_same_first_weights_in_both_modern_twins() -> None:
    torch.manual_seed(1337)
    fast = model_modern.GPT(config()).state_dict()
    after_fast = torch.get_rng_state()
    torch.manual_seed(1337)
    other = plain.GPT(config()).state_dict()
    assert list(fast) == list(other)
    assert all(torch.equal(fast[name], other[name]) for name in fast)
    assert torch.equal(after_fast, torch.get_rng_state()), 'later draws would differ'


@pytest.mark.parametrize('parts', [1, 3])
@pytest.mark.parametrize('shape', [(8, 8), (32, 8), (8, 32)])
def test_three_steps_of_muon_are_those_of_its_plain_rule(shape: tuple[int, int], parts: int) -> None:
    m, n = shape
    weights = [torch.nn.Parameter(torch.randn(parts * m, n, dtype=torch.float64)) for _ in range(2)]
    by_rule = [[part.clone() for part in p.detach().split(m)] for p in weights]
    means = [[torch.zeros_like(part) for part in those] for those in by_rule]
    group = {'params': weights, 'parts': parts, 'weight_decay': 0.1, 'momentum': 0.0}
    optimizer = muon.Muon([group, {'params': [torch.nn.Parameter(torch.ones(1))]}], 0.02, (0.8, 0.95))
    for momentum in (0.85, 0.9, 0.95):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.param_groups[0]['momentum'] = momentum
        optimizer.step()
        for p, those, mean in zip(weights, by_rule, means, strict=True):
            assert p.grad is not None
            for i, gradient in enumerate(p.grad.split(m)):
                those[i], mean[i] = plain.muon(those[i], gradient, mean[i], 0.02, 0.1, momentum)
            torch.testing.assert_close(p.detach(), torch.cat(those), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------
# Marks


def definitions(source: str) -> dict[str, list[str]]:
    """Return the lines of each function and method of a file, and under '' and the names of classes all other lines;
    without imports, docstrings and blank lines."""
    tree, lines = ast.parse(source), source.splitlines()
    owner = [''] * len(lines)
    keep = [bool(line.strip()) for line in lines]

    def own(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                label = f'{name}.{child.name}'.strip('.')
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)]) - 1
                while lines[first - 1].strip().startswith('#'):  # a comment above belongs to the definition
                    first -= 1
                owner[first:child.end_lineno] = [label] * ((child.end_lineno or 0) - first)
                if isinstance(child, ast.ClassDef):
                    own(child, label)

    own(tree, '')
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            keep[node.lineno - 1:node.end_lineno] = [False] * ((node.end_lineno or 0) - node.lineno + 1)
        if isinstance(node, ast.ClassDef):
            keep[node.lineno - 1] = False  # the base class changes nothing by itself
    found: dict[str, list[str]] = {}
    for line, name, is_kept in zip(lines, owner, keep, strict=True):
        line = re.sub(r' *# (fast|more): .*', '', line)  # these speak of another file
        if is_kept and line:
            found.setdefault(name, []).append(line.rstrip())
    return found


def unmarked(old_source: str, new_source: str) -> list[str]:
    """Return the hunks in which a definition of the new file differs from that of the same name in the old one, and
    that do not say what is gained, and by which source. Definitions of the old file alone are inherited, or
    imported."""
    old, new = definitions(old_source), definitions(new_source)
    hunks = []
    for name, lines in new.items():
        before = old.get(name, [])
        changes = difflib.SequenceMatcher(None, before, lines, autojunk=False).get_opcodes()
        hunks += ['\n'.join([*('< ' + line for line in before[a:b]), *('> ' + line for line in lines[c:d])])
                  for kind, a, b, c, d in changes if kind != 'equal']
    assert len(hunks) > 10
    source = rf'{MARK}[^(]*\(.*(\d|nanoGPT|modded-nanogpt)\)'
    return [hunk for hunk in hunks if not re.search(source, hunk, re.DOTALL)]


def test_every_difference_of_the_modern_model_says_what_is_gained() -> None:
    old, new = ((ROOT / name).read_text(encoding='utf-8') for name in ('model.py', 'model_modern.py'))
    assert unmarked(old, new) == []
    # and a difference that does not state its reason would be found
    line = '        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)\n'
    assert new.count(line) == 1
    assert unmarked(old, new.replace(line, line.replace('q, k', 'k, q')))


def test_the_page_names_every_record_that_a_mark_names() -> None:
    page = (ROOT / 'docs/modern.md').read_text(encoding='utf-8')
    marks = re.findall(rf'{MARK}.*', (ROOT / 'model_modern.py').read_text(encoding='utf-8'))
    records = {number for mark in marks for number in re.findall(r'(?:records?|and) (\d+)', mark)}
    assert records == {'2', '5', '8', '9', '18'}
    assert records <= set(re.findall(r'record (\d+)', page))


def test_the_modern_files_are_short() -> None:
    for name, most in (('model_modern.py', 150), ('model_modern_trivialised.py', 150), ('plaingpt/muon.py', 100)):
        assert len((ROOT / name).read_text(encoding='utf-8').splitlines()) <= most


def test_the_plain_modern_model_writes_out_what_it_explains() -> None:
    tree = ast.parse((ROOT / 'model_modern_trivialised.py').read_text(encoding='utf-8'))
    imports = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert imports == {'import math', 'import torch', 'import torch.nn as nn', 'from torch import Tensor',
                       'from model import GPTConfig', 'from model_trivialised import softmax'}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_nn = {node.attr for node in attributes if ast.unparse(node.value) == 'nn'}
    assert of_nn == {'Module', 'ModuleList', 'Parameter', 'Linear', 'Embedding'}
