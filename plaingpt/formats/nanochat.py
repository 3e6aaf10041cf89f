"""Hugging Face's form of the modern model, in and out: NanoChatForCausalLM computes the same, but for the shortcuts."""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from plaingpt import schema
from plaingpt.errors import CHECKPOINT, UserError
from plaingpt.formats.weights import SIDE

SIDES = {  # the settings that may differ between two models: their names in config.json, and in GPTConfig
    'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
    'num_attention_heads': 'n_head', 'max_position_embeddings': 'block_size'}
FIXED = {  # settings that all modern models of this project share
    'hidden_act': 'relu2', 'rms_norm_eps': 1e-6, 'final_logit_softcapping': 15.0, 'attention_bias': False,
    'tie_word_embeddings': False}
DEFAULTS: dict[str, Any] = {  # what transformers' NanoChatConfig has if a config.json does not say
    **FIXED, 'vocab_size': 50304, 'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 6,
    'max_position_embeddings': 2048, 'intermediate_size': 8192, 'num_key_value_heads': None, 'head_dim': None,
    'rope_parameters': None, 'rope_scaling': None, 'rope_theta': 10_000.0, 'quantization_config': None}
NAMES = [('transformer.wte.', 'model.embed_tokens.'), ('transformer.h.', 'model.layers.'),
         ('.attn.c_proj.', '.self_attn.o_proj.'), ('.mlp.c_fc.', '.mlp.fc1.'), ('.mlp.c_proj.', '.mlp.fc2.')]
WHOLE, PARTS = '.attn.c_attn.', [f'.self_attn.{part}_proj.' for part in 'qkv']  # one matrix, or three


def settings_of(config: GPTConfig) -> dict[str, Any]:
    """Return the settings of a config.json that decide what NanoChatForCausalLM computes."""
    return {
        **{name: getattr(config, field) for name, field in SIDES.items()},
        'intermediate_size': 4 * config.n_embd,
        'num_key_value_heads': config.n_head,
        'head_dim': config.n_embd // config.n_head,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 10_000.0},
        **FIXED}


def config_of(settings: dict[str, Any], path: Path, dropout: float) -> GPTConfig:
    """Return the shape that the settings of a config.json at `path` give. Raise UserError if they decide that another
    model is computed."""
    found = DEFAULTS | settings
    schema.refuse(found, dict.fromkeys(SIDES, SIDE), path, CHECKPOINT)
    config = GPTConfig(**{field: found[name] for name, field in SIDES.items()}, dropout=dropout, bias=False,
                       tie_weights=False, arch='modern')
    right = DEFAULTS | settings_of(config)
    found |= {name: right[name] for name in ('num_key_value_heads', 'head_dim', 'rope_parameters')
              if found[name] is None}
    if odd := [f'{name}={schema.shown(found[name])}' for name, value in right.items() if found[name] != value]:
        raise UserError(f'{path} is of a different model from model_modern.py: it has {", ".join(odd)}', CHECKPOINT)
    return config


def to_nanochat(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of model_modern.py under nanochat's names. A row of a matrix is an output in both."""
    renamed: dict[str, Tensor] = {}
    for name, p in weights.items():
        parts = zip(PARTS, p.chunk(3), strict=True) if WHOLE in name else [(WHOLE, p)]  # each (C, C)
        for part, matrix in parts:
            new = name.replace(WHOLE, part)
            for before, after in NAMES:
                new = new.replace(before, after)
            renamed[new] = matrix
    return renamed


def from_nanochat(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return nanochat's weights under the names of model_modern.py. A q becomes c_attn only with a k and a v of its
    shape and type."""
    renamed: dict[str, Tensor] = {}
    for name, p in weights.items():
        parts = [weights.get(name.replace(PARTS[0], part), torch.empty(0)) for part in PARTS]
        is_one = PARTS[0] in name and len({(part.shape, part.dtype) for part in parts}) == 1
        new = name.replace(PARTS[0], WHOLE) if is_one else name
        for before, after in NAMES:
            new = new.replace(after, before)
        renamed[new] = torch.cat(parts) if is_one else p
    return renamed
