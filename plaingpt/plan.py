"""
Before a run: what it amounts to. How many tokens and steps, parameters and bytes, how many hours on which card.

    python train.py config/train_gpt2.py --plan=True

Nothing is written, and of a corpus only the size is read. Models are built on PyTorch's meta device, where tensors have
a shape and no numbers; only a run that starts from a checkpoint loads that one. Bytes are in powers of ten: 1 GB is
10^9.
"""
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import configurator
from model import GPT, GPTConfig
from plaingpt import console, sizes
from plaingpt.corpus import token_files
from plaingpt.corpus.folder import data_folder, files_of, read_meta
from plaingpt.corpus.order import Order
from plaingpt.errors import DATA, UserError
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import peak_flops
from plaingpt.run import checkpoint

CARDS = {'RTX 4090': 24e9, 'A100': 80e9, 'H100 HBM3': 80e9, 'B200': 180e9}  # bytes of memory
UTILISATION = 0.4  # of the FLOP/s that a card promises: an assumption, and a good one for GPT-2's sizes
PROCESSES = (2, 4, 8)
REPEATS = 4.0  # epochs: up to here a repeated text teaches nearly as much as a new one (Muennighoff et al. 2023)
GPT2_STEP = 500_000  # tokens: what GPT-2's and GPT-3's smallest models learn from in one step (Brown et al. 2020)
GPT2_SIZED = 100e6  # parameters
ANY_STEP = sys.maxsize  # where no epoch ends the run


def refuse(settings: dict[str, Any], given: set[str]) -> None:
    """Refuse what can be refused before anything is loaded, and say what has no effect."""
    configurator.check_range(settings, 'keep', 2)  # the newest may be damaged
    configurator.check_range(settings, 'eval_interval eval_iters log_interval gradient_accumulation_steps batch_size '
                             'block_size n_layer n_head n_embd start_timeout timeout', 1)
    configurator.check_range(settings, 'total_batch_size max_iters max_epochs warmup_iters lr_decay_iters max_hours '
                             'sample_interval sample_tokens hellaswag_interval hellaswag_limit vocab_size grad_clip '
                             'learning_rate min_lr weight_decay', 0)
    configurator.check_range(settings, 'dropout beta1 beta2 decay_fraction', 0, below=1)
    if settings['decay_lr'] and settings['schedule'] != 'constant' and settings['min_lr'] > settings['learning_rate']:
        raise UserError(f'--min_lr={settings["min_lr"]} is above --learning_rate={settings["learning_rate"]}:\n'
                        'give --min_lr=0, or a tenth of the learning rate')
    if settings['overwrite'] and settings['init_from'] in ('resume', 'auto'):
        raise UserError(f'--overwrite=True starts over; --init_from={settings["init_from"]} goes on: give one of them')
    decides = {'gradient_accumulation_steps': settings['total_batch_size'] and 'total_batch_size',
               'schedule': '' if settings['decay_lr'] else 'decay_lr=False',
               **dict.fromkeys(('hellaswag', 'hellaswag_limit'),
                               '' if settings['hellaswag_interval'] else 'hellaswag_interval=0'),
               'reshard_after_forward': '' if settings['strategy'] == 'fsdp' else f'strategy={settings["strategy"]}'}
    for name in sorted(name for name in given if decides.get(name)):
        console.say(f'{name} has no effect: {decides[name]} decides')


def windows_in_step(total_batch_size: int, micro_batches: int, batch_size: int, block_size: int) -> int:
    """Windows that all processes together read for one update."""
    if not total_batch_size:
        return micro_batches * batch_size
    if total_batch_size % block_size:
        below = total_batch_size // block_size * block_size
        raise UserError(f'total_batch_size={total_batch_size} must be a multiple of block_size={block_size}: '
                        f'the nearest are {f"{below} and " if below else ""}{below + block_size}')
    return total_batch_size // block_size


class Work(NamedTuple):
    """How much there is to do."""

    n_windows: int  # in a step, over all processes
    n_parts: int  # micro-batches of each process in a step
    last_step: int  # before which the run ends
    decay_steps: int  # where the learning rate has come down


def amount(settings: dict[str, Any], block_size: int, epoch: int, world_size: int, first_step: int = 0) -> Work:
    """The work of a run that begins at first_step. An `epoch` has so many windows; 0 where that is not known."""
    n_windows = windows_in_step(settings['total_batch_size'], settings['gradient_accumulation_steps'],
                                settings['batch_size'], block_size)
    n_parts = math.ceil(n_windows / (settings['batch_size'] * world_size))
    max_epochs = settings['max_epochs'] if epoch else 0
    end_of_epochs = math.ceil(max_epochs * epoch / n_windows) if max_epochs else ANY_STEP
    last_step = max(first_step, min(settings['max_iters'], end_of_epochs))
    return Work(n_windows, n_parts, last_step, min(settings['lr_decay_iters'], end_of_epochs))


