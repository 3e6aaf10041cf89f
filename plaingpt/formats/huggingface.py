"""Hugging Face's form of a GPT-2, in and out: the same names, with four kinds of matrices transposed."""
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from model import GPT, GPTConfig
from plaingpt.corpus.tokenizer import END_OF_TEXT, Tokenizer, TrainedBPE, byte_level
from plaingpt.errors import CHECKPOINT, DISK_FULL, UserError

if TYPE_CHECKING:
    import tokenizers

TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')  # (in, out) there
TABLE, HEAD = 'transformer.wte.weight', 'lm_head.weight'
DEFAULTS = {  # what transformers' GPT2Config has where a config.json is silent
    'vocab_size': 50257, 'n_positions': 1024, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'n_inner': None,
    'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False, 'tie_word_embeddings': True,
    'quantization_config': None}
ALIASES = {'max_position_embeddings': 'n_positions', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head',
           'hidden_size': 'n_embd'}
GELU: dict[str, Literal['tanh', 'exact']] = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}
ORIGIN = 'plaingpt.json'  # beside what export.py writes: what no other format has room for, such as the tokenizer
TOKENIZER_FILES = ('tokenizer.json', 'vocab.json', 'merges.txt')  # the first, or the others in older folders
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
GPT2_PIECES = '7db3ecccc3244b0f6caf9087f7d9c8224cbb8bdc6d01888e547329c0e064260f'  # sha256 of its tokens, one on a line


def load(name_or_folder: str, dropout: float = 0.0) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the weights, in float32, of a GPT-2 of the hub, or of a local folder. Raises UserError where there
    is none, where some of it is missing, and where it is another model."""
    with readable_errors(name_or_folder):
        config = read_config(name_or_folder, dropout)
        theirs = read_weights(name_or_folder)
        shapes = {name: p.shape for name, p in GPT.on_meta(config).state_dict().items()}
        if config.tie_weights:  # one table, which a file holds under either name, or both
            del shapes[HEAD]
            theirs = {TABLE: theirs[HEAD], **theirs} if HEAD in theirs else theirs
        missing = shapes.keys() - theirs.keys()
        if missing:
            raise UserError(f'{name_or_folder!r} lacks {len(missing)} of the weights: {min(missing)} ...', CHECKPOINT)
        weights = {}
        for name, shape in shapes.items():
            p = theirs.pop(name)
            p = p.t() if name.endswith(TRANSPOSED) else p
            if p.shape != shape:
                raise ValueError(f'{name} is {tuple(p.shape)}, and by its config.json {tuple(shape)}')
            # a copy, since this memory may be that of a file, which may change or go
            weights[name] = p.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return config, weights | ({HEAD: weights[TABLE]} if config.tie_weights else {})


def read_config(name_or_folder: str, dropout: float) -> GPTConfig:
    """The shape in their config.json, which must be GPT-2's in every respect that changes what the model computes."""
    path = folder_of(name_or_folder, 'config.json') / 'config.json'
    try:
        settings = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f'its config.json is not JSON: {error}') from None
    if settings.get('model_type') != 'gpt2':
        raise UserError(f'{name_or_folder!r} is no GPT-2: the model_type of its config.json is '
                        f'{settings.get("model_type", "missing")}', CHECKPOINT)
    theirs = DEFAULTS | {ALIASES.get(name, name): value for name, value in settings.items()}
    right: dict[str, Any] = {
        'activation_function': GELU, 'n_inner': (None, 4 * theirs['n_embd']), 'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,),
        'quantization_config': (None,)}
    odd = [f'{name}={theirs[name]}' for name, values in right.items() if theirs[name] not in values]
    if odd:
        raise UserError(f'{name_or_folder!r} is another model than GPT-2: it has {", ".join(odd)}', CHECKPOINT)
    return GPTConfig(
        block_size=theirs['n_positions'], vocab_size=theirs['vocab_size'], n_layer=theirs['n_layer'],
        n_head=theirs['n_head'], n_embd=theirs['n_embd'], dropout=dropout, bias=True,
        gelu=GELU[theirs['activation_function']], tie_weights=theirs['tie_word_embeddings'])


