"""Muon: the directions of a gradient, the groups and their rates, and each weight's update by its own rule."""
import math

import pytest
import torch
from torch import Tensor

import model_modern
import model_modern_trivialised as plain
import train
from model import GPTConfig
from plaingpt import muon
from plaingpt.chance import draw
from tests.comparing import ROUNDING, give

SHAPES = [(8, 8), (32, 8), (8, 32), (64, 64), (128, 512), (512, 128)]
MODERN = {'learning_rate': 0.025, 'weight_decay': 0.05, 'beta1': 0.8, 'beta2': 0.95, 'schedule': 'wsd', 'min_lr': 0.0,
          'decay_fraction': 0.7, 'warmup_iters': 0}


def modern(n_embd: int = 16, n_layer: int = 2, shortcuts: bool = True) -> model_modern.GPT:
    torch.manual_seed(1)
    return model_modern.GPT(GPTConfig(16, 61, n_layer, 2, n_embd, bias=False, tie_weights=False, arch='modern',
                                      shortcuts=shortcuts))


def factors(m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random U (m, r) and V (n, r) with orthogonal columns, and singular values (r,) from 1 to 1/100: r is the
    smaller side."""
    source, r = torch.Generator().manual_seed(draw(seed, m, n)), min(m, n)
    u, v = (torch.linalg.qr(torch.randn(side, r, generator=source, dtype=torch.float64))[0] for side in (m, n))
    return u, 10 ** torch.linspace(0, -2, r, dtype=torch.float64), v


def matrix(m: int, n: int, seed: int = 0) -> Tensor:
    u, s, v = factors(m, n, seed)
    return u * s @ v.T


def orthogonal(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return muon.orthogonalise(x[None], dtype)[0]


# ------------------------------------------------------------------------------------------------
# Directions


@pytest.mark.parametrize(('m', 'n'), SHAPES)
def test_singular_values_go_to_1_and_directions_stay(m: int, n: int) -> None:
    u, s, v = factors(m, n)
    found = u.T @ orthogonal(u * s @ v.T) @ v  # (r, r), diagonal if it has the same directions
    new = found.diagonal()
    assert new.min() >= 0.65 and new.max() <= 1.25, 'each is positive, and none is far from 1'
    torch.testing.assert_close(found, new.diag(), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(torch.linalg.svdvals(orthogonal(matrix(m, n))), new.sort(descending=True).values,
                               rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(('m', 'n'), SHAPES)
def test_neither_the_orientation_nor_the_size_of_a_matrix_matters(m: int, n: int) -> None:
    x = matrix(m, n)
    right = orthogonal(x)
    torch.testing.assert_close(orthogonal(x.T), right.T, rtol=0, atol=ROUNDING)
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(orthogonal(factor * x), right, rtol=0, atol=1e-3)  # Muon adds 1e-7 to the length


def test_a_stack_is_orthogonalised_matrix_by_matrix() -> None:
    """One matrix is a thousand times larger than the others, and one is 0, which stays 0."""
    stack = torch.stack([matrix(8, 32, seed) for seed in range(5)])
    stack[1] *= 1000
    stack[3] = 0
    found = muon.orthogonalise(stack, torch.float64)
    for one, x in zip(found, stack, strict=True):
        torch.testing.assert_close(one, orthogonal(x), rtol=0, atol=ROUNDING)
    assert not found[3].any() and found.isfinite().all()


@pytest.mark.parametrize(('m', 'n'), SHAPES)
def test_bfloat16_products_give_nearly_the_same_in_the_precision_of_the_weights(m: int, n: int) -> None:
    x = matrix(m, n).float()
    exact, found = orthogonal(x, torch.float32), orthogonal(x, torch.bfloat16)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 0.06 * exact.norm()
    new = torch.linalg.svdvals(found)
    assert new.min() >= 0.6 and new.max() <= 1.3
    torch.testing.assert_close(exact.double(), orthogonal(x.double()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(('step', 'expected'), [(0, 0.85), (75, 0.875), (150, 0.9), (300, 0.95), (10_000, 0.95)])
def test_momentum_rises_from_85_to_95_percent_in_300_steps(step: int, expected: float) -> None:
    assert muon.momentum_at(step) == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize('shortcuts', [True, False])
def test_every_parameter_of_the_modern_model_has_one_group_with_its_rate_and_decay(shortcuts: bool) -> None:
    """The width is the one for which they are tuned: 0.7, 0.004 and 0.015 beside Muon's 0.025."""
    give(train, **MODERN)
    model = modern(768, 1, shortcuts)
    optimizer = train.make_optimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    listed = [p for group in optimizer.param_groups for p in group['params']]
    assert len(listed) == len({*listed}) == len(names)
    assert train.set_rates(optimizer, 0, 100) == 0.025

    expected = {'attn.c_attn.weight': (3, 0.025, 0.05), 'attn.c_proj.weight': (1, 0.025, 0.05),
                'mlp.c_fc.weight': (1, 0.025, 0.05), 'mlp.c_proj.weight': (1, 0.025, 0.05),
                'transformer.wte.weight': (0, 0.7, 0.001), 'lm_head.weight': (0, 0.004, 0.001),
                'mix': (0, 0.015, 0.0)}
    for group in optimizer.param_groups:
        for p in group['params']:
            parts, rate, decay = next(rule for name, rule in expected.items() if names[p].endswith(name))
            assert group.get('parts', 0) == parts, names[p]
            assert (group['lr'], group['weight_decay']) == pytest.approx((rate, decay)), names[p]
            if not parts:
                assert (group['betas'], group['eps']) == ((0.8, 0.95), 1e-10), names[p]
    assert ('transformer.h.0.mix' in names.values()) == shortcuts


def test_each_group_is_given_its_rate_and_muon_its_momentum_at_each_step() -> None:
    give(train, **MODERN)
    optimizer = train.make_optimizer(modern())
    scales = [group['scale'] for group in optimizer.param_groups]
    for step, rate in ((0, 0.025), (300, 0.025), (650, 0.0125), (1000, 0.0)):
        assert train.set_rates(optimizer, step, 1000) == pytest.approx(rate)
        assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([rate * scale for scale in scales])
        momenta = [group['momentum'] for group in optimizer.param_groups if 'parts' in group]
        assert momenta == [muon.momentum_at(step)] * 2


def test_the_state_of_all_groups_is_one_with_a_number_for_each_parameter() -> None:
    """Muon keeps one number for each of a weight, AdamW two; and Muon lists AdamW's groups with its own."""
    give(train, **MODERN)
    model = modern()
    optimizer = train.make_optimizer(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved, listed = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group['params']]
    assert [number for group in saved['param_groups'] for number in group['params']] == list(range(len(listed)))
    assert sorted(saved['state']) == list(range(len(listed)))
    of_muon = {number for group in saved['param_groups'] if 'parts' in group for number in group['params']}
    assert len(of_muon) == 2 * 4
    for number, p in enumerate(listed):
        kept = saved['state'][number]
        assert kept.keys() == ({'momentum_buffer'} if number in of_muon else {'step', 'exp_avg', 'exp_avg_sq'})
        assert all(tensor.shape == p.shape for name, tensor in kept.items() if name != 'step')


# ------------------------------------------------------------------------------------------------
# Updates


def adamw(p: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, lr: float,
          decay: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Update by AdamW's rule, with the betas and the eps of the modern model."""
    first, second = 0.8 * moments[0] + 0.2 * gradient, 0.95 * moments[1] + 0.05 * gradient**2
    change = first / (1 - 0.8**step) / (torch.sqrt(second / (1 - 0.95**step)) + 1e-10)
    return p - lr * decay * p - lr * change, (first, second)


@pytest.mark.usefixtures('float64')
def test_each_weight_moves_by_its_own_rule_at_the_rate_of_the_step() -> None:
    """Four steps have four rates and momenta, and gradients so small that AdamW's eps counts. Each of q, k and v is a
    matrix of its own."""
    give(train, **MODERN)
    model = modern()
    optimizer = train.make_optimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    owned = [(p, group) for group in optimizer.param_groups for p in group['params']]
    by_rule = {name: p.detach().clone() for name, p in model.named_parameters()}
    means = {name: torch.zeros_like(p) for name, p in by_rule.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in by_rule.items()}
    for number, step in enumerate((0, 150, 650, 900), start=1):
        rate, momentum = train.set_rates(optimizer, step, 1000), 0.85 + 0.1 * min(1.0, step / 300)
        assert rate == pytest.approx(0.025 * min(1.0, (1000 - step) / 700))
        for p in model.parameters():
            p.grad = 1e-9 * torch.randn_like(p)
        optimizer.step()
        for p, group in owned:
            name, old, gradient = names[p], by_rule[names[p]], p.grad
            assert gradient is not None
            if p.dim() == 2 and '.h.' in name:
                cuts = 3 if 'c_attn' in name else 1
                halves = [plain.muon(*part, rate, 0.05, momentum) for part in zip(
                    old.chunk(cuts), gradient.chunk(cuts), means[name].chunk(cuts), strict=True)]
                by_rule[name], means[name] = (torch.cat(tensors) for tensors in zip(*halves, strict=True))
            else:
                decay = 0.0 if 'mix' in name else 0.001
                by_rule[name], moments[name] = adamw(old, gradient, moments[name], number, group['lr'], decay)
            torch.testing.assert_close(p.detach(), by_rule[name], rtol=0, atol=ROUNDING, msg=f'{name} at step {step}')


def test_q_k_and_v_as_one_matrix_would_be_another_update() -> None:
    gradient = torch.cat([matrix(16, 16, seed) * 10**seed for seed in range(3)])
    whole, zero = orthogonal(gradient), torch.zeros_like(gradient)
    apart = torch.cat([orthogonal(part) for part in gradient.chunk(3)])
    assert (apart - whole).norm() > 0.5 * whole.norm()
    p = torch.nn.Parameter(zero.clone())
    p.grad = gradient
    groups = [{'params': [p], 'parts': 3, 'weight_decay': 0.0, 'momentum': 0.0},
              {'params': [torch.nn.Parameter(torch.ones(1))], 'weight_decay': 0.0}]
    muon.Muon(groups, 1.0, (0.8, 0.95)).step()
    torch.testing.assert_close(p.detach(), -apart, rtol=0, atol=ROUNDING)


def test_without_a_gradient_a_weight_decays_in_proportion_to_its_rate_and_nothing_else() -> None:
    """There are two rates; and nothing is NaN, although 0 has no direction."""
    give(train, **MODERN)
    model = modern()
    optimizer = train.make_optimizer(model)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    for step, total in ((0, 1000), (650, 1000)):
        train.set_rates(optimizer, step, total)
        before = [(p, group, p.detach().clone()) for group in optimizer.param_groups for p in group['params']]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, group, old in before:
            kept = 1 - group['lr'] * group['weight_decay']
            torch.testing.assert_close(p.detach(), kept * old, rtol=1e-6, atol=0)
            assert (kept < 1) == (p.dim() == 2)


def test_a_tall_matrix_takes_longer_steps() -> None:
    """Steps grow by the root of the ratio of height to width, so that outputs move as much as those of a square matrix
    would."""
    for m, n in ((8, 8), (32, 8), (8, 32)):
        p = torch.nn.Parameter(torch.zeros(m, n, dtype=torch.float64))
        p.grad = matrix(m, n)
        groups = [{'params': [p], 'parts': 1, 'weight_decay': 0.0, 'momentum': 0.0},
                  {'params': [torch.nn.Parameter(torch.ones(1))], 'weight_decay': 0.0}]
        muon.Muon(groups, 0.1, (0.8, 0.95)).step()
        expected = -0.1 * math.sqrt(max(1.0, m / n)) * orthogonal(matrix(m, n))
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=ROUNDING)


def test_a_weight_without_a_gradient_stays_where_it_is() -> None:
    """Such a weight has no part in the loss: --check=True names it, but must first get past the optimizer."""
    give(train, **MODERN)
    model = modern()
    optimizer = train.make_optimizer(model)
    left_out = model.get_parameter('transformer.h.1.attn.c_attn.weight')
    for p in model.parameters():
        p.grad = None if p is left_out else torch.randn_like(p)
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.step()
    assert [p for p, old in before.items() if torch.equal(p, old)] == [left_out]