class Corpus(NamedTuple):
    """What is known of a corpus without reading it."""

    tokens: dict[str, int]  # of each split; empty where there is no corpus
    n_vocab: int
    tokenizer_bytes: int  # in a checkpoint
    line: str  # for people


def look_at(dataset: str) -> Corpus:
    """The corpus of this name; where it is not there, or damaged, none, and GPT-2's vocabulary."""
    folder = data_folder(dataset)
    try:
        meta = read_meta(folder)
        counts = {split: len(token_files.open_files(files_of(folder, split) or [folder / f'{split}.bin'], folder,
                                                    meta['dtype'])) for split in ('train', 'val')}
    except UserError as error:
        if error.code != DATA:
            raise
        return Corpus({}, 50257, 36 * 50257, f'{str(error).splitlines()[0]}: its epochs cannot be told, and its '
                                             "vocabulary is taken for GPT-2's")
    reference = json.dumps(meta['tokenizer'], ensure_ascii=False).encode()
    is_named = meta['tokenizer'].keys() == {'name'} and meta['tokenizer']['name'] != 'byte'  # the file has all of it
    line = f'{folder}: {counts["train"]:,} tokens to train on, {counts["val"]:,} to validate, {meta["vocab_size"]} ids'
    return Corpus(counts, meta['vocab_size'], 36 * meta['vocab_size'] if is_named else len(reference), line)


def shape_of(settings: dict[str, Any], given: set[str], n_vocab: int) -> tuple[GPTConfig, int]:
    """The model of a run, and its first step."""
    source, run, dropout = settings['init_from'], Path(settings['out_dir']), settings['dropout']
    first_step = 0
    if source in ('scratch', 'start') or (source == 'auto' and not checkpoint.holds_run(run)):
        return checkpoint.new_config(settings, n_vocab), first_step
    if source in ('resume', 'auto'):
        state = checkpoint.load_newest(run)
        config, first_step = checkpoint.config_of(state, dropout), state['iter_num']
    else:
        known, answers = sizes.GPT2.get(source), {name: settings[name] for name in given & {'n_head', 'gelu'}}
        config = replace(known, dropout=dropout) if known else checkpoint.open_model(source, dropout, answers)[0].config
    checkpoint.refuse_other_shape(config, settings, given - {'block_size'})
    is_cropped = 'block_size' in given and settings['block_size'] < config.block_size
    return replace(config, block_size=settings['block_size']) if is_cropped else config, first_step


class Plan(NamedTuple):
    """All that the lines for people are made of."""

    settings: dict[str, Any]
    model: GPT  # on the meta device
    corpus: Corpus
    epoch: int  # windows; 0 where that is not known
    first_step: int
    world_size: int

    def work(self, n: int) -> Work:
        return amount(self.settings, self.model.config.block_size, self.epoch, n, self.first_step)

    def peak(self, strategy: strategies.Strategy, n: int, width: int, recomputes: bool) -> int:
        """Bytes of each of n processes. Those offloaded by fsdp are in main memory."""
        part = sizes.held(self.model, strategy, n, width, not self.settings['reshard_after_forward'])
        if self.settings['cpu_offload'] and strategy == 'fsdp':
            part = sizes.Held(0, 0, 0, part.gathered)
        needs = sizes.activations(self.model.config, self.settings['batch_size'], width)
        return sizes.peak(self.model.config, part, needs, n > 1 or self.work(n).n_parts > 1, recomputes)


def size(n: float) -> str:
    """Bytes, for people."""
    for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
        if n >= unit:
            return f'{n / unit:.3g} {name}' if n < 999.5 * unit else f'{n / unit:,.0f} {name}'
    return f'{n:.0f} B'


def duration(seconds: float) -> str:
    """An estimate, for people."""
    if seconds < 3600:
        return f'{seconds / 60:.0f} min' if seconds >= 60 else '< 1 min'
    return f'{seconds / 3600:,.1f} h' if seconds < 360_000 else f'{seconds / 3600:,.0f} h'


def row(label: str, *cells: object, width: int = 10) -> str:
    return f'  {label:30}' + ''.join(f' {cell!s:>{width}}' for cell in cells)


def about_the_model(plan: Plan) -> Iterator[str]:
    config, n = plan.model.config, sizes.n_parameters(plan.model)
    yield (f'{n:,} parameters: {config.n_layer} layers of {config.n_head} heads, {config.n_embd} wide, windows of '
           f'{config.block_size}, {config.vocab_size} ids')
    for part, number in sizes.parts_of(plan.model).items():
        yield row(part, f'{number:,}' if number else 'tied', f'{number / n:.1%}', width=13)


