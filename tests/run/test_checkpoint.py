"""Checkpoints: nanoGPT's load here and plainGPT's load in nanoGPT, damage is noticed, and no code in a file ever
runs."""
import dataclasses
import mmap
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import train
from model import GPT, GPTConfig
from plaingpt import errors, files
from plaingpt.corpus import token_files
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.folder import open_split
from plaingpt.corpus.order import Order, fixed_starts
from plaingpt.errors import UserError
from plaingpt.init_from import open_model
from plaingpt.run import checkpoint
from tests.comparing import ROUNDING, assert_equal_to_rounding, differences, give, leaves, refused

SETTINGS: dict[str, Any] = {
    'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'batch_size': 4, 'gradient_accumulation_steps': 1,
    'max_iters': 4, 'eval_interval': 2, 'eval_iters': 2, 'sample_interval': 0, 'device': 'cpu', 'decay_lr': False,
    'learning_rate': 1e-2,
}


pytestmark = pytest.mark.usefixtures('no_pictures')


@pytest.fixture
def run(tiny_dataset: Path) -> Callable[..., Path]:
    """Train in this process: run(out_dir, name=value, ...). None leaves a setting out."""
    def run(out_dir: Path, **changes: Any) -> Path:
        settings = SETTINGS | {'out_dir': out_dir, 'dataset': tiny_dataset} | changes
        train.main([f'--{name}={value}' for name, value in settings.items() if value is not None])
        return out_dir / 'ckpt.pt'

    return run


