"""
Train a GPT: on a laptop, on one GPU, or on many.

    python train.py config/train_stdlib.py                                    the default run, a few minutes on a CPU
    python train.py config/train_gpt2.py --batch_size=4 --device=cuda         GPT-2, on one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py    GPT-2, on the 8 GPUs of one machine
"""
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import configurator  # before PyTorch, which reads a variable that plaingpt/__init__.py sets

# isort: split

import torch
import torch.nn.functional as F
from torch import Tensor

import sample
from model import GPT, sum_of_nats
from plaingpt import console, errors, lock, metrics, muon, sizes, tasks
from plaingpt.chance import draw
from plaingpt.check import run_checks
from plaingpt.corpus.batches import Part, parts_of, read_ahead
from plaingpt.corpus.folder import Data, data_folder, fingerprint, open_split, read_meta
from plaingpt.corpus.order import Order
from plaingpt.errors import UserError
from plaingpt.init_from import Origin, begin, shared_tokenizer
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import advice, choose, peak_memory
from plaingpt.machines.processes import Process
from plaingpt.machines.stop import Stop, StopAsked
from plaingpt.machines.watch import Watch, explained
from plaingpt.machines.zero import Zero
from plaingpt.plan import RunSettings, amount, show_plan
from plaingpt.run import checkpoint, wandb
from plaingpt.run import reference as references
from plaingpt.run.log import Log, Pace
from plaingpt.run.run import Learner, Run, Work
from plaingpt.run.upload import Uploader

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them. Names, defaults and meanings
# are nanoGPT's wherever it has them: the defaults train GPT-2 (124M) on 8 A100s. A step is one update of the weights.

