"""
Checkpoints of other projects, in this project's form: nanoGPT, build-nanogpt, gpt_from_scratch, and bare weights under
GPT-2's names. Whatever is another model than GPT-2 is refused, with the reason.

Some of them hold a pickled dataclass. It is never imported: an inert class takes its place, and has its fields.
"""
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plaingpt.errors import CHECKPOINT, UserError, python

State = dict[str, Any]
OTHER_MODELS = [  # the keys of a checkpoint, whose it is, and why its weights are of no use to a GPT-2
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


class Inert:
    """Takes the place of one class that a file names, whatever that is: it has fields, and does nothing."""


def read(path: Path) -> Any:
    """What torch.save has written. Nothing in it runs: all but tensors, plain values and the fields of one config is
    refused."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        config: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (Inert, name) for name in names if len(names) == 1 and name.endswith('Config')]
        with torch.serialization.safe_globals(config):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception:  # torch's own reader raises several kinds
        raise UserError(f'{path} holds more than tensors and plain values, which could run any code: it is not loaded',
                        CHECKPOINT) from None


def adopt(tree: Any, path: Path, answers: dict[str, Any]) -> State:
    """A checkpoint in this project's form, made of what `path` holds; `answers` gives what that does not say: n_head
    and gelu. Raises UserError where something is missing, and for another model than GPT-2."""
    if not isinstance(tree, dict):
        tree = {}
    for keys, project, reason in OTHER_MODELS:
        if keys <= tree.keys():
            raise UserError(f"{path} looks like {project}'s, which is another model than GPT-2: {reason}", CHECKPOINT)
    is_bare = 'model' not in tree and any(isinstance(value, Tensor) for value in tree.values())
    weights = clean(tree if is_bare else tree.get('model'))
    if weights and isinstance(tree.get('model_args'), dict):
        return from_nanogpt(tree, weights, answers)
    config = vars(tree['config']) if isinstance(tree.get('config'), Inert) else {}
    if 'gpt.t_embedding.weight' in weights:
        weights = from_gpt_from_scratch(weights)
        known = {'n_head': config.get('n_heads'), 'gelu': 'tanh', 'tie_weights': False}
    elif 'transformer.wte.weight' in weights:
        known = {'n_head': config.get('n_head'), 'gelu': 'tanh' if config else None, 'tie_weights': None}
    else:
        raise UserError(f"{path} has no 'model' and 'model_args': neither plainGPT nor nanoGPT wrote it", CHECKPOINT)
    return describe(tree, weights, known, path, answers)


def clean(weights: Any) -> dict[str, Tensor]:
    """Weights under their own names: compiled and distributed models prefix them, and old ones carry the causal mask as
    a buffer. Empty where these are no weights."""
    found = {}
    for name, tensor in weights.items() if isinstance(weights, dict) else ():
        while name.startswith(('_orig_mod.', 'module.')):
            name = name.partition('.')[2]
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):
            found[name] = tensor
    return found


def complete(state: State) -> State:
    """The keys that this project's checkpoints have and others lack."""
    best_val_loss = float(state.get('best_val_loss', 'inf'))  # a tensor in nanoGPT's
    best = {'loss': [best_val_loss, state.get('iter_num', 0)]} if math.isfinite(best_val_loss) else {}
    rest: State = {'iter_num': 0, 'skipped': 0, 'tokenizer': None, 'scaler': {}, 'wandb_run_id': '', 'data': {},
                   'best': best}
    return rest | state | {'best_val_loss': best_val_loss}


def from_nanogpt(state: State, weights: dict[str, Tensor], answers: dict[str, Any]) -> State:
    """nanoGPT's, whose GELU is the exact one if nobody says otherwise; and our own, which say all."""
    settings = {'gelu': answers.get('gelu', 'exact'), 'tie_weights': True} | state.get('config', {})
    return complete(state | {'model': weights, 'config': settings})


def from_gpt_from_scratch(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's names in place of theirs. Where q, k and v have no biases, they are zero."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in GPT_FROM_SCRATCH:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in [name for name in renamed if name.endswith('.attn.c_attn.weight')]:
        renamed.setdefault(name.removesuffix('weight') + 'bias', torch.zeros(renamed[name].size(0)))
    return renamed


def describe(tree: State, weights: dict[str, Tensor], known: dict[str, Any], path: Path,
             answers: dict[str, Any]) -> State:
    """The checkpoint that weights under GPT-2's names make, with the shape that they have."""
    wte, wpe = weights['transformer.wte.weight'], weights.get('transformer.wpe.weight')
    layers = {int(name.split('.')[2]) for name in weights if name.startswith('transformer.h.')}
    if wpe is None or wte.dim() != 2:
        raise UserError(f'{path} is another model than GPT-2: it has no table of positions', CHECKPOINT)
    if type(known['n_head']) is not int or known['n_head'] < 1:
        known['n_head'] = None
    known = {name: answers.get(name) if value is None else value for name, value in known.items()}
    missing = {'n_head': f'--n_head={max(1, wte.size(1) // 64)}', 'gelu': '--gelu=tanh'}
    asked = [name for name in missing if known[name] is None]
    if asked:
        answers_wanted = ' '.join(missing[name] for name in asked)
        raise UserError(f'{path} does not say {" and ".join(asked)}: {python()} export.py '
                        f'--init_from={shlex.quote(str(path))} --to=ckpt {answers_wanted} makes a checkpoint that does',
                        CHECKPOINT)
    head = weights.setdefault('lm_head.weight', wte)
    tied = known['tie_weights'] if known['tie_weights'] is not None else torch.equal(head, wte)
    args = {'n_layer': len(layers), 'n_head': known['n_head'], 'n_embd': wte.size(1), 'block_size': wpe.size(0),
            'bias': 'transformer.ln_f.bias' in weights, 'vocab_size': wte.size(0), 'dropout': 0.0}
    return complete({'model': weights, 'model_args': args, 'config': {'gelu': known['gelu'], 'tie_weights': tied},
                     'iter_num': tree.get('step', tree.get('iter', 0)),
                     'best_val_loss': tree.get('val_loss', math.inf)})
