"""Products in 8 bits: the result is what plain whole numbers give, row by row, and a model loses next to nothing by
it."""
import json
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evaluate
import sample
from model import GPT, GPTConfig
from plaingpt.errors import UserError
from plaingpt.machines import int8
from plaingpt.machines.device import pick_dtype
from plaingpt.machines.int8 import Int8Linear, Product, quantise
from tests.comparing import ROUNDING, needs_8_bits

OLD_RUN = Path(__file__).parents[1] / 'data/run_0.1.0'
WORKING = [way for way in int8.WAYS if int8.is_exact(way)]


def in_8_bits(linear: nn.Linear) -> nn.Module:
    model = nn.Sequential(linear)
    quantise(model)
    return model[0]


@pytest.mark.parametrize('way', WORKING)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n_rows', [1, 2, 17])
def test_a_product_is_that_of_whole_numbers(n_rows: int, bias: bool, way: int8.Way,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows differ a thousandfold in size; one of them is 0."""
    monkeypatch.setattr(int8, 'WAYS', (way,))
    torch.manual_seed(1)
    linear = nn.Linear(24, 40, bias=bias)
    x = torch.randn(n_rows, 24) * 10.0 ** torch.arange(n_rows)[:, None].remainder(4)
    x[1:2] = 0
    exact = linear(x).detach()
    found = in_8_bits(deepcopy(linear))(x[None])
    assert found.shape == (1, n_rows, 40)

    def whole(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute in float32, in which a division is the same on every machine, so that no number is rounded another
        way."""
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(127)
        return np.rint(rows / scales).astype(np.int64), scales.astype(np.float64)

    weights, of_channel = whole(linear.weight.detach().numpy())
    numbers, of_row = whole(x.numpy())
    assert np.abs(weights).max() == np.abs(numbers).max() == 127
    expected = (numbers @ weights.T) * of_row * of_channel.T + (linear.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert ((found[0] - exact).norm(dim=1) <= 0.02 * exact.norm(dim=1) + 1e-6).all()


@pytest.mark.skipif(not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()),
                    reason='this CPU, or build of torch, has one way only')
@pytest.mark.parametrize('n_rows', [1, 2, 9, 70])
@pytest.mark.parametrize('is_transposed', [False, True])
def test_both_ways_give_the_same_bits(n_rows: int, is_transposed: bool) -> None:
    """Speed decides which one is taken, so no text may depend on it."""
    assert (*WORKING,) == int8.WAYS
    torch.manual_seed(3)
    matrix = torch.randn(3072, 48).t() if is_transposed else torch.randn(48, 3072)
    weight, scale = int8.to_int8(matrix)
    rows, _ = int8.to_int8(torch.randn(n_rows, 3072))
    one, other = [way(weight, scale[:, 0])(rows) for way in WORKING]
    assert torch.equal(one, other) and one.any()


@needs_8_bits
def test_the_fastest_way_that_is_exact_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others one is missing, one is slow, one sums up in 16 bits, as old CPUs do, and one rounds in another
    way."""
    def slow(weight: Tensor, scale: Tensor) -> Product:
        product = int8.plain_product(weight, scale)

        def after_a_while(rows: Tensor) -> Tensor:
            time.sleep(0.01)
            return product(rows)

        return after_a_while

    def missing(weight: Tensor, scale: Tensor) -> Product:
        raise AttributeError

    def saturating(weight: Tensor, scale: Tensor) -> Product:
        return lambda rows: int8.plain_product(weight, scale)(rows).clamp(-2**15, 2**15 - 1)

    def fast(weight: Tensor, scale: Tensor) -> Product:
        product = int8.plain_product(weight, scale)
        taken.append(product)
        return product

    def rounding(weight: Tensor, scale: Tensor) -> Product:
        return lambda rows: int8.plain_product(weight, torch.ones_like(scale))(rows) * (scale + 1e-8)

    taken: list[Product] = []
    monkeypatch.setattr(int8, 'WAYS', (missing, slow, saturating, rounding, fast))
    found = in_8_bits(nn.Linear(24, 40))
    assert isinstance(found, Int8Linear) and found.product is taken[-1]
    assert [int8.is_exact(way) for way in int8.WAYS] == [False, True, False, False, True]


@needs_8_bits
def test_a_way_that_is_far_too_slow_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take five minutes."""
    def endless(weight: Tensor, scale: Tensor) -> Product:
        def product(rows: Tensor) -> Tensor:
            calls.append(len(rows))
            time.sleep(1)
            return int8.plain_product(weight, scale)(rows)

        return product

    calls: list[int] = []
    monkeypatch.setattr(int8, 'WAYS', (int8.plain_product, endless))
    monkeypatch.setattr(int8, 'is_exact', lambda way: True)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(100)))
    quantise(model)
    assert len(calls) == 1


