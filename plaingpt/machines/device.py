"""The device on which a process computes, how precisely it does, and what it promises."""
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import Block, GPTConfig
from plaingpt.errors import UserError
from plaingpt.machines.int8 import why_not

# Dense 16-bit matrix FLOP/s with 32-bit accumulation, from the makers' data sheets and architecture white papers (which
# often print twice as much, for sparse matrices). An entry is for GPUs whose name, as the driver gives it, has all of
# its words; the first such entry counts.
PEAK_FLOPS = {
    'GB200': 2500e12, 'B200': 2250e12,
    'GH200': 989.4e12, 'H200 NVL': 835.5e12, 'H200': 989.4e12,
    'H100 NVL': 835.5e12, 'H100 PCIe': 756e12, 'H100 HBM3': 989.4e12,
    'A100': 312e12, 'A40': 149.7e12, 'A30': 165e12, 'A10': 125e12, 'A10G': 70e12,
    'L40S': 362e12, 'L40': 181e12, 'L4': 121e12,
    'V100S PCIe': 130e12, 'V100 PCIe': 112e12, 'V100 SXM2': 125e12, 'T4': 65e12,
    'RTX 6000 Ada': 364.2e12, 'RTX A6000': 154.8e12,
    'RTX 5090': 209.5e12, 'RTX 4090': 165.2e12, 'RTX 3090 Ti': 80e12, 'RTX 3090': 71e12,
}
FLOAT16_ONLY = {'V100S', 'V100', 'T4'}  # before Ampere: neither bfloat16 nor TF32
OTHER_CHIP = {'mig', 'laptop', 'mobile', 'max-q', 'd'}  # a part of a GPU, or a smaller chip under the same name
COMPILERS = {'win32': 'cl', 'darwin': 'clang++'}  # torch.compile calls them for a CPU, unless CXX names one
C_COMPILERS = ('gcc', 'clang', 'cc')  # Triton needs one, for the code that starts its kernels, unless CC names another
TRITON_SINCE = (8, 0)  # the first generation of GPUs that Triton is made for
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16, 'int8': torch.int8}


