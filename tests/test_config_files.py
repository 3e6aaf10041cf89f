"""nanoGPT's settings and config files, and plainGPT's own: train.py understands all of them, and none is in torchrun's
way."""
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import configurator

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'config').glob('*.py'))

# nanoGPT's settings with their defaults; dtype, device, compile and backend are 'auto' here
NANOGPT: dict[str, Any] = {
    'out_dir': 'out', 'eval_interval': 2000, 'log_interval': 1, 'eval_iters': 200, 'eval_only': False,
    'always_save_checkpoint': True, 'init_from': 'scratch', 'wandb_log': False, 'wandb_project': 'owt',
    'wandb_run_name': 'gpt2', 'dataset': 'openwebtext', 'gradient_accumulation_steps': 40, 'batch_size': 12,
    'block_size': 1024, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'dropout': 0.0, 'bias': False,
    'learning_rate': 6e-4, 'max_iters': 600000, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'grad_clip': 1.0,
    'decay_lr': True, 'warmup_iters': 2000, 'lr_decay_iters': 600000, 'min_lr': 6e-5, 'backend': 'auto',
    'device': 'auto', 'dtype': 'auto', 'compile': 'auto',
}
# For each setting, a value other than the default as a nanoGPT user types it, and what it must become
TYPED: dict[str, tuple[str, Any]] = {
    'out_dir': ('out-a', 'out-a'), 'eval_interval': ('10', 10), 'log_interval': ('5', 5), 'eval_iters': ('20', 20),
    'eval_only': ('True', True), 'always_save_checkpoint': ('False', False), 'init_from': ('gpt2-xl', 'gpt2-xl'),
    'wandb_log': ('True', True), 'wandb_project': ('p', 'p'), 'wandb_run_name': ('r', 'r'),
    'dataset': ('shakespeare', 'shakespeare'), 'gradient_accumulation_steps': ('8', 8), 'batch_size': ('4', 4),
    'block_size': ('256', 256), 'n_layer': ('4', 4), 'n_head': ('4', 4), 'n_embd': ('128', 128),
    'dropout': ('0.2', 0.2), 'bias': ('True', True), 'learning_rate': ('1e-3', 1e-3), 'max_iters': ('5000', 5000),
    'weight_decay': ('0.2', 0.2), 'beta1': ('0.8', 0.8), 'beta2': ('0.99', 0.99), 'grad_clip': ('0.0', 0.0),
    'decay_lr': ('False', False), 'warmup_iters': ('100', 100), 'lr_decay_iters': ('5000', 5000),
    'min_lr': ('1e-4', 1e-4), 'backend': ('gloo', 'gloo'), 'device': ('cpu', 'cpu'), 'dtype': ('float32', 'float32'),
    'compile': ('False', False),
}
# The contents of nanoGPT's config files, without its comments
CONFIG_FILES = {
    'train_gpt2': """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    'train_shakespeare_char': """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
    'finetune_shakespeare': """
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    **{f'eval_{name.replace("-", "_")}': f"""
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = '{name}'
""" for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')},
}
IMPORTS_TIME = "import time\n\nwandb_run_name = 'ft-' + str(time.time())\n"


@pytest.fixture(scope='module')
def train() -> ModuleType:
    """Return train.py, with its real settings."""
    return importlib.import_module('train')


def executed(source: str) -> dict[str, Any]:
    """Return what nanoGPT makes of a config file by running it."""
    values: dict[str, Any] = {}
    exec(source, values)
    del values['__builtins__']
    return values


def test_every_default_is_nanogpts(train: ModuleType) -> None:
    settings, given = configurator.configure(train, [])
    assert {name: settings.get(name) for name in NANOGPT} == NANOGPT
    assert given == set()


@pytest.mark.parametrize('name', NANOGPT)
def test_every_setting_of_nanogpt_is_taken_from_the_command_line(train: ModuleType, name: str) -> None:
    text, value = TYPED[name]
    assert value != NANOGPT[name]
    settings, given = configurator.configure(train, [f'--{name}={text}'])
    assert settings[name] == value == getattr(train, name)
    assert type(settings[name]) is type(value)
    assert given == {name}


@pytest.mark.parametrize('name', CONFIG_FILES)
def test_nanogpts_config_files_mean_what_they_mean_there(train: ModuleType, name: str, tmp_path: Path) -> None:
    path = tmp_path / f'{name}.py'
    path.write_text(CONFIG_FILES[name], encoding='utf-8')
    settings, given = configurator.configure(train, [str(path)])
    expected = executed(CONFIG_FILES[name])
    assert {key: settings[key] for key in given} == expected
    found, _ = configurator.configure(train, [str(ROOT / 'config' / path.name)])
    assert {key: found[key] for key in expected} == expected, 'the file of that name agrees'


def test_the_config_file_that_imports_time_names_the_run_by_the_clock(train: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / 'finetune_shakespeare.py'
    path.write_text(IMPORTS_TIME + CONFIG_FILES[path.stem], encoding='utf-8')
    settings, _ = configurator.configure(train, [str(path)], 1700000000.5)
    assert (settings['wandb_run_name'], settings['max_iters']) == ('ft-1700000000.5', 20)
    settings, _ = configurator.configure(train, [str(ROOT / 'config/finetune_shakespeare.py')])
    assert re.fullmatch(r'ft-\d{8}-\d{6}', settings['wandb_run_name'])


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_each_config_file_opens_with_its_command_and_is_understood(train: ModuleType, path: Path) -> None:
    source = path.read_text(encoding='utf-8')
    comment = re.match(r'(#.*\n)+', source)
    assert comment, 'the file opens with a comment'
    labels = re.findall(r'^# (\w+): ', comment.group(), flags=re.MULTILINE)
    assert labels == ['command', 'device', 'duration', 'expected']
    assert f' train.py config/{path.name}\n' in comment.group()

    settings, given = configurator.configure(train, [str(path)])
    name_of_run = {'wandb_run_name': settings['wandb_run_name']} if '{time}' in source else {}
    assert {key: settings[key] for key in given} == executed(source) | name_of_run
    prepare = re.search(r'python data/(\w+)/prepare\.py(?: .*--name=(\w+))?', comment.group())
    assert prepare, 'it says how the text is prepared'
    assert (ROOT / 'data' / prepare[1] / 'prepare.py').exists()
    assert settings['dataset'] == (prepare[2] or prepare[1])


def test_the_file_for_larger_gpus_trains_and_measures_on_as_many_windows(train: ModuleType) -> None:
    small, large = (configurator.configure(train, [str(ROOT / f'config/train_gpt2{name}.py')])[0]
                    for name in ('', '_80gb'))
    assert {name for name in small if small[name] != large[name]} == {
        'batch_size', 'gradient_accumulation_steps', 'eval_iters', 'out_dir'}
    assert small['batch_size'] < large['batch_size']
    for count in ('gradient_accumulation_steps', 'eval_iters'):
        assert small['batch_size'] * small[count] == large['batch_size'] * large[count]
    assert large['gradient_accumulation_steps'] % 8 == 0, 'as many for each of 8 processes'


def test_the_folders_that_configs_write_to_differ(train: ModuleType) -> None:
    folders = [configurator.configure(train, [str(path)])[0]['out_dir'] for path in CONFIGS if 'eval' not in path.stem]
    assert len(set(folders)) == len(folders)


def test_the_commands_of_nanogpts_relatives_are_understood(train: ModuleType) -> None:
    config = str(ROOT / 'config/train_gpt2.py')
    line = '--device=cpu --compile=False --block_size=256 --batch_size=4 --n_layer=4 --n_head=4'
    settings, _ = configurator.configure(train, [config, *line.split()])
    assert (settings['device'], settings['compile'], settings['n_layer'], settings['n_embd']) == ('cpu', False, 4, 768)
    line = ('--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 '
            '--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0')
    settings, given = configurator.configure(train, [str(ROOT / 'config/train_shakespeare_char.py'), *line.split()])
    assert (settings['max_iters'], settings['dropout'], settings['dataset']) == (2000, 0.0, 'shakespeare_char')
    assert 'dropout' in given


def test_no_setting_of_train_is_ambiguous_to_torchrun(train: ModuleType) -> None:
    """torchrun's parser looks at every option on the line, and exits if one may begin two of its own options."""
    torchrun = importlib.import_module('torch.distributed.run')
    with pytest.raises(SystemExit):
        torchrun.parse_args(['--standalone', 'train.py', '--max=3'])  # ambiguous, so the check can fail
    settings, _ = configurator.configure(train, [])
    for name, value in settings.items():
        for option in ([f'--{name}={value}'], [f'--{name}', str(value)], [f'--{name.replace("_", "-")}={value}']):
            taken = torchrun.parse_args(['--standalone', '--nproc_per_node=2', 'train.py', *option])
            assert (taken.training_script, taken.training_script_args) == ('train.py', option)
            assert (taken.standalone, taken.nproc_per_node) == (True, '2')