# where
out_dir: str = 'out'
dataset: str = 'openwebtext'  # a folder in data/, any other folder, or a glob: token files of any family
init_from: str = 'scratch'  # 'scratch' ('start'), 'resume' from out_dir, 'auto' (resume if it can), 'gpt2*', or a path
overwrite: bool = False  # start over in an out_dir that holds a run: its files are deleted
ignore_data_change: bool = False  # resume although the corpus is another one than before
upload_to: str = ''  # a folder that gets a copy of each checkpoint: 's3://bucket/run', or another URL that fsspec knows
# before a run
plan: bool = False  # print what the run will take, parameters, bytes and hours, and leave
check: bool = False  # try whether model and run are wired right, on one short window, and leave with 0 or 1
# evaluation, logging and samples
eval_interval: int = 2000  # steps
eval_iters: int = 200  # batches of batch_size that an evaluation reads, in all
eval_only: bool = False  # evaluate once and leave
log_interval: int = 1  # steps
always_save_checkpoint: bool = True  # at each evaluation; False: only when the validation loss is the best so far
keep: int = 2  # checkpoints: ckpt.pt, and those before it as ckpt.1.pt ...; best.pt does not count
sample_interval: int = 2000  # steps; samples are drawn before the first step and after the last one too; 0 draws none
reference: str = ''  # a curve to draw beside this run's, in grey: docs/curves/stdlib.csv: is this run right?
sample_start: str = '\n'  # what a sample continues
sample_tokens: int = 100
hellaswag_interval: int = 0  # steps; HellaSwag is asked before the first step and after the last one too; 0: never
hellaswag_limit: int = 0  # questions, from the first on; 0 asks all 10,042
hellaswag: str = ''  # their file; '' downloads it
wandb_log: bool = False
wandb_project: str = 'owt'
wandb_run_name: str = 'gpt2'
# the batch of a step, over all processes: total_batch_size tokens, or gradient_accumulation_steps x batch_size windows
total_batch_size: int = 0  # tokens, a multiple of block_size; 0 takes the next line
gradient_accumulation_steps: int = 5 * 8  # micro-batches, over all processes: 5 on each of 8 GPUs
batch_size: int = 12  # windows in a micro-batch: what one process takes at a time; lower it when memory runs out
block_size: int = 1024  # tokens in a window
# model
n_layer: int = 12
n_head: int = 12
n_embd: int = 768
vocab_size: int = 0  # 0 takes the tokenizer's; a large one is rounded up to a multiple of 128 (GPT-2's: 50304)
dropout: float = 0.0  # 0 to pretrain; 0.1 or more to fine-tune, or on little text, against overfitting
bias: bool = False  # in the Linear layers and LayerNorms
gelu: Literal['tanh', 'exact'] = 'tanh'  # GPT-2's, or nanoGPT's
tie_weights: bool = True  # one table embeds a token and predicts it
arch: Literal['gpt2', 'modern'] = 'gpt2'  # model.py, or model_modern.py, which learns with Muon: config/train_modern.py
shortcuts: bool = True  # in the modern model, from its first layer to all others; Hugging Face's has none
# the optimizer: AdamW, or for 'modern' Muon, whose rate and decay these are; what AdamW has there keeps a ratio to them
learning_rate: float = 6e-4  # the highest
max_iters: int = 600000  # steps
max_epochs: float = 0.0  # passes over the corpus, where they end before max_iters; 0 sets no such end
weight_decay: float = 1e-1  # of matrices; vectors have none
beta1: float = 0.9  # of AdamW
beta2: float = 0.95
grad_clip: float = 1.0  # the longest gradient, as one vector; 0 allows any
overfit_single_batch: bool = False  # a check: overfit one batch, or exit 1; writes to out_dir/overfit
# learning rate
decay_lr: bool = True  # False: learning_rate at every step
schedule: Literal['cosine', 'linear', 'constant', 'wsd'] = 'cosine'  # after the warm-up; 'wsd' is constant, then linear
warmup_iters: int = 2000  # steps
lr_decay_iters: int = 600000  # the step at which min_lr is reached, with max_epochs its last at the latest
decay_fraction: float = 0.2  # of lr_decay_iters: how long 'wsd' falls
min_lr: float = 6e-5
# machine
strategy: Literal['ddp', 'zero1', 'fsdp'] = 'ddp'  # each process holds all; a part of AdamW's moments; a part of all
reshard_after_forward: bool = True  # with 'fsdp': give weights back after each block; False is faster, and needs memory
cpu_offload: bool = False  # with 'fsdp': keep weights and moments in main memory
activation_checkpointing: bool = False  # compute each block again on the way back, and keep less of it until then
max_hours: float = 0.0  # save and end after that time, with exit code 75; 0 sets no such end
start_timeout: float = 1800.0  # seconds: how long processes wait for each other until their first step is done
timeout: float = 300.0  # seconds without any progress after which a process that died or hangs is given up
backend: str = 'auto'  # between processes: 'nccl' on cuda, 'gloo' elsewhere
device: str = 'auto'  # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto' is the first of these that the machine has
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; 'auto' is the fastest sound one
compile: bool | Literal['auto'] = 'auto'  # 'auto': on cuda
seed: int = 1337
deterministic: bool = False  # on cuda: bit for bit the same each time, and slower
# ------------------------------------------------------------------------------------------------

# Of these each process of a run may have its own: they say where things are, or what only process 0 does. A corpus is
# compared by what it holds, as questions are.
PLACE = ('out_dir', 'dataset', 'reference', 'upload_to', 'hellaswag', 'wandb_log', 'wandb_project', 'wandb_run_name',
         'device')
LEARNED_BY_HEART = 0.1  # of the first loss: overfit_single_batch passes below it
PATIENCE = 10  # steps in a row that are skipped because something is not finite; then the run ends
SLOW = 5  # seconds: a longer step shows its micro-batches on a terminal


# ------------------------------------------------------------------------------------------------
# What learns, and from what


def open_data(origin: Origin, process: Process) -> Data:
    """Open the corpus, which must be that of the run that is resumed, and in the tokens that the model has learned."""
    folder, config = data_folder(dataset), origin.model.config
    meta = read_meta(folder)
    splits = {split: open_split(folder, split, config.block_size, config.vocab_size) for split in ('train', 'val')}
    prints = {split: fingerprint(corpus, meta) for split, corpus in splits.items()}
    if origin.is_resumed and not ignore_data_change:
        checkpoint.refuse_other_data(origin.state, prints, folder)
    processes.refuse_difference(process, prints, f'{folder} must be the same on all machines')
    order = Order(len(splits['train']), config.block_size, seed)
    return Data(folder, splits, order, shared_tokenizer(origin.tokenizer_reference(folder), folder), prints)