def about_the_work(plan: Plan) -> Iterator[str]:
    """Steps, tokens, epochs, operations, and what of it ends up on the disk."""
    settings, T, work = plan.settings, plan.model.config.block_size, plan.work(plan.world_size)
    step = work.n_windows * T
    yield (f'a step: {step:,} tokens = {work.n_windows} windows of {T}, in micro-batches of {settings["batch_size"]}, '
           f'{work.n_parts} for {f"each of {plan.world_size} processes" if plan.world_size > 1 else "one process"}')
    if plan.epoch:
        yield f'an epoch: {math.ceil(plan.epoch / work.n_windows):,} steps'
    epochs = f', {work.last_step * work.n_windows / plan.epoch:.1f} epochs' if plan.epoch else ''
    total, flops = work.last_step * step, plan.model.flops_per_token()
    yield f'the run: {work.last_step:,} steps, {total:,} tokens{epochs}; {total * flops:.2e} FLOP, {flops:,} a token'
    if plan.first_step:
        yield f'it goes on at step {plan.first_step}'
    file = sizes.checkpoint_bytes(plan.model, plan.corpus.tokenizer_bytes)
    yield (f'a checkpoint: {size(file)}; {settings["out_dir"]} needs {size(disk_bytes(plan))}, for '
           f'keep={settings["keep"]} of them, the best and a new one; {size(free_bytes(settings["out_dir"]))} are free')


def disk_bytes(plan: Plan) -> int:
    """What checkpoint.make_ready asks for."""
    return checkpoint.bytes_needed(sizes.n_parameters(plan.model), plan.settings['keep'])


def free_bytes(folder: str) -> int:
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def about_memory(plan: Plan) -> Iterator[str]:
    """Each strategy in turn, with and without activation checkpointing, in float32 and in bfloat16."""
    config, batch = plan.model.config, plan.settings['batch_size']
    yield row(f'a micro-batch of {batch} windows', 'float32', 'bfloat16')
    full, half = (sizes.activations(config, batch, width) for width in (4, 2))
    yield row('kept by all blocks', size(full.blocks), size(half.blocks))
    yield row('... activation_checkpointing', size(full.inputs + full.block), size(half.inputs + half.block))
    yield row('kept around them', size(full.around), size(half.around))
    yield row('logits and their gradient', size(full.loss), size(half.loss))
    yield ''
    yield row('each process', 'weights', 'gradients', 'moments', 'gathered', 'peak: f32', 'recomp.', 'bf16', 'recomp.')
    counts = sorted({*PROCESSES, plan.world_size} - {1})
    rows: list[tuple[strategies.Strategy, int, str]] = [('ddp', 1, 'ddp, alone'), ('ddp', 2, 'ddp, one of several')]
    rows += [('zero1', n, f'zero1, one of {n}') for n in counts] + [('fsdp', n, f'fsdp, one of {n}') for n in counts]
    for strategy, n, label in rows:
        part = sizes.held(plan.model, strategy, n, 4, not plan.settings['reshard_after_forward'])
        peaks = [plan.peak(strategy, n, width, recomputes) for width in (4, 2) for recomputes in (False, True)]
        yield row(label, *map(size, part), *map(size, peaks))
    yield ("gathered: the others' parts, for a moment; f32, bf16: --dtype; recomp.: --activation_checkpointing=True\n"
           'the peak is that of tensors, uncompiled; a card needs some more for itself')


def about_time(plan: Plan) -> Iterator[str]:
    """Hours on cards that have the memory for it."""
    settings, work = plan.settings, plan.work(plan.world_size)
    dtype = 'float32' if settings['dtype'] == 'float32' else 'bfloat16'
    flops = work.last_step * work.n_windows * plan.model.config.block_size * plan.model.flops_per_token()
    yield row(f'time, {settings["strategy"]}, {dtype}', 'memory', '1 card', '8 cards')
    for card, memory in CARDS.items():
        promised = peak_flops(card, dtype)
        assert promised, f'device.PEAK_FLOPS knows the {card}'
        cells = []
        for n in (1, 8):
            need = plan.peak(settings['strategy'], n, 4 if dtype == 'float32' else 2,
                             settings['activation_checkpointing'])
            cells.append(duration(flops / (promised * UTILISATION * n)) if need <= memory else 'too small')
        yield row(card, size(memory), *cells)
    yield (f'an estimate, for cards that do {UTILISATION:.0%} of the FLOP/s that they promise: small models and small '
           'batches do less\nthe mfu that a run prints is measured, and better than it')


