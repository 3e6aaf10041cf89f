"""
Checkpoints of other projects, in this project's form: nanoGPT, build-nanogpt, gpt_from_scratch, and bare weights under
GPT-2's names. A different model from GPT-2 is refused, with the reason.

Some of them hold a pickled dataclass. It is never imported: an inert class takes its place, and has its fields.
"""
import math
import mmap
import re
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPTConfig
from plaingpt import schema
from plaingpt.corpus import tokenizer
from plaingpt.errors import CHECKPOINT, UserError, command, is_out_of_memory, of_system, python, refusal
from plaingpt.formats.weights import SIDE, TABLE, TRANSPOSED, is_tensor, is_tied
from plaingpt.schema import COUNT, EMPTY, PLAIN

State = dict[str, Any]
OTHER_MODELS = [  # the keys of a checkpoint, its project, and why its weights are of no use to a GPT-2
    ({'n_iter', 'model_state_dict', 'wandb_run_id'}, 'DDP-BASEMODEL-TRAIN',
     'its norms are RMSNorm, and what its attention projects is never used'),
    ({'epoch', 'model_state_dict', 'optimizer_state_dict', 'loss'}, 'gpt-ddp',
     'it normalises the residual stream itself, and has its GELU after the MLP'),
    ({'model_state', 'optimizer_state', 'finished_epoch'}, 'minGPT-ddp', 'its attention sees later tokens'),
]
GPT_FROM_SCRATCH = [  # its names for the weights, and GPT-2's
    ('gpt.t_embedding.', 'transformer.wte.'), ('gpt.p_embedding.', 'transformer.wpe.'),
    ('gpt.transformers.', 'transformer.h.'), ('.norm1.', '.ln_1.'), ('.mha.qkv.', '.attn.c_attn.'),
    ('.mha.proj.', '.attn.c_proj.'), ('.norm2.', '.ln_2.'), ('.ff.layers.0.', '.mlp.c_fc.'),
    ('.ff.final_l.', '.mlp.c_proj.'), ('gpt.final_ln.', 'transformer.ln_f.'), ('gpt.ln_out.', 'lm_head.')]
# The parts that torch.compile, DDP, activation checkpointing and FSDP put into the names of weights
WRAPPERS = re.compile(r'(?<![^.])(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.')
SPLIT = {'tokens': COUNT, 'sha256': str}
BEST = ({'loss': [float, COUNT], str: [float, COUNT]}, EMPTY)


def is_number(value: object) -> bool:
    return is_tensor(value) and value.numel() == 1 and value.is_floating_point()


CONTENT: dict[str, Any] = {  # the parts of a checkpoint that are read; other projects' lack some of them
    'model': {str: is_tensor},
    'model_args': {
        **dict.fromkeys(('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size'), SIDE),
        'bias?': bool,
        'dropout?': float},
    'config': {
        str: PLAIN,
        'gelu': {'tanh', 'exact'},
        'tie_weights': bool,
        'arch?': {'gpt2', 'modern'},
        'shortcuts?': bool,
        'dataset?': str,
        **dict.fromkeys(('total_batch_size?', 'gradient_accumulation_steps?', 'batch_size?', 'block_size?'), COUNT)},
    **dict.fromkeys(('iter_num?', 'windows?', 'windows_before?', 'tokens?', 'skipped?'), COUNT),
    'best_val_loss?': (float, is_number),  # the latter in nanoGPT's
    'best?': BEST,
    'tokenizer?': (None, *tokenizer.STATE),
    'scaler?': ({'scale': float, 'growth_factor': float, 'backoff_factor': float, 'growth_interval': COUNT,
                 '_growth_tracker': COUNT}, EMPTY),
    'wandb_run_id?': str,
    'data?': ({'train': SPLIT, 'val': SPLIT}, EMPTY),
    'compute?': {'device': str, 'dtype': {'float32', 'bfloat16', 'float16'}},
    'optimizer?': {'state': {int: ({'step': (is_tensor, float), 'exp_avg': is_tensor, 'exp_avg_sq': is_tensor},
                                   {'momentum_buffer': is_tensor})},
                    'param_groups': [{'params': [COUNT, ...]}, ...]}}


# The classes and functions that make a number of numpy, in files of its versions 1 and 2
SCALAR: Any = np.float64(0).__reduce__()[0]
NUMPY: dict[str, Any] = {
    'numpy.core.multiarray.scalar': SCALAR, 'numpy._core.multiarray.scalar': SCALAR, 'numpy.dtype': np.dtype}
NUMBERS: list[Any] = [type(np.dtype(kind)) for kind in ('f8', 'f4', 'f2', 'i8', 'i4', '?')]


class Inert:
    """A stand-in for a class that a file names, whatever that is: it has fields, and does nothing."""