def build_learner(origin: Origin, data: Data, watch: Watch, process: Process) -> Learner:
    """Return the model on its device, divided among the processes, and its optimizer: new, or as a checkpoint left
    them if the run is resumed, and then at its place in the data, unless that has changed."""
    raw_model, before = origin.model, origin.state.get('compute') if origin.is_resumed else None
    compute = choose(process.device, dtype, compile, before)
    blocks = raw_model.transformer.h
    raw_model.transformer.recomputes = activation_checkpointing
    for block in blocks if compute.compiles else ():
        block.compile()  # fast: `forward and backward` as one graph for all blocks; in place, so that names stay
    raw_model.compiled_nats = torch.compile(sum_of_nats) if compute.compiles else None  # fast: and `cross_entropy`
    model = strategies.distribute(raw_model, blocks, process, strategy, compute.dtype, reshard_after_forward,
                                  cpu_offload)
    watch.follow(raw_model, () if compute.compiles else blocks)  # a compiled block is one operation
    watch.may_starve = compute.compiles and strategy == 'fsdp' and process.device.type == 'cuda'
    optimizer = make_optimizer(raw_model, process, compute.dtype)
    # float16 takes small gradients for 0: so the loss is scaled up before backward, and gradients down again after it.
    # bfloat16 has the range of float32, and needs no scaler
    scaler = torch.amp.GradScaler(process.device.type, enabled=compute.dtype == torch.float16)
    learner = Learner(raw_model, model, optimizer, scaler, process, compute)
    if origin.is_resumed:
        checkpoint.restore(optimizer, scaler, origin.state)
        learner.step, learner.windows, learner.windows_before, learner.tokens = checkpoint.place_of(
            origin.state, data.fingerprint, data.order.block_size)
        learner.best, learner.skipped = origin.state['best'], origin.state['skipped']
    for name in ('model', 'optimizer'):  # their memory is free again
        origin.state.pop(name, None)
    return learner


def parameter_groups(model: GPT) -> list[dict[str, Any]]:
    """Return the groups of parameters that are treated alike, and how. Matrices are pulled towards zero; vectors, which
    are biases and LayerNorm gains, are not. `scale` times the schedule's is the learning rate of a group."""
    if model.config.arch == 'modern':
        return groups_of_modern(model)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{'params': matrices, 'weight_decay': weight_decay, 'scale': 1.0},
            {'params': vectors, 'weight_decay': 0.0, 'scale': 1.0}]


def groups_of_modern(model: GPT) -> list[dict[str, Any]]:
    """Return the groups of the modern model. Muon is for the matrices that lie between vectors of the residual stream,
    in `parts` that are one matrix each, as those of q, k and v are; what only looks up or predicts tokens is AdamW's,
    in smaller steps if the model is wider (as in nanochat)."""
    width = math.sqrt(768 / model.config.n_embd)  # the rates of table and head are those of 124M
    inner = {name: p for name, p in model.transformer.h.named_parameters() if p.dim() >= 2}
    scalars = [p for p in model.parameters() if p.dim() < 2]
    by_muon = {'weight_decay': weight_decay, 'scale': 1.0, 'momentum': muon.LAST}
    little = 0.02 * weight_decay
    groups: list[dict[str, Any]] = [
        {'params': [p for name, p in inner.items() if 'c_attn' in name], 'parts': 3, **by_muon},
        {'params': [p for name, p in inner.items() if 'c_attn' not in name], 'parts': 1, **by_muon},
        {'params': [model.transformer.wte.weight], 'weight_decay': little, 'scale': 28.0 * width},
        {'params': [model.lm_head.weight], 'weight_decay': little, 'scale': 0.16 * width},
        {'params': scalars, 'weight_decay': 0.0, 'scale': 0.6}]
    return groups if scalars else groups[:-1]


