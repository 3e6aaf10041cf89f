"""
The plan of a run, before it begins: how many tokens and steps, parameters and bytes, and how many hours on which GPU.

    python train.py config/train_gpt2.py --plan=True

Nothing is written, and only the size of a corpus is read. Models are built on PyTorch's meta device, where tensors have
a shape and no numbers; a checkpoint is loaded only if the run starts from it. Bytes are in powers of ten: 1 GB is 10^9.
"""
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model import GPT, GPTConfig
from plaingpt import sizes
from plaingpt.console import duration, say, size
from plaingpt.corpus import token_files
from plaingpt.corpus.folder import data_folder, files_of, fingerprint, read_meta
from plaingpt.corpus.order import Order
from plaingpt.errors import DATA, UserError
from plaingpt.formats.weights import gpt_class
from plaingpt.init_from import ModelSettings, open_model
from plaingpt.machines import meeting, strategies
from plaingpt.machines.device import peak_flops
from plaingpt.run import checkpoint
from plaingpt.run.run import Work

GPUS = {'RTX 4090': 24e9, 'A100': 80e9, 'H100 HBM3': 80e9, 'B200': 180e9}  # bytes of memory
UTILISATION = 0.4  # of the FLOP/s that a GPU promises: an assumption, and a good one for GPT-2's sizes
PROCESSES = (2, 4, 8)
REPEATS = 4.0  # epochs up to which a repeated text teaches nearly as much as a new one (Muennighoff et al. 2023)
GPT2_STEP = 500_000  # tokens: what GPT-2's and GPT-3's smallest models learn from in one step (Brown et al. 2020)
GPT2_SIZED = 100e6  # parameters
MOST_WINDOWS = 2**24  # in a step: each process keeps their numbers in memory
Grouping = Callable[[GPT], list[dict[str, Any]]]  # the parameter groups of an optimizer
ANY_STEP = sys.maxsize  # if no epoch ends the run
RANK_BYTES = 36  # that a checkpoint takes for each token of a published vocabulary


@dataclass(frozen=True)
class RunSettings(ModelSettings):
    """The settings of train.py that decide how much data, memory and time a run takes."""

    dataset: str
    seed: int
    eval_only: bool
    keep: int
    total_batch_size: int
    gradient_accumulation_steps: int
    batch_size: int
    max_iters: int
    max_epochs: float
    decay_lr: bool
    schedule: str
    warmup_iters: int
    lr_decay_iters: int
    strategy: strategies.Strategy
    reshard_after_forward: bool
    cpu_offload: bool
    activation_checkpointing: bool
    dtype: str
    compile: bool | Literal['auto']


def windows_in_step(total_batch_size: int, micro_batches: int, batch_size: int, block_size: int) -> int:
    """Return the number of windows that all processes together read for one update."""
    n_windows = total_batch_size // block_size if total_batch_size else micro_batches * batch_size
    if n_windows > MOST_WINDOWS:
        asked = (f'total_batch_size={total_batch_size}' if total_batch_size else
                 f'gradient_accumulation_steps={micro_batches} x batch_size={batch_size}')
        raise UserError(f'{asked}: a step of {n_windows} windows; at most {MOST_WINDOWS} are possible')
    if total_batch_size % block_size:
        below = total_batch_size // block_size * block_size
        raise UserError(f'total_batch_size={total_batch_size} must be a multiple of block_size={block_size}: '
                        f'the nearest are {f"{below} and " if below else ""}{below + block_size}')
    return n_windows


def amount(settings: RunSettings, block_size: int, epoch: int, world_size: int, place: checkpoint.Place) -> Work:
    """Return the work of a run that continues from a place. `epoch` is the number of windows in an epoch, 0 if that
    is not known."""
    n_windows = windows_in_step(settings.total_batch_size, settings.gradient_accumulation_steps, settings.batch_size,
                                block_size)
    n_parts = math.ceil(n_windows / (settings.batch_size * world_size))
    max_windows = math.ceil(settings.max_epochs * epoch)  # 0 sets no such end
    first = place.windows - place.windows_before  # the number of its first window in the order of the corpus
    end_of_epochs = place.step + math.ceil((max_windows - first) / n_windows) if max_windows else ANY_STEP
    last_step = max(place.step, min(settings.max_iters, end_of_epochs))
    end = first + (last_step - place.step) * n_windows
    return Work(n_windows, n_parts, last_step, min(settings.lr_decay_iters, end_of_epochs), end)


