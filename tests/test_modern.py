"""The modern model: its first step, its loss in parts, its text, and its runs from start to sample."""
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import model as gpt
import model_modern
import model_modern_trivialised as plain
import sample
import train
from model import GPTConfig, choose
from plaingpt import errors
from plaingpt.chance import draw
from plaingpt.init_from import open_model
from plaingpt.run import checkpoint
from tests.comparing import (
    ROUNDING,
    assert_equal_learning,
    assert_equal_to_rounding,
    differences,
    leaves,
    needs_8_bits,
    refused,
)

ROOT = Path(__file__).parents[1]
BLOCK, V = 16, 61

pytestmark = pytest.mark.usefixtures('no_pictures')


def config(shortcuts: bool = True, **changes: Any) -> GPTConfig:
    return GPTConfig(**{'block_size': BLOCK, 'vocab_size': V, 'n_layer': 3, 'n_head': 4, 'n_embd': 32, 'bias': False,
                        'tie_weights': False, 'arch': 'modern', 'shortcuts': shortcuts, **changes})


@torch.no_grad()
def random_modern(shortcuts: bool = True) -> model_modern.GPT:
    """Return a model in float64 with all parameters at random: none is 0, and each position and each earlier token
    matters."""
    torch.manual_seed(1)
    model = model_modern.GPT(config(shortcuts)).double().eval()
    for name, p in model.named_parameters():
        p.normal_(0.0, 1.5 if 'lm_head' in name else 0.5)
    return model


def random_tokens(B: int, T: int) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------------
# The first step


@pytest.mark.parametrize('shortcuts', [True, False])
def test_at_first_each_token_is_as_likely_as_any_other(shortcuts: bool) -> None:
    model, x = model_modern.GPT(config(shortcuts)), random_tokens(3, BLOCK + 1)
    assert not model.lm_head.weight.any()
    logits, loss = model(x[:, :-1], x[:, 1:])
    assert not logits.any()
    assert loss.item() == pytest.approx(math.log(V), abs=1e-5)


@pytest.mark.parametrize('shortcuts', [True, False])
def test_at_first_each_block_changes_nothing_and_its_projections_would(shortcuts: bool) -> None:
    model = model_modern.GPT(config(shortcuts))
    embedded = model_modern.norm(torch.randn(2, BLOCK, 32))
    turns, v = model_modern.turns_of(0, BLOCK, 8, embedded), torch.randn(2, 4, BLOCK, 8)
    for layer, block in enumerate(model.transformer.h):
        x = torch.randn(2, BLOCK, 32)

        def after(x: Tensor = x, block: Any = block, first_v: Tensor | None = v if layer else None) -> Tensor:
            y: Tensor = block(x, embedded, turns, first_v)[0]
            return y

        assert torch.equal(after(), x)
        for projection in (block.get_submodule(name) for name in ('attn.c_proj', 'mlp.c_proj')):
            assert isinstance(projection, torch.nn.Linear)
            torch.nn.init.normal_(projection.weight)
            assert (after() - x).abs().mean() > 0.1
            torch.nn.init.zeros_(projection.weight)


def test_at_first_the_residual_stream_has_size_1_whatever_the_width() -> None:
    for n_embd in (32, 256):
        model = model_modern.GPT(config(n_embd=n_embd))
        x, read = model.transformer(random_tokens(3, BLOCK)), list[float]()
        assert x.square().mean().item() == pytest.approx(1, abs=1e-4)
        for block in model.transformer.h:
            for name in ('attn.c_attn', 'mlp.c_fc'):
                read.append(block.get_submodule(name)(x).std().item())
        assert read == pytest.approx([math.sqrt(1 / 3)] * 6, rel=0.2)


