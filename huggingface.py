"""GPT-2's weights as Hugging Face keeps them: under the same names, with four kinds of matrices transposed."""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from errors import CHECKPOINT, UserError
from model import GPTConfig

if TYPE_CHECKING:
    import transformers

TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')  # (in, out) there
GELU: dict[str, Literal['tanh', 'exact']] = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}


def load(name_or_folder: str, dropout: float = 0.0) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the weights of a GPT-2 of the hub, or of a local folder. Raises UserError where there is none,
    where some of it is missing, and where it is another model."""
    with readable_errors(name_or_folder):
        import transformers

        theirs = read_config(name_or_folder)
        loaded: Any = transformers.GPT2LMHeadModel.from_pretrained(
            name_or_folder, config=theirs, dtype=torch.float32, output_loading_info=True)
    model, missing = loaded[0], loaded[1]['missing_keys']
    if missing:  # transformers has drawn these at random
        raise UserError(f'{name_or_folder!r} lacks {len(missing)} of the weights: {min(missing)} ...', CHECKPOINT)
    config = GPTConfig(
        block_size=theirs.n_positions, vocab_size=theirs.vocab_size, n_layer=theirs.n_layer, n_head=theirs.n_head,
        n_embd=theirs.n_embd, dropout=dropout, bias=True, gelu=GELU[str(theirs.activation_function)],
        tie_weights=theirs.tie_word_embeddings)
    weights = model.state_dict().items()
    return config, {name: p.t().contiguous() if name.endswith(TRANSPOSED) else p for name, p in weights}


def read_config(name_or_folder: str) -> 'transformers.GPT2Config':
    """Their description of the model, which must be GPT-2 in every respect that changes what it computes."""
    import transformers

    settings, _ = transformers.GPT2Config.get_config_dict(name_or_folder)
    if settings.get('model_type') != 'gpt2':
        raise UserError(f'{name_or_folder!r} is no GPT-2: the model_type of its config.json is '
                        f'{settings.get("model_type", "missing")}', CHECKPOINT)
    config = transformers.GPT2Config.from_dict(settings)
    right: dict[str, Any] = {
        'activation_function': GELU, 'n_inner': (None, 4 * config.n_embd), 'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)}
    odd = [f'{name}={getattr(config, name)}' for name, values in right.items() if getattr(config, name) not in values]
    if odd:
        raise UserError(f'{name_or_folder!r} is another model than GPT-2: it has {", ".join(odd)}', CHECKPOINT)
    return config


@contextmanager
def readable_errors(name_or_folder: str) -> Iterator[None]:
    """What can go wrong in there, in a line or two."""
    if not Path(name_or_folder).is_dir() and not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name_or_folder):
        raise UserError(f'there is no folder {name_or_folder!r}\n'
                        'give one that save_pretrained wrote, or a name such as gpt2', CHECKPOINT)
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError('transformers, which reads these weights, is not here: pip install transformers') from None
    except Exception as error:  # of four libraries
        raise UserError(f'no GPT-2 weights at {name_or_folder!r}: {(str(error).splitlines() or [repr(error)])[0]}\n'
                        'without network, give a local folder that save_pretrained wrote', CHECKPOINT) from None