def make_optimizer(model: GPT, process: Process | None = None,
                   precision: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2017), or Muon for the modern model. With several processes and 'zero1' each
    updates a part of the weights, and sends it to the others; so it does with what Muon updates, unless fsdp has
    divided it."""
    groups, betas = parameter_groups(model), (beta1, beta2)
    # fast: `adamw`, one kernel for all weights
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = partial(
        torch.optim.AdamW, lr=learning_rate, betas=betas, fused=True)
    if model.config.arch == 'modern':
        in_half = precision == torch.bfloat16 and not cpu_offload  # what is offloaded is multiplied by a CPU
        make = partial(muon.Muon, lr=learning_rate, betas=betas, dtype=torch.bfloat16 if in_half else None)
    divided = groups if strategy == 'zero1' else [group for group in groups if 'parts' in group]
    if process is None or process.world_size == 1 or strategy == 'fsdp' or not divided:
        return make(groups)
    return Zero(groups, divided, make, process)


def set_rates(optimizer: torch.optim.Optimizer, step: int, total: int) -> float:
    """Give each group of the optimizer its learning rate, and Muon its momentum. Return the rate of the schedule."""
    rate = lr_at(step, total)
    for group in optimizer.param_groups:
        group['lr'] = rate * group['scale']
        if 'parts' in group:
            group['momentum'] = muon.momentum_at(step)
    return rate


def lr_at(step: int, total: int) -> float:
    """Rise linearly to learning_rate, then fall to min_lr at step `total`: along half a cosine, along a line, along a
    line in the last decay_fraction of all steps, or never."""
    if not decay_lr:  # more: `lr_at`, three other ways to fall, and none
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    fall = max(warmup_iters, round(total * (1 - decay_fraction))) if schedule == 'wsd' else warmup_iters
    progress = min(1.0, max(0, step - fall) / max(1, total - fall))  # 0 to 1, from the step where the fall begins
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    height = {'cosine': cosine, 'linear': 1 - progress, 'wsd': 1 - progress, 'constant': 1.0}[schedule]
    return min_lr + (learning_rate - min_lr) * height


# ------------------------------------------------------------------------------------------------
# Where the results go


def run_folder() -> Path:
    return Path(out_dir, 'overfit' if overfit_single_batch else '')


@contextmanager
def alone(process: Process, watch: Watch) -> Iterator[None]:
    """Keep every other run out of this one's folder until the block ends. Every process must call it."""
    writes = process.is_main and not (eval_only or check)
    with lock.owned(run_folder(), start_timeout, watch.beat) if writes else nullcontext():
        processes.wait_for_all(process)
        yield


@contextmanager
def open_run(origin: Origin, learner: Learner, work: Work, watch: Watch, stop: Stop,
             record: dict[str, Any]) -> Iterator[Run]:
    """Yield the run, with its folder, log and checkpoints, until the block ends. With eval_only nothing is written."""
    process, folder = learner.process, run_folder()
    if process.is_main and not eval_only:
        is_best = bool(learner.best) and learner.best['loss'][1] == learner.step > 0
        n_bytes = sizes.tensor_bytes(learner.raw_model, [*map(sizes.Group.of, learner.optimizer.param_groups)])
        checkpoint.make_ready(folder, overwrite and not overfit_single_batch, is_best, n_bytes, keep)
    is_kept = process.is_main and not (eval_only or overfit_single_batch)
    uploader = Uploader(upload_to if is_kept else '', console.say)
    log = Log(None if eval_only else folder, process.is_main, learner.step, work.last_step, uploader)
    log.reference = references.read(reference) if reference else None
    introduce(log, learner, record)
    watch.on_end = log.end
    run_id = origin.state.get('wandb_run_id', '') if origin.is_resumed else ''
    if wandb_log:
        run_id = run_id or wandb.new_id()
        written = '' if eval_only else str(folder)
        log.add('wandb', partial(wandb.Wandb, wandb_project, wandb_run_name, run_id, written, record))
    stop.has_begun = not (eval_only or overfit_single_batch)
    log.on_closed = stop.ask if stop.has_begun else None
    peak = learner.compute.peak and learner.compute.peak * process.world_size
    pace = Pace(work.n_windows * learner.raw_model.config.block_size, learner.raw_model.flops_per_token(), peak)
    with log, explained(watch, less_memory(learner)), checkpoint.Saver(folder, keep, uploader, watch.beat) as saver:
        yield Run(folder, log, saver, watch, stop, process, record, run_id, learner.step, work, log_interval, pace)


