"""
Hugging Face's form of a GPT-2, in and out: the same names, with four kinds of matrices transposed. That of the modern
model is in nanochat.py.
"""
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from model import GPTConfig
from plaingpt import schema
from plaingpt.corpus import tokenizer
from plaingpt.corpus.tokenizer import ForeignBPE, Tokenizer
from plaingpt.errors import CHECKPOINT, UserError, refusal
from plaingpt.formats import nanochat, others
from plaingpt.formats.exported import Exported
from plaingpt.formats.weights import HEAD, SIDE, TABLE, TRANSPOSED, fitting, is_tensor, is_tied

if TYPE_CHECKING:
    import tokenizers

DEFAULTS: dict[str, Any] = {  # what transformers' GPT2Config has if a config.json does not say
    'vocab_size': 50257, 'n_positions': 1024, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'n_inner': None,
    'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False, 'tie_word_embeddings': True,
    'quantization_config': None}
CONFIG = {  # the parts of a config.json that are read
    **dict.fromkeys(('vocab_size', 'n_positions', 'n_layer', 'n_head', 'n_embd'), SIDE),
    'activation_function': str,
    'tie_word_embeddings': bool}
ALIASES = {'max_position_embeddings': 'n_positions', 'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head',
           'hidden_size': 'n_embd'}
GELU: dict[str, Literal['tanh', 'exact']] = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'exact'}
ORIGIN = 'plaingpt.json'  # beside the files of export.py: all that no other format has room for, such as the tokenizer
ORIGINS = {  # the parts of it that are read
    'tokenizer': tokenizer.STATE,
    'iter_num': schema.COUNT,
    'best': others.BEST,
    'config': {'dataset?': str},
    'to': str,
    'files': ({str: str}, [str, ...])}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{model_type}, plaingpt]
# license: the owner of this model says here what others may do with it
---

# {name}

{kind} with {parameters:,} parameters, exported by plainGPT: {config.n_layer} layers, {config.n_head} heads,
{config.n_embd} channels, {config.block_size} positions; {tokens}{refusal}.{more}