def pick_device(name: str) -> tuple[str, str]:
    """Return the device to use, and why: 'auto' takes the first of cuda, mps and cpu that this machine has. Raise
    UserError if it is missing, or if there is a GPU that this build of torch cannot use: a run must not train on the
    CPU instead."""
    kind, colon, number = name.partition(':')
    asks_for_cuda = kind in ('auto', 'cuda')
    has = {'cuda': asks_for_cuda and has_cuda(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device in has if has[device]), f'the first of {", ".join(has)} that is available'
    if kind not in has or (colon and not number.isdecimal()):
        raise UserError(f"--device={name}: expected 'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'")
    if not has[kind]:
        raise UserError(f'--device={name}: this machine, or this build of torch {torch.__version__}, has no {kind}\n'
                        'try --device=cpu, or --device=auto for the best there is')
    if kind == 'cuda' and colon and int(number) >= torch.cuda.device_count():
        raise UserError(f'--device={name}: the last GPU here is cuda:{torch.cuda.device_count() - 1}')
    return name, 'as asked'


def has_cuda() -> bool:
    """Return whether there is a GPU that this build of torch can use. Raise UserError if there is a GPU that it
    cannot use: the driver is too old for the build, or the build has no code for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        is_there = torch.cuda.is_available()
    complaint = next((str(warning.message) for warning in caught if 'too old' in str(warning.message)), '')
    if complaint and not is_there:
        version = re.search(r'found version (\d+)', complaint)
        raise UserError(f"this machine's NVIDIA driver{f' ({version[1]})' if version else ''} is too old for torch "
                        f'{torch.__version__}, which is built for CUDA {torch.version.cuda}\nupdate the driver, '
                        'install a build of torch for an older CUDA, or give --device=cpu to train there all the same')
    builds = torch.cuda.get_arch_list() if is_there else []
    if is_there and not any(runs_on(built, torch.cuda.get_device_capability()) for built in builds):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(f'torch {torch.__version__} has no code for this GPU, {torch.cuda.get_device_name()}, which '
                        f'is sm_{major}{minor}: it has {", ".join(builds)}\ninstall a build of torch for an older CUDA '
                        '(12.6 has sm_70), or give --device=cpu')
    return is_there


def runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Return whether code that was built for 'sm_80' or 'compute_80' runs on a GPU. Machine code runs on GPUs of
    the same generation that are not older; PTX, which is compiled on the spot, on all that are not older."""
    kind, _, number = built.partition('_')
    major, minor = divmod(int(re.sub(r'\D', '', number)), 10)
    return (major, minor) <= capability and (kind == 'compute' or major == capability[0])


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """Return the precision of the matrix products, and why: 'auto' takes the fastest that trains soundly on this type
    of device."""
    is_cuda = device == 'cuda'
    has_bfloat16 = not is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    why_float32 = {
        'auto': '' if is_cuda else f'which is sound on every {device}',
        'bfloat16': '' if has_bfloat16 else 'bfloat16 was asked for, and this GPU does not multiply it',
        'float16': '' if is_cuda else 'float16 was asked for, and is for cuda alone',
        'int8': why_not(device) if name == 'int8' else '',
        'float32': 'as asked',
    }[name]
    if why_float32:
        return torch.float32, why_float32
    if name != 'auto':
        return DTYPES[name], 'as asked'
    return ((torch.bfloat16, 'the GPU computes with it') if has_bfloat16 else
            (torch.float16, 'the GPU has no bfloat16'))


def pick_compile(choice: bool | str, device: str) -> tuple[bool, str]:
    """Return whether to compile, and why."""
    if choice != 'auto':
        compiler = os.environ.get('CXX') or COMPILERS.get(sys.platform, 'g++')
        if choice and device == 'cpu' and not shutil.which(compiler):
            return False, f'as that needs a C++ compiler, {compiler}'
        return bool(choice), 'as asked'
    if device != 'cuda':
        return False, 'as that rarely pays without cuda'
    wanting = {
        'Triton': find_spec('triton') is None,
        'a newer GPU': torch.cuda.get_device_capability() < TRITON_SINCE,
        f'a C compiler, {" or ".join(C_COMPILERS)}': not ('CC' in os.environ or any(map(shutil.which, C_COMPILERS)))}
    if missing := [what for what, is_wanting in wanting.items() if is_wanting]:
        return False, f'as that needs {missing[0]}'
    return True, 'which pays on cuda'


class Compute(NamedTuple):
    """The way in which a process computes."""

    dtype: torch.dtype  # of matrix products
    autocast: AbstractContextManager[None]  # gives them that dtype; weights, sums and the loss stay in float32
    compiles: bool
    peak: float | None  # FLOP/s that the device promises in matrix products, if that is known
    line: str  # for people: all this, and why

    def eager(self) -> AbstractContextManager[None]:
        """Run compiled code as it was written until the block ends."""
        return torch.compiler.set_stance('force_eager') if self.compiles else nullcontext()


def choose(device: torch.device, dtype: str, compile: bool | str, before: dict[str, str] | None = None) -> Compute:
    """Return what the settings `dtype` and `compile` mean on this device. `before` is the type of device of a resumed
    run, and its dtype there: 'auto' keeps that on the same type of device."""
    is_kept = dtype == 'auto' and before is not None and before['device'] == device.type
    precision, why_precision = pick_dtype(before['dtype'] if is_kept and before else dtype, device.type)
    if is_kept:
        why_precision = 'as before'
    elif before and dtype == 'auto':
        why_precision += f' (it was {before["dtype"]} on {before["device"]})'
    compiles, why_compile = pick_compile(compile, device.type)
    return Compute(
        dtype=precision,
        autocast=autocast(device, precision),
        compiles=compiles,
        peak=peak_flops(gpu_name(device), name_of(precision)),
        line=f'{name_of(precision)}, {why_precision}; {"compiled" if compiles else "not compiled"}, {why_compile}',
    )


def advice(dtype: torch.dtype, rows: int, config: GPTConfig) -> Iterator[str]:
    """Yield a line for people if this CPU learns faster in another dtype, with `rows` tokens at a time. It is only
    advice: a measurement must not decide what a run computes."""
    part = time_in_bfloat16(rows, config.n_embd)
    if part < 1:  # then attention tells, which takes some CPUs many times as long if texts are short
        part = layer_in_bfloat16(config)
    if dtype == torch.float32 and part < 0.8:
        yield f'bfloat16 would take about {part:.1f} of the time here: --dtype=bfloat16'
    if dtype == torch.bfloat16 and part > 1.2:
        yield f'bfloat16 takes {part:.1f} times as long as float32 here: --dtype=float32'


def layer_in_bfloat16(config: GPTConfig) -> float:
    """Return how much of float32's time a layer of GPT-2, forward and backward, takes in bfloat16 on this CPU, on one
    thread, for a text of at most 256 tokens."""
    with torch.device('meta'):  # nothing is drawn at random
        layer = Block(config)
    layer.to_empty(device='cpu')
    for p in layer.parameters():
        nn.init.constant_(p, 0.01)
    x, n_threads = torch.ones(1, min(config.block_size, 256), config.n_embd), torch.get_num_threads()

    def seconds(dtype: torch.dtype) -> float:
        times = []
        for _ in range(2):  # the first one also warms up
            began = time.perf_counter()
            with autocast(torch.device('cpu'), dtype):
                y = layer(x)
            y.sum().backward()
            times.append(time.perf_counter() - began)
        return min(times)

    torch.set_num_threads(1)
    try:
        return seconds(torch.bfloat16) / seconds(torch.float32)
    finally:
        torch.set_num_threads(n_threads)


def time_in_bfloat16(rows: int, width: int) -> float:
    """Return how much of float32's time a product (rows, width) x (width, 4 width) takes in bfloat16 on this CPU, on
    one thread, since several would wait for other programs. This takes milliseconds: a large product is made smaller,
    and if bfloat16 is very slow, a few rows show it."""
    columns, n_threads = min(4 * width, 1024), torch.get_num_threads()

    def ratio(rows: int) -> float:
        best = []
        for dtype in (torch.bfloat16, torch.float32):
            x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(width, columns, dtype=dtype)
            times = []
            for _ in range(4):  # the first one also warms up
                began = time.perf_counter()
                x @ weight
                times.append(time.perf_counter() - began)
            best.append(min(times))
        return best[0] / best[1]

    torch.set_num_threads(1)
    try:
        few = ratio(min(rows, 4))
        return few if few > 20 else ratio(min(rows, 128))
    finally:
        torch.set_num_threads(n_threads)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context for matrix products in `dtype`; weights, sums and the loss stay in float32. For int8 it does
    nothing: the model's Linears see to that themselves."""
    return nullcontext() if dtype in (torch.float32, torch.int8) else torch.autocast(device.type, dtype=dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def gpu_name(device: torch.device) -> str:
    """Return the maker's name for the GPU; '' if the device is none."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else ''


def make_current(device: torch.device) -> None:
    """Let this thread use a GPU where it names none: each thread begins with the first one."""
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device. On cuda this process does not wait for it: it queues the copy, as it queues the work
    on it, and continues."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the FLOP/s that the GPU promises in matrix products of `dtype` ('float32': with TF32 allowed, half the
    16-bit rate); None if that is not known, so that no wrong utilisation is shown."""
    words = set(re.split(r'[\s-]+', device_name.lower()))
    name = next((name for name in PEAK_FLOPS if words.issuperset(name.lower().split())), '')
    if not name or words & OTHER_CHIP or (name.split()[0] in FLOAT16_ONLY and dtype != 'float16'):
        return None
    return PEAK_FLOPS[name] / (2 if dtype == 'float32' else 1)


def peak_memory(device_type: str) -> int:
    """Return the most bytes that this process has held, on the GPU ('mps': that it holds now) or in main memory; 0 if
    the system does not say."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    if device_type == 'mps':
        return torch.mps.driver_allocated_memory()
    if sys.platform == 'win32':
        return 0
    import resource  # absent on Windows

    unit = 1 if sys.platform == 'darwin' else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