def warnings(plan: Plan) -> Iterator[str]:
    """What somebody may not have meant."""
    settings, config, counts, work = plan.settings, plan.model.config, plan.corpus.tokens, plan.work(plan.world_size)
    n, step, last = sizes.n_parameters(plan.model), work.n_windows * config.block_size, work.last_step
    epochs = last * work.n_windows / plan.epoch if plan.epoch else 0
    if config.vocab_size < plan.corpus.n_vocab:
        yield f"vocab_size={config.vocab_size} is smaller than the tokenizer's {plan.corpus.n_vocab}: leave it out"
    for split, count in counts.items():
        if count <= config.block_size:
            yield (f'{split}: {count} tokens are too few for a window of {config.block_size} + 1: '
                   f'--block_size={max(1, min(counts.values()) - 1)} or less, or more text')
    if epochs > REPEATS:
        yield f'{epochs:.1f} epochs of this corpus: beyond {REPEATS:.0f} a repeated text teaches little that is new'
    if settings['init_from'] in ('scratch', 'start', 'auto') and n >= GPT2_SIZED and step < GPT2_STEP / 4:
        yield (f'{step:,} tokens are a small step for {n / 1e6:.0f}M parameters: GPT-2 learned from about {GPT2_STEP:,}'
               f' at a time; try --total_batch_size={GPT2_STEP // config.block_size * config.block_size}')
    filled = work.n_parts * settings['batch_size'] * plan.world_size
    if filled > work.n_windows:
        yield (f'{work.n_windows} windows do not fill {work.n_parts} x {plan.world_size} micro-batches of '
               f'{settings["batch_size"]}: {1 - work.n_windows / filled:.0%} of the time is spent on nothing')
    if settings['decay_lr'] and settings['warmup_iters'] >= last:
        yield f'the warm-up, {settings["warmup_iters"]:,} steps, is not over when the run ends, at {last:,}: lower it'
    elif settings['decay_lr'] and settings['schedule'] != 'constant' and work.decay_steps != last:
        yield (f'the learning rate comes down until step {work.decay_steps:,}, and the run ends at {last:,}: '
               f'--lr_decay_iters={last}')
    free, fixed = free_bytes(settings['out_dir']), sum(sizes.held(plan.model, 'ddp', 1, 4)[:3])
    if disk_bytes(plan) > free:
        yield f'the disk has no room for the checkpoints: they need {size(disk_bytes(plan))}, and {size(free)} are free'
    if fixed > max(CARDS.values()):
        yield f'weights, gradients and moments, {size(fixed)}, are more than any card holds: --strategy=fsdp'


def others() -> Iterator[str]:
    """Models to compare with: parameters, and the bytes of their weights and of a checkpoint."""
    yield row('to compare', 'parameters', 'weights', 'checkpoint', width=13)
    for name, config in (sizes.GPT2 | sizes.SMALL).items():
        model = sizes.on_meta(config)
        n, file = sizes.n_parameters(model), sizes.checkpoint_bytes(model, 0)
        yield row(f'{name}, {config.n_layer} x {config.n_embd}', f'{n:,}', size(sizes.FLOAT * n), size(file), width=13)


def describe(settings: dict[str, Any], given: set[str], world_size: int) -> Iterator[str]:
    """The lines of a plan for so many processes."""
    corpus = look_at(settings['dataset'])
    config, first_step = shape_of(settings, given, corpus.n_vocab)
    order = Order(corpus.tokens.get('train', 0), config.block_size, settings['seed'])
    plan = Plan(settings, sizes.on_meta(config), corpus, order.epoch if corpus.tokens else 0, first_step, world_size)
    yield from about_the_model(plan)
    yield f'\n{corpus.line}'
    if settings['eval_only']:
        yield f'eval_only=True: nothing is trained; weights are {size(sizes.held(plan.model, "ddp", 1, 4).weights)}'
        return
    yield from about_the_work(plan)
    for about in (about_memory(plan), about_time(plan), others()):
        yield ''
        yield from about
    complaints = list(warnings(plan))
    yield f'\n{len(complaints)} warning{"s" * (len(complaints) != 1)}{":" * bool(complaints)}'
    yield from (f'- {complaint}' for complaint in complaints)


def show(settings: dict[str, Any], given: set[str]) -> None:
    """Print the plan of this run, in the first of the processes that torchrun or srun started."""
    environment = os.environ | processes.slurm_as_torchrun(os.environ)
    if environment.get('RANK', '0') == '0':
        for line in describe(settings, given, int(environment.get('WORLD_SIZE', '1'))):
            print(line)
