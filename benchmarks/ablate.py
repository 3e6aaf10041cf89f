"""
The gain of each change from GPT-2 to the modern model on the default text: GPT-2 and one change after another, and the
modern model less one change at a time. docs/modern.md says what they are, and has the table that this prints.

    python benchmarks/ablate.py                     69 runs of 600 steps: 90 minutes of one core
    python benchmarks/ablate.py --seeds=1337        a third of them

A run that has ended is kept in --out_dir, and not repeated: the same command continues, and prints the table again.
Changes are parts that this script exchanges; they are not settings of train.py, where they would be branches.
"""
import io
import json
import math
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import model
import train
from model import Cache, GPTConfig
from model_modern import norm, rotate, turns_of
from plaingpt import console
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
seeds: str = '1337,1,2'
max_iters: int = 600  # steps of each run, with a schedule of its own
out_dir: str = 'out-ablate'
# ------------------------------------------------------------------------------------------------

CHANGES = {  # in the order in which they are made
    'muon': 'Muon for the matrices, its rates and its schedule',
    'embedding': 'a norm after the embedding, Normal(0, 1), and an untied head',
    'rmsnorm': 'RMSNorm without gains for LayerNorm',
    'rope': 'rotary positions for a table of them',
    'qk': 'QK-norm',
    'relu2': 'ReLU squared for GELU',
    'zeros': 'zero-initialised projections',
    'heads': 'half as many heads, which are twice as wide',
    'values': 'value residual',
    'embedded': 'the embedding in each layer',
    'cap': 'a soft cap of the logits'}
CONFIGS = Path(__file__).resolve().parents[1] / 'config'
GPT2, MODERN = frozenset[str](), frozenset(CHANGES)


class Attention(nn.Module):
    """The attention of model.py or of model_modern.py, or something between the two."""

    def __init__(self, config: GPTConfig, layer: int, changes: frozenset[str]) -> None:
        super().__init__()
        self.n_head, self.changes = config.n_head, changes
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.mix = nn.Parameter(torch.empty(1)) if 'values' in changes and layer > 0 else None

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        if 'qk' in self.changes:
            q, k = norm(q), norm(k)
        if 'rope' in self.changes:
            q, k = rotate(q, turns), rotate(k, turns)
        mixed = v if self.mix is None or first_v is None else v + self.mix * (first_v - v)
        y = F.scaled_dot_product_attention(q, k, mixed, is_causal=T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), v


class MLP(nn.Module):
    """The MLP of either model."""

    def __init__(self, config: GPTConfig, changes: frozenset[str]) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.changes = changes

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(F.relu(x).square() if 'relu2' in self.changes else F.gelu(x, approximate='tanh'))


class Norm(nn.Module):
    """RMSNorm, which has nothing to learn."""

    def forward(self, x: Tensor) -> Tensor:
        return norm(x)


def norm_of(config: GPTConfig, changes: frozenset[str]) -> nn.Module:
    return Norm() if 'rmsnorm' in changes else nn.LayerNorm(config.n_embd, bias=False)