@pytest.fixture(scope='module')
def saved(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp('saved')
    settings = SETTINGS | {'out_dir': folder, 'dataset': tiny_dataset, 'gelu': 'exact'}
    train.main([f'--{name}={value}' for name, value in settings.items()])
    return folder / 'ckpt.pt'


# ------------------------------------------------------------------------------------------------
# nanoGPT's model, as far as its checkpoints describe it: its names, its exact GELU, its seven arguments


@dataclasses.dataclass
class TheirConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class TheirBlock(nn.Module):
    def __init__(self, c: TheirConfig) -> None:
        super().__init__()
        self.n_head = c.n_head
        self.ln_1 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.attn = nn.ModuleDict({'c_attn': nn.Linear(c.n_embd, 3 * c.n_embd, c.bias),
                                   'c_proj': nn.Linear(c.n_embd, c.n_embd, c.bias)})
        self.ln_2 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.mlp = nn.ModuleDict({'c_fc': nn.Linear(c.n_embd, 4 * c.n_embd, c.bias),
                                  'c_proj': nn.Linear(4 * c.n_embd, c.n_embd, c.bias)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn['c_attn'](self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.attn['c_proj'](y)
        y = self.mlp['c_proj'](F.gelu(self.mlp['c_fc'](self.ln_2(x))))
        return x + y


class TheirGPT(nn.Module):
    def __init__(self, c: TheirConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(c.vocab_size, c.n_embd), 'wpe': nn.Embedding(c.block_size, c.n_embd),
            'h': nn.ModuleList(TheirBlock(c) for _ in range(c.n_layer)), 'ln_f': nn.LayerNorm(c.n_embd, bias=c.bias)})
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.lm_head.weight = self.transformer['wte'].get_parameter('weight')
        for p in self.parameters():
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)  # so large that the two GELUs differ

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer['wte'](idx) + self.transformer['wpe'](torch.arange(idx.size(1)))
        for block in self.transformer['h'].children():
            x = block(x)
        logits: Tensor = self.lm_head(self.transformer['ln_f'](x))
        return logits


def their_step(model: TheirGPT, optimizer: torch.optim.Optimizer, corpus: token_files.TokenFile, step: int) -> float:
    """Make one update on the four windows that this project reads in that step."""
    starts = Order(len(corpus), 16, 1337).starts(4 * step, 4)
    x, y = read_batch(corpus, starts, 16, 4, 128)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def their_run(folder: Path, corpus: token_files.TokenFile, bias: bool) -> tuple[TheirGPT, torch.optim.Optimizer]:
    """Train for three steps and leave the ckpt.pt of a compiled run, with the causal mask that old ones hold."""
    config = TheirConfig(16, 128, 2, 2, 16, 0.0, bias)
    model = TheirGPT(config)
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(3):
        their_step(model, optimizer, corpus, step)
    mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    weights = model.state_dict() | {f'transformer.h.{i}.attn.bias': mask for i in range(2)}
    model_args = {name: getattr(config, name)
                  for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    torch.save({
        'model': {f'_orig_mod.{name}': weight for name, weight in weights.items()}, 'optimizer': optimizer.state_dict(),
        'model_args': model_args, 'iter_num': 3, 'best_val_loss': torch.tensor(4.25),
        'config': {'out_dir': 'out', 'dataset': 'tiny', 'eval_interval': 2000, 'init_from': 'scratch', 'dropout': 0.0,
                   'gradient_accumulation_steps': 1, 'batch_size': 4, 'block_size': 16, 'bias': bias,
                   'learning_rate': 1e-2, 'device': 'cuda', 'dtype': 'bfloat16', 'compile': True},
    }, folder / 'ckpt.pt')
    return model, optimizer


@pytest.fixture
def corpus(tiny_dataset: Path) -> token_files.TokenFile:
    return open_split(tiny_dataset, 'train', 16, 128)


@pytest.mark.parametrize('bias', [True, False])
def test_nanogpts_checkpoint_computes_here_what_it_computed_there(tmp_path: Path, corpus: token_files.TokenFile,
                                                                  bias: bool) -> None:
    original, _ = their_run(tmp_path, corpus, bias)
    state = checkpoint.load(tmp_path / 'ckpt.pt')
    assert state['best_val_loss'] == 4.25
    assert isinstance(state['best_val_loss'], float)
    model = checkpoint.model_of(state)
    assert (model.config.gelu, model.config.tie_weights, model.config.bias) == ('exact', True, bias)
    x, _ = read_batch(corpus, fixed_starts(len(corpus), 16, 8), 16, 8, 128)
    logits, _ = model.double()(x)
    torch.testing.assert_close(logits, original.double()(x), atol=ROUNDING, rtol=0)

    tanh = GPT.from_weights(GPTConfig(**vars(model.config) | {'gelu': 'tanh'}), state['model'])
    assert (tanh.double()(x)[0] - logits).abs().max() > 1e-4, 'the other GELU would fail'


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('bias', [True, False])
def test_nanogpts_run_resumes_here_with_its_moments(tmp_path: Path, corpus: token_files.TokenFile, bias: bool,
                                                    run: Callable[..., Path]) -> None:
    original, optimizer = their_run(tmp_path, corpus, bias)
    fresh = GPT.from_weights(checkpoint.config_of(checkpoint.load(tmp_path / 'ckpt.pt')), {
        name: weight.clone() for name, weight in original.state_dict().items()})
    for step in (3, 4):
        their_step(original, optimizer, corpus, step)
    state = checkpoint.load(run(tmp_path, init_from='resume', max_iters=5, n_layer=None))
    assert state['iter_num'] == 5
    assert_equal_to_rounding(state['model'], original.state_dict())
    assert_equal_to_rounding(state['optimizer']['state'], optimizer.state_dict()['state'], ROUNDING / 1000)

    give(train, learning_rate=1e-2)
    forgetful = train.make_optimizer(fresh)
    for step in (3, 4):
        starts = Order(len(corpus), 16, 1337).starts(4 * step, 4)
        fresh(*read_batch(corpus, starts, 16, 4, 128))[1].backward()
        nn.utils.clip_grad_norm_(fresh.parameters(), 1.0)
        forgetful.step()
        forgetful.zero_grad()
    distance = (fresh.transformer.wte.weight - state['model']['transformer.wte.weight']).abs().max().item()
    assert distance > 1e-3, 'without the moments the weights would differ'


@pytest.mark.parametrize('bias', [True, False])
def test_a_checkpoint_of_plaingpt_is_one_of_nanogpts(tmp_path: Path, corpus: token_files.TokenFile, bias: bool,
                                                     run: Callable[..., Path]) -> None:
    """nanoGPT's sample.py loads with torch's own defaults, strips the prefix of compiled models, builds the model from
    model_args, and loads strictly; its train.py does so on resume."""
    path = run(tmp_path, bias=bias, gelu='exact')
    file = torch.load(path)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= file.keys()
    assert set(file['model_args']) == {field.name for field in dataclasses.fields(TheirConfig)}
    assert not any(name.startswith('_orig_mod.') for name in file['model'])
    original = TheirGPT(TheirConfig(**file['model_args']))
    assert {name: weight.shape for name, weight in original.state_dict().items()} == {
        name: weight.shape for name, weight in file['model'].items()}
    original.load_state_dict(file['model'])
    x, _ = read_batch(corpus, fixed_starts(len(corpus), 16, 8), 16, 8, 128)
    expected, _ = checkpoint.model_of(checkpoint.load(path)).double()(x)
    torch.testing.assert_close(original.double()(x), expected, atol=ROUNDING, rtol=0)

    groups = [{'params': [p for p in original.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
              {'params': [p for p in original.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    optimizer.load_state_dict(file['optimizer'])
    for p, moments in optimizer.state.items():
        assert moments['exp_avg'].shape == p.shape
        assert moments['step'].item() == 4
    assert len(optimizer.state) == len(list(original.parameters()))


def test_what_wrappers_put_into_the_names_of_weights_is_removed(saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved)
    clean = checkpoint.load(saved)['model']
    for prefix in ('', '_orig_mod.', 'module.', 'module._orig_mod.', '_orig_mod.module.', '_fsdp_wrapped_module.'):
        weights = {prefix + name: weight for name, weight in state['model'].items()}
        torch.save(state | {'model': weights}, tmp_path / 'a')
        assert not differences(checkpoint.load(tmp_path / 'a')['model'], clean)
    for inside in ('_orig_mod.', '_checkpoint_wrapped_module.', '_orig_mod._checkpoint_wrapped_module.'):
        weights = {re.sub(r'(h\.\d+\.)', rf'\1{inside}', name): weight for name, weight in state['model'].items()}
        torch.save(state | {'model': weights}, tmp_path / 'a')
        assert not differences(checkpoint.load(tmp_path / 'a')['model'], clean)


def test_a_tied_file_needs_no_head_and_one_that_differs_is_kept(saved: Path, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    """nanoGPT's own files tie the head, and those of its forks may not: neither says so."""
    state, path = torch.load(saved), tmp_path / 'a'
    state['config'] = {}
    head = state['model'].pop('lm_head.weight')
    torch.save(state, path)
    assert open_model(str(path))[0].config.tie_weights
    state['model']['lm_head.weight'] = head.clone()
    torch.save(state, path)
    assert open_model(str(path))[0].config.tie_weights
    assert 'its head differs' not in capsys.readouterr().err
    for says in ({}, {'tie_weights': True}, {'tie_weights': False}):
        state['model']['lm_head.weight'] = head + 1
        state['config'] = says
        torch.save(state, path)
        model, _ = open_model(str(path))
        assert not model.config.tie_weights
        assert torch.equal(model.lm_head.weight, head + 1)
        assert (f'{path}: its head differs' in capsys.readouterr().err) == (says != {'tie_weights': False})


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_trained_in_float32_whatever_the_file_has(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = torch.load(saved)
    state['model'] = {name: p.to(dtype) for name, p in state['model'].items()}
    torch.save(state, tmp_path / 'a')
    for name, p in open_model(str(tmp_path / 'a'))[0].state_dict().items():
        assert p.dtype == torch.float32
        assert torch.equal(p, state['model'][name].float())


def test_numbers_of_numpy_in_a_checkpoint_are_numbers(saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved) | {'best_val_loss': np.float64(2.5), 'iter_num': np.int64(7)}
    state['config'] |= {'learning_rate': np.float32(0.5)}
    torch.save(state, tmp_path / 'a')
    loaded = checkpoint.load(tmp_path / 'a')
    assert (loaded['best_val_loss'], loaded['iter_num'], loaded['config']['learning_rate']) == (2.5, 7, 0.5)
    assert [type(loaded[name]) for name in ('best_val_loss', 'iter_num')] == [float, int]


def test_other_formats_are_named_with_the_way_in(saved: Path, tmp_path: Path) -> None:
    state, old = torch.load(saved), tmp_path / 'old.pt'
    torch.save(state, old, _use_new_zipfile_serialization=False)
    message = refused(checkpoint.load, old, code=errors.CHECKPOINT)
    assert "PyTorch's format before 1.6" in message
    command = message.splitlines()[1]
    subprocess.run(shlex.split(command.replace(command.split(' -c ')[0], sys.executable)), check=True)
    assert not differences(checkpoint.load(tmp_path / 'old.converted.pt')['model'], checkpoint.load(saved)['model'])
    save_file({name: p for name, p in state['model'].items() if name != 'lm_head.weight'}, tmp_path / 'a.safetensors')
    assert 'is a safetensors file' in refused(checkpoint.load, tmp_path / 'a.safetensors', code=errors.CHECKPOINT)


# ------------------------------------------------------------------------------------------------
# The memory that a file needs


def is_in_file(tensor: Tensor, path: Path) -> bool:
    """Return whether the numbers of a tensor are those of the file, which the system reads on first use."""
    for line in Path('/proc/self/maps').read_text(encoding='utf-8').splitlines():
        if line.endswith(str(path.resolve())):
            first, last = (int(end, 16) for end in line.split()[0].split('-'))
            if first <= tensor.data_ptr() < last:
                return True
    return False


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_moments_take_no_memory_until_a_run_needs_them_and_weights_do_not_stay_in_a_file(
        saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, right = checkpoint.load(saved), torch.load(saved)
    assert not differences({**state, 'model': None}, {**right, 'model': None})
    assert not differences(state['model'], right['model'])
    moments = [tensor for one in state['optimizer']['state'].values() for tensor in one.values()]
    assert len(moments) > 30 and all(is_in_file(tensor, saved) for tensor in moments)
    assert not any(is_in_file(tensor, saved) for tensor in state['model'].values())
    assert len({tensor.data_ptr() for tensor in state['model'].values()}) == len(state['model']) - 1, 'a tied table'

    def refuse(*_: object, **__: object) -> None:
        raise OSError('this file system maps nothing')

    monkeypatch.setattr(mmap, 'mmap', refuse)
    state = checkpoint.load(saved)
    assert not differences(state, right)
    assert not is_in_file(state['optimizer']['state'][0]['exp_avg'], saved)


def test_a_checkpoint_that_was_compressed_afterwards_has_the_same_values(saved: Path, tmp_path: Path) -> None:
    small = tmp_path / 'ckpt.pt'
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(small, 'w', zipfile.ZIP_DEFLATED) as compressed:
        for part in archive.infolist():
            compressed.writestr(part.filename, archive.read(part))
    assert small.stat().st_size < saved.stat().st_size
    assert not differences(checkpoint.load(small), checkpoint.load(saved))


def test_a_run_resumes_from_a_file_that_another_program_overwrites(run: Callable[..., Path], tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with the same bits as one whose file stays; and so does the best checkpoint that it leaves."""
    for name in ('left alone', 'overwritten'):
        run(tmp_path / name, max_iters=2)
    run(tmp_path / 'left alone', init_from='resume')
    restore, path = checkpoint.restore, tmp_path / 'overwritten/ckpt.pt'

    def restore_and_overwrite(*arguments: Any) -> None:
        restore(*arguments)
        with open(path, 'r+b') as file:
            file.write(bytes(path.stat().st_size))

    monkeypatch.setattr(checkpoint, 'restore', restore_and_overwrite)
    run(tmp_path / 'overwritten', init_from='resume')
    for part in ('model', 'optimizer', 'best'):
        assert not differences(checkpoint.load(path)[part], checkpoint.load(tmp_path / 'left alone/ckpt.pt')[part])


# ------------------------------------------------------------------------------------------------
# The contents of a file


def test_a_checkpoint_holds_tensors_and_plain_values_and_nothing_else(saved: Path) -> None:
    state = torch.load(saved, weights_only=True)
    assert state.keys() == {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'tokenizer',
                            'scaler', 'wandb_run_id', 'data', 'versions', 'compute', 'best', 'skipped', 'windows',
                            'windows_before', 'tokens'}
    for name, value in leaves(state):
        assert type(value) in (Tensor, str, int, float, bool, bytes, type(None)), name
        assert not isinstance(value, Tensor) or value.device.type == 'cpu'
    assert state['config']['learning_rate'] == 1e-2
    assert state['data']['train']['tokens'] > 40_000
    assert set(state['data']['val']) == {'tokens', 'head', 'tail', 'sha256'}
    assert state['versions']['torch'] == torch.__version__


def test_the_checkpoint_alone_is_enough_to_continue_a_text(saved: Path, tmp_path: Path, tiny_text: str) -> None:
    from plaingpt.corpus import tokenizer

    model, state = open_model(str(shutil.copy(saved, tmp_path / 'moved.pt')))
    vocabulary = tokenizer.from_state(state['tokenizer'])
    ids = vocabulary.encode(tiny_text[:10])
    assert vocabulary.decode(ids) == tiny_text[:10]
    new = model.generate(torch.tensor([ids]), 5, seed=1, n_vocab=vocabulary.n_vocab)
    assert len(vocabulary.decode(new[0].tolist())) == 15


def test_tied_tensors_are_stored_once_and_stay_tied(run: Callable[..., Path], tmp_path: Path) -> None:
    tied = run(tmp_path / 'tied', vocab_size=4096, max_iters=1)
    untied = run(tmp_path / 'untied', vocab_size=4096, max_iters=1, tie_weights=False)
    table = 4096 * 16 * 4  # bytes
    assert untied.stat().st_size - tied.stat().st_size == pytest.approx(3 * table, rel=0.05), 'weights and two moments'
    weights = sum(p.numel() for p in checkpoint.model_of(checkpoint.load(tied)).parameters()) * 4
    assert tied.stat().st_size < 3 * weights + 40_000
    model = checkpoint.model_of(checkpoint.load(tied))
    assert model.lm_head.weight is model.transformer.wte.weight
    model = checkpoint.model_of(checkpoint.load(untied))
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_the_best_is_a_second_name_of_the_newest_and_outlives_it(run: Callable[..., Path], tmp_path: Path) -> None:
    newest, best = run(tmp_path), tmp_path / 'best.pt'
    assert os.path.samefile(newest, best), 'no copy if the file system needs none'
    content = best.read_bytes()
    run(tmp_path, init_from='resume', max_iters=6, learning_rate=1.0)
    assert checkpoint.load(newest)['iter_num'] == 6
    assert best.read_bytes() == content, 'and the next checkpoint does not write through it'
    assert not list(tmp_path.glob('*.tmp')) + list(tmp_path.glob('*.new.*'))


def test_the_best_is_a_copy_if_a_file_can_have_one_name_only(
        saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError('this file system has no links')

    monkeypatch.setattr(os, 'link', no_links)
    (tmp_path / 'best.pt').write_bytes(b'old')
    files.link(saved, tmp_path / 'best.pt')
    assert (tmp_path / 'best.pt').read_bytes() == saved.read_bytes()
    assert not os.path.samefile(saved, tmp_path / 'best.pt')


# ------------------------------------------------------------------------------------------------
# Refused files


def spoiled(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield a file with one bit flipped: anywhere, and in the directory and headers of the zip, where a flip may point
    to other data; then files that are cut short, or that end in zeros."""
    directory = data.index(b'PK\x01\x02')
    headers = [at + i for at in range(directory) if data.startswith(b'PK\x03\x04', at) for i in range(30)]
    bits = [*rng.choices(range(len(data)), k=120), *rng.choices(range(directory, len(data)), k=200),
            *rng.choices(headers, k=60)]
    for at in bits:
        bit = rng.randrange(8)
        yield f'bit {bit} of byte {at}', data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
    for length in [0, 1, 22, len(data) - 1, len(data) - 22, directory, *rng.choices(range(len(data)), k=20)]:
        yield f'cut at {length}', data[:length]
        yield f'zeros from {length} on', data[:length] + bytes(len(data) - length)


def test_no_damage_ever_loads_other_values(saved: Path, tmp_path: Path) -> None:
    """A flip may hit bytes that are never read, such as the date of a part. Then the values must be the same."""
    data, right, path = saved.read_bytes(), checkpoint.load(saved), tmp_path / 'ckpt.pt'
    refusals = 0
    for what, bad in spoiled(data, random.Random(1)):
        path.write_bytes(bad)
        try:
            state = checkpoint.load(path)
        except UserError as error:
            message, state = str(error), right
            refusals += 1
        else:
            message = str(path)
        assert str(path) in message, what
        assert not differences(state, right), what
    assert refusals > 250


def test_every_bit_of_the_weights_counts(saved: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / 'ckpt.pt'
    weights = checkpoint.load(saved)['model']['transformer.wpe.weight'].numpy().tobytes()
    first = data.index(weights)
    for at in random.Random(2).choices(range(first, first + len(weights)), k=60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
        assert torch.load(path)['iter_num'] == 4, 'torch itself does not notice the damage'
        assert f'{path} is damaged' in refused(checkpoint.load, path, code=errors.CHECKPOINT)


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'touch {self.witness}',)


@pytest.mark.parametrize('where', ['model', 'config', 'tokenizer', 'evil'])
def test_a_file_that_would_run_a_command_is_refused_whatever_the_environment_says(
        saved: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    witness = tmp_path / 'witness'
    for zipped in (True, False):
        torch.save(torch.load(saved, weights_only=True) | {where: Evil(witness)}, tmp_path / 'evil.pt',
                   _use_new_zipfile_serialization=zipped)
        assert str(tmp_path / 'evil.pt') in refused(checkpoint.load, tmp_path / 'evil.pt', code=errors.CHECKPOINT)
        assert not witness.exists()
    torch.load(tmp_path / 'evil.pt', weights_only=False)
    assert witness.exists(), 'the pickle would have run'


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / 'ckpt.pt'
    assert refused(checkpoint.load, path, code=errors.CHECKPOINT) == f'no checkpoint at {path}'
    assert f'no checkpoint at {tmp_path}' in refused(checkpoint.load, tmp_path, code=errors.CHECKPOINT)
    for content in (b'', b'text', b'PK\x03\x04' + bytes(100)):
        path.write_bytes(content)
        assert f'{path} is damaged, or not a checkpoint' in refused(checkpoint.load, path, code=errors.CHECKPOINT)
    trees: list[Any] = [[1, 2], {'model': {}}, {'model': [1], 'model_args': {}}, torch.ones(3)]
    for tree in trees:
        torch.save(tree, path)
        assert f"{path} has no 'model' and 'model_args'" in refused(checkpoint.load, path, code=errors.CHECKPOINT)


def test_a_file_whose_entries_are_of_the_wrong_kind_is_refused(saved: Path, tmp_path: Path) -> None:
    state, path = torch.load(saved), tmp_path / 'ckpt.pt'
    weights = dict(state['model'])
    del weights['transformer.ln_f.weight']
    changes: list[dict[str, Any]] = [
        {'model': weights}, {'model': {**state['model'], 'odd': torch.ones(1)}}, {'model_args': {}},
        {'model_args': state['model_args'] | {'n_layer': 3}}, {'model_args': [1]}, {'model': [1]}]
    for change in changes:
        torch.save(state | change, path)
        refused(open_model, str(path), code=errors.CHECKPOINT)


def changed(tree: Any, path: str, value: Any) -> Any:
    """Return a copy in which the entry at 'a.b' is replaced; '' is the tree itself."""
    name, _, rest = path.partition('.')
    return {**tree, name: changed(tree[name], rest, value)} if name else value


NAN = torch.tensor(float('nan'))
WRONG: list[tuple[str, Any, str]] = [
    ('iter_num', '7', "iter_num is '7'"), ('iter_num', -1, 'iter_num is -1'),
    ('model_args.n_head', None, 'model_args.n_head is None'), ('model_args.n_head', 3, 'multiple of n_head=3'),
    ('model_args.n_layer', 10**4, 'too few for n_layer=10000'), ('model_args.n_embd', 2**40, 'n_embd is'),
    ('model_args.vocab_size', True, 'vocab_size is True'), ('model_args.dropout', 'x', "dropout is 'x'"),
    ('config', [1], 'config is of the type list'), ('config.keep', torch.ones(9), "config['keep'] is of the type"),
    ('config.dataset', 3, 'dataset'), ('config.dataset', '\udfff', 'dataset'), ('config.gelu', 'relu', 'config.gelu'),
    ('best', {'accuracy': [1.0, 4]}, 'best.loss is missing'), ('best', {'loss': 2.0}, 'best.loss is 2.0'),
    ('best', {'loss': [2.0]}, 'best.loss[1] is missing'), ('best', None, 'best is None'),
    ('best_val_loss', torch.ones(2), 'best_val_loss'), ('best_val_loss', None, 'best_val_loss is None'),
    ('tokenizer', 'gpt2', "tokenizer is 'gpt2'"), ('tokenizer', {'eot': True}, 'tokenizer.name is missing'),
    ('skipped', 0.5, 'skipped is 0.5'), ('scaler', {'scale': 1.0}, 'scaler.growth_factor is missing'),
    ('wandb_run_id', 7, 'wandb_run_id is 7'), ('data', {'train': {'tokens': 9}}, 'data.train.sha256 is missing'),
    ('optimizer', [1], 'optimizer is of the type list'), ('optimizer.param_groups', [{}], 'param_groups[0].params'),
    ('optimizer.state', {0: {'step': 1.0, 'exp_avg': torch.ones(1)}}, 'optimizer.state[0].exp_avg_sq is missing'),
    ('optimizer.state', {0: {'square_avg': torch.ones(1)}}, 'optimizer.state[0].step is missing'),
    ('model', {3: torch.ones(1)}, 'the key 3 of model'), ('model', {'x': [1.0]}, "model['x'] is of the type list"),
    ('model', {'wte': torch.eye(3).to_sparse()}, "model['wte'] is of the type Tensor"),
]


def test_an_entry_that_is_not_what_it_should_be_is_named(saved: Path, tmp_path: Path) -> None:
    for path, value, message in WRONG:
        torch.save(changed(torch.load(saved), path, value), tmp_path / 'ckpt.pt')
        said = refused(open_model, str(tmp_path / 'ckpt.pt'), code=errors.CHECKPOINT)
        assert f'{tmp_path}/ckpt.pt' in said and message in said and '\n' not in said, said


def test_weights_that_are_no_numbers_are_refused_before_anything_is_computed(
        saved: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    """An older checkpoint takes its place, as after any other damage."""
    state = torch.load(saved)
    for name, bad in (('transformer.h.1.mlp.c_fc.weight', NAN), ('transformer.wpe.weight', -1 / torch.zeros(()))):
        weights = state['model'] | {name: state['model'][name].clone()}
        weights[name].view(-1)[-1] = bad
        torch.save(state | {'model': weights}, tmp_path / 'ckpt.pt')
        said = refused(run, tmp_path, init_from='resume', max_iters=6, code=errors.CHECKPOINT)
        assert f'ckpt.pt do not fit a GPT-2: {name} has numbers that are infinite or NaN' in said
    shutil.copy(saved, tmp_path / 'ckpt.1.pt')
    assert open_model(str(tmp_path))[1]['iter_num'] == 4


def test_moments_of_other_shapes_are_refused(saved: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    state = torch.load(saved)
    for number, moments in ((0, {'exp_avg': torch.ones(2, 3)}), (99, {'step': torch.ones(())})):
        moved = state['optimizer']['state'] | {number: state['optimizer']['state'][0] | moments}
        torch.save(changed(state, 'optimizer.state', moved), tmp_path / 'ckpt.pt')
        assert 'another model' in refused(run, tmp_path, init_from='resume', max_iters=6, code=errors.CHECKPOINT)


def test_weights_without_an_optimizer_can_be_fine_tuned_and_not_resumed(saved: Path, tmp_path: Path,
                                                                        run: Callable[..., Path]) -> None:
    state = torch.load(saved)
    del state['optimizer']
    torch.save(state, tmp_path / 'ckpt.pt')
    assert checkpoint.load(run(tmp_path / 'new', init_from=tmp_path / 'ckpt.pt', max_iters=1))['iter_num'] == 1
    assert 'optimizer' in refused(run, tmp_path, init_from='resume', max_iters=6, code=errors.CHECKPOINT)


def test_moments_of_another_model_are_refused(saved: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    state = torch.load(saved)
    state['optimizer']['param_groups'][0]['params'].pop()
    torch.save(state, tmp_path / 'ckpt.pt')
    assert 'another model' in refused(run, tmp_path, init_from='resume', max_iters=6, code=errors.CHECKPOINT)


def test_resuming_needs_something_to_resume(run: Callable[..., Path], tmp_path: Path) -> None:
    message = refused(run, tmp_path / 'nothing', init_from='resume', code=errors.CHECKPOINT)
    assert f'no checkpoint at {tmp_path}/nothing/ckpt.pt' in message
    assert '--init_from=scratch' in message


def test_a_model_is_opened_by_its_file_its_folder_or_its_name(saved: Path, tmp_path: Path) -> None:
    for path in (saved, saved.parent):
        model, state = open_model(str(path), dropout=0.2)
        assert (model.config.dropout, model.config.gelu, state['iter_num']) == (0.2, 'exact', 4)
    for where in ('nonsense', str(tmp_path / 'nothing'), str(tmp_path)):
        assert where in refused(open_model, where, code=errors.CHECKPOINT)
    shutil.copy(saved, tmp_path / 'ckpt.1.pt')
    assert open_model(str(tmp_path))[1]['iter_num'] == 4, 'a run whose newest file is gone'