def read_weights(name_or_folder: str) -> dict[str, Tensor]:
    """Their tensors under our names, from one file or several: safetensors, or else PyTorch's."""
    for stem, suffix in (('model', '.safetensors'), ('pytorch_model', '.bin')):
        whole, index = f'{stem}{suffix}', f'{stem}{suffix}.index.json'
        folder = folder_of(name_or_folder, whole, index, f'{stem}-*{suffix}')
        files = [whole] if (folder / whole).is_file() else []
        if not files and (folder / index).is_file():
            files = sorted(set(json.loads((folder / index).read_text(encoding='utf-8'))['weight_map'].values()))
        if files:
            tensors = {name: p for file in files for name, p in read_tensors(folder / file).items()}
            return {name if name.startswith(('transformer.', 'lm_head.')) else f'transformer.{name}': p
                    for name, p in tensors.items()}
    raise FileNotFoundError('it has neither model.safetensors nor pytorch_model.bin')


def read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == '.bin':
        return torch.load(path, map_location='cpu', weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


def folder_of(name_or_folder: str, *patterns: str) -> Path:
    """A local folder; or that of a model of the hub, with those files of it that match, which are downloaded once."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_folder, allow_patterns=list(patterns)))


@contextmanager
def readable_errors(name_or_folder: str) -> Iterator[None]:
    """What can go wrong in there, in a line or two."""
    if not Path(name_or_folder).is_dir() and not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name_or_folder):
        raise UserError(f'there is no folder {name_or_folder!r}\n'
                        'give one that save_pretrained wrote, or a name such as gpt2', CHECKPOINT)
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of three libraries
        if isinstance(error, UserError) and error.code == CHECKPOINT:
            raise
        raise UserError(f'no GPT-2 weights at {name_or_folder!r}: {(str(error).splitlines() or [repr(error)])[0]}\n'
                        'without network, give a local folder that save_pretrained wrote', CHECKPOINT) from None


def read_origin(folder: Path) -> dict[str, Any]:
    """What export.py has left of the checkpoint that it exported to this folder; {} where it did not write it."""
    path = folder / ORIGIN
    if not path.is_file():
        return {}
    try:
        origin = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:  # of JSON, or of UTF-8
        raise UserError(f'{path} is damaged: {error}', CHECKPOINT) from None
    if not isinstance(origin, dict) or not isinstance(origin.get('tokenizer'), dict):
        raise UserError(f'{path} is damaged: it has no tokenizer', CHECKPOINT)
    return origin


def read_tokenizer(name_or_folder: str) -> dict[str, Any]:
    """What a checkpoint would say of the tokenizer that others have put beside their model; {} where it is GPT-2's, or
    where there is none. Raises UserError where it is of another kind than GPT-2's."""
    if name_or_folder.startswith('gpt2') and not Path(name_or_folder).is_dir():
        return {}
    with readable_errors(name_or_folder):
        folder = folder_of(name_or_folder, *TOKENIZER_FILES)
    path, vocab, merges = (folder / name for name in TOKENIZER_FILES)
    if not path.is_file() and not (vocab.is_file() and merges.is_file()):
        return {}
    import tokenizers

    try:
        if path.is_file():
            library = tokenizers.Tokenizer.from_file(str(path))
        else:
            ids, pairs = tokenizers.models.BPE.read_file(str(vocab), str(merges))
            library = byte_level(ids, pairs, '')
            library.add_special_tokens([END_OF_TEXT] if END_OF_TEXT in ids else [])
        library.no_truncation()
        library.no_padding()
        learned = TrainedBPE(f'bpe:{library.get_vocab_size()}', library)
        says = json.loads(library.to_str())
        is_like_gpt2 = (
            says['model']['type'] == 'BPE' and not says['model']['dropout'] and says['normalizer'] is None
            and says['pre_tokenizer'] | {'trim_offsets': True} == BYTE_LEVEL and library.encode('').ids == []
            and all(library.id_to_token(i) for i in range(learned.n_vocab))
            and set(map(bytes, zip(range(256), strict=True))) <= set(learned.pieces))
    except Exception:  # of a library that reads what others have written; or it holds no bytes
        is_like_gpt2 = False
    if not is_like_gpt2:
        raise UserError(f"the tokenizer of {name_or_folder} is damaged, or of another kind than GPT-2's: it is not read"
                        "\nwithout its files, the model's tokens are taken for GPT-2's, or those of a --dataset",
                        CHECKPOINT)
    is_gpt2 = hashlib.sha256(b'\n'.join(learned.pieces)).hexdigest() == GPT2_PIECES
    return {} if is_gpt2 else {'tokenizer': learned.state()}


def write(folder: Path, config: GPTConfig, weights: dict[str, Tensor], vocabulary: Tokenizer,
          dtype: torch.dtype) -> None:
    """Weights, configuration and tokenizer, as AutoModelForCausalLM and AutoTokenizer load them. The model must
    have biases, and a token for each of its ids."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    theirs = {name: (p.t() if name.endswith(TRANSPOSED) else p).to(dtype).contiguous() for name, p in weights.items()
              if not (config.tie_weights and name == 'lm_head.weight')}
    try:
        save_file(theirs, folder / 'model.safetensors', {'format': 'pt'})
    except SafetensorError as error:
        raise UserError(f'{folder} cannot be written: {error}\nmake room, and run the same command again',
                        DISK_FULL) from None
    end = vocabulary.eot
    tokens = {'bos_token_id': end, 'eos_token_id': end}
    gelu = next(name for name, kind in GELU.items() if kind == config.gelu)
    write_json(folder / 'config.json', {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2',
        'dtype': str(dtype).removeprefix('torch.'),
        'vocab_size': config.vocab_size, 'n_positions': config.block_size, 'n_ctx': config.block_size,
        'n_embd': config.n_embd, 'n_layer': config.n_layer, 'n_head': config.n_head, 'n_inner': None,
        'activation_function': gelu, 'layer_norm_epsilon': 1e-5, 'initializer_range': 0.02,
        'tie_word_embeddings': config.tie_weights,
        **dict.fromkeys(('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), config.dropout), **tokens})
    write_json(folder / 'generation_config.json', {  # as sample.py draws
        'do_sample': True, 'temperature': 0.8, 'top_k': min(200, config.vocab_size), 'max_length': config.block_size,
        **tokens, 'pad_token_id': end})
    tokenizer_of(vocabulary).save(str(folder / 'tokenizer.json'))
    shutil.copymode(folder / 'config.json', folder / 'model.safetensors')  # which its library writes for us alone
    names = {} if end is None else {'bos_token': END_OF_TEXT, 'eos_token': END_OF_TEXT}
    write_json(folder / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': config.block_size,
        'clean_up_tokenization_spaces': False, 'add_prefix_space': False, **names})


def tokenizer_of(vocabulary: Tokenizer) -> 'tokenizers.Tokenizer':
    """Their form of our tokenizer, which has been tried: it gives the same ids for the text of all tokens."""
    refusal = UserError(f"the tokenizer '{vocabulary.name}' gives other ids in the form of Hugging Face's tokenizers: "
                        'it is not exported')
    try:
        library = vocabulary.to_huggingface()
    except ModuleNotFoundError:
        raise
    except Exception:  # whatever the library finds wrong with the pattern
        raise refusal from None
    text = vocabulary.decode(i for i, size in enumerate(vocabulary.token_sizes()) if size)
    library.encode_special_tokens = True  # as ordinary text
    if library.encode(text).ids != vocabulary.encode(text):
        raise refusal
    library.encode_special_tokens = False
    return library


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