def introduce(log: Log, learner: Learner, record: dict[str, Any]) -> None:
    """Write down what the run is and who runs it, for its report. The launcher of several processes is not known."""
    about = {'settings': record, 'parameters': sum(p.numel() for p in learner.raw_model.parameters()),
             'python': platform.python_version(), 'torch': str(torch.__version__)}
    machine = (f'{processes.describe(learner.process)}; {learner.compute.line}; '
               f'{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores')
    log.introduce(about, shlex.join([errors.python(), *map(console.shown, sys.argv)]), machine)


def announce(data: Data, origin: Origin, learner: Learner, run: Run) -> None:
    """Say what will be learned, from what and on what, before the first step."""
    work, T, epoch = run.work, data.order.block_size, data.order.epoch
    run.log.line(f'{processes.describe(run.process)}; {learner.compute.line}\n'
                 f'{console.parameter_lines(learner.optimizer.param_groups)}')
    if run.process.is_main and run.process.device.type == 'cpu' and dtype != 'float32' and not eval_only:
        for line in advice(learner.compute.dtype, batch_size * T, learner.raw_model.config):
            run.log.line(line)
    if not eval_only:
        run.log.line(f'tokens per iteration will be: {work.n_windows * T:,} = {work.n_windows} windows of {T}, in '
                     f'micro-batches of {batch_size}, {work.n_parts} for each process\n'
                     f'{work.last_step:,} iterations are {work.end / epoch:.2f} epochs')
    _, complaint = sample.encode_start(sample_start, data.tokenizer, data.splits['val'])
    if complaint and (sample_interval or not data.tokenizer):
        run.log.line(complaint)
    if origin.is_resumed:
        run.log.line(checkpoint.describe(origin.state, run.record))
    if learner.windows_before == learner.windows > 0:
        run.log.line('the corpus or block_size has changed: the corpus is read from its first window on')


# ------------------------------------------------------------------------------------------------
# Looking


def ask_hellaswag(questions: tasks.InTraining | None, learner: Learner, run: Run) -> None:
    if questions:
        results = questions.answer(learner.predictor(batch_size), run.progress(learner))
        run.log.line(metrics.table({f'step {learner.step}': results}, {}))
        run.log.row(learner.step, **results)


def evaluate_splits(data: Data, learner: Learner, run: Run) -> None:
    """Measure both splits, and save what has become of the model. Every process must call it: each measures a share of
    the batches, and if one were missing, the others would wait for its sums for ever."""
    # more: `evaluation` of both splits, in batches, now and then
    step, predict = learner.step, learner.predictor(batch_size)
    was_measured = bool(learner.best) and learner.best['loss'][1] == step
    results = {split: metrics.evaluate(predict, corpus, eval_iters * batch_size, data.token_sizes,
                                       run.progress(learner)) for split, corpus in data.splits.items()}
    train_loss, val = results['train']['loss'], results['val']
    if not math.isfinite(val['loss']):
        give_up(f'the loss of step {step}', data, learner, ())
    is_best = metrics.keep_best(learner.best, val, step)
    run.log.line(console.step_line(step, train_loss, val['loss']))
    run.log.line(metrics.table(results, learner.best))
    run.log.row(step, train_loss=train_loss, **{f'val_{name}': value for name, value in val.items()})
    has_changed = step > run.first_step or (step > 0 and is_best and not was_measured)
    if has_changed and (is_best or always_save_checkpoint) and not eval_only:
        run.save(data, learner, is_best)
    run.log.plot()
    run.log.status('running', step, errors.DONE)


def draw_sample(data: Data, learner: Learner, run: Run) -> None:
    if data.tokenizer and not eval_only:
        prompt, _ = sample.encode_start(sample_start, data.tokenizer, data.splits['val'])
        with learner.compute.eager(), learner.compute.autocast:
            text = sample.continue_text(learner.raw_model, prompt, data.tokenizer, sample_tokens, seed,
                                        learner.process.device)
        run.log.sample(learner.step, text)


# ------------------------------------------------------------------------------------------------
# Learning