def test_no_logit_passes_the_cap_and_small_ones_stay() -> None:
    model, x = random_modern(), random_tokens(3, BLOCK)
    raw = model.lm_head(model.transformer(x))
    assert raw.abs().max() > 16 > 15 > model(x)[0].abs().max() > 10
    small = 0.01 * raw
    with torch.no_grad():
        model.lm_head.weight *= 0.01
    torch.testing.assert_close(model(x)[0], small, rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------
# The loss in parts


@pytest.mark.parametrize('rows', [1, 7, 1000])
@pytest.mark.parametrize('missing', ['none', 'some', 'all'])
def test_a_capped_loss_in_chunks_is_the_same_and_so_is_each_gradient(rows: int, missing: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches add up, and the gradient from above is not 1."""
    model, x = random_modern().train(), random_tokens(3, BLOCK + 1)
    x, y = x[:, :-1], x[:, 1:].clone()
    y[0, 5:] = y[2] = -1 if missing != 'none' else y[0, 0]
    y[:] = -1 if missing == 'all' else y
    assert (model.lm_head(model.transformer(x)).abs() > 15).any(), 'the cap has an effect'

    def learn() -> list[Tensor | None]:
        model.zero_grad()
        losses = [model(ids, targets, logits='none')[1] for ids, targets in ((x, y), (x[1:], y[1:]))]
        sum(0.7 * loss**2 for loss in losses).backward()
        return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters())]

    expected = learn()
    monkeypatch.setattr(gpt, 'MOST_LOGITS', 0)
    monkeypatch.setattr(gpt, 'CHUNK', rows * V)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, 'cross_entropy', None)  # not called
        found = learn()
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert all(tensor is not None and bool(tensor.any()) == (missing != 'all') for tensor in found)


def test_a_capped_loss_in_chunks_is_exact_and_nearly_so_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are up to twice the cap; bfloat16 has 8 bits, and sums of its numbers differ by four times its
    rounding."""
    monkeypatch.setattr(gpt, 'CHUNK', 7 * V)
    states, head, targets = torch.randn(100, 32), torch.randn(V, 32) * 1.5, torch.randint(-1, V, (100,))
    x, weight = (tensor.double().requires_grad_() for tensor in (states, head))
    logits = x @ weight.T
    assert logits.abs().max() > 25 and (targets == -1).any()
    whole = F.cross_entropy(15 * torch.tanh(logits / 15), targets, ignore_index=-1, reduction='sum')
    whole.backward()
    for dtype in (torch.float32, torch.bfloat16):
        other, head_too = (tensor.clone().requires_grad_() for tensor in (states, head))
        with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
            nats = gpt.chunked_nats(other, head_too, targets, 15.0)
        assert nats.dtype == torch.float32
        nats.backward()
        for found, right in ((nats, whole), (other.grad, x.grad), (head_too.grad, weight.grad)):
            assert found is not None and right is not None
            assert (found.double() - right).norm() < 4 * max(torch.finfo(dtype).eps, 1e-6) * right.norm()


# ------------------------------------------------------------------------------------------------
# Text


@pytest.fixture(scope='module')
def pair() -> tuple[model_modern.GPT, plain.GPT]:
    """Return both twins with the same weights. The plain one keeps to the band over a whole text, however long."""
    fast = random_modern()
    other = plain.GPT(config()).double()
    other.load_state_dict(fast.state_dict())
    return fast, other.eval()


@torch.no_grad()
def written_by(model: Any, idx: Tensor, n_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, seed: int = 0) -> Tensor:
    """Return the text that a model that reads the whole text for each token writes after the last block of idx (B,
    T)."""
    text = idx[:, -BLOCK:]
    for number in range(n_tokens):
        draws = [draw(seed, row, number) for row in range(len(idx))]
        token = choose(model(text)[0][:, -1].float(), temperature, top_k, top_p, draws)
        text = torch.cat([text, token[:, None]], dim=1)
    return torch.cat([idx, text[:, -n_tokens:]], dim=1)


@pytest.mark.parametrize('T', [1, 5, BLOCK - 1, BLOCK, BLOCK + 4])
@pytest.mark.parametrize('how', [{'temperature': 0.0}, {'temperature': 0.8, 'top_k': 20, 'top_p': 0.9, 'seed': 5},
                                 {'temperature': 2.0, 'seed': 6}])
def test_cached_and_uncached_write_what_the_plain_twin_writes_far_past_the_block(
        how: dict[str, Any], T: int, pair: tuple[model_modern.GPT, plain.GPT]) -> None:
    model, other = pair
    idx, n_tokens = random_tokens(2, T), 3 * BLOCK
    cached = model.generate(idx, n_tokens, **how)
    assert cached.shape == (2, T + n_tokens)
    assert torch.equal(cached, model.generate(idx, n_tokens, **how, use_cache=False))
    assert torch.equal(cached, written_by(other, idx, n_tokens, **how))
    assert len(set(cached[:, T:].flatten().tolist())) > 3, 'one token repeated would prove little'


def test_positions_keep_growing_for_many_blocks(pair: tuple[model_modern.GPT, plain.GPT]) -> None:
    """This compares logits, and not only tokens. A window that is read anew would give other logits, since its tokens
    have seen what slid out of it."""
    model, other = pair
    idx, caches = random_tokens(2, 6 * BLOCK), [gpt.Cache(BLOCK) for _ in model.transformer.h]
    with torch.no_grad():
        expected = other(idx)[0]
        found = [model(idx[:, :5], caches=caches)[0]]
        found += [model(idx[:, t:t + 1], caches=caches)[0] for t in range(5, 6 * BLOCK)]
        assert caches[0].length == 6 * BLOCK and caches[0].k.size(2) == BLOCK
        torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=ROUNDING)
        anew = model(idx[:, -BLOCK:])[0][:, -1]
        assert (anew - expected[:, -1]).abs().max() > 0.1


def test_a_row_of_a_batch_is_written_as_it_would_be_alone_past_the_block() -> None:
    model = random_modern()
    ways: list[dict[str, Any]] = [{'temperature': 0.0}, {'temperature': 0.9, 'top_p': 0.95, 'seed': 1}]
    for how in ways:
        together = model.generate(random_tokens(3, 4), 2 * BLOCK, **how)
        for row in range(3):
            alone = model.generate(random_tokens(3, 4)[row:row + 1], 2 * BLOCK, **how, first=row)
            assert torch.equal(together[row:row + 1], alone)


def test_past_the_block_each_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, forward = random_modern(), list[int](), gpt.GPT.forward

    def counting(self: gpt.GPT, idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(idx.size(1))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(gpt.GPT, 'forward', counting)
    model.generate(random_tokens(1, BLOCK - 2), 7)
    assert read == [BLOCK - 2, 1, 1, 1, 1, 1, 1]
    read.clear()
    model.generate(random_tokens(1, BLOCK - 2), 4, use_cache=False)
    assert read == [BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 1]


def test_a_stream_leaves_training_as_it_was_and_padding_is_never_drawn_and_a_stop_ends() -> None:
    model = random_modern()
    free = model.generate(random_tokens(2, 4), 2 * BLOCK, seed=3)
    model.train()
    for number, token in enumerate(model.stream(random_tokens(2, 4), 2 * BLOCK, seed=3)):
        assert torch.equal(token, free[:, 4 + number])
        assert all(module.training for module in model.modules())
    model.eval()
    below = model.generate(random_tokens(2, 4) % 50, 4 * BLOCK, seed=3, n_vocab=50)
    assert below.max() < 50 <= model.generate(random_tokens(2, 4) % 50, 4 * BLOCK, seed=3).max()

    stop = int(free[0, -3])
    ended = model.generate(random_tokens(1, 4), 2 * BLOCK, seed=3, stop=stop)[0, 4:].tolist()
    row = free[0, 4:].tolist()
    assert ended == row[:row.index(stop) + 1] and len(ended) < 2 * BLOCK


def test_a_shorter_block_computes_the_same_until_its_end_and_a_longer_one_is_refused() -> None:
    model, x = random_modern(), random_tokens(2, BLOCK)
    cropped = model.crop_block_size(10)
    assert isinstance(cropped, model_modern.GPT) and cropped.config == config(block_size=10)
    with torch.no_grad():
        found, expected = cropped(x)[0], model(x)[0]
    torch.testing.assert_close(found[:, :10], expected[:, :10], rtol=0, atol=ROUNDING)
    assert (found[:, 10:] - expected[:, 10:]).abs().amax(dim=(0, 2)).min() > 0.1, 'later ones miss the first tokens'
    assert f'block_size={BLOCK + 1} is longer' in refused(model.crop_block_size, BLOCK + 1, code=errors.COMMAND)


# ------------------------------------------------------------------------------------------------
# Runs


SETTINGS: dict[str, Any] = {
    'arch': 'modern', 'tie_weights': False, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': BLOCK,
    'batch_size': 4, 'gradient_accumulation_steps': 2, 'max_iters': 8, 'lr_decay_iters': 8, 'eval_interval': 4,
    'eval_iters': 3, 'sample_interval': 4, 'sample_tokens': 20, 'device': 'cpu', 'learning_rate': 0.025, 'min_lr': 0.0,
    'weight_decay': 0.05, 'beta1': 0.8, 'grad_clip': 0.0, 'schedule': 'wsd', 'decay_fraction': 0.7, 'warmup_iters': 0,
}
Run = Callable[..., Path]


def arguments(settings: dict[str, Any]) -> list[str]:
    return [f'--{name}={value}' for name, value in (SETTINGS | settings).items() if value is not None]


@pytest.fixture
def run(tiny_dataset: Path) -> Run:
    """Train in this process: run(out_dir, name=value, ...) -> ckpt.pt. None leaves a setting out."""
    def run(out_dir: Path, **changes: Any) -> Path:
        train.main(arguments({'out_dir': out_dir, 'dataset': tiny_dataset} | changes))
        return out_dir / 'ckpt.pt'

    return run


@pytest.fixture(scope='module')
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of eight steps that no test changes, with its checkpoint of step 4 as ckpt.1.pt."""
    folder = tmp_path_factory.mktemp('modern') / 'run'
    train.main(arguments({'out_dir': folder, 'dataset': tiny_dataset}))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in ('tokens_per_second', 'peak_memory_bytes')}
            for line in lines]


def losses(folder: Path) -> list[float]:
    return [row['loss'] for row in rows_of(folder) if 'loss' in row]


def test_a_run_begins_at_ln_v_and_learns(trained: Path) -> None:
    rows = rows_of(trained)
    n_vocab = checkpoint.load(trained / 'ckpt.pt')['model_args']['vocab_size']
    assert rows[0]['loss'] == pytest.approx(math.log(n_vocab), abs=1e-5)
    assert rows[0]['val_loss'] == pytest.approx(math.log(n_vocab), abs=1e-5)
    assert rows[-1]['val_loss'] < rows[0]['val_loss'] - 0.5
    assert [row['lr'] for row in rows if 'lr' in row][:2] == [0.025, 0.025]


def test_a_checkpoint_says_which_model_it_is_beside_nanogpts_seven_arguments(trained: Path) -> None:
    state = torch.load(trained / 'ckpt.pt')
    assert set(state['model_args']) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert (state['config']['arch'], state['config']['shortcuts'], state['config']['tie_weights']) == (
        'modern', True, False)
    assert set(state['model']) == {name for name, _ in model_modern.GPT(config(n_layer=2)).named_parameters()}
    model, _ = open_model(str(trained))
    assert isinstance(model, model_modern.GPT)
    assert model.config == config(vocab_size=state['model_args']['vocab_size'], n_layer=2, n_head=2)


def test_a_checkpoint_of_gpt2_from_before_there_were_others_is_gpt2s() -> None:
    path = ROOT / 'tests/data/run_0.1.0/ckpt.pt'
    assert not {'arch', 'shortcuts'} & torch.load(path)['config'].keys()
    model, _ = open_model(str(path))
    assert (type(model), model.config.arch, model.config.shortcuts) == (gpt.GPT, 'gpt2', False)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('shortcuts', [True, False])
def test_micro_batches_of_any_number_make_the_same_step(run: Run, tmp_path: Path, shortcuts: bool) -> None:
    """The micro-batches are eight of one window, two of four, and three, the last of them short; also with a sixteenth
    of the logits at a time, and with blocks that are computed twice."""
    same = {'total_batch_size': 8 * BLOCK, 'shortcuts': shortcuts}
    whole = checkpoint.load(run(tmp_path / 'whole', batch_size=8, eval_iters=3, **same))
    ways: list[dict[str, Any]] = [{'batch_size': 1, 'eval_iters': 24}, {'batch_size': 4, 'eval_iters': 6},
                                  {'batch_size': 3, 'eval_iters': 8},
                                  {'batch_size': 8, 'activation_checkpointing': True}]
    for number, way in enumerate(ways):
        other = checkpoint.load(run(tmp_path / str(number), **same | way))
        assert_equal_learning(other, whole)
        assert_equal_to_rounding(rows_of(tmp_path / str(number)), rows_of(tmp_path / 'whole'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, 'MOST_LOGITS', 0)
        patch.setattr(gpt, 'CHUNK', 1000)
        assert_equal_learning(checkpoint.load(run(tmp_path / 'chunks', batch_size=4, **same)), whole)


def test_a_run_that_is_resumed_ends_bit_for_bit_like_one_that_was_not(trained: Path, tmp_path: Path, run: Run) -> None:
    for age, step in ((1, 4), (0, 8)):
        cut = tmp_path / str(step)
        cut.mkdir()
        shutil.copy(trained / f'ckpt{f".{age}" if age else ""}.pt', cut / 'ckpt.pt')
        for name in ('metrics.jsonl', 'samples.txt'):
            shutil.copy(trained / name, cut / name)
        assert checkpoint.load(cut / 'ckpt.pt')['iter_num'] == step
        run(cut, init_from='resume', n_layer=None, n_embd=None)
        first, second = (checkpoint.load(folder / 'ckpt.pt') for folder in (cut, trained))
        for part in ('model', 'optimizer', 'best', 'iter_num'):
            assert not differences(first[part], second[part]), part
        assert rows_of(cut) == rows_of(trained)
        assert (cut / 'samples.txt').read_bytes() == (trained / 'samples.txt').read_bytes()


def test_bfloat16_learns_about_the_same_keeps_its_weights_exact_and_resumes(trained: Path, tmp_path: Path,
                                                                            run: Run) -> None:
    whole = run(tmp_path / 'whole', dtype='bfloat16')
    assert losses(tmp_path / 'whole') == pytest.approx(losses(trained), abs=0.05)
    assert losses(tmp_path / 'whole') != losses(trained)
    state = checkpoint.load(whole)
    tensors = [leaf for part in ('model', 'optimizer') for _, leaf in leaves(state[part]) if isinstance(leaf, Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert any((p != p.bfloat16()).any() for p in state['model'].values()), 'small updates are not rounded away'
    run(tmp_path / 'cut', dtype='bfloat16', max_iters=4)
    run(tmp_path / 'cut', init_from='resume')  # in the precision of its start
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
    assert not differences(checkpoint.load(tmp_path / 'cut/ckpt.pt')['model'], state['model'])


@pytest.mark.slow
def test_compiled_blocks_learn_what_plain_ones_learn(trained: Path, tmp_path: Path, run: Run) -> None:
    run(tmp_path, compile=True, max_iters=2, sample_interval=0)
    assert losses(tmp_path) == pytest.approx(losses(trained)[:2], rel=1e-4)


@pytest.mark.parametrize('dtype', ['float32', pytest.param('int8', marks=needs_8_bits)])
def test_a_run_is_evaluated_and_writes_text(trained: Path, tmp_path: Path, dtype: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation gives the loss of its own last evaluation, exactly or to 8 bits; and it writes past its block."""
    evaluate.main([f'--out_dir={trained}', f'--json={tmp_path}/figures.json', '--device=cpu', '--eval_iters=3',
                   '--batch_size=4', f'--dtype={dtype}'])
    [measured] = json.loads((tmp_path / 'figures.json').read_text(encoding='utf-8'))['measured']
    near = {'float32': 1e-5, 'int8': 0.02}[dtype]
    assert measured['val']['loss'] == pytest.approx(rows_of(trained)[-1]['val_loss'], abs=near)
    capsys.readouterr()
    sample.main([f'--out_dir={trained}', '--device=cpu', '--num_samples=2', '--start=def ', '--seed=3',
                 f'--max_new_tokens={3 * BLOCK}', f'--dtype={dtype}'])
    texts = capsys.readouterr().out.split(f'\n{sample.RULE}\n')
    assert [len(text) for text in texts] == [4 + 3 * BLOCK, 4 + 3 * BLOCK, 0]
    assert all(text.startswith('def ') for text in texts[:2]) and texts[0] != texts[1]


def test_hellaswag_is_answered_by_a_modern_model(trained: Path, tmp_path: Path, tiny_dataset: Path,
                                                 run: Run) -> None:
    run(tmp_path, max_iters=1, hellaswag_interval=1, hellaswag=tiny_dataset / 'hellaswag.jsonl')
    assert [row['step'] for row in rows_of(tmp_path) if 'hellaswag_acc_norm' in row] == [0, 1]
    assert losses(tmp_path) == losses(trained)[:1]


def test_weights_of_a_modern_run_begin_another_one_with_a_shorter_block(trained: Path, tmp_path: Path,
                                                                        run: Run) -> None:
    state = checkpoint.load(run(tmp_path, init_from=trained, block_size=8, max_iters=1, shortcuts=None))
    assert (state['model_args']['block_size'], state['config']['arch'], state['iter_num']) == (8, 'modern', 1)
    assert losses(tmp_path)[0] < rows_of(trained)[0]['loss'] - 0.3


# ------------------------------------------------------------------------------------------------
# Refused settings


@pytest.mark.parametrize(('changes', 'words'), [
    ({'learning_rate': None}, 'config/train_modern.py'),
    ({'bias': True}, '--bias=False'), ({'tie_weights': True}, '--tie_weights=False'),
    ({'tie_weights': None}, '--tie_weights=False'), ({'dropout': 0.1}, '--dropout=0'),
    ({'n_embd': 30, 'n_head': 2}, 'n_embd=30 / n_head=2 must be even'),
    ({'init_from': 'gpt2'}, 'another model than gpt2'), ({'init_from': 'gpt2-xl'}, 'another model than gpt2-xl'),
])
def test_what_the_modern_model_cannot_be_is_refused_in_a_sentence(changes: dict[str, Any], words: str, run: Run,
                                                                  tmp_path: Path) -> None:
    assert words in refused(run, tmp_path, **changes, code=errors.COMMAND)
    assert not list(tmp_path.glob('*.pt'))


def test_a_run_resumed_without_its_rates_or_as_another_model_is_refused(trained: Path, tmp_path: Path,
                                                                        run: Run) -> None:
    again = {'out_dir': shutil.copytree(trained, tmp_path / 'run'), 'init_from': 'resume', 'max_iters': 9}
    before = (tmp_path / 'run/ckpt.pt').read_bytes()
    plainly = dict.fromkeys(('arch', 'tie_weights', 'n_layer', 'n_embd', 'learning_rate', 'min_lr'))
    assert 'config/train_modern.py' in refused(run, **again | plainly, code=errors.COMMAND)
    for name, value in (('arch', 'gpt2'), ('shortcuts', False), ('tie_weights', True), ('bias', True)):
        message = refused(run, **again | {name: value}, code=errors.COMMAND)
        assert f'{name}={value} was given, and the model in ' in message or (name, value) != ('arch', 'gpt2')
    assert (tmp_path / 'run/ckpt.pt').read_bytes() == before
    run(**again | plainly | {'learning_rate': 0.025})
    assert checkpoint.load(tmp_path / 'run/ckpt.pt')['iter_num'] == 9
    train.main([f'--{name}={value}' for name, value in again.items()] + [
        f'--dataset={checkpoint.load(trained / "ckpt.pt")["config"]["dataset"]}', '--eval_only=True', '--device=cpu',
        '--eval_iters=1', '--batch_size=2'])  # evaluation needs no rate


def test_a_run_of_gpt2_does_not_become_a_modern_one(tmp_path: Path, run: Run) -> None:
    run(tmp_path, arch='gpt2', tie_weights=None, max_iters=1, shortcuts=None)
    message = refused(run, tmp_path, init_from='resume', tie_weights=None, max_iters=2, code=errors.COMMAND)
    assert "arch=modern was given, and the model in 'resume' has gpt2\n" in message


def test_moments_of_the_other_optimizer_are_refused(trained: Path, tmp_path: Path, run: Run) -> None:
    """Muon's state has one tensor where AdamW's has two, and the other way round; or the number of groups differs."""
    state, path = torch.load(trained / 'ckpt.pt'), tmp_path / 'ckpt.pt'
    moments, groups = state['optimizer']['state'], state['optimizer']['param_groups']
    of_muon, of_adamw = groups[0]['params'][0], groups[-1]['params'][0]
    adamw = {name: torch.ones_like(moments[of_muon]['momentum_buffer']) for name in ('exp_avg', 'exp_avg_sq')}
    muon = {'momentum_buffer': torch.ones_like(moments[of_adamw]['exp_avg'])}
    others: list[dict[str, Any]] = [
        {'state': moments | {of_muon: {'step': torch.ones(())} | adamw}}, {'state': moments | {of_adamw: muon}},
        {'param_groups': groups[:-1]}]
    for other in others:
        torch.save(state | {'optimizer': state['optimizer'] | other}, path)
        message = refused(run, tmp_path, init_from='resume', max_iters=9, code=errors.CHECKPOINT)
        assert 'has no optimizer state, or that of another model' in message


def test_the_plan_of_the_large_run_counts_its_parameters_and_moments(tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    for shortcuts, number in ((True, '162,201,635'), (False, '162,201,600')):
        train.main([str(ROOT / 'config/train_modern.py'), '--plan=True', f'--dataset={tmp_path}',
                    f'--shortcuts={shortcuts}'])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith(f'{number} parameters: 12 layers of 6 heads, 768 wide')]
        [alone] = [line for line in lines if line.startswith('  ddp, alone ')]
        assert re.split('  +', alone.strip())[1:4] == ['649 MB', '649 MB', '958 MB']  # weights, gradients, moments
        assert not [line for line in lines if 'LayerNorms' in line or 'position' in line], 'the modern model has none'