class Block(nn.Module):
    """A layer of either model, or something between the two."""

    def __init__(self, config: GPTConfig, layer: int, changes: frozenset[str]) -> None:
        super().__init__()
        self.ln_1 = norm_of(config, changes)
        self.attn = Attention(config, layer, changes)
        self.ln_2 = norm_of(config, changes)
        self.mlp = MLP(config, changes)
        self.mix = nn.Parameter(torch.empty(2)) if 'embedded' in changes else None

    def forward(self, x: Tensor, embedded: Tensor, turns: tuple[Tensor, Tensor],
                first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * embedded
        y, v = self.attn(self.ln_1(x), turns, first_v)
        x = x + y
        return x + self.mlp(self.ln_2(x)), v


class Transformer(model.Transformer):
    """All layers of either model, or something between the two."""

    def __init__(self, config: GPTConfig, changes: frozenset[str]) -> None:
        nn.Module.__init__(self)
        self.changes, self.head_size = changes, config.n_embd // config.n_head
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if 'rope' not in changes:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, changes) for layer in range(config.n_layer))
        self.last = norm_of(config, changes)
        self.recomputes = False

    def forward(self, idx: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """idx (B, T) -> (B, T, C)"""
        x, T = self.wte(idx), idx.size(1)  # (B, T, C)
        x = x if 'rope' in self.changes else x + self.wpe.weight[:T]
        x = embedded = norm(x) if 'embedding' in self.changes else x
        turns, first_v = turns_of(0, T, self.head_size, x), None
        for block in self.h:
            x, v = block(x, embedded, turns, first_v)
            first_v = v if first_v is None else first_v
        return self.last(x)


class Mixed(model.GPT):
    """GPT-2 with some changes, or all of them, which make it the modern model."""

    changes = GPT2

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.cap = config, 15.0 if 'cap' in self.changes else None
        self.transformer = Transformer(config, self.changes)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if 'embedding' not in self.changes:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw each weight as model.py or model_modern.py does, depending on the changes."""
        C, zeros, ones = self.config.n_embd, 'zeros' in self.changes, 'embedding' in self.changes
        for name, p in self.named_parameters():
            if name.endswith('mix'):
                p.copy_(torch.tensor([0.5] if name.endswith('attn.mix') else [1.0, 0.0]))
            elif p.dim() == 1:
                p.fill_(1.0)
            elif zeros and name.endswith(('c_proj.weight', 'lm_head.weight')):
                p.zero_()
            elif name.endswith(('wte.weight', 'wpe.weight')):
                p.normal_(0.0, 1.0 if ones else 0.02)
            elif name.endswith('c_proj.weight'):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(0.0, math.sqrt(1 / 3 / C) if zeros and 'lm_head' not in name else 0.02)


def groups_of(mixed: model.GPT) -> list[dict[str, Any]]:
    """Return the groups of train.groups_of_modern, some parameters of which may be missing. A table of positions learns
    like that of tokens, and a table that is the head as well learns like a head."""
    groups = {id(group['params'][0]): group for group in original_groups(mixed)}  # a tied head takes the table's place
    tables = [module.weight for name, module in mixed.transformer.named_children() if name == 'wpe']
    next(group for group in groups.values() if group['params'][0] is mixed.transformer.wte.weight)['params'] += tables
    return list(groups.values())


original_groups = train.groups_of_modern


def trained(config: str, steps: int, **settings: object) -> dict[str, float]:
    """Train as config/<config>.py and these settings say, for so many steps with a schedule of their own. Return the
    figures at the end, and the seconds of one core."""
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        settings |= {'max_iters': steps, 'lr_decay_iters': steps, 'eval_interval': steps, 'sample_interval': 0,
                     'device': 'cpu', 'out_dir': folder}
        began = time.process_time()
        train.main([str(CONFIGS / f'{config}.py'), *(f'--{name}={value}' for name, value in settings.items())])
        seconds = time.process_time() - began
        rows = [json.loads(line) for line in Path(folder, 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    return {'loss': rows[-1]['val_loss'], 'bits_per_byte': rows[-1]['val_bits_per_byte'], 'seconds': seconds}


def final_loss(changes: frozenset[str], seed: int) -> dict[str, float]:
    """Train with these changes."""
    Mixed.changes = changes
    with patch('plaingpt.init_from.gpt_class', return_value=Mixed), patch('train.groups_of_modern', groups_of):
        return trained('train_modern_stdlib' if 'muon' in changes else 'train_stdlib', max_iters, seed=seed,
                       n_head=2 if 'heads' in changes else 4)


def variants() -> dict[str, frozenset[str]]:
    """Return the rows of the table, each with its changes."""
    names = list(CHANGES)
    found = {'GPT-2': GPT2}
    found |= {f'+ {CHANGES[name]}': frozenset(names[:i + 1]) for i, name in enumerate(names)}
    return found | {f'modern, less {CHANGES[name]}': MODERN - {name} for name in names}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the means over all seeds whose runs have all ended, with their standard deviation, and the difference of a
    row from the one that it is compared with."""
    whole = [seed for seed in seeds.split(',')
             if all(f'{label}, seed {seed}, {max_iters} steps' in results for label in variants())]
    lines = ['| | val loss, nats | difference | bits per byte | seconds |', '|---|---|---|---|---|']
    before = modern = math.nan
    for label, changes in variants().items():
        runs = [results[f'{label}, seed {seed}, {max_iters} steps'] for seed in whole]
        if not runs:
            continue
        losses = [result['loss'] for result in runs]
        loss, spread = mean(losses), stdev(losses) if losses[1:] else math.nan
        modern = loss if changes == MODERN else modern
        base = modern if label.startswith('modern') else before
        before = loss
        lines.append(f'| {label} | {loss:.3f} ± {spread:.3f} | {"" if math.isnan(base) else f"{loss - base:+.3f}"} | '
                     f'{mean(result["bits_per_byte"] for result in runs):.3f} | '
                     f'{mean(result["seconds"] for result in runs):.0f} |')
    return '\n'.join(lines)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    torch.set_num_threads(1)
    kept = Path(out_dir, 'results.jsonl')
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    for seed in map(int, seeds.split(',')):
        for label, changes in variants().items():
            key = f'{label}, seed {seed}, {max_iters} steps'
            if key in done(kept):
                continue
            result = final_loss(changes, seed)
            with open(kept, 'a', encoding='utf-8') as file:
                print(json.dumps({'key': key, **result}), file=file)
            console.say(f'{key}: {result["loss"]:.4f}, {result["seconds"]:.0f} s')
    console.say(table(done(kept)))


def done(kept: Path) -> dict[str, dict[str, float]]:
    """Return the results of the runs that have ended, under their keys."""
    rows = map(json.loads, kept.read_text(encoding='utf-8').splitlines())
    return {row['key']: row for row in rows if row['key'].endswith(f', {max_iters} steps')}


if __name__ == '__main__':
    run(main)
