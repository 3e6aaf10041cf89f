"""llm.c's files: a header of 256 int32, then the weights of a GPT-2, or the tokens of its vocabulary."""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import GPTConfig
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import CHECKPOINT, UserError

MODEL, TOKENS = 20240326, 20240328  # the first number of a header
HEADER = 256  # numbers
DTYPES: dict[int, torch.dtype] = {3: torch.float32, 5: torch.bfloat16}  # by the version of the format
LAYER = ('ln_1.weight', 'ln_1.bias', 'attn.c_attn.weight', 'attn.c_attn.bias', 'attn.c_proj.weight', 'attn.c_proj.bias',
         'ln_2.weight', 'ln_2.bias', 'mlp.c_fc.weight', 'mlp.c_fc.bias', 'mlp.c_proj.weight', 'mlp.c_proj.bias')


class Shape(NamedTuple):
    """What a header says, in its order, from its third number on."""

    T: int
    V: int
    n_layer: int
    n_head: int
    C: int
    rows: int  # of the table; those from V on stand for no token

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """The names and shapes of all tensors in the order of the file, which keeps a kind of all layers together."""
        C = self.C
        inner = {'attn.c_attn': 3 * C, 'mlp.c_fc': 4 * C}  # outputs, where they are not C
        tensors: list[tuple[str, tuple[int, ...]]] = [
            ('transformer.wte.weight', (self.rows, C)), ('transformer.wpe.weight', (self.T, C))]
        for kind in LAYER:
            module, _, parameter = kind.rpartition('.')
            shape: tuple[int, ...] = (inner.get(module, C),)
            if parameter == 'weight' and not module.startswith('ln'):
                shape += (4 * C if module == 'mlp.c_proj' else C,)
            tensors += [(f'transformer.h.{layer}.{kind}', shape) for layer in range(self.n_layer)]
        return [*tensors, ('transformer.ln_f.weight', (C,)), ('transformer.ln_f.bias', (C,))]


def is_model(path: Path) -> bool:
    """Whether this file is one, by its first number."""
    with open(path, 'rb') as file:
        return file.read(4) == MODEL.to_bytes(4, 'little')


def load(path: Path, dropout: float = 0.0) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the weights, in float32. The rows that pad the vocabulary stay behind. Raises UserError for a file
    that is cut off, or of another version."""
    with open(path, 'rb') as file:
        first = np.fromfile(file, '<i4', HEADER)
        version = int(first[1]) if len(first) == HEADER else 0
        if version not in DTYPES:
            raise UserError(f'{path} is of version {version} of its format: llm.c has GPT-2 in 3 (float32) and 5 '
                            '(bfloat16)', CHECKPOINT)
        shape, data = Shape(*map(int, first[2:8])), np.fromfile(file, np.uint8)
    tensors = shape.tensors()
    sizes = [math.prod(size) for _, size in tensors]
    need = sum(sizes) * DTYPES[version].itemsize
    if min(shape) < 1 or need != len(data):
        raise UserError(f'{path} has {len(data):,} bytes of weights, and its header speaks of {need:,}: it is cut off '
                        'or damaged', CHECKPOINT)
    parts = torch.from_numpy(data).view(DTYPES[version]).float().split(sizes)
    weights = {name: part.view(size) for (name, size), part in zip(tensors, parts, strict=True)}
    weights['transformer.wte.weight'] = weights['transformer.wte.weight'][:shape.V].contiguous()
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    config = GPTConfig(block_size=shape.T, vocab_size=shape.V, n_layer=shape.n_layer, n_head=shape.n_head,
                       n_embd=shape.C, dropout=dropout)
    return config, weights


def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (HEADER - len(numbers))], dtype='<i4').tobytes()


def write(folder: Path, config: GPTConfig, weights: dict[str, Tensor], vocabulary: Tokenizer,
          dtype: torch.dtype) -> None:
    """The model, in float32 or bfloat16, its vocabulary padded to a multiple of 128 with rows of zeros; and the tokens.
    The model must be llm.c's: tanh GELU, a tied head, biases."""
    shape = Shape(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd,
                  rows=-(-config.vocab_size // 128) * 128)
    version = next(version for version, known in DTYPES.items() if known == dtype)
    with open(folder / 'model.bin', 'wb') as file:
        file.write(header(MODEL, version, *shape))
        for name, size in shape.tensors():
            tensor = torch.zeros(size)
            tensor[:len(weights[name])] = weights[name]
            file.write(tensor.to(dtype).view(torch.uint8).numpy().tobytes())
    if vocabulary.eot is None or any(not 0 < len(piece) < 256 for piece in vocabulary.pieces):
        print('no tokenizer.bin: llm.c needs a token that begins a text, and 1 to 255 bytes in each')
        return
    with open(folder / 'tokenizer.bin', 'wb') as file:
        file.write(header(TOKENS, 2, vocabulary.n_vocab, vocabulary.eot))
        for piece in vocabulary.pieces:
            file.write(bytes([len(piece)]) + piece)
