"""
What a GPU does, and no CPU can tell. benchmarks/gpu_check.sh runs the parts one after the other; on a CPU they are
tried with a small model.

    python benchmarks/gpu_probe.py --part=machine      versions, and the rates of a product and of a copy
    python benchmarks/gpu_probe.py --part=compiling    four ways to compile a step: tokens per second, memory
    python benchmarks/gpu_probe.py --part=waits        the lines of a run at which this process waits for the GPU
    python benchmarks/gpu_probe.py --part=writing      a token, with its launches one by one and replayed
"""
import collections
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TextIO

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import train
from model import GPT, GPTConfig, sum_of_nats
from plaingpt.errors import run
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import autocast, name_of, peak_flops, pick_dtype
from plaingpt.machines.replay import Replay

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
part: Literal['machine', 'compiling', 'waits', 'writing'] = 'machine'
dataset: str = ''  # of the run whose waits are counted
out_dir: str = 'out-gpu-check'  # where that run goes
device: str = 'auto'
# ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
SMALL = GPTConfig(block_size=32, vocab_size=512, n_layer=2, n_head=2, n_embd=32, bias=False)  # on a CPU
# The parts that are compiled. 'blocks' leaves the loss in chunks, 'blocks and loss' is train.py's way, and the last one
# takes longest to compile.
WAYS = ('blocks', 'blocks and loss', 'blocks, head and loss', 'whole')


def sync(process: processes.Process) -> None:
    if process.device.type == 'cuda':
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], process: processes.Process, times: int = 10, warm: int = 3) -> float:
    """Return the median of the seconds that the work takes, from an idle device to an idle device."""
    taken = []
    for _ in range(times + warm):  # the first ones only warm up
        sync(process)
        began = time.perf_counter()
        work()
        sync(process)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[warm:])


def machine(process: processes.Process, precision: torch.dtype) -> Iterator[str]:
    yield f'torch {torch.__version__}, Python {sys.version.split()[0]}, {processes.describe(process)}'
    on_gpu = process.device.type == 'cuda'
    if on_gpu:
        chip = torch.cuda.get_device_properties(process.device)
        yield (f'{chip.name}, generation {chip.major}.{chip.minor}, {chip.total_memory / 1e9:.0f} GB; PyTorch has code '
               f'for {", ".join(torch.cuda.get_arch_list())}; cuDNN {torch.backends.cudnn.version()}; peak '
               f'{peak_flops(chip.name, name_of(precision)) or 0:.3g} FLOP/s')
    side, bytes_copied = (8192, 2**32) if on_gpu else (256, 2**20)
    x = torch.randn(side, side, device=process.device).to(precision)
    a = torch.empty(bytes_copied, dtype=torch.uint8, device=process.device)
    b = torch.empty_like(a)
    yield (f'a product: {2 * side**3 / seconds(lambda: x @ x, process) / 1e12:.3g} TFLOP/s in {name_of(precision)}; a '
           f'copy reads and writes {2 * bytes_copied / seconds(lambda: b.copy_(a), process) / 1e12:.3g} TB/s')
    yield f'attention, forward and backward, runs {", ".join(attention_kernels(process, precision)) or "no own kernel"}'


def attention_kernels(process: processes.Process, precision: torch.dtype) -> list[str]:
    """Return the names of what PyTorch runs for attention in one block."""
    config = shape(process)
    block = GPT(replace(config, n_layer=1)).to(process.device).transformer.h[0]
    x = torch.randn(4, config.block_size, config.n_embd, device=process.device, requires_grad=True)
    with torch.profiler.profile() as profiler, autocast(process.device, precision):
        block(x).sum().backward()
    words = ('flash', 'fmha', 'cudnn', 'efficient')
    return sorted({event.key[:60] for event in profiler.key_averages() if any(word in event.key for word in words)})


def shape(process: processes.Process) -> GPTConfig:
    return GPTConfig(bias=False) if process.device.type == 'cuda' else SMALL


def compiling(process: processes.Process, precision: torch.dtype) -> Iterator[str]:
    """Yield a line for each way and each size of a micro-batch. On a CPU the compiler's code is not built: that it
    would be asked for is all that is tried."""
    backend = 'inductor' if process.device.type == 'cuda' else 'aot_eager'
    for way in WAYS:
        for B in (12, 64) if process.device.type == 'cuda' else (2,):
            torch.compiler.reset()
            try:
                yield f'B={B:3} {way:22} {measured(way, B, process, precision, backend)}'
            except RuntimeError as error:  # such as out of memory: the next way may need less
                yield f'B={B:3} {way:22} FAIL {str(error).splitlines()[0][:100]}'