def read(path: Path, may_be_old: bool = False, is_mapped: bool = False) -> Any:
    """Return what torch.save has written. Nothing in it runs: all but tensors, plain values and the fields of one
    config is refused, and so is a file whose checksums do not match, or that has none, unless it `may_be_old`. If
    `is_mapped`, its tensors are read when they are used, and all processes of a machine share the memory for them. Copy
    what is needed for longer: if the file is changed in place, the tensors change, too."""
    is_old = may_be_old and not zipfile.is_zipfile(path)
    if not is_old:
        refuse_other_formats(path)
        refuse_damage(path)
    try:
        names = [] if is_old else torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        left = [name for name in names if name not in NUMPY]
        configs = [(Inert, name) for name in left if len(left) == 1 and name.endswith('Config')]
        of_numpy = [(NUMPY[name], name) for name in names if name in NUMPY]
        with torch.serialization.safe_globals([*configs, *of_numpy, *NUMBERS]):
            return plain(torch.load(path, map_location='cpu', weights_only=True, mmap=is_mapped and is_mappable(path)))
    except Exception as error:  # torch's own reader raises several kinds
        if is_out_of_memory(error):
            raise
        if of_system(error):
            raise refusal(error, path, CHECKPOINT) from None
        raise UserError(f'{path} holds more than tensors and plain values, which could run any code: it is not loaded',
                        CHECKPOINT) from None


def is_mappable(path: Path) -> bool:
    """Return whether the file system maps files into memory, and no part of this zip is compressed, which torch does
    not check. Windows neither deletes nor replaces a mapped file."""
    if sys.platform == 'win32':
        return False
    with open(path, 'rb') as file, zipfile.ZipFile(file) as archive:
        try:
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).close()
        except OSError:
            return False
        return all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())


def plain(tree: Any) -> Any:
    """Return the same tree with Python's numbers in place of numpy's."""
    if type(tree) is dict:
        return {key: plain(value) for key, value in tree.items()}
    return tree.item() if isinstance(tree, np.generic) else tree


def refuse_other_formats(path: Path) -> None:
    """Raise UserError for two other formats that users often give, and say how to convert them."""
    with open(path, 'rb') as file:
        head = file.read(10)
    if head[8:] == b'{"':
        raise UserError(f'{path} is a safetensors file, which does not say the shape of its model\ngive the folder '
                        'that holds it as model.safetensors beside its config.json', CHECKPOINT)
    if head[:1] == b'\x80':
        new = shlex.quote(str(path.with_suffix('.converted.pt')))
        raise UserError(f"{path} is in PyTorch's format before 1.6, or a pickle: nothing would show damage to it\n"
                        f'{python()} -c "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=True), '
                        f'sys.argv[2])" {shlex.quote(str(path))} {new}', CHECKPOINT)


def refuse_damage(path: Path) -> None:
    """Raise UserError if the checksums of a zip do not match."""
    with open(path, 'rb') as file:  # outside of the try: what the system refuses is not damage
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f'{path} is damaged, or not a checkpoint: {error}', CHECKPOINT) from None
    if damaged:
        raise UserError(f'{path} is damaged: the checksum of its part {damaged} does not match', CHECKPOINT)


def adopt(tree: Any, path: Path, answers: dict[str, Any]) -> State:
    """Return a checkpoint in this project's form from what `path` holds; `answers` gives the n_head and gelu that it
    may not say. Raise UserError if something is missing, and for a different model from GPT-2."""
    if not isinstance(tree, dict):
        tree = {}
    for keys, project, reason in OTHER_MODELS:
        if keys <= tree.keys():
            raise UserError(f"{path} looks like {project}'s, which is a different model from GPT-2: {reason}",
                            CHECKPOINT)
    is_bare = 'model' not in tree and any(isinstance(value, Tensor) for value in tree.values())
    found = tree if is_bare else tree.get('model')
    if isinstance(found, dict):
        schema.refuse({'model': found}, {'model': CONTENT['model']}, path, CHECKPOINT)
    weights = clean(found)
    if weights and isinstance(tree.get('model_args'), dict):  # nanoGPT's, whose GELU is exact, or this project's
        config = tree.get('config', {})
        if isinstance(config, dict) and TABLE in weights:
            known = {'gelu': answers.get('gelu', 'exact')}
            config = known | config | {'tie_weights': is_tied(weights, config.get('tie_weights'), path)}
        state = tree | {'model': weights, 'config': config}
    else:
        state = name_all(tree, weights, path, answers)
    schema.refuse(state, CONTENT, path, CHECKPOINT)
    return complete(state)


