"""
Train a GPT: on a laptop, on one card, or on many.

    python train.py config/train_stdlib.py                                    the default run, a few minutes on a CPU
    python train.py config/train_gpt2.py --batch_size=4 --device=cuda         GPT-2, on one card
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py    GPT-2, on the 8 cards of one machine
"""
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

import configurator
import sample
from plaingpt import console, errors, metrics
from plaingpt.check import Wiring, run_checks
from plaingpt.corpus.batches import Part, parts_of
from plaingpt.corpus.folder import data_folder, fingerprint, open_split, read_meta
from plaingpt.corpus.order import Order, draw
from plaingpt.errors import UserError
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import choose, peak_memory
from plaingpt.machines.stop import Stop
from plaingpt.machines.watch import Watch, explained, give_up
from plaingpt.plan import amount, refuse, show
from plaingpt.run import checkpoint, upload
from plaingpt.run.log import Logger
from plaingpt.tasks import for_training, score

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
plan: bool = False  # say what the run amounts to, parameters, bytes and hours, and leave
check: bool = False  # try whether model and run are wired right, on one short window, and leave with 0 or 1
# evaluation, logging and samples
eval_interval: int = 2000  # steps
eval_iters: int = 200  # batches of batch_size that an evaluation reads, in all
eval_only: bool = False  # evaluate once and leave
log_interval: int = 1  # steps
always_save_checkpoint: bool = True  # at each evaluation; False: only when the validation loss is the best so far
keep: int = 2  # checkpoints: ckpt.pt, and those before it as ckpt.1.pt ...; best.pt does not count
sample_interval: int = 2000  # steps; samples are drawn before the first step and after the last one too; 0 draws none
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
gradient_accumulation_steps: int = 5 * 8  # micro-batches
batch_size: int = 12  # windows in a micro-batch: what one process takes at a time; lower it when memory runs out
block_size: int = 1024  # tokens in a window
# model
n_layer: int = 12
n_head: int = 12
n_embd: int = 768
vocab_size: int = 0  # 0 takes the tokenizer's; a large one is rounded up to a multiple of 128 (GPT-2's: 50304)
dropout: float = 0.0  # 0 to pretrain; 0.1 or more to fine-tune, or on little text
bias: bool = False  # in the Linear layers and LayerNorms
gelu: Literal['tanh', 'exact'] = 'tanh'  # GPT-2's, or nanoGPT's
tie_weights: bool = True  # one table embeds a token and predicts it
# AdamW
learning_rate: float = 6e-4  # the highest
max_iters: int = 600000  # steps
max_epochs: float = 0.0  # passes over the corpus, where they end before max_iters; 0 sets no such end
weight_decay: float = 1e-1  # of matrices; vectors have none
beta1: float = 0.9
beta2: float = 0.95
grad_clip: float = 1.0  # the longest gradient, as one vector; 0 allows any
overfit_single_batch: bool = False  # a check: learn one batch by heart, or exit 1; writes to out_dir/overfit
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
device: str = 'auto'  # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto' is the first of them that is here
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; 'auto' is the fastest sound one
compile: bool | Literal['auto'] = 'auto'  # 'auto': on cuda
seed: int = 1337
deterministic: bool = False  # on cuda: bit for bit the same each time, and slower
# ------------------------------------------------------------------------------------------------

