"""Checkpoints of other projects: this project computes what they compute, asks for what they do not say, and runs
nothing in them. Their models are written again below, as far as their files describe them."""
import dataclasses
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import export
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from tests.comparing import ROUNDING, refused

# ------------------------------------------------------------------------------------------------
# Checkpoint files whose config class is in a module that no longer exists when the file is read


def config_of(module: str, fields: dict[str, Any]) -> Any:
    """Return an instance of the dataclass `module`.GPTConfig, which can be pickled as long as the module exists."""
    made = dataclasses.make_dataclass('GPTConfig', [(name, type(value)) for name, value in fields.items()])
    made.__module__ = module
    for name in parents(module):
        sys.modules.setdefault(name, types.ModuleType(name))
    vars(sys.modules[module])['GPTConfig'] = made
    return made(**fields)


def parents(module: str) -> list[str]:
    """Return 'a.b' as ['a', 'a.b']."""
    parts = module.split('.')
    return ['.'.join(parts[:end + 1]) for end in range(len(parts))]


def save(tree: Any, path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.save(tree, path)
    if module == '__main__':
        monkeypatch.delattr('__main__.GPTConfig')
    else:
        for name in parents(module):
            monkeypatch.delitem(sys.modules, name)
    return path


def build_nanogpt(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """Save a log/model_05000.pt of build-nanogpt: GPT-2 as it is, the config a dataclass of the script that ran."""
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=4, n_embd=16))
    randomise(model)
    fields = {'block_size': 16, 'vocab_size': 50304, 'n_layer': 2, 'n_head': 4, 'n_embd': 16}
    tree = {'model': model.state_dict(), 'config': config_of('__main__', fields), 'step': 5000, 'val_loss': 3.25}
    return save(tree, path, '__main__', monkeypatch), model