def micro_batches(data: Data, learner: Learner, run: Run) -> Iterator[Part]:
    """Yield the micro-batches that this process reads from the next step on, run.work.n_parts for each step."""
    first, n_windows = learner.windows - learner.windows_before, run.work.n_windows
    for step in range(run.work.last_step - learner.step):
        starts = data.order.starts(0 if overfit_single_batch else first + step * n_windows, n_windows)
        yield from parts_of(data.splits['train'], starts, batch_size, learner.raw_model.config, learner.process)


def accumulate_gradient(learner: Learner, parts: Iterable[Part]) -> Tensor:
    """Leave the gradient of the step's mean loss in the parameters. Return this process's part of that mean, in nats
    per token."""
    process = learner.process
    loss = torch.zeros((), device=process.device)
    for part in parts:  # fast: `forward and backward` in parts that fit into memory, and on several devices
        strategies.set_gradient_sync(learner.model, on=part.is_last)
        torch.manual_seed(draw(seed, learner.step, part.number))  # dropout is the same for any number of processes
        with learner.compute.autocast:  # fast: `forward and backward` in bfloat16, if the device multiplies it
            _, mean = learner.model(part.x, part.y, logits='none')
        share = mean * part.share  # a mean over this part -> its part of the mean over all: gradients are added up
        loss += share.detach()
        learner.scaler.scale(share * process.world_size).backward()  # processes exchange the mean, and we want the sum
    return loss


def train(data: Data, learner: Learner, run: Run, parts: Iterator[Part], questions: tasks.InTraining | None) -> None:
    """Look, learn, look, learn ... until the last step, or until run.heed raises StopAsked. `parts` are the
    micro-batches of all steps."""
    # more: `train` looks, heeds signals, and skips steps that are not finite
    optimizer, scaler = learner.optimizer, learner.scaler
    while True:
        run.heed(learner)  # signals, max_hours, a checkpoint that could not be written

        # look: every so often, and at the end
        if run.is_due(hellaswag_interval, learner.step):
            ask_hellaswag(questions, learner, run)
        if run.is_due(eval_interval if eval_only or not overfit_single_batch else 0, learner.step):
            evaluate_splits(data, learner, run)
        if run.is_due(sample_interval, learner.step):
            draw_sample(data, learner, run)
        if learner.step == run.work.last_step:
            return

        # forward and backward: the gradient of the mean loss over the step's windows, one micro-batch at a time
        run.pace.begin()
        of_step = islice(parts, run.work.n_parts)  # fast: `forward and backward`, while a thread reads what comes next
        shown = console.progress(of_step, run.work.n_parts, f'step {learner.step}', 'micro-batches', SLOW, run.log.line)
        part_of_loss = accumulate_gradient(learner, shown)

        # update
        rate = set_rates(optimizer, learner.step, run.work.decay_steps)
        scaler.unscale_(optimizer)
        norm = strategies.clip(learner.raw_model.parameters(), grad_clip)  # more: `clip`, if processes share the model
        loss, grad_norm = run.add_up(part_of_loss, norm)
        if learner.is_sound(loss, grad_norm):
            scaler.step(optimizer)
            learner.skipped_in_a_row = 0
        else:
            learner.skipped += 1
            learner.skipped_in_a_row += 1
            run.log.line(f'step {learner.step} is skipped: loss {loss}, gradient norm {grad_norm}; '
                         f'skipped so far: {learner.skipped}')
        scaler.update()
        optimizer.zero_grad()
        if learner.skipped_in_a_row == PATIENCE:
            give_up(f'{PATIENCE} steps in a row were skipped, up to step {learner.step}', data, learner,
                    islice(micro_batches(data, learner, run), run.work.n_parts))
        learner.count_step(run.work.n_windows)
        run.watch.tighten()  # from here on, a process that is silent for long is lost
        run.pace.end()

        # report
        run.report(learner, loss, rate, grad_norm)


def give_up(what: str, data: Data, learner: Learner, parts: Iterable[Part]) -> NoReturn:
    """End a run in which nothing is finite any more, and show the first text of these parts whose loss is not."""
    predict, found = learner.predictor(1), []
    for part in parts:
        for x, y in zip(part.x, part.y, strict=True):  # (T,) each
            if not F.cross_entropy(predict(x[None])[0], y, ignore_index=-1, reduction='sum').isfinite():
                found.append(x.tolist())
    text = data.tokenizer.decode(found[0]) if found and data.tokenizer else ''
    where = f'the first text of this process that has no finite loss: {text[:200]!r}\n' if text else ''
    raise UserError(f'nothing is finite any more: {what}; what was saved before is whole\n{where}'
                    'try a lower --learning_rate, or --dtype=float32', errors.NOT_FINITE)