{numbers}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = '.'  # where this file is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt!r}, return_tensors='pt')
print(tokenizer.decode(model.generate(**prompt)[0]))
```

It continues a text; it was not trained to follow instructions. It reads and writes at most {config.block_size} tokens.
"""
KINDS = {  # of models, by their arch, in the words of the model card
    'gpt2': ('A GPT-2', ''),
    'modern': ('A modern GPT', """

It has RMSNorm, rotary positions, normalised queries and keys, a squared ReLU, an untied head and capped logits.
transformers 5.0 and later load it as `NanoChatForCausalLM`.""")}


def load(name_or_folder: str, dropout: float = 0.0) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Return the shape and the weights of a GPT-2 or a nanochat on the hub, or in a local folder. Raise UserError if
    there is none, if a part is missing, and if it is another model."""
    with readable_errors(name_or_folder):
        refuse_damage(Path(name_or_folder), 'config.json', 'model.safetensors')
        config, says = read_config(name_or_folder, dropout)
        weights = read_weights(name_or_folder, config)
        if config.tie_weights and HEAD in weights:  # one table, which a file holds under either name, or both
            weights.setdefault(TABLE, weights[HEAD])
        if TABLE in weights and config.arch == 'gpt2':
            config = replace(config, tie_weights=is_tied(weights, says, name_or_folder))
        # copies, since this memory may be a mapped file, which may change or disappear
        weights = {name: p.clone(memory_format=torch.contiguous_format) for name, p in weights.items()}
        return config, fitting(config, weights, name_or_folder)


def read_config(name_or_folder: str, dropout: float) -> tuple[GPTConfig, bool | None]:
    """Return the shape that a config.json gives, and whether the head is tied, as far as it says so. It must be GPT-2's
    or the modern model's in every respect that changes what the model computes."""
    path = folder_of(name_or_folder, 'config.json') / 'config.json'
    settings = schema.read_json(path, {}, CHECKPOINT)
    if settings.get('model_type') == 'nanochat':
        return nanochat.config_of(settings, path, dropout), False
    if settings.get('model_type') != 'gpt2':
        raise UserError(f'{name_or_folder!r} is neither GPT-2 nor nanochat: the model_type of its config.json is '
                        f'{schema.shown(settings.get("model_type", schema.MISSING))}', CHECKPOINT)
    known = {ALIASES.get(name, name): value for name, value in settings.items()}
    found = {name: known.get(name, default) for name, default in DEFAULTS.items()}  # and nothing else that it says
    schema.refuse(found, CONFIG, path, CHECKPOINT)
    right: dict[str, Any] = {
        'activation_function': GELU,
        'n_inner': (None, 4 * found['n_embd']),
        **{name: (DEFAULTS[name],) for name in (
            'layer_norm_epsilon', 'scale_attn_weights', 'scale_attn_by_inverse_layer_idx', 'add_cross_attention',
            'quantization_config')}}
    if odd := [f'{name}={schema.shown(found[name])}' for name, values in right.items() if found[name] not in values]:
        raise UserError(f'{name_or_folder!r} is a different model from GPT-2: it has {", ".join(odd)}', CHECKPOINT)
    return GPTConfig(
        block_size=found['n_positions'], vocab_size=found['vocab_size'], n_layer=found['n_layer'],
        n_head=found['n_head'], n_embd=found['n_embd'], dropout=dropout, bias=True,
        gelu=GELU[found['activation_function']], tie_weights=found['tie_word_embeddings']
    ), known.get('tie_word_embeddings')


def read_weights(name_or_folder: str, config: GPTConfig) -> dict[str, Tensor]:
    """Return the tensors of one file or several, safetensors or else PyTorch's, under this project's names and in its
    shapes."""
    from safetensors.torch import load_file

    for stem, suffix in (('model', '.safetensors'), ('pytorch_model', '.bin')):
        whole, index = f'{stem}{suffix}', f'{stem}{suffix}.index.json'
        folder = folder_of(name_or_folder, whole, index, f'{stem}-*{suffix}')
        files = [whole] if (folder / whole).is_file() else []
        if not files and (folder / index).is_file():
            shape = {'weight_map': {str: is_file_name}}
            files = sorted(set(schema.read_json(folder / index, shape, CHECKPOINT)['weight_map'].values()))
        if files:
            parts = [others.read(folder / file, may_be_old=True) if suffix == '.bin' else load_file(folder / file)
                     for file in files]
            for file, part in zip(files, parts, strict=True):
                schema.refuse(part, {str: is_tensor}, folder / file, CHECKPOINT)
            found = {name: p for part in parts for name, p in part.items()}
            return nanochat.from_nanochat(found) if config.arch == 'modern' else {
                name if name.startswith(('transformer.', 'lm_head.')) else f'transformer.{name}':
                p.t() if name.endswith(TRANSPOSED) else p for name, p in found.items()}
    raise FileNotFoundError('it has neither model.safetensors nor pytorch_model.bin')


def is_file_name(name: object) -> bool:
    """Return whether it can only be the name of a file in the same folder."""
    return isinstance(name, str) and re.fullmatch(r'\w[\w.-]*', name) is not None


def folder_of(name_or_folder: str, *patterns: str) -> Path:
    """Return a local folder; or, for a model on the hub, the folder with those of its files that match, downloaded
    once."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_folder, allow_patterns=list(patterns)))


@contextmanager
def readable_errors(name_or_folder: str) -> Iterator[None]:
    """Raise what goes wrong in the block as a UserError of a line or two."""
    if not Path(name_or_folder).is_dir() and not re.fullmatch(r'\w[\w.-]*(/[\w.-]+)?', name_or_folder):
        raise UserError(f'there is no folder {name_or_folder!r}\n'
                        'give one that save_pretrained wrote, or a name such as gpt2', CHECKPOINT)
    try:
        yield
    except ModuleNotFoundError:
        raise
    except UserError as error:
        raise error if error.code == CHECKPOINT else UserError(f'{name_or_folder}: {error}', CHECKPOINT) from None
    except Exception as error:  # three libraries raise errors of their own
        raise refusal(error, f'no GPT-2 weights at {name_or_folder!r}', CHECKPOINT,
                      'without network, give a local folder that save_pretrained wrote') from None


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what export.py has kept of the checkpoint that it exported to this folder; {} if it did not write the
    folder."""
    path = folder / ORIGIN
    if not path.is_file():
        return {}
    origin = dict(schema.read_json(path, ORIGINS, CHECKPOINT))
    if origin.pop('sha256', hash_of(origin)) != hash_of(origin):
        raise UserError(f'{path} is damaged: its sha256 is another\nexport the model again', CHECKPOINT)
    return origin


def hash_of(origin: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()


def refuse_damage(folder: Path, *names: str) -> None:
    """Raise UserError if one of these files exists, and is not as export.py wrote it."""
    made = read_origin(folder).get('files', {})
    for path in (folder / name for name in names if name in made and isinstance(made, dict)):
        if path.is_file() and sha256_of(path) != made[path.name]:
            raise UserError(f'{path} is not what export.py wrote: it is damaged, or another program has changed it\n'
                            f'export the model again; or delete {folder / ORIGIN}, if it is meant to be so', CHECKPOINT)


def sha256_of(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write_origin(folder: Path, exported: Exported, to: str) -> None:
    """Write what `read_origin` reads: nothing about the machine, the sha256 of each file, and its own."""
    corpus = Path(exported.state.get('config', {}).get('dataset', '')).name
    origin = {
        'tokenizer': exported.vocabulary.state(),
        'iter_num': exported.state.get('iter_num', 0),
        'best': exported.state.get('best', {}),
        'config': {'dataset': corpus} if corpus else {},
        'to': to,
        'files': {path.name: sha256_of(path) for path in sorted(folder.iterdir())}}
    (folder / ORIGIN).write_text(json.dumps(origin | {'sha256': hash_of(origin)}), encoding='utf-8')


def write(folder: Path, exported: Exported) -> None:
    """Write weights, configuration and tokenizer, as AutoModelForCausalLM and AutoTokenizer load them, and a model
    card. The model must be complete."""
    import safetensors.torch

    weights = nanochat.to_nanochat(exported.weights) if exported.config.arch == 'modern' else {
        name: p.t() if name.endswith(TRANSPOSED) else p for name, p in exported.weights.items()}
    weights = {name: p.to(exported.torch_dtype).contiguous() for name, p in weights.items()}
    safetensors.torch.save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    tokenizer_of(exported.vocabulary).save(str(folder / 'tokenizer.json'))
    for name, content in settings_of(exported).items():
        (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    (folder / 'README.md').write_text(card(exported), encoding='utf-8')
    shutil.copymode(folder / 'README.md', folder / 'model.safetensors')  # safetensors lets only its owner read it


def settings_of(exported: Exported) -> dict[str, dict[str, Any]]:
    """Return the content of each of Hugging Face's JSON files."""
    config = exported.config
    begin, end, ends = exported.vocabulary.bos, exported.vocabulary.eot, exported.vocabulary.stops
    names = {role: exported.vocabulary.pieces[i].decode() for role, i in (('bos_token', begin), ('eos_token', end))
             if i is not None and i in exported.vocabulary.special}  # an ordinary token would become another one
    return {
        'config.json': {
            **model_settings(config),
            'dtype': exported.dtype,
            'bos_token_id': begin,
            'eos_token_id': list(ends) if ends[1:] else end},
        'generation_config.json': {  # as sample.py draws
            'do_sample': True,
            'temperature': 0.8,
            'top_k': min(200, config.vocab_size),
            'max_length': config.block_size,
            'bos_token_id': begin,
            'eos_token_id': list(ends) if ends[1:] else end,
            'pad_token_id': end},
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': config.block_size,
            'clean_up_tokenization_spaces': False,
            'add_prefix_space': isinstance(exported.vocabulary, ForeignBPE) and exported.vocabulary.prefixes_space,
            **names}}


def model_settings(config: GPTConfig) -> dict[str, Any]:
    """Return what config.json says about the model itself."""
    if config.arch == 'modern':
        return {
            'architectures': ['NanoChatForCausalLM'],
            'model_type': 'nanochat',
            **nanochat.settings_of(config),
            'pad_token_id': None}  # by default it is 1, a token like any other here, whose embedding would never learn
    return {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        'vocab_size': config.vocab_size,
        'n_positions': config.block_size,
        'n_ctx': config.block_size,
        'n_embd': config.n_embd,
        'n_layer': config.n_layer,
        'n_head': config.n_head,
        'n_inner': None,
        'activation_function': next(name for name, gelu in GELU.items() if gelu == config.gelu),
        'layer_norm_epsilon': 1e-5,
        'initializer_range': 0.02,
        'tie_word_embeddings': config.tie_weights,
        'attn_pdrop': config.dropout,
        'embd_pdrop': config.dropout,
        'resid_pdrop': config.dropout}


def card(exported: Exported) -> str:
    """Return the model card: what the model is, and the numbers of its run."""
    state = exported.state
    settings = state.get('config', {})
    best = state.get('best', {})
    kind, more = KINDS[exported.config.arch]
    numbers = {
        'corpus': Path(settings.get('dataset', '')).name,
        'steps': f'{state.get("iter_num", 0):,}',
        'tokens seen': f'{state["tokens"]:,}' if state.get('tokens') else '',
        'tokens of the corpus': f'{state["data"]["train"]["tokens"]:,}' if state.get('data') else '',
        'validation loss, nats per token': f'{best["loss"][0]:.4f}, at step {best["loss"][1]:,}' if best else '',
        'bits per byte': f'{best["bits_per_byte"][0]:.4f}' if 'bits_per_byte' in best else ''}
    rows = ''.join(f'\n| {label} | {value} |' for label, value in numbers.items() if value)
    return CARD.format(
        name=exported.name,
        model_type=model_settings(exported.config)['model_type'],
        kind=kind,
        more=more,
        parameters=sum(p.numel() for p in exported.weights.values()),
        config=exported.config,
        tokens=f"{exported.vocabulary.n_vocab:,} tokens of the tokenizer '{exported.vocabulary.name}'",
        refusal=', which knows the characters of its corpus and refuses any other'
        if exported.vocabulary.name == 'char' else '',
        prompt=exported.prompt,
        numbers=f'| | |\n|---|---|{rows}' if state else 'Nothing is known of its training.')


def tokenizer_of(vocabulary: Tokenizer) -> 'tokenizers.Tokenizer':
    """Return a tokenizer in Hugging Face's form, after a trial: it gives the same ids for the text of all tokens."""
    text = vocabulary.decode(i for i, size in enumerate(vocabulary.token_sizes()) if size)
    try:
        library = vocabulary.to_huggingface()
        library.encode_special_tokens = not isinstance(vocabulary, ForeignBPE)  # as ordinary text
        if library.encode(text, add_special_tokens=False).ids != vocabulary.encode(text):
            raise ValueError('other ids')
    except ModuleNotFoundError:
        raise
    except Exception:  # the ValueError, or whatever the library finds wrong with the pattern
        raise UserError(f"the tokenizer '{vocabulary.name}' gives other ids in the form of Hugging Face's tokenizers: "
                        'it is not exported') from None
    library.encode_special_tokens = False
    return library
