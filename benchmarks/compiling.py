"""
Compile each block or the whole model? The time to the first step, and the time of a step, against no compiling.

    python benchmarks/compiling.py                 on the best device here

Each way runs in a process of its own, with an empty cache. Steps are forward, backward and AdamW; medians.
"""
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import configurator
import train
from model import GPT, GPTConfig
from plaingpt.errors import run
from plaingpt.machines import processes
from plaingpt.machines.device import autocast, pick_dtype

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
way: Literal['', 'eager', 'blocks', 'whole'] = ''  # the one to measure in this process; '' starts a process for each
# ------------------------------------------------------------------------------------------------

THREADS, STEPS = 1, 20
SHAPES = {  # by device: batch and model
    'cpu': (8, GPTConfig(block_size=128, vocab_size=1024, n_layer=6, n_head=6, n_embd=192, bias=False)),
    'cuda': (12, GPTConfig(bias=False)),
    'mps': (8, GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, bias=False)),
}


def measure() -> tuple[float, float]:
    """Return the seconds to the end of the first step, and the median of the steps after it."""
    torch.set_num_threads(THREADS)
    process = processes.start('auto')
    B, config = SHAPES[process.device.type]
    precision, _ = pick_dtype('auto', process.device.type)
    model = GPT(config).to(process.device)
    optimizer = train.make_optimizer(model)
    if way == 'whole':
        model.compile()
    elif way == 'blocks':
        for block in model.transformer.h:
            block.compile()
    idx, targets = torch.randint(config.vocab_size, (2, B, config.block_size), device=process.device).unbind()
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        with autocast(process.device, precision):
            _, loss = model(idx, targets, logits='none')
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[2:])


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if way:
        print(*measure())
        return
    results = {}
    for name in ('eager', 'blocks', 'whole'):
        out = subprocess.run([sys.executable, __file__, f'--way={name}'], capture_output=True, text=True, check=True,
                             env={**os.environ, 'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'}).stdout
        results[name] = [float(number) for number in out.splitlines()[-1].split()]
    device = 'cuda' if torch.cuda.is_available() else f'cpu, {THREADS} thread'
    print(f'{device}, torch {torch.__version__}: first step and later steps, against eager')
    for name, (first, later) in results.items():
        print(f'{name:8} first step {first / results["eager"][0]:8.1f}   step {later / results["eager"][1]:6.2f}   '
              f'pays after {max(0.0, first - results["eager"][0]) / max(1e-9, results["eager"][1] - later):,.0f} steps')


if __name__ == '__main__':
    run(main)