class Corpus(NamedTuple):
    """The facts about a corpus that are known without reading it."""

    prints: dict[str, Any]  # the fingerprint of each split; empty if there is no corpus
    n_vocab: int
    tokenizer_bytes: int  # in a checkpoint
    line: str  # for people


def look_at(dataset: str) -> Corpus:
    """Return the corpus of this name; if it is missing or damaged, an empty one with GPT-2's vocabulary."""
    folder = data_folder(dataset)
    try:
        meta = read_meta(folder)
        prints = {split: fingerprint(token_files.open_files(files_of(folder, split) or [folder / f'{split}.bin'],
                                                            folder, meta['dtype']), meta) for split in ('train', 'val')}
    except UserError as error:
        if error.code != DATA:
            raise
        line = f"{str(error).splitlines()[0]}: its epochs are not known, and its vocabulary is taken to be GPT-2's"
        return Corpus({}, 50257, RANK_BYTES * 50257, line)
    reference = json.dumps(meta['tokenizer'], ensure_ascii=False).encode(errors='replace')
    is_named = meta['tokenizer'].keys() == {'name'} and meta['tokenizer']['name'] != 'byte'  # the file has all of it
    train, val = (f'{prints[split]["tokens"]:,}' for split in ('train', 'val'))
    line = f'{folder}: {train} tokens to train on, {val} to validate, {meta["vocab_size"]} ids'
    return Corpus(prints, meta['vocab_size'], RANK_BYTES * meta['vocab_size'] if is_named else len(reference), line)


def shape_of(settings: RunSettings, n_vocab: int) -> tuple[GPTConfig, checkpoint.State]:
    """Return the shape of a run's model, and the checkpoint that it resumes; {} if there is none."""
    state: checkpoint.State = {}
    if settings.is_new:
        return settings.new_config(n_vocab), state
    if settings.init_from in ('resume', 'auto'):
        state = checkpoint.load_newest(Path(settings.out_dir))
        config = checkpoint.config_of(state, settings.dropout)
    elif settings.init_from in sizes.GPT2:
        config = replace(sizes.GPT2[settings.init_from], dropout=settings.dropout)
    else:
        config = open_model(settings.init_from, settings.dropout, settings.answers)[0].config
    settings.refuse_other_shape(config)
    is_cropped = 'block_size' in settings.given and settings.block_size < config.block_size
    return replace(config, block_size=settings.block_size) if is_cropped else config, state


@dataclass(frozen=True)
class Plan:
    """All that the printed lines are made from."""

    settings: RunSettings
    model: GPT  # on the meta device
    groups: list[sizes.Group]
    corpus: Corpus
    epoch: int  # windows; 0 if that is not known
    place: checkpoint.Place  # from which the run continues
    world_size: int

    @property
    def work(self) -> Work:
        return amount(self.settings, self.model.config.block_size, self.epoch, self.world_size, self.place)

    @property
    def epochs(self) -> float:
        return self.work.end / self.epoch if self.epoch else 0.0

    @property
    def total(self) -> int:
        """Return the tokens of the whole run."""
        new_steps = self.work.last_step - self.place.step
        return self.place.tokens + new_steps * self.work.n_windows * self.model.config.block_size

    @property
    def disk_bytes(self) -> int:
        """Return the room that checkpoint.make_ready asks for."""
        return checkpoint.bytes_needed(sizes.tensor_bytes(self.model, self.groups), self.settings.keep)

    def held(self, strategy: strategies.Strategy, n: int, width: int = 4) -> sizes.Held:
        return sizes.held(self.model, self.groups, strategy, n, width, not self.settings.reshard_after_forward)

    def peak(self, strategy: strategies.Strategy, n: int, width: int, recomputes: bool, compiles: bool = False) -> int:
        """Return the most bytes that each of n processes holds. Those that fsdp offloads are in main memory, and left
        out."""
        held = self.held(strategy, n, width)
        if self.settings.cpu_offload and strategy == 'fsdp':
            held = sizes.Held(0, 0, 0, held.gathered)
        accumulates = self.work.n_windows > self.settings.batch_size  # as any number of processes does
        needs = sizes.activations(self.model.config, self.settings.batch_size, width, compiles)
        return sizes.peak(self.model.config, held, needs, n > 1 or accumulates, recomputes)


def row(label: str, *cells: object, width: int = 10) -> str:
    return f'  {label:30}' + ''.join(f' {cell!s:>{width}}' for cell in cells)


