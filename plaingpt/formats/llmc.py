"""The files of llm.c: a header of 256 int32, then the weights of a GPT-2, or the tokens of its vocabulary."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import GPT, GPTConfig
from plaingpt import console
from plaingpt.errors import CHECKPOINT, UserError
from plaingpt.formats import huggingface
from plaingpt.formats.exported import Exported
from plaingpt.formats.weights import SIDE, TABLE, fitting

MODEL, TOKENS = 20240326, 20240328  # the first number of a header
HEADER = 256  # numbers
DTYPES: dict[int, torch.dtype] = {3: torch.float32, 5: torch.bfloat16}  # by the version of the format
LAYER = (
    'h.0.ln_1.weight', 'h.0.ln_1.bias',
    'h.0.attn.c_attn.weight', 'h.0.attn.c_attn.bias', 'h.0.attn.c_proj.weight', 'h.0.attn.c_proj.bias',
    'h.0.ln_2.weight', 'h.0.ln_2.bias',
    'h.0.mlp.c_fc.weight', 'h.0.mlp.c_fc.bias', 'h.0.mlp.c_proj.weight', 'h.0.mlp.c_proj.bias')


def tensors(T: int, rows: int, n_layer: int, C: int) -> Iterator[tuple[str, torch.Size]]:
    """Yield the names and shapes of all tensors in the order of the file, which keeps those of one kind together for
    all layers. The table of tokens has `rows`; those beyond the vocabulary stand for no token."""
    of_one_layer = GPT.on_meta(GPTConfig(T, rows, n_layer=1, n_head=1, n_embd=C)).state_dict()
    for kind in ('wte.weight', 'wpe.weight', *LAYER, 'ln_f.weight', 'ln_f.bias'):
        for layer in range(n_layer if kind in LAYER else 1):
            yield f'transformer.{kind}'.replace('.h.0.', f'.h.{layer}.'), of_one_layer[f'transformer.{kind}'].shape


def is_model(path: Path) -> bool:
    """Return whether this file is llm.c's model file, by its first number."""
    return np.fromfile(path, '<i4', 1).tolist() == [MODEL]


def load(path: Path, dropout: float = 0.0) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the shape and the weights, in float32, without the rows that pad the vocabulary. Raise UserError for a
    file that is cut off, or of another version."""
    huggingface.refuse_damage(path.parent, path.name)
    first = np.fromfile(path, '<i4', HEADER).tolist()
    version = first[1] if len(first) == HEADER else 0
    if version not in DTYPES:
        raise UserError(f'{path} is of version {version} of its format: llm.c has GPT-2 in 3 (float32) and 5 '
                        '(bfloat16)', CHECKPOINT)
    T, V, n_layer, n_head, C, rows = first[2:8]
    if not all(number in SIDE for number in first[2:8]) or C % n_head or rows < V:
        raise UserError(f'{path} is damaged: the sizes in its header are {first[2:8]}', CHECKPOINT)
    # from the sizes of one layer and of two: a damaged header may claim millions
    one, two = (sum(shape.numel() for _, shape in tensors(T, rows, n, C)) for n in (1, 2))
    need = (one + (n_layer - 1) * (two - one)) * DTYPES[version].itemsize
    data = np.fromfile(path, np.uint8, offset=4 * HEADER)
    if need != len(data):
        raise UserError(f'{path} has {len(data):,} bytes of weights, and its header promises {need:,}: it is cut off '
                        'or damaged', CHECKPOINT)
    shapes = dict(tensors(T, rows, n_layer, C))
    sizes = [shape.numel() for shape in shapes.values()]
    parts = torch.from_numpy(data).view(DTYPES[version]).float().split(sizes)
    weights = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    table = weights[TABLE][:V].contiguous()
    config = GPTConfig(T, V, n_layer, n_head, C, dropout)
    return config, fitting(config, weights | {TABLE: table}, path)


def header(*numbers: int) -> bytes:
    return np.array([*numbers, *[0] * (HEADER - len(numbers))], dtype='<i4').tobytes()


def write(folder: Path, exported: Exported) -> None:
    """Write the model, in float32 or bfloat16, with its vocabulary padded to a multiple of 128 by rows of zeros; and
    the tokens. The model must be as llm.c has it: tanh GELU, a tied head, biases."""
    config = exported.config
    vocabulary = exported.vocabulary
    [version] = [version for version, dtype in DTYPES.items() if dtype == exported.torch_dtype]
    rows = -(-config.vocab_size // 128) * 128
    weights = exported.weights | {
        TABLE: torch.nn.functional.pad(exported.weights[TABLE], (0, 0, 0, rows - config.vocab_size))}
    with open(folder / 'model.bin', 'wb') as file:
        file.write(header(MODEL, version, config.block_size, config.vocab_size, config.n_layer, config.n_head,
                          config.n_embd, rows))
        for name, _ in tensors(config.block_size, rows, config.n_layer, config.n_embd):
            file.write(weights[name].to(exported.torch_dtype).contiguous().view(torch.uint8).numpy().tobytes())
    if vocabulary.eot is not None and all(0 < len(piece) < 256 for piece in vocabulary.pieces):
        (folder / 'tokenizer.bin').write_bytes(b''.join([
            header(TOKENS, 2, vocabulary.n_vocab, vocabulary.eot),
            *(bytes([len(piece)]) + piece for piece in vocabulary.pieces)]))
    else:
        console.say('no tokenizer.bin: llm.c needs a token that begins a text, and 1 to 255 bytes in each')
