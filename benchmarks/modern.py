"""
How many of GPT-2's tokens, and how much of its time, does the modern model need for GPT-2's loss?

    python benchmarks/modern.py        12 runs, 20 minutes of one core; after data/stdlib and data/shakespeare_char

Both learn from the same windows, each with a schedule of its own, one after the other with each seed: loss, tokens and
seconds of one core are means over the seeds.
"""
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from benchmarks.ablate import trained
from plaingpt import console
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
seeds: str = '1337,1,2'
texts: str = 'stdlib,shakespeare_char'
share: float = 1.0  # of all steps: less shows that this script works
# ------------------------------------------------------------------------------------------------

ON_A_CPU: dict[str, Any] = {  # the settings that nanoGPT's README gives to config/train_shakespeare_char.py on a CPU
    'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 64, 'batch_size': 12, 'dropout': 0, 'eval_iters': 50}


class Recipe(NamedTuple):
    """The way in which a model is trained."""

    config: str
    steps: int
    tokens: int  # in a step
    settings: dict[str, Any]


RECIPES = {
    'stdlib': (Recipe('train_stdlib', 2000, 1024, {}), Recipe('train_modern_stdlib', 520, 1024, {})),
    'shakespeare_char': (Recipe('train_shakespeare_char', 2000, 768, ON_A_CPU),
                         Recipe('train_modern_shakespeare_char', 300, 768, {'eval_iters': 50}))}


def rows(text: str) -> Iterator[str]:
    """Yield the rows of one text: GPT-2's, the modern model's, and the ratios."""
    pair = RECIPES[text]
    found: list[list[dict[str, float]]] = [[], []]
    for seed in map(int, seeds.split(',')):
        for recipe, results in zip(pair, found, strict=True):
            results.append(trained(recipe.config, max(1, round(share * recipe.steps)), seed=seed, **recipe.settings))
    for recipe, results in zip(pair, found, strict=True):
        losses = [result['loss'] for result in results]
        spread = f' ± {stdev(losses):.3f}' if losses[1:] else ''
        yield (f'| config/{recipe.config}.py | {recipe.steps:,} | {recipe.steps * recipe.tokens / 1e6:.2f}M | '
               f'{mean(losses):.3f}{spread} | {mean(result["seconds"] for result in results):.0f} |')
    tokens = pair[1].steps * pair[1].tokens / (pair[0].steps * pair[0].tokens)
    seconds = mean(one['seconds'] for one in found[1]) / mean(one['seconds'] for one in found[0])
    yield f'| modern / GPT-2 | | {tokens:.0%} | | {seconds:.0%} |'


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    torch.set_num_threads(1)
    console.say('| | steps | tokens | val loss, nats | seconds |\n|---|---|---|---|---|')
    for text in texts.split(','):
        for row in rows(text):
            console.say(row)


if __name__ == '__main__':
    run(main)