def measured(way: str, B: int, process: processes.Process, precision: torch.dtype, backend: str) -> str:
    """Return what a micro-batch of B windows takes."""
    on_gpu, config = process.device.type == 'cuda', shape(process)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = GPT(config).to(process.device)
    optimizer = train.make_optimizer(model)
    x, y = torch.randint(config.vocab_size, (2, B, config.block_size), device=process.device).unbind()

    def with_head(hidden: Tensor) -> Tensor:
        return sum_of_nats(model.lm_head(hidden), y) / y.numel()

    tail = torch.compile(with_head, backend=backend) if way == 'blocks, head and loss' else None
    if way == 'whole':
        model.compiled_nats = sum_of_nats  # all logits at once, in the graph of the model
        model.compile(backend=backend)
    else:
        for block in model.transformer.h:
            block.compile(backend=backend)
    if way == 'blocks and loss':  # as train.py does it
        model.compiled_nats = torch.compile(sum_of_nats, backend=backend)

    def forward() -> Tensor:
        with autocast(process.device, precision):
            loss = tail(model.transformer(x)) if tail else model(x, y, logits='none')[1]
        assert loss is not None
        return loss

    def update() -> None:
        strategies.clip(model.parameters(), 1.0)
        optimizer.step()

    began = time.perf_counter()
    forward().backward()
    sync(process)
    first = time.perf_counter() - began
    whole, only = seconds(lambda: forward().backward(), process), seconds(forward, process, 5)
    peak = peak_flops(torch.cuda.get_device_name(), name_of(precision)) if on_gpu else None
    used = f', mfu {model.flops_per_token() * B * config.block_size / whole / peak:.1%}' if peak else ''
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return (f'{B * config.block_size / whole / 1e3:7.1f}k tokens/s, {1e3 * whole:7.2f} ms (forward {1e3 * only:.2f}), '
            f'update {1e3 * seconds(update, process, 5):.2f} ms, {memory:.1f} GB, first {first:.0f} s{used}')


def waits(process: processes.Process, precision: torch.dtype) -> Iterator[str]:
    """Yield the lines of this project at which a run of 8 steps waits for the GPU, as CUDA's own warnings tell, and how
    often."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
             line: str | None = None) -> None:
        if 'synchroniz' in str(message):
            frames = [frame for frame in traceback.extract_stack()
                      if Path(frame.filename).is_relative_to(ROOT) and 'site-packages' not in frame.filename
                      and Path(frame.filename) != Path(__file__)]
            place = frames[-1] if frames else traceback.FrameSummary(filename, lineno, '')
            found[f'{Path(place.filename).name}:{place.lineno}'] += 1

    small = () if process.device.type == 'cuda' else (
        *(f'--{name}={getattr(SMALL, name)}' for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')),
        '--device=cpu')
    warnings.showwarning = note
    warnings.simplefilter('always')
    if process.device.type == 'cuda':
        torch.cuda.set_sync_debug_mode('warn')
    train.main([f'--dataset={dataset}', f'--out_dir={out_dir}', '--overwrite=True', '--max_iters=8', '--eval_iters=2',
                '--batch_size=12', '--gradient_accumulation_steps=4', '--sample_interval=0', *small])
    yield f'waits in 8 steps of 4 micro-batches, two evaluations, compiling and the rest: {found.most_common(12)}'


def writing(process: processes.Process, precision: torch.dtype) -> Iterator[str]:
    model = GPT(shape(process)).to(process.device, precision).eval()
    n_tokens = min(900, model.config.block_size - 2)  # many, since each text is recorded anew
    for rows in (1, 16):
        idx = torch.zeros(rows, 1, dtype=torch.int64, device=process.device)
        for how, replay in (('one by one', None), ('replayed', Replay(model))):
            model.replay = replay

            @torch.inference_mode()  # as in sample.py
            def write(idx: Tensor = idx) -> None:
                for token in model.stream(idx, n_tokens, 0.8, 200, seed=1):
                    token.tolist()

            taken = seconds(write, process, times=2, warm=1)
            yield (f'{rows:2} texts, launches {how:10}: {1e3 * taken / n_tokens:6.2f} ms a token, '
                   f'{rows * n_tokens / taken:8.0f} tokens/s')


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    process = processes.start(device)
    precision, _ = pick_dtype('auto', process.device.type)
    parts = {'machine': machine, 'compiling': compiling, 'waits': waits, 'writing': writing}
    for line in parts[part](process, precision):
        print(line, flush=True)


if __name__ == '__main__':
    run(main)