def name_all(tree: State, weights: dict[str, Tensor], path: Path, answers: dict[str, Any]) -> State:
    """Return what a file without nanoGPT's names says, under those names; see `adopt`."""
    config = vars(tree['config']) if isinstance(tree.get('config'), Inert) else {}
    if 'gpt.t_embedding.weight' in weights:
        weights = from_gpt_from_scratch(weights)
        config = {'n_head': config.get('n_heads')}
    says = {'n_head': config.get('n_head'), 'gelu': 'tanh'} if config else {}  # both projects have GPT-2's GELU
    known = answers | {name: value for name, value in says.items()
                       if name == 'gelu' or (type(value) is int and value > 0)}
    weights = from_transformers(weights)
    if TABLE not in weights:
        raise UserError(f"{path} has no 'model' and 'model_args': neither plainGPT nor nanoGPT wrote it", CHECKPOINT)
    return describe(weights, known, path) | {
        'iter_num': tree.get('step', tree.get('iter', 0)), 'best_val_loss': tree.get('val_loss', math.inf)}


def clean(weights: Any) -> dict[str, Tensor]:
    """Return weights under their own names: compiled and distributed models prefix them, and old ones carry the causal
    mask as a buffer. If these are not weights, return {}."""
    if not isinstance(weights, dict):
        return {}
    named = {WRAPPERS.sub('', name): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))}


def complete(state: State) -> State:
    """Add the keys that this project's checkpoints have and others lack."""
    best_val_loss = float(state.get('best_val_loss', 'inf'))  # a tensor in nanoGPT's
    windows = state.get('iter_num', 0) * windows_in_step(state)
    return {
        'iter_num': 0,
        'windows': windows,
        'windows_before': 0,
        'tokens': windows * state['model_args'].get('block_size', 0),
        'skipped': 0,
        'tokenizer': None,
        'scaler': {},
        'wandb_run_id': '',
        'data': {},
        'best': {'loss': [best_val_loss, state.get('iter_num', 0)]} if math.isfinite(best_val_loss) else {},
        **state,
        'best_val_loss': best_val_loss}


def windows_in_step(state: State) -> int:
    """Return how many windows each step has read in a run of nanoGPT, or of version 0.1.0, which does not say how many
    it has read in all."""
    settings = {'block_size': 1, **state.get('config', {}), **state['model_args']}
    in_tokens = settings.get('total_batch_size', 0) // settings['block_size']
    return in_tokens or settings.get('gradient_accumulation_steps', 1) * settings.get('batch_size', 0)


def from_gpt_from_scratch(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of gpt_from_scratch under GPT-2's names. If q, k and v have no biases, add biases of zero."""
    for before, after in GPT_FROM_SCRATCH:
        weights = {name.replace(before, after): tensor for name, tensor in weights.items()}
    biases = {name.removesuffix('weight') + 'bias': torch.zeros(tensor.shape[:1])
              for name, tensor in weights.items() if name.endswith('.attn.c_attn.weight')}
    return biases | weights


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of one of transformers' GPT-2s, with or without a head, under this project's names and in
    its shapes; any other as it is."""
    if 'wte.weight' in weights:
        weights = {f'transformer.{name}': tensor for name, tensor in weights.items()}
    c_attn = weights.get('transformer.h.0.attn.c_attn.weight')
    if c_attn is not None and c_attn.dim() == 2 and c_attn.size(1) == 3 * c_attn.size(0):
        weights = {name: p.t().contiguous() if name.endswith(TRANSPOSED) and p.dim() == 2 else p
                   for name, p in weights.items()}
    return weights


def describe(weights: dict[str, Tensor], known: dict[str, Any], path: Path) -> State:
    """Return a checkpoint made from weights under GPT-2's names: they decide the shape, but for n_head and gelu, which
    must be `known`."""
    wte, wpe = weights[TABLE], weights.get('transformer.wpe.weight')
    if wpe is None or not wte.dim() == wpe.dim() == 2:
        raise UserError(f'{path} is a different model from GPT-2: it has no table of positions', CHECKPOINT)
    options = {'n_head': str(max(1, wte.size(1) // 64)), 'gelu': 'tanh'}
    if asked := [name for name in options if name not in known]:
        answers = {name: options[name] for name in asked}
        remedy = command('export.py', init_from=path, out_dir=f'out-{path.stem}', to='ckpt', **answers)
        raise UserError(f'{path} does not say {" and ".join(asked)}\nmake a checkpoint that does: {remedy}', CHECKPOINT)
    args = {
        'n_layer': len({name.split('.')[2] for name in weights if name.startswith('transformer.h.')}),
        'n_head': known['n_head'],
        'n_embd': wte.size(1),
        'block_size': wpe.size(0),
        'bias': 'transformer.ln_f.bias' in weights,
        'vocab_size': wte.size(0),
        'dropout': 0.0}
    GPTConfig(**args)  # refuses an n_head that the user gave and that does not fit
    config = {'gelu': known['gelu'], 'tie_weights': is_tied(weights, None, path)}
    return {'model': weights, 'model_args': args, 'config': config}