class Their001(nn.Module):
    """The model of gpt_from_scratch: an untied head, and q, k and v without biases unless asked for."""

    def __init__(self, qkv_bias: bool) -> None:
        super().__init__()
        V, C, T = 384, 16, 16
        self.gpt = nn.ModuleDict({
            't_embedding': nn.Embedding(V, C), 'p_embedding': nn.Embedding(T, C), 'dropout': nn.Dropout(0.0),
            'transformers': nn.Sequential(*(nn.ModuleDict({
                'mha': nn.ModuleDict({'qkv': nn.Linear(C, 3 * C, bias=qkv_bias), 'proj': nn.Linear(C, C)}),
                'ff': nn.ModuleDict({'layers': nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(approximate='tanh')),
                                     'final_l': nn.Linear(4 * C, C)}),
                'norm1': nn.LayerNorm(C), 'norm2': nn.LayerNorm(C)}) for _ in range(2))),
            'final_ln': nn.LayerNorm(C), 'ln_out': nn.Linear(C, V, bias=False)})

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        B, T = idx.shape
        x = self.gpt['t_embedding'](idx) + self.gpt['p_embedding'](torch.arange(T))
        for block in self.gpt['transformers'].children():
            parts = dict(block.named_children())
            mha, ff = (dict(parts[name].named_children()) for name in ('mha', 'ff'))
            q, k, v = (z.view(B, T, 4, 4).transpose(1, 2) for z in mha['qkv'](parts['norm1'](x)).split(16, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mha['proj'](y.transpose(1, 2).reshape(B, T, 16))
            x = x + ff['final_l'](ff['layers'](parts['norm2'](x)))
        return self.gpt['ln_out'](self.gpt['final_ln'](x)), None


def gpt_from_scratch(path: Path, monkeypatch: pytest.MonkeyPatch, qkv_bias: bool = False) -> tuple[Path, nn.Module]:
    """Save a log/model_epoch0_iter05000.pt of gpt_from_scratch, with the state of its optimizer."""
    model = Their001(qkv_bias)
    randomise(model)
    fields = {'vocab_size': 384, 'emb_dim': 16, 'context_length': 16, 'drop_rate': 0.0, 'n_layers': 2, 'n_heads': 4,
              'qkv_bias': qkv_bias}
    module = 'gpt_from_scratch.models.utils'
    tree = {'model': model.state_dict(), 'optimizer': torch.optim.AdamW(model.parameters()).state_dict(),
            'config': config_of(module, fields), 'epoch': 0, 'iter': 5000, 'val_loss': 3.25}
    return save(tree, path, module, monkeypatch), model


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)


@torch.no_grad()
def assert_same_logits(loaded: GPT, original: nn.Module, n_vocab: int = 384) -> None:
    idx = torch.randint(n_vocab, (3, 16))
    loaded, original = loaded.double().eval(), original.double().eval()
    torch.testing.assert_close(loaded(idx)[0], original(idx)[0], rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------------------------------------


def test_build_nanogpts_checkpoint_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = build_nanogpt(tmp_path / 'model_05000.pt', monkeypatch)
    loaded, state = open_model(str(path), dropout=0.1)
    assert loaded.config == GPTConfig(16, 50304, 2, 4, 16, dropout=0.1, bias=True, gelu='tanh', tie_weights=True)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert (state['iter_num'], state['best_val_loss'], state['best']) == (5000, 3.25, {'loss': [3.25, 5000]})
    assert_same_logits(loaded, original)


@pytest.mark.parametrize('qkv_bias', [False, True])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_gpt_from_scratchs_checkpoint_loads(qkv_bias: bool, prefix: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = gpt_from_scratch(tmp_path / 'model_epoch0_iter05000.pt', monkeypatch, qkv_bias)
    if prefix:
        tree = {'model': {f'{prefix}{name}': p for name, p in original.state_dict().items()}, 'iter': 5000, 'epoch': 0,
                'val_loss': 3.25, 'config': config_of('gone', {'n_heads': 4})}
        save(tree, path, 'gone', monkeypatch)
    loaded, state = open_model(str(path))
    assert loaded.config == GPTConfig(16, 384, 2, 4, 16, bias=True, gelu='tanh', tie_weights=False)
    assert_same_logits(loaded, original)
    assert loaded.state_dict()['transformer.h.0.attn.c_attn.bias'].any() == qkv_bias
    assert state['iter_num'] == 5000 and 'optimizer' not in state


def test_bare_weights_need_two_answers(tmp_path: Path) -> None:
    original = GPT(GPTConfig(16, 50304, 2, 4, 256))
    randomise(original)
    path = tmp_path / 'weights.pth'
    for tied in (True, False):
        weights = original.state_dict()
        if tied:
            del weights['lm_head.weight']
        else:
            weights['lm_head.weight'] = weights['lm_head.weight'] + 1
        weights['transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()  # the mask of old models
        torch.save(weights, path)
        message = refused(open_model, str(path), code=errors.CHECKPOINT)
        assert message.startswith(f'{path} does not say n_head and gelu\nmake a checkpoint that does: ')
        assert f'export.py --init_from={path} --out_dir=out-weights --to=ckpt --n_head=4 --gelu=tanh' in message
        loaded, _ = open_model(str(path), answers={'n_head': 4, 'gelu': 'exact'})
        assert loaded.config == GPTConfig(16, 50304, 2, 4, 256, gelu='exact', tie_weights=tied)


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2_stand_in')
def test_the_advice_makes_a_run_that_needs_no_more_answers(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    """The test follows the advice, as printed, and then runs sample.py on the result."""
    original = GPT(GPTConfig(16, 50304, 1, 1, 64))
    torch.save({'model': original.state_dict()}, tmp_path / 'original.pt')
    result = run_script('sample.py', '--init_from=original.pt', cwd=tmp_path)
    assert result.returncode == errors.CHECKPOINT
    _, _, advice = result.stderr.partition('make a checkpoint that does: ')
    subprocess.run(['sh', '-c', advice], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    result = run_script('sample.py', '--out_dir=out-original', '--num_samples=1', '--max_new_tokens=3', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    model, state = open_model(str(tmp_path / 'out-original'))
    assert all(torch.equal(p, original.state_dict()[name]) for name, p in model.state_dict().items())
    assert state['tokenizer']['name'] == 'gpt2'


@pytest.mark.slow
def test_training_takes_the_answers_from_its_own_settings(tmp_path: Path, tiny_dataset: Path,
                                                          run_script: Callable[..., Any]) -> None:
    torch.save(GPT(GPTConfig(16, 128, 1, 2, 8)).state_dict(), tmp_path / 'original.pt')
    arguments = [f'--init_from={tmp_path}/original.pt', f'--out_dir={tmp_path}/out', f'--dataset={tiny_dataset}',
                 '--max_iters=1', '--gradient_accumulation_steps=1', '--batch_size=2', '--eval_iters=1',
                 '--sample_interval=0', '--device=cpu']
    assert 'does not say n_head and gelu' in run_script('train.py', *arguments).stderr
    result = run_script('train.py', *arguments, '--n_head=4', '--gelu=exact')
    assert result.returncode == 0, result.stderr
    model, _ = open_model(f'{tmp_path}/out')
    assert (model.config.n_head, model.config.gelu) == (4, 'exact')


@pytest.mark.slow
def test_an_imported_model_can_be_evaluated_exported_and_trained_on(
        tmp_path: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, run_script: Callable[..., Any]) -> None:
    path, original = gpt_from_scratch(tmp_path / 'original.pt', monkeypatch)
    common = [f'--init_from={path}', f'--dataset={tiny_dataset}']
    for script, arguments in [
            ('evaluate.py', ['--eval_iters=1']), ('export.py', ['--to=hf', f'--out_dir={tmp_path}']),
            ('train.py', [f'--out_dir={tmp_path}/out', '--max_iters=1', '--gradient_accumulation_steps=1',
                          '--batch_size=2', '--eval_iters=1', '--sample_interval=0', '--device=cpu'])]:
        result = run_script(script, *common, *arguments)
        assert result.returncode == 0, f'{script}\n{result.stderr}'
    model, state = open_model(f'{tmp_path}/hf')
    n_vocab = learned_tokenizer(state, model.config.vocab_size, corpus_of(state)).n_vocab
    assert model.config.vocab_size == n_vocab < 384
    idx = torch.randint(n_vocab, (2, 16))
    model, original = model.double().eval(), original.double().eval()
    torch.testing.assert_close(model(idx)[0], original(idx)[0][:, :, :n_vocab], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(('tree', 'reason'), [
    ({'n_iter': 1, 'model_state_dict': {}, 'optimizer_state_dict': {}, 'wandb_run_id': '', 'train_loss': 1.0,
      'val_loss': 1.0}, 'RMSNorm, and what its attention projects is never used'),
    ({'epoch': 1, 'model_state_dict': {}, 'optimizer_state_dict': {}, 'loss': 1.0}, 'GELU after the MLP'),
    ({'model_state': {}, 'optimizer_state': {}, 'finished_epoch': 1}, 'sees later tokens'),
    ({'model': {'transformer.wte.weight': torch.ones(4, 2), 'transformer.h.0.ln_1.weight': torch.ones(2)}},
     'no table of positions'),
])
def test_other_models_are_refused_with_the_reason(tree: dict[str, Any], reason: str, tmp_path: Path) -> None:
    torch.save(tree, tmp_path / 'chkpoint_100.pth')
    message = refused(open_model, str(tmp_path / 'chkpoint_100.pth'), code=errors.CHECKPOINT)
    assert 'is a different model from GPT-2' in message and reason in message


def test_a_model_that_only_looks_like_gpt_from_scratchs_is_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = gpt_from_scratch(tmp_path / 'original.pt', monkeypatch)
    weights = original.state_dict()
    odd = [{name: p for name, p in weights.items() if 'norm2' not in name},
           weights | {'gpt.rope.frequencies': torch.ones(2)},
           weights | {'gpt.final_ln.weight': torch.ones(3)}]
    for changed in odd:
        torch.save({'model': changed}, path)
        assert 'do not fit' in refused(open_model, str(path), answers={'n_head': 4}, code=errors.CHECKPOINT)


# ------------------------------------------------------------------------------------------------
# Nothing runs


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'touch {self.witness}',)


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[[str], Any], argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (self.argument,)


def test_the_class_that_a_file_names_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module exists, and records every access to an attribute."""
    touched: list[str] = []

    class Trap(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            touched.append(name)
            raise AttributeError(name)

    path, original = gpt_from_scratch(tmp_path / 'original.pt', monkeypatch)
    monkeypatch.setitem(sys.modules, 'gpt_from_scratch.models.utils', Trap('trap'))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    allowed = torch.serialization.get_safe_globals()
    assert_same_logits(open_model(str(path))[0], original)
    assert touched == []
    now = torch.serialization.get_safe_globals()
    assert sorted(map(str, now)) == sorted(map(str, allowed)), 'the class is allowed for that one file only'


@pytest.mark.parametrize('where', ['instead of the config', 'in a field', 'beside it', 'as its class'])
def test_a_pickle_in_the_place_of_a_config_runs_nothing(where: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    witness, path = tmp_path / 'witness', tmp_path / 'original.pt'
    _, original = gpt_from_scratch(path, monkeypatch)
    tree: dict[str, Any] = {'model': original.state_dict(), 'config': config_of('gone', {'n_heads': 4})}
    if where == 'instead of the config':
        tree['config'] = Evil(witness)
    elif where == 'in a field':
        tree['config'].n_heads = Evil(witness)
    elif where == 'beside it':
        tree['epoch'] = Evil(witness)
    else:  # a name that looks like a config, with a call instead of fields
        made = vars(sys.modules['gone'])['GPTConfig']
        made.__init__ = run_a_command
        tree['config'] = Call(made, f'touch {witness}')
    torch.save(tree, path)
    message = refused(open_model, str(path), code=errors.CHECKPOINT)
    assert 'could run any code' in message and not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists(), 'the pickle would have run'
    monkeypatch.delitem(sys.modules, 'gone')


def run_a_command(_: Any, command: str) -> None:
    os.system(command)


def test_a_config_with_odd_fields_is_asked_about_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = gpt_from_scratch(tmp_path / 'original.pt', monkeypatch)
    odd: list[dict[str, Any]] = [{'heads': 4}, *({'n_heads': value} for value in ('4', 0, -4, [4], True))]
    for fields in odd:
        tree = {'model': original.state_dict(), 'config': config_of('gone', fields)}
        save(tree, path, 'gone', monkeypatch)
        assert 'n_head' in refused(open_model, str(path), code=errors.CHECKPOINT)


def test_only_one_class_and_only_a_config_is_read_as_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = gpt_from_scratch(tmp_path / 'original.pt', monkeypatch)
    tree = {'model': original.state_dict(), 'config': config_of('gone', {'n_heads': 4})}
    type(tree['config']).__qualname__ = type(tree['config']).__name__ = 'Optimizer'
    vars(sys.modules['gone'])['Optimizer'] = type(tree['config'])
    torch.save(tree, path)
    assert 'could run any code' in refused(open_model, str(path), code=errors.CHECKPOINT)
    torch.save({**tree, 'config': config_of('gone', {'n_heads': 4}), 'other': config_of('elsewhere', {'a': 1})}, path)
    assert 'could run any code' in refused(open_model, str(path), code=errors.CHECKPOINT)
    for name in ('gone', 'elsewhere'):
        monkeypatch.delitem(sys.modules, name)


def test_export_refuses_an_answer_that_does_not_fit(tmp_path: Path) -> None:
    torch.save(GPT(GPTConfig(16, 128, 1, 2, 8)).state_dict(), tmp_path / 'original.pt')
    arguments = [f'--init_from={tmp_path}/original.pt', f'--out_dir={tmp_path}/new', '--to=ckpt', '--gelu=tanh']
    assert 'multiple of n_head=3' in refused(export.main, [*arguments, '--n_head=3'], code=errors.COMMAND)
    assert not (tmp_path / 'new').exists()


@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_run_without_a_tokenizer_is_made_with_a_line_and_a_corpus_brings_one(
        tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(GPT(GPTConfig(16, 128, 1, 2, 8)).state_dict(), tmp_path / 'original.pt')
    arguments = [f'--init_from={tmp_path}/original.pt', '--to=ckpt', '--gelu=exact', '--n_head=4']
    export.main([*arguments, f'--out_dir={tmp_path}/without'])
    assert 'the tokenizer is left out: the model knows 128 tokens' in capsys.readouterr().out
    model, state = open_model(f'{tmp_path}/without')
    assert (model.config.n_head, model.config.gelu, state['tokenizer']) == (4, 'exact', None)
    export.main([*arguments, f'--out_dir={tmp_path}/with', f'--dataset={tiny_dataset}'])
    assert open_model(f'{tmp_path}/with')[1]['tokenizer']['name'] == 'char'
    without = [f'--init_from={tmp_path}/without', f'--out_dir={tmp_path}/new', '--to=hf']
    assert 'has learned another one' in refused(export.main, without, code=errors.CHECKPOINT)


def test_nanogpts_gelu_is_the_exact_one_unless_a_setting_says_otherwise(tmp_path: Path) -> None:
    """nanoGPT's files do not say which one it is; nor do those of its relatives, which have its names and the other
    GELU."""
    args = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 16, 'bias': True, 'vocab_size': 64, 'dropout': 0.0}
    tree = {'model': GPT(GPTConfig(16, 64, 1, 2, 8)).state_dict(), 'model_args': args, 'iter_num': 3}
    torch.save(tree, tmp_path / 'ckpt.pt')
    assert open_model(str(tmp_path / 'ckpt.pt'))[0].config.gelu == 'exact'
    export.main([f'--init_from={tmp_path}/ckpt.pt', f'--out_dir={tmp_path}/new', '--to=ckpt', '--gelu=tanh'])
    assert open_model(f'{tmp_path}/new')[0].config.gelu == 'tanh'