def about_the_model(plan: Plan) -> Iterator[str]:
    config, n = plan.model.config, sizes.n_parameters(plan.model)
    yield (f'{n:,} parameters: {config.n_layer} layers of {config.n_head} heads, {config.n_embd} wide, windows of '
           f'{config.block_size}, {config.vocab_size} ids')
    for part, number in sizes.parts_of(plan.model).items():
        if not number and part != 'head':
            continue  # only the other model has this part
        yield row(part, f'{number:,}' if number else 'tied', f'{number / n:.1%}', width=13)


def about_the_work(plan: Plan) -> Iterator[str]:
    """Yield the steps, tokens, epochs and operations, and what is written to the disk."""
    settings, work, T = plan.settings, plan.work, plan.model.config.block_size
    step, flops = work.n_windows * T, plan.model.flops_per_token()
    each = f'each of {plan.world_size} processes' if plan.world_size > 1 else 'one process'
    yield (f'a step: {step:,} tokens = {work.n_windows} windows of {T}, in micro-batches of {settings.batch_size}, '
           f'{work.n_parts} for {each}')
    if plan.epoch:
        yield f'an epoch: {math.ceil(plan.epoch / work.n_windows):,} steps'
    epochs = f', {plan.epochs:.1f} epochs' if plan.epoch else ''
    yield (f'the run: {work.last_step:,} steps, {plan.total:,} tokens{epochs}; {plan.total * flops:.2e} FLOP, '
           f'{flops:,} a token')
    if plan.place.step:
        yield f'it continues at step {plan.place.step}'
    file = sizes.checkpoint_bytes(plan.model, plan.groups, plan.corpus.tokenizer_bytes)
    yield (f'a checkpoint: {size(file)}; {settings.out_dir} needs {size(plan.disk_bytes)}, for '
           f'keep={settings.keep} of them, the best and a new one; {size(free_bytes(settings.out_dir))} are free')


def free_bytes(folder: str) -> int:
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def about_memory(plan: Plan) -> Iterator[str]:
    """Yield the memory of each strategy, with and without activation checkpointing, in float32 and in bfloat16."""
    batch = plan.settings.batch_size
    kept = [sizes.activations(plan.model.config, batch, width) for width in (4, 2)]
    yield row(f'a micro-batch of {batch} windows', 'float32', 'bfloat16')
    yield row('kept by all blocks', *(size(part.blocks) for part in kept))
    yield row('... activation_checkpointing', *(size(part.inputs + part.block) for part in kept))
    yield row('kept around them', *(size(part.around) for part in kept))
    yield row('logits and their gradient', *(size(part.loss) for part in kept))
    compiled = [sizes.activations(plan.model.config, batch, width, compiles=True) for width in (4, 2)]
    yield row('... compiled, as on cuda', *(size(part.loss) for part in compiled))
    yield ''
    yield row('each process', 'weights', 'gradients', 'moments', 'gathered', 'peak: f32', 'recomp.', 'bf16', 'recomp.')
    counts = sorted({*PROCESSES, plan.world_size} - {1})
    rows: list[tuple[strategies.Strategy, int, str]] = [
        ('ddp', 1, 'ddp, alone'), ('ddp', 2, 'ddp, one of several'),
        *(('zero1', n, f'zero1, one of {n}') for n in counts), *(('fsdp', n, f'fsdp, one of {n}') for n in counts)]
    for strategy, n, label in rows:
        peaks = [plan.peak(strategy, n, width, recomputes) for width in (4, 2) for recomputes in (False, True)]
        yield row(label, *map(size, plan.held(strategy, n)), *map(size, peaks))
    yield ("gathered: the others' parts, for a moment; f32, bf16: --dtype; recomp.: --activation_checkpointing=True\n"
           'the peak is that of tensors, uncompiled; a GPU needs some more for itself')


def about_time(plan: Plan) -> Iterator[str]:
    """Yield the hours on each GPU that has the memory for it."""
    settings = plan.settings
    dtype, width = ('float32', 4) if settings.dtype == 'float32' else ('bfloat16', 2)
    flops = plan.total * plan.model.flops_per_token()
    compiles = settings.compile is not False  # 'auto' does on each of these
    needs = {n: plan.peak(settings.strategy, n, width, settings.activation_checkpointing, compiles) for n in (1, 8)}
    yield row(f'time, {settings.strategy}, {dtype}', 'memory', '1 GPU', '8 GPUs')
    for gpu, memory in GPUS.items():
        seconds = flops / (UTILISATION * (peak_flops(gpu, dtype) or math.nan))  # on one GPU
        yield row(gpu, size(memory), *(duration(seconds / n) if need <= memory else 'too small'
                                       for n, need in needs.items()))
    yield (f'an estimate, for GPUs that do {UTILISATION:.0%} of the FLOP/s that they promise: small models and small '
           'batches do less\nthe mfu that a run prints is measured, and more reliable')


