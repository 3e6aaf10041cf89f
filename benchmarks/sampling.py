"""
How fast is text written? The cache against reading everything again, ten texts at once against ten in turn, and
plainGPT against transformers: the same weights, prompts and number of tokens, on the same machine.

    python benchmarks/sampling.py

Each number is the median of `repeats` runs. The rivals take turns, so that a busy moment of the machine hits
all of them.
"""
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from model import GPT, GPTConfig
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
# By default GPT-2's smallest model; its weights are random, which changes the text and not the time.
n_layer: int = 12
n_head: int = 12
n_embd: int = 768
vocab_size: int = 50257
block_size: int = 1024
prompt_tokens: int = 16
new_tokens: int = 48
batch: int = 10  # texts that are written at once
repeats: int = 3
threads: int = 1  # of torch, on the CPU
# ------------------------------------------------------------------------------------------------


def as_transformers(model: GPT) -> Any:
    """Return transformers' GPT-2 with the same weights."""
    import transformers

    c = model.config
    shape = transformers.GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size,
                                    n_positions=c.block_size, bos_token_id=0, eos_token_id=0)
    rival: Any = transformers.GPT2LMHeadModel(shape)
    weights = {name: p.t() if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else p
               for name, p in model.state_dict().items()}
    rival.load_state_dict(weights)
    return rival.eval()


def take_turns(rivals: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median number of seconds of each rival, in `repeats` rounds after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats + 1):
        for name, write in rivals.items():
            start = clock()
            write()
            seconds[name].append(clock() - start)
    return {name: median(each[1:]) for name, each in seconds.items()}


def main(args: list[str]) -> None:
    import transformers

    configurator.configure(sys.modules[__name__], args)
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    # a single thread's own time is the same whatever else the machine does
    clock = time.process_time if device == 'cpu' and threads == 1 else time.perf_counter
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)).eval().to(device)
    rival = as_transformers(model).to(device)
    prompts = torch.randint(vocab_size, (batch, prompt_tokens), device=device)

    def write(prompt: Tensor, use_cache: bool = True) -> Tensor:
        return model.generate(prompt, new_tokens, temperature=0, use_cache=use_cache).cpu()  # waits for a GPU to end

    def write_rival(prompt: Tensor) -> Tensor:
        text: Tensor = rival.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                                      eos_token_id=None, max_new_tokens=new_tokens)
        return text.cpu()

    equal = (write(prompts) == write_rival(prompts)).float().mean().item()
    seconds = take_turns({
        'one text, cached': lambda: write(prompts[:1]),
        'one text, not cached': lambda: write(prompts[:1], use_cache=False),
        'one text, transformers': lambda: write_rival(prompts[:1]),
        f'{batch} texts at once': lambda: write(prompts),
        f'{batch} texts in turn': lambda: [write(prompt[None]) for prompt in prompts],
        f'{batch} texts at once, transformers': lambda: write_rival(prompts),
    }, repeats, clock)

    chip = torch.cuda.get_device_name() if device == 'cuda' else f'{platform.machine()} CPU'
    print(f'{chip}, {threads} of {os.cpu_count()} cores; Python {platform.python_version()}, '
          f'torch {torch.__version__}, transformers {transformers.__version__}')
    print(f'{sum(p.numel() for p in model.parameters()):,} parameters, float32; {prompt_tokens} tokens of prompt, '
          f'{new_tokens} new, greedy; '
          f'median of {repeats}, {clock.__name__}')
    print(f'{100 * equal:.1f} % of all tokens are the same as those of transformers')
    for name, each in seconds.items():
        texts = batch if name.startswith(f'{batch} ') else 1
        print(f'{name:<36} {texts * new_tokens / each:8.1f} tokens/s')
    one, uncached, one_rival, at_once, in_turn, at_once_rival = seconds.values()
    print(f'cached / not cached            {uncached / one:6.2f} x')
    print(f'{batch} at once / {batch} in turn        {in_turn / at_once:6.2f} x')
    print(f'plainGPT / transformers, 1     {one_rival / one:6.2f} x')
    print(f'plainGPT / transformers, {batch:<5} {at_once_rival / at_once:6.2f} x')


if __name__ == '__main__':
    run(main)
