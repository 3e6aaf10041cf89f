"""train_trivialised.py and train.py are the same training: the same windows, losses, initial and final weights."""
import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import configurator
import train
import train_trivialised
from model import GPTConfig
from model_trivialised import GPT
from plaingpt.corpus.folder import open_split, read_meta
from plaingpt.run import checkpoint
from tests.comparing import assert_equal_to_rounding

ROOT = Path(__file__).parents[1]
SHAPE = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--total_batch_size=256']
OVERRIDES = {
    'rise and fall': ['--max_iters=12', '--warmup_iters=4', '--lr_decay_iters=10', '--learning_rate=1e-2',
                      '--min_lr=1e-3'],
    'no warm-up': ['--max_iters=6', '--warmup_iters=0', '--lr_decay_iters=6', '--learning_rate=3e-3', '--min_lr=0',
                   '--bias=True', '--beta1=0.8', '--beta2=0.95', '--weight_decay=1.0', '--grad_clip=0.05', '--seed=7'],
}


def train_plainly(dataset: Path, overrides: list[str]) -> tuple[list[float], GPT]:
    configurator.configure(train_trivialised, [f'--dataset={dataset}', *SHAPE, *overrides])
    settings = train_trivialised
    meta = read_meta(dataset)
    torch.manual_seed(settings.seed)
    config = GPTConfig(settings.block_size, meta['vocab_size'], settings.n_layer, settings.n_head, settings.n_embd,
                       bias=settings.bias)
    model = GPT(config)
    corpus = open_split(dataset, 'train', settings.block_size, meta['vocab_size'])
    return train_trivialised.train(model, corpus), model


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('batch_size', [8, 3])  # a whole step at once, and in parts, the last of them not full
@pytest.mark.parametrize('name', OVERRIDES)
def test_the_plain_training_and_the_fast_one_give_the_same_losses_and_weights(
        tiny_dataset: Path, tmp_path: Path, name: str, batch_size: int) -> None:
    losses, plain = train_plainly(tiny_dataset, OVERRIDES[name])

    train.main([f'--dataset={tiny_dataset}', *SHAPE, '--warmup_iters=100', '--beta2=0.99', '--lr_decay_iters=600',
                *OVERRIDES[name], f'--batch_size={batch_size}', f'--out_dir={tmp_path}', '--device=cpu',
                '--sample_interval=0', '--eval_interval=100', '--eval_iters=1'])
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    fast = checkpoint.load(tmp_path / 'ckpt.pt')['model']

    assert_equal_to_rounding([row['loss'] for row in rows if 'loss' in row], losses)
    assert losses[-1] < losses[0] - 0.2  # the run learns, so the agreement means something
    assert_equal_to_rounding(fast, plain.state_dict())


def test_every_setting_of_the_plain_training_is_one_of_the_fast_training() -> None:
    plain, _ = configurator.configure(train_trivialised, [])
    fast, _ = configurator.configure(train, [])
    assert set(plain) <= set(fast)
    assert {name: type(value) for name, value in plain.items()} == {name: type(fast[name]) for name in plain}


def test_the_plain_training_writes_out_all_of_its_arithmetic() -> None:
    """AdamW, clipping and the schedule are written out, and no function of torch stands in for them."""
    source = Path(str(sys.modules['train_trivialised'].__file__)).read_text(encoding='utf-8')
    for name in ('torch.optim', 'clip_grad', 'lr_scheduler', 'nn.functional', '.backward('):
        assert name not in source


def complaints_about_marks(plain: str, model: str, fast: str) -> list[str]:
    """Return what train.py's marks lack: the two files differ too much for their hunks to be compared, so a mark names,
    in backticks, a function of a plain file or a part of the loop, which a comment of the plain file names."""
    functions = {node.name for node in ast.parse(plain).body if isinstance(node, ast.FunctionDef)}
    parts = {'forward and backward', 'evaluation'}  # of the loop; its rate, clipping and update are functions
    exist = functions | {part for part in parts if f'# {part}' in plain}
    exist |= {node.name for node in ast.parse(model).body if isinstance(node, ast.FunctionDef)}
    marks = [line.strip() for line in fast.splitlines() if re.search('# (fast|more): ', line)]
    named = {name: line for line in marks for name in re.findall('`([^`]+)`', line)}
    return [*(f'no mark names {name}' for name in functions | parts if name not in named),
            *(f'no name: {line}' for line in marks if '`' not in line),
            *(f'{name} is nowhere: {line}' for name, line in named.items() if name not in exist)]


def test_train_py_says_what_became_of_each_function_and_part_of_the_plain_file() -> None:
    plain, model, fast = ((ROOT / name).read_text(encoding='utf-8')
                          for name in ('train_trivialised.py', 'model_trivialised.py', 'train.py'))
    assert complaints_about_marks(plain, model, fast) == []

    # and the test notices missing marks and names, on either side
    assert complaints_about_marks(plain + 'def more() -> None:\n    pass\n', model, fast) == ['no mark names more']
    [lost] = complaints_about_marks(plain.replace('def clip(', 'def shorten('), model, fast)[1:]
    assert 'clip is nowhere' in lost
    assert complaints_about_marks(plain, model, fast.replace('`clip`', 'it')) != []
    assert complaints_about_marks(plain.replace('# evaluation', ''), model, fast)[0].startswith('evaluation is nowhere')