@needs_8_bits
def test_a_text_does_not_depend_on_those_beside_it() -> None:
    """Ten texts at once give what each gives alone, although one of them has numbers that are a hundred times larger.
    The test is in float64, so that the code around the products does not round a number of a text another way."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(32, 300, 2, 2, 32)).double().eval()
    with torch.no_grad():
        model.transformer.wte.weight[7] *= 100
    quantise(model)
    x = torch.randint(300, (10, 20))
    x[3] = 7
    with torch.no_grad():
        together = model(x)[0]
        for row in range(10):
            torch.testing.assert_close(together[row:row + 1], model(x[row:row + 1])[0], rtol=0, atol=ROUNDING)
    assert torch.equal(model.generate(x, 12, temperature=0.0), torch.cat(
        [model.generate(row[None], 12, temperature=0.0) for row in x]))


@needs_8_bits
@pytest.mark.parametrize('tie_weights', [True, False])
def test_every_product_has_8_bits_and_the_table_its_own_numbers(tie_weights: bool) -> None:
    model = GPT(GPTConfig(32, 300, 2, 2, 32, tie_weights=tie_weights)).eval()
    before = model.transformer.wte.weight.clone()
    quantise(model)
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 2 * 4 + 1
    assert torch.equal(model.transformer.wte.weight, before)


@needs_8_bits
def test_the_loss_is_nearly_that_of_float32(tmp_path: Path) -> None:
    figures = {}
    for dtype in ('float32', 'int8'):
        evaluate.main([f'--init_from={OLD_RUN}/ckpt.pt', f'--dataset={OLD_RUN}/corpus', f'--dtype={dtype}',
                       f'--json={tmp_path}/{dtype}.json', '--device=cpu'])
        told = json.loads((tmp_path / f'{dtype}.json').read_text(encoding='utf-8'))
        assert told['dtype'] == dtype
        figures[dtype] = told['measured'][0]['val']['loss']
    assert 0 < abs(figures['int8'] - figures['float32']) < 0.01


@needs_8_bits
def test_samples_are_written_with_8_bits_or_a_line_says_why_not(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f'--init_from={OLD_RUN}/ckpt.pt', '--device=cpu', '--num_samples=2', '--max_new_tokens=9',
                 '--start=the', '--temperature=0']

    def written(dtype: str) -> tuple[str, str]:
        sample.main([*arguments, f'--dtype={dtype}'])
        return capsys.readouterr()

    exact, _ = written('float32')
    text, notes = written('int8')
    assert 'int8, as asked' in notes and text.startswith('the') and text.count(sample.RULE) == 2
    monkeypatch.setattr(int8, 'WAYS', ())
    text, notes = written('int8')
    assert 'float32, torch' in notes and 'does not multiply whole numbers on this CPU' in notes and text == exact
    monkeypatch.undo()
    assert pick_dtype('int8', 'cpu') == (torch.int8, 'as asked')
    assert pick_dtype('int8', 'mps') == (torch.float32, 'int8 is for a CPU, and this is mps')


@pytest.mark.parametrize(('ways', 'compiles'), [((), False), ((int8.packed_product,), True)])
def test_no_model_is_written_with_sums_that_are_wrong(ways: tuple[int8.Way, ...], compiles: bool,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """There are CPUs on which PyTorch adds up whole numbers in 16 bits. The model stays as it was."""
    monkeypatch.setattr(int8, 'WAYS', ways)
    model = nn.Sequential(nn.Linear(24, 40))
    with pytest.raises(UserError, match='does not multiply whole numbers on this CPU'):
        quantise(model, compiles)
    assert model[0].weight.shape == (40, 24)