LEARNED_BY_HEART = 0.1  # of the first loss: overfit_single_batch passes below it
PATIENCE = 10  # steps in a row that are skipped because something is not finite; then the run ends
SLOW = 5  # seconds: a longer step shows its micro-batches


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float],
                   shards: bool = False) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017). Matrices are pulled towards zero; vectors, which are biases and LayerNorm
    gains, are not. If it `shards`, each process updates a part of the weights, and sends it to the others (Rajbhandari
    et al. 2020: ZeRO, stage 1)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.0}]
    # fast: one kernel for all weights; the plain file writes AdamW out
    if shards:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # it takes half a second
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=lr, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_at(step: int, kind: str, peak: float, floor: float, warmup: int, total: int, decay: float) -> float:
    """Rise linearly to `peak` over `warmup` steps, then fall to `floor` at step `total`: along half a cosine, along a
    line, along a line in the last `decay` of all steps, or never."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    fall = max(warmup, round(total * (1 - decay))) if kind == 'wsd' else warmup  # the step where the fall begins
    progress = min(1.0, max(0, step - fall) / max(1, total - fall))  # 0 to 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    height = {'cosine': cosine, 'linear': 1 - progress, 'wsd': 1 - progress, 'constant': 1.0}[kind]
    return floor + (peak - floor) * height


def accumulate_gradient(model: nn.Module, parts: Iterable[Part], step: int, n_parts: int,
                        process: processes.Process, autocast: AbstractContextManager[None],
                        scaler: torch.amp.GradScaler, seed: int) -> Tensor:
    """Leave the gradient of the step's mean loss in the parameters. Returns this process's part of that mean, in nats
    per token."""
    loss = torch.zeros((), device=process.device)
    for i, part in enumerate(parts):  # fast: a step in parts that fit into memory, and on several devices
        strategies.set_gradient_sync(model, on=i == n_parts - 1)
        torch.manual_seed(draw(seed, step, part.number))  # dropout is the same for any number of processes
        with autocast:  # fast: matrix products in bfloat16, where the device multiplies it
            _, mean = model(part.x, part.y, logits='none')
        share = mean * part.share
        loss += share.detach()
        scaler.scale(share * process.world_size).backward()  # processes exchange the mean, and we want the sum
    return loss


def train(process: processes.Process, watch: Watch, stop: Stop, settings: dict[str, Any],
          given: set[str]) -> None:
    """The whole run: load, then step after step evaluate, save, sample and learn."""
    # the corpus, and a model for it
    torch.manual_seed(seed)  # every process draws the same initial weights
    folder = data_folder(dataset)
    meta = read_meta(folder)
    raw_model, state, is_resumed = checkpoint.start_from(settings | {'eval_only': eval_only or check}, given,
                                                         meta['vocab_size'], process)
    config, T = raw_model.config, raw_model.config.block_size
    corpora = {split: open_split(folder, split, T, config.vocab_size) for split in ('train', 'val')}
    prints = {split: fingerprint(corpus, meta) for split, corpus in corpora.items()}
    if is_resumed and not ignore_data_change:
        checkpoint.refuse_other_data(state, prints, folder)
    processes.refuse_difference(process, 'corpus', prints, f'{folder} must be the same on all machines')
    vocabulary = checkpoint.vocabulary_of(meta, state, init_from)
    token_sizes = vocabulary.token_sizes() if vocabulary else None
    prompt, no_start = sample.encode_start(sample_start, vocabulary, corpora['val'])

    # how much there is to do
    order = Order(len(corpora['train']), T, seed)
    first_step = state['iter_num'] if is_resumed else 0
    n_windows, n_parts, last_step, decay_steps = amount(settings, T, order.epoch, process.world_size, first_step)

    # the model and its optimizer, on their device
    compute = choose(process.device, dtype, compile)
    autocast, blocks = compute.autocast, raw_model.transformer.h
    raw_model.transformer.recomputes = activation_checkpointing
    for block in blocks if compute.compiles else ():
        block.compile()  # fast: one graph that serves all blocks; in place, so that the names of the weights stay
    model = strategies.distribute(raw_model, blocks, process, strategy, compute.dtype, reshard_after_forward,
                                  cpu_offload)
    watch.follow(model, () if compute.compiles else blocks)  # a compiled block is one operation
    shards = strategy == 'zero1' and process.world_size > 1
    optimizer = make_optimizer(raw_model, learning_rate, weight_decay, (beta1, beta2), shards)
    scaler = torch.amp.GradScaler(process.device.type, enabled=compute.dtype == torch.float16)
    best: metrics.Best = state['best'] if is_resumed else {}
    skipped, skipped_in_a_row = state['skipped'] if is_resumed else 0, 0  # steps
    if is_resumed:
        checkpoint.restore(optimizer, scaler, state)

    if check:
        backward = partial(accumulate_gradient, model, n_parts=1, process=process, autocast=autocast, scaler=scaler,
                           seed=seed)
        is_new = init_from in ('scratch', 'start', 'auto') and not is_resumed
        return run_checks(Wiring(raw_model, model, optimizer, scaler, process, compute, corpora, vocabulary, is_new,
                                 seed, grad_clip, watch.beat, backward))

    # where the results go
    is_asked = hellaswag_interval > 0 and not overfit_single_batch
    questions = for_training(hellaswag, hellaswag_limit, vocabulary, process) if is_asked else None
    run = Path(out_dir, 'overfit') if overfit_single_batch else Path(out_dir)
    writes = process.is_main and not eval_only
    if writes:
        is_best = bool(best) and best['loss'][1] == first_step > 0
        checkpoint.make_ready(run, overwrite and not overfit_single_batch, is_best, raw_model, keep)
    uploader = upload.Uploader(upload_to if writes and not overfit_single_batch else '', console.say)
    log = Logger('' if eval_only else str(run), process.is_main, first_step, last_step,
                        wandb_project if wandb_log else '', wandb_run_name,
                        state['wandb_run_id'] if is_resumed else '', settings, uploader)
    watch.on_end = log.end
    with log, explained(watch, settings), checkpoint.Saver(run, keep, uploader, watch.beat) as saver:
        log.line(f'{processes.describe(process)}; {compute.line}\n{console.parameter_lines(optimizer.param_groups)}')
        log.line(f'tokens per iteration will be: {n_windows * T:,} = {n_windows} windows of {T}, in micro-batches of '
                 f'{batch_size}, {n_parts} for each process\n'
                 f'{last_step:,} iterations are {last_step * n_windows / order.epoch:.2f} epochs')
        if no_start and (sample_interval or not vocabulary):
            log.line(no_start)
        if is_resumed:
            log.line(checkpoint.describe(state, settings))
        state = {}  # its memory is free again

        def read(step: int) -> Iterator[Part]:
            starts = order.starts(0 if overfit_single_batch else step * n_windows, n_windows)
            for part in parts_of(corpora['train'], starts, batch_size, config, process):
                watch.beat(step)
                yield part

        def save(step: int, is_best: bool) -> None:
            """Every process gives its part; the main one writes the file, while all go on."""
            saver.wait()
            weights, moments = strategies.gather(raw_model, optimizer, process)
            if process.is_main:
                log.flush()
                log.line(f'saving checkpoint to {run}')
                saver.save(is_best, {
                    'model': weights, 'optimizer': moments, 'model_args': checkpoint.model_args(config),
                    'config': settings | {name: getattr(config, name) for name in checkpoint.SHAPE},
                    'iter_num': step, 'best_val_loss': best['loss'][0] if best else math.inf, 'best': dict(best),
                    'tokenizer': vocabulary.state() if vocabulary else None, 'skipped': skipped,
                    'scaler': scaler.state_dict(), 'wandb_run_id': log.wandb_run_id, 'data': prints,
                })

        def end_if_asked(step: int) -> None:
            """Save and leave before `step`, on all processes at once, if any of them was asked to."""
            watch.beat(step)
            if not processes.total(torch.tensor(float(stop.is_asked()), device=process.device)).item():
                return
            if not (is_resumed and step == first_step):
                save(step, False)
                saver.wait()
            watch.rest()
            raise UserError(f'stopped before step {step} of {last_step} by {stop.reason or "another process"}\n'
                            'the same command goes on from there, with --init_from=auto', errors.STOPPED)

        def progress(step: int, items: Iterable[int], total: int, label: str, unit: str) -> Iterator[int]:
            for item in log.progress(items, total, label, unit):
                end_if_asked(step)
                yield item

        def ask(step: int) -> None:
            if questions:
                results = questions.answer(partial(score, model, config, batch_size, process, autocast,
                                                   partial(progress, step)))
                log.line(metrics.table({f'step {step}': results}, {}))
                log.row(step, **results)

        def measure(step: int) -> None:
            """Evaluate on both splits, and save what has become of the model."""
            n, was_measured = eval_iters * batch_size, bool(best) and best['loss'][1] == step
            results = {split: metrics.evaluate(model, config, corpus, n, batch_size, token_sizes, process, autocast,
                                                partial(progress, step)) for split, corpus in corpora.items()}
            val = results['val']
            if not math.isfinite(val['loss']):
                give_up(step, 0, model, (), autocast, vocabulary)
            is_best = metrics.keep_best(best, val, step)
            log.line(console.step_line(step, results['train']['loss'], val['loss']))
            log.line(metrics.table(results, best))
            log.row(step, train_loss=results['train']['loss'], **{f'val_{name}': value for name, value in val.items()})
            is_new = step > first_step or (step > 0 and is_best and not was_measured)
            if is_new and (is_best or always_save_checkpoint) and not eval_only:
                save(step, is_best)
            log.plot()
            log.status('running', step, errors.DONE)

        def draw_sample(step: int) -> None:
            if vocabulary:
                with torch.compiler.set_stance('force_eager'), autocast:
                    log.sample(step, sample.continue_text(raw_model, prompt, vocabulary, sample_tokens, seed, process,
                                                          watch.beat))

        if eval_only:
            ask(first_step)
            return measure(first_step)

        stop.has_begun, log.on_closed = not overfit_single_batch, None if overfit_single_batch else stop.ask
        # one micro-batch tells how long a step will take; when it compiles, the second one does
        for _ in range(1 + compute.compiles):
            started = time.perf_counter()
            accumulate_gradient(model, islice(read(0), 1), 0, 1, process, autocast, scaler, seed).item()
            seconds = n_parts * (time.perf_counter() - started)  # of a step
        optimizer.zero_grad()
        if seconds > SLOW:
            log.line(f'one iteration, {n_windows * T:,} tokens, takes about {seconds:.0f} s on this machine')

        first_loss = loss = math.nan
        peak = compute.peak and compute.peak * process.world_size
        pace = console.Pace(n_windows * T, raw_model.flops_per_token(), peak, first_step)
        for step in range(first_step, last_step + 1):
            # look: ask, measure, save, sample
            is_last = step == last_step
            end_if_asked(step)
            saver.complain()
            asks, measures, draws = (interval and (is_last or step % interval == 0) for interval in (
                hellaswag_interval, 0 if overfit_single_batch else eval_interval, sample_interval))
            if asks:
                ask(step)
            if measures:
                measure(step)
            if draws:
                draw_sample(step)
            if is_last:
                break
            if asks or measures or draws:
                pace.start(step)  # looking was not learning

            # learn: one update
            lr = learning_rate
            if decay_lr:
                lr = lr_at(step, schedule, learning_rate, min_lr, warmup_iters, decay_steps, decay_fraction)
            for group in optimizer.param_groups:
                group['lr'] = lr
            parts = read(step)
            if seconds > SLOW:
                parts = log.progress(parts, n_parts, f'step {step}', 'micro-batches')
            step_loss = accumulate_gradient(model, parts, step, n_parts, process, autocast, scaler, seed)
            scaler.unscale_(optimizer)
            grad_norm = strategies.clip(raw_model.parameters(), grad_clip)
            watch.beat(step)
            loss = processes.total(step_loss).item()
            # the same on every process; an overflow of float16 is for the scaler, which then updates nothing either
            if math.isfinite(loss) and (math.isfinite(grad_norm) or (scaler.is_enabled() and scaler.get_scale() > 1)):
                scaler.step(optimizer)
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                log.line(f'step {step} is skipped: loss {loss}, gradient norm {grad_norm}; skipped so far: {skipped}')
            scaler.update()
            optimizer.zero_grad()
            watch.tighten()
            if skipped_in_a_row == PATIENCE:
                give_up(step, PATIENCE, model, read(step), autocast, vocabulary)

            # report
            if step % log_interval == 0 or step in (first_step, last_step - 1):
                first_loss = loss if step == first_step else first_loss
                log.iteration(step, {
                    'loss': loss, 'lr': lr, 'grad_norm': grad_norm, 'tokens': (step + 1) * n_windows * T,
                    'skipped': skipped, 'peak_memory_bytes': peak_memory(process.device.type),
                }, pace.lap(step + 1))

        log.plot()
        saver.wait()
        watch.rest()
        if overfit_single_batch:
            verdict = f'the loss on one batch went from {first_loss:.4f} to {loss:.4f} in {last_step} steps'
            if not loss < LEARNED_BY_HEART * first_loss:
                raise UserError(f'FAIL: {verdict}, not below {LEARNED_BY_HEART} of the first', errors.CHECK_FAILED)
            log.line(f'PASS: {verdict}')
        elif process.is_main:
            log.line(f'peak memory: {console.short(peak_memory(process.device.type))} bytes')
            log.line(f'{run} holds {", ".join(sorted(path.name for path in run.iterdir()))}')
            log.line(f'try next: {errors.python()} sample.py --out_dir={run}')


def main(args: list[str]) -> None:
    settings, given = configurator.configure(sys.modules[__name__], args)
    refuse(settings, given)
    if plan:
        return show(settings, given)
    with (Stop(max_hours) as stop,
          processes.joined(device, backend, deterministic, start_timeout, strategy == 'fsdp') as process,
          Watch(process, start_timeout, timeout) as watch, explained(watch, settings)):
        train(process, watch, stop, settings, given)


if __name__ == '__main__':
    errors.run(main)