def warnings(plan: Plan) -> list[str]:
    """Return a warning about each thing that the user may not have meant."""
    settings, config, work = plan.settings, plan.model.config, plan.work
    counts = {split: mark['tokens'] for split, mark in plan.corpus.prints.items()}
    n, step = sizes.n_parameters(plan.model), work.n_windows * config.block_size
    is_new = settings.init_from in ('scratch', 'start', 'auto')
    is_warm = settings.warmup_iters < work.last_step
    filled = work.n_parts * settings.batch_size * plan.world_size
    free, fixed = free_bytes(settings.out_dir), sum(plan.held('ddp', 1)[:3])
    complaints = {
        f"vocab_size={config.vocab_size} is smaller than the tokenizer's {plan.corpus.n_vocab}: leave it out":
            config.vocab_size < plan.corpus.n_vocab,
        **{f'{split}: {count} tokens are too few for a window of {config.block_size} + 1: '
           f'--block_size={max(1, min(counts.values()) - 1)} or less, or more text': count <= config.block_size
           for split, count in counts.items()},
        f'{plan.epochs:.1f} epochs of this corpus: beyond {REPEATS:.0f} a repeated text teaches little that is new':
            plan.epochs > REPEATS,
        f'{step:,} tokens are a small step for {n / 1e6:.0f}M parameters: GPT-2 learned from about {GPT2_STEP:,}'
        f' at a time; try --total_batch_size={GPT2_STEP // config.block_size * config.block_size}':
            is_new and n >= GPT2_SIZED and step < GPT2_STEP / 4,
        f'{work.n_windows} windows do not fill {work.n_parts} x {plan.world_size} micro-batches of '
        f'{settings.batch_size}: {1 - work.n_windows / filled:.0%} of the time is wasted':
            filled > work.n_windows,
        f'the warm-up, {settings.warmup_iters:,} steps, is not over when the run ends, at {work.last_step:,}: lower it':
            settings.decay_lr and not is_warm,
        f'the learning rate comes down until step {work.decay_steps:,}, and the run ends at {work.last_step:,}: '
        f'--lr_decay_iters={work.last_step}':
            settings.decay_lr and is_warm and settings.schedule != 'constant' and work.decay_steps != work.last_step,
        f'the disk has no room for the checkpoints: they need {size(plan.disk_bytes)}, and {size(free)} are free':
            plan.disk_bytes > free,
        f'weights, gradients and moments, {size(fixed)}, are more than any GPU holds: --strategy=fsdp':
            fixed > max(GPUS.values()),
    }
    return [text for text, is_so in complaints.items() if is_so]


def describe(settings: RunSettings, grouped: Grouping, world_size: int) -> Iterator[str]:
    """Yield the lines of a plan for `world_size` processes."""
    corpus = look_at(settings.dataset)
    config, state = shape_of(settings, corpus.n_vocab)
    n_tokens = corpus.prints['train']['tokens'] if corpus.prints else 0
    order = Order(n_tokens, config.block_size, settings.seed)
    model = gpt_class(config).on_meta(config)
    groups = [sizes.Group.of(group) for group in grouped(model)]
    place = checkpoint.place_of(state, corpus.prints, config.block_size) if state else checkpoint.Place()
    plan = Plan(settings, model, groups, corpus, order.epoch if corpus.prints else 0, place, world_size)
    yield from about_the_model(plan)
    yield f'\n{corpus.line}'
    if settings.eval_only:
        yield f'eval_only=True: nothing is trained; weights are {size(sizes.FLOAT * sizes.n_parameters(model))}'
        return
    complaints = warnings(plan)
    count = f'{len(complaints)} warning{"s" * (len(complaints) != 1)}{":" * bool(complaints)}'
    yield from (*about_the_work(plan), '', *about_memory(plan), '', *about_time(plan), f'\n{count}',
                *(f'- {complaint}' for complaint in complaints))


def show_plan(settings: RunSettings, grouped: Grouping) -> None:
    """Print the plan of this run, in the first of the processes that a launcher started."""
    launch = meeting.launch_of(os.environ)
    for line in describe(settings, grouped, int(launch.variables['WORLD_SIZE']) if launch else 1):
        say(line)
