"""The weights of a file, before a model takes them."""
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from model import GPT, GPTConfig
from plaingpt import console
from plaingpt.errors import CHECKPOINT, UserError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TABLE, HEAD = 'transformer.wte.weight', 'lm_head.weight'
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')  # (in, out) elsewhere
KINDS = {'gpt2': 'a GPT-2', 'modern': 'the modern model'}  # by GPTConfig.arch
SIDE = range(1, 2**28)  # of a matrix whose bytes PyTorch can count


def gpt_class(config: GPTConfig) -> type[GPT]:
    """Return the class of such a model. The file of the modern one is read only if it is needed."""
    if config.arch == 'gpt2':
        return GPT
    import model_modern

    return model_modern.GPT


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Return whether it is a dense tensor in main memory: torch.load may make others."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == 'cpu'


def is_tied(weights: dict[str, Tensor], says: bool | None, path: str | Path) -> bool:
    """Return whether the head is the table of tokens: the file has no head, or an equal one and no setting that unties
    it."""
    if HEAD not in weights or (says is not False and torch.equal(weights[HEAD], weights[TABLE])):
        return True
    if says is not False and console.is_main():
        console.note(f'{path}: its head differs from its table of tokens, and is used as it is: tie_weights=False')
    return False


def fitting(config: GPTConfig, weights: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the weights of such a model among those of a file, in the precision of training. Raise UserError if one is
    missing, has another shape, or has numbers that are not finite."""
    if config.n_layer > len(weights):  # before so many layers are built
        raise UserError(f'{path} has {len(weights)} weights, too few for n_layer={config.n_layer}', CHECKPOINT)
    shapes = {name: p.shape for name, p in gpt_class(config).on_meta(config).named_parameters()}
    for name, shape in shapes.items():
        p = weights.get(name)
        fault = ('is missing' if p is None else
                 f'is {tuple(p.shape)}, and should be {tuple(shape)} by the settings' if p.shape != shape else
                 f'has numbers of the type {p.dtype}' if p.dtype not in DTYPES else
                 # a sum keeps NaN and infinity, and takes no memory
                 '' if p.sum(dtype=torch.promote_types(p.dtype, torch.float32)).isfinite() else
                 'has numbers that are infinite or NaN')
        if fault:
            raise UserError(f'the weights in {path} do not fit {KINDS[config.arch]}: {name} {fault}', CHECKPOINT)
    fit = {name: weights[name].to(torch.get_default_dtype()) for name in shapes}
    return fit | ({HEAD: fit[TABLE]} if config.tie_weights else {})