# ------------------------------------------------------------------------------------------------
# The end


def stop_early(data: Data, learner: Learner, run: Run, is_resumed: bool, reason: StopAsked) -> NoReturn:
    """Save, unless the run has not come further than the checkpoint that it resumed."""
    if learner.step > run.first_step or not is_resumed:
        run.save(data, learner)
        run.saver.wait()
    run.watch.rest()
    raise UserError(f'stopped before step {learner.step} of {run.work.last_step} by {reason}\n'
                    'the same command continues from there, with --init_from=auto', errors.STOPPED)


def finish(run: Run) -> None:
    """Say the last words of a run that has made all its steps."""
    run.log.plot()
    run.saver.wait()
    run.watch.rest()
    if overfit_single_batch and not eval_only:
        verdict = (f'the loss on one batch went from {run.first_loss:.4f} to {run.last_loss:.4f} '
                   f'in {run.work.last_step} steps')
        if not run.last_loss < LEARNED_BY_HEART * run.first_loss:
            raise UserError(f'FAIL: {verdict}, not below {LEARNED_BY_HEART} of the first', errors.CHECK_FAILED)
        run.log.line(f'PASS: {verdict}')
    elif run.process.is_main and not eval_only:
        run.log.line(f'peak memory: {console.short(peak_memory(run.process.device.type))} bytes')
        run.log.line(f'{run.folder} holds {", ".join(sorted(path.name for path in run.folder.glob("[!.]*")))}')
        if checkpoint.holds_run(run.folder):
            run.log.line(f'try next: {errors.command("sample.py", out_dir=run.folder)}')


# ------------------------------------------------------------------------------------------------
# From the settings to a run


def refuse_mistakes(given: set[str]) -> None:
    """Refuse what can be refused before anything is loaded, and say what has no effect."""
    script = sys.modules[__name__]
    many = configurator.MANY
    configurator.check_range(script, 'keep', 2, below=many)  # the newest may be damaged
    configurator.check_range(script, 'eval_iters gradient_accumulation_steps batch_size block_size n_layer n_head '
                             'n_embd start_timeout timeout', 1, below=many)
    configurator.check_range(script, 'eval_interval log_interval', 1)
    configurator.check_range(script, 'vocab_size sample_tokens hellaswag_limit max_hours', 0, below=many)
    configurator.check_range(script, 'total_batch_size max_iters max_epochs warmup_iters lr_decay_iters '
                             'sample_interval hellaswag_interval grad_clip learning_rate min_lr weight_decay', 0)
    configurator.check_range(script, 'dropout beta1 beta2 decay_fraction', 0, below=1)
    if decay_lr and schedule != 'constant' and min_lr > learning_rate:
        raise UserError(f'--min_lr={min_lr} is above --learning_rate={learning_rate}:\n'
                        'give --min_lr=0, or a tenth of the learning rate')
    if overwrite and init_from in ('resume', 'auto'):
        raise UserError(f'--overwrite=True starts over; --init_from={init_from} continues: give one of them')
    if reference:
        references.read(reference)
    if arch == 'modern':
        refuse_rates_of_gpt2(given)
        if init_from in sizes.GPT2:
            raise UserError(f'--arch=modern is another model than {init_from}: leave one of them out')
    without_effect = {
        'gradient_accumulation_steps': 'total_batch_size' if total_batch_size else '',
        'schedule': '' if decay_lr else 'decay_lr=False',
        'hellaswag': '' if hellaswag_interval else 'hellaswag_interval=0',
        'hellaswag_limit': '' if hellaswag_interval else 'hellaswag_interval=0',
        'reshard_after_forward': '' if strategy == 'fsdp' else f'strategy={strategy}',
        'gelu': 'arch=modern' if arch == 'modern' else '',
        'shortcuts': '' if arch == 'modern' else f'arch={arch}',
    }
    for name, reason in without_effect.items():
        if name in given and reason:
            console.say(f'{name} has no effect: {reason} decides')


def refuse_rates_of_gpt2(given: set[str]) -> None:
    """Refuse to train the modern model with the defaults of this file, which are GPT-2's, as are its schedule, warm-up
    and clipping."""
    if 'learning_rate' not in given and not eval_only:
        raise UserError(f'--learning_rate={learning_rate} is for GPT-2, and so are all defaults of the optimizer here\n'
                        'the modern model has its own in config/train_modern.py: give that file, or another of '
                        'config/train_modern*.py')


def less_memory(learner: Learner | None = None) -> str:
    """Return the settings that need less memory, for the same tokens in a step. A micro-batch that is only a little
    smaller may need more, if its logits are just few enough to be stored whole."""
    if batch_size == 1:
        return '--activation_checkpointing=True, or --strategy=fsdp on several GPUs, or a smaller --block_size'
    windows = batch_size * gradient_accumulation_steps
    smaller = next(size for size in range(batch_size // 2, 0, -1) if windows % size == 0
                   and (size == 1 or not learner or bytes_of(size, learner) < bytes_of(batch_size, learner)))
    if total_batch_size:
        return f'--batch_size={smaller}, for the same total_batch_size'
    return (f'--batch_size={smaller} --gradient_accumulation_steps={windows // smaller}, for the same tokens in a step')


def bytes_of(n_windows: int, learner: Learner) -> int:
    """Return the bytes that a micro-batch of so many windows needs."""
    compute = learner.compute
    width = 4 if compute.dtype == torch.float32 else 2
    is_compiled = compute.compiles and learner.process.device.type == 'cuda'
    return sizes.activations(learner.raw_model.config, n_windows, width, is_compiled).most(activation_checkpointing)


def carry_out(process: Process, watch: Watch, stop: Stop, record: dict[str, Any], given: set[str]) -> None:
    """Train, or check what would be trained, by processes that have met."""
    torch.manual_seed(seed)  # every process draws the same initial weights
    wanted = configurator.pick(RunSettings, sys.modules[__name__], given=frozenset(given))
    may_share_folder = overwrite or eval_only or check or overfit_single_batch
    origin = begin(wanted, read_meta(data_folder(dataset))['vocab_size'], may_share_folder, process)
    if origin.model.config.arch == 'modern':  # by its checkpoint, perhaps
        refuse_rates_of_gpt2(given)
    data = open_data(origin, process)
    learner = build_learner(origin, data, watch, process)
    if check:
        return run_checks(data, learner, origin.is_new, accumulate_gradient, seed, grad_clip)
    is_asked = hellaswag_interval > 0 and not overfit_single_batch
    questions = tasks.for_training(hellaswag, hellaswag_limit, data.tokenizer, process) if is_asked else None
    work = amount(wanted, data.order.block_size, data.order.epoch, process.world_size, learner.place)
    if eval_only:
        work = work._replace(last_step=learner.step)
    with open_run(origin, learner, work, watch, stop, record) as run:
        announce(data, origin, learner, run)
        parts = read_ahead(micro_batches(data, learner, run), process)
        try:
            with closing(parts):
                train(data, learner, run, parts, questions)
        except StopAsked as reason:
            stop_early(data, learner, run, origin.is_resumed, reason)
        finish(run)


# more: `main`, with a plan, checks, several processes and a watch over them
def main(args: list[str]) -> None:
    _, given = configurator.configure(sys.modules[__name__], args)
    refuse_mistakes(given)
    if plan:
        wanted = configurator.pick(RunSettings, sys.modules[__name__], given=frozenset(given))
        return show_plan(wanted, parameter_groups)
    with (Stop(max_hours) as stop,
          processes.joined(device, backend, deterministic, start_timeout, strategy == 'fsdp', cpu_offload) as process,
          Watch(process, start_timeout, timeout) as watch, explained(watch, less_memory())):
        record = processes.agree_on_settings(process, sys.modules[__name__], args, PLACE)
        with alone(process, watch):
            carry_out(process, watch, stop, record, given)


if __name__ == '__main__':
    errors.run(main)
