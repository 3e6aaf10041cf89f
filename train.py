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
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

import checkpoint
import configurator
import errors
import evaluate
import logger
import parallel
import tokenizer
import tokens
from errors import UserError
from model import GPTConfig

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them. Names, defaults and meanings
# are nanoGPT's wherever it has them: the defaults train GPT-2 (124M) on 8 A100s. A step is one update of the weights.

# where
out_dir: str = 'out'
dataset: str = 'openwebtext'  # a folder in data/, or any folder, that holds train.bin and val.bin
init_from: str = 'scratch'  # 'scratch' ('start'), 'resume' from out_dir, 'auto' (resume if it can), 'gpt2*', or a path
overwrite: bool = False  # start over in an out_dir that holds a run: its files are deleted
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
backend: str = 'auto'  # between processes: 'nccl' on cuda, 'gloo' elsewhere
device: str = 'auto'  # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto' is the first of them that is here
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matrix products; 'auto' is the fastest sound one
compile: bool | Literal['auto'] = 'auto'  # 'auto': on cuda
seed: int = 1337
deterministic: bool = False  # on cuda: bit for bit the same each time, and slower
# ------------------------------------------------------------------------------------------------

LEARNED_BY_HEART = 0.1  # of the first loss: overfit_single_batch passes below it
SLOW = 5  # seconds: a longer step shows its micro-batches


class Part(NamedTuple):
    """One micro-batch of a step: what is computed at once."""

    number: int  # among the step's micro-batches, over all processes
    share: float  # of the step's windows
    x: Tensor  # (B, T)
    y: Tensor  # (B, T), -1 where there is no target


def check(settings: dict[str, Any]) -> None:
    """Refuse what can be refused before anything is loaded."""
    for name in ('eval_interval', 'eval_iters', 'log_interval', 'gradient_accumulation_steps', 'batch_size',
                 'block_size', 'n_layer', 'n_head', 'n_embd', 'keep'):
        if settings[name] < 1:
            raise UserError(f'--{name}={settings[name]}: must be 1 or more')
    for name in ('total_batch_size', 'max_iters', 'max_epochs', 'warmup_iters', 'lr_decay_iters', 'sample_interval',
                 'sample_tokens', 'vocab_size', 'grad_clip', 'learning_rate', 'min_lr', 'weight_decay'):
        if settings[name] < 0:
            raise UserError(f'--{name}={settings[name]}: must be 0 or more')
    for name in ('dropout', 'beta1', 'beta2', 'decay_fraction'):
        if not 0 <= settings[name] < 1:
            raise UserError(f'--{name}={settings[name]}: must be at least 0 and less than 1')
    falls = settings['decay_lr'] and settings['schedule'] != 'constant'
    if falls and settings['min_lr'] > settings['learning_rate']:
        raise UserError(f'--min_lr={settings["min_lr"]} is above --learning_rate={settings["learning_rate"]}:\n'
                        'give --min_lr=0, or a tenth of the learning rate')
    if settings['overwrite'] and settings['init_from'] in ('resume', 'auto'):
        raise UserError(f'--overwrite=True starts over; --init_from={settings["init_from"]} goes on: give one of them')


def windows_in_step(total_batch_size: int, micro_batches: int, batch_size: int, block_size: int) -> int:
    """Windows that all processes together read for one update."""
    if not total_batch_size:
        return micro_batches * batch_size
    if total_batch_size % block_size:
        below = total_batch_size // block_size * block_size
        raise UserError(f'total_batch_size={total_batch_size} must be a multiple of block_size={block_size}: '
                        f'the nearest are {f"{below} and " if below else ""}{below + block_size}')
    return total_batch_size // block_size


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017). Matrices are pulled towards zero; vectors, which are biases and LayerNorm
    gains, are not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': weight_decay}, {'params': vectors, 'weight_decay': 0.0}]
    # fast: one kernel for all weights; the plain file writes AdamW out
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


def parts_of(corpus: tokens.TokenFile, starts: tokens.Integers, batch_size: int, config: GPTConfig,
             process: parallel.Process) -> Iterator[Part]:
    """This process's micro-batches of the windows of one step. Every process gets the same number of them, of the same
    shape; where windows are missing, targets are -1."""
    rounds = math.ceil(len(starts) / (batch_size * process.world_size))
    for number in range(process.rank, rounds * process.world_size, process.world_size):
        mine = starts[number * batch_size:(number + 1) * batch_size]
        x, y = tokens.read_batch(corpus, mine, config.block_size, batch_size, config.vocab_size)
        x, y = parallel.to_device(x, process.device), parallel.to_device(y, process.device)
        yield Part(number, len(mine) / len(starts), x, y)


def accumulate_gradient(model: nn.Module, parts: Iterable[Part], n_parts: int, step: int, process: parallel.Process,
                        autocast: AbstractContextManager[None], scaler: torch.amp.GradScaler, seed: int) -> Tensor:
    """Leave the gradient of the step's mean loss in the parameters. Returns this process's part of that mean, in nats
    per token."""
    loss = torch.zeros((), device=process.device)
    for i, part in enumerate(parts):  # fast: a step in parts that fit into memory, and on several devices
        parallel.set_gradient_sync(model, on=i == n_parts - 1)
        torch.manual_seed(tokens.draw(seed, step, part.number))  # dropout is the same for any number of processes
        with autocast:  # fast: matrix products in bfloat16, where the device multiplies it
            _, mean = model(part.x, part.y, logits='none')
        share = mean * part.share
        loss += share.detach()
        scaler.scale(share * process.world_size).backward()  # processes exchange the mean, and we want the sum
    return loss


def encode_start(text: str, vocabulary: tokenizer.Tokenizer, unseen: tokens.TokenFile) -> tuple[list[int], str]:
    """The ids that samples continue, and a line to say where that is not `text`: what the vocabulary cannot write gives
    way to the beginning of the validation text, and an empty text to the beginning of a document."""
    if not text and vocabulary.eot is not None:
        return [vocabulary.eot], ''
    try:
        ids = vocabulary.encode_prompt(text)
    except UserError:
        ids = []
    line = f'--sample_start={text!r} cannot be written in this vocabulary: samples continue the start of {unseen.path}'
    return (ids, '') if ids else (unseen.read(0, 8).tolist(), line)


def refuse_infinite(loss: float, step: int, run: Path) -> None:
    """End a run whose weights are lost, before they take the place of those that were saved."""
    if not math.isfinite(loss):
        raise UserError(f'the loss is {loss} at step {step}; {run} holds what was saved before\n'
                        'try a lower --learning_rate, or --dtype=float32', errors.NOT_FINITE)


def train(process: parallel.Process, settings: dict[str, Any], given: set[str]) -> None:
    """The whole run: load, then step after step evaluate, save, sample and learn."""
    # the corpus, and a model for it
    torch.manual_seed(seed)  # every process draws the same initial weights
    folder = tokens.data_folder(dataset)
    meta = tokens.read_meta(folder)
    raw_model, state, is_resumed = checkpoint.start_from(settings, given, meta['vocab_size'])
    config, T = raw_model.config, raw_model.config.block_size
    corpora = {split: tokens.open_split(folder, split, T, config.vocab_size) for split in ('train', 'val')}
    prints = {split: tokens.fingerprint(corpus) for split, corpus in corpora.items()}
    vocabulary = checkpoint.vocabulary_of(meta, state, init_from)
    token_sizes = vocabulary.token_sizes() if vocabulary else None
    sample_ids, no_start = encode_start(sample_start, vocabulary, corpora['val']) if vocabulary else ([], '')

    # how much there is to do
    order = tokens.Order(len(corpora['train']), T, seed)
    n_windows = windows_in_step(total_batch_size, gradient_accumulation_steps, batch_size, T)
    n_parts = math.ceil(n_windows / (batch_size * process.world_size))  # micro-batches of each process in a step
    first_step = state['iter_num'] if is_resumed else 0
    end_of_epochs = math.ceil(max_epochs * order.epoch / n_windows) if max_epochs else sys.maxsize  # step
    last_step, decay_steps = max(first_step, min(max_iters, end_of_epochs)), min(lr_decay_iters, end_of_epochs)

    # the model and its optimizer, on their device
    precision, why_precision = parallel.pick_dtype(dtype, process.device.type)
    compiles, why_compile = parallel.pick_compile(compile, process.device.type)
    autocast = parallel.autocast(process.device, precision)
    peak = logger.peak_flops(parallel.card(process), parallel.name_of(precision))
    raw_model.to(process.device)
    if compiles:
        for block in raw_model.transformer.h:
            block.compile()  # fast: one graph that serves all blocks; in place, so that the names of the weights stay
        torch._dynamo.config.optimize_ddp = False  # blocks are apart already: DDP need not cut them further
    model = parallel.wrap(raw_model, process)
    optimizer = make_optimizer(raw_model, learning_rate, weight_decay, (beta1, beta2))
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == torch.float16)
    best: evaluate.Best = state['best'] if is_resumed else {}
    if is_resumed:
        checkpoint.restore(optimizer, scaler, state)

    # where the results go
    run = Path(out_dir, 'overfit') if overfit_single_batch else Path(out_dir)
    if process.is_main and not eval_only:
        checkpoint.make_folder(run)
    if process.is_main and overwrite and not (is_resumed or eval_only or overfit_single_batch):
        checkpoint.delete_all(run)
    log = logger.Logger('' if eval_only else str(run), process.is_main, first_step, last_step,
                        wandb_project if wandb_log else '', wandb_run_name,
                        state['wandb_run_id'] if is_resumed else '', settings)
    with log:
        log.line(f'{parallel.describe(process)}; {parallel.name_of(precision)}, {why_precision}; '
                 f'{"compiled" if compiles else "not compiled"}, {why_compile}')
        log.line(f'number of parameters: {sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f}M')
        log.line(f'tokens per iteration will be: {n_windows * T:,} = {n_windows} windows of {T}, in micro-batches of '
                 f'{batch_size}, {n_parts} for each process')
        log.line(f'{last_step:,} iterations are {last_step * n_windows / order.epoch:.2f} epochs')
        for group, kind in zip(optimizer.param_groups, ('decayed', 'non-decayed'), strict=True):
            log.line(f'num {kind} parameter tensors: {len(group["params"])}, '
                     f'with {sum(p.numel() for p in group["params"]):,} parameters')
        log.line('using fused AdamW: True')
        if vocabulary is None:
            log.line(f'the tokenizer {meta["tokenizer"]["name"]} cannot be had here: no samples, and no bits per byte')
        if no_start and sample_interval:
            log.line(no_start)
        if is_resumed:
            log.line(checkpoint.describe(state, settings, prints))
        state = {}  # its memory is free again

        def read(step: int) -> Iterator[Part]:
            return parts_of(corpora['train'], order.starts(step * n_windows, n_windows), batch_size, config, process)

        def save(step: int, is_best: bool) -> None:
            log.flush()
            if process.is_main:
                log.line(f'saving checkpoint to {run}')
                checkpoint.save(run, raw_model, optimizer, keep, is_best, {
                    'config': settings | {name: getattr(config, name) for name in checkpoint.SHAPE},
                    'iter_num': step, 'best_val_loss': best['loss'][0], 'best': best,
                    'tokenizer': vocabulary.state() if vocabulary else None,
                    'scaler': scaler.state_dict(), 'wandb_run_id': log.wandb_run_id,
                    'data': prints,
                })

        def measure(step: int) -> None:
            """Evaluate on both splits, and save what has become of the model."""
            n = eval_iters * batch_size
            results = {split: evaluate.evaluate(model, config, corpus, n, batch_size, token_sizes, process, autocast,
                                                log.progress) for split, corpus in corpora.items()}
            train_loss, val = results['train']['loss'], results['val']
            refuse_infinite(val['loss'], step, run)
            is_best = evaluate.keep_best(best, val, step)
            log.line(logger.step_line(step, train_loss, val['loss']))
            log.line(evaluate.table(results, best))
            log.row(step, train_loss=train_loss, **{f'val_{name}': value for name, value in val.items()})
            if step > first_step and (is_best or always_save_checkpoint):
                save(step, is_best)
            log.plot()
            log.status('running', step, errors.DONE)

        def draw_sample(step: int) -> None:
            if process.is_main and vocabulary:
                prompt = torch.tensor([sample_ids], device=process.device)
                with torch.compiler.set_stance('force_eager'), autocast:
                    ids = raw_model.generate(prompt, sample_tokens, temperature=0.8, top_k=200, seed=seed,
                                             n_vocab=vocabulary.n_vocab)
                log.sample(step, vocabulary.decode(ids[0].tolist()))

        if eval_only:
            measure(first_step)
            return

        # one micro-batch tells how long a step will take; when it compiles, the second one does
        for _ in range(1 + compiles):
            started = time.perf_counter()
            accumulate_gradient(model, islice(read(0), 1), 1, 0, process, autocast, scaler, seed).item()
            seconds = n_parts * (time.perf_counter() - started)  # of a step
        optimizer.zero_grad()
        if seconds > SLOW:
            log.line(f'one iteration, {n_windows * T:,} tokens, takes about {seconds:.0f} s on this machine')

        first_loss = loss = math.nan
        clock, clock_step = time.perf_counter(), first_step
        for step in range(first_step, last_step + 1):
            # look: measure, save, sample
            is_last = step == last_step
            if (is_last or step % eval_interval == 0) and not overfit_single_batch:
                measure(step)
            if sample_interval and (is_last or step % sample_interval == 0):
                draw_sample(step)
            if is_last:
                break
            if step % eval_interval == 0 or (sample_interval and step % sample_interval == 0):
                clock, clock_step = time.perf_counter(), step  # looking was not learning

            # learn: one update
            lr = learning_rate
            if decay_lr:
                lr = lr_at(step, schedule, learning_rate, min_lr, warmup_iters, decay_steps, decay_fraction)
            for group in optimizer.param_groups:
                group['lr'] = lr
            parts = read(0 if overfit_single_batch else step)
            if seconds > SLOW:
                parts = log.progress(parts, n_parts, f'step {step}', 'micro-batches')
            step_loss = accumulate_gradient(model, parts, n_parts, step, process, autocast, scaler, seed)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            # report
            if step % log_interval == 0 or step in (first_step, last_step - 1):
                loss = parallel.total(step_loss).item()  # reading a number waits for the device
                first_loss = loss if step == first_step else first_loss
                refuse_infinite(loss, step, run)
                seconds = (time.perf_counter() - clock) / (step + 1 - clock_step)
                clock, clock_step = time.perf_counter(), step + 1
                speed = n_windows * T / seconds  # tokens per second
                mfu = raw_model.flops_per_token() * speed / (peak * process.world_size) if peak else None
                row = {'loss': loss, 'lr': lr, 'grad_norm': grad_norm.item(), 'tokens': (step + 1) * n_windows * T,
                       'tokens_per_second': speed, 'peak_memory_bytes': logger.peak_memory(process.device.type)}
                log.row(step, **row if mfu is None else row | {'mfu': mfu})
                log.line(logger.iter_line(step, loss, 1000 * seconds, mfu, lr, row['grad_norm'], speed))
                log.update(step + 1, loss=f'{loss:.3f}', speed=f'{speed:,.0f} tok/s')

        log.plot()
        if overfit_single_batch:
            n_steps = last_step - first_step
            verdict = f'the loss on one batch went from {first_loss:.4f} to {loss:.4f} in {n_steps} steps'
            if not loss < LEARNED_BY_HEART * first_loss:
                raise UserError(f'FAIL: {verdict}, not below {LEARNED_BY_HEART} of the first', errors.CHECK_FAILED)
            log.line(f'PASS: {verdict}')
        else:
            files = ', '.join(sorted(path.name for path in run.iterdir())) if process.is_main else ''
            memory = logger.short(logger.peak_memory(process.device.type))
            log.line(f'peak memory: {memory} bytes\n{run} holds {files}')
            log.line(f'try next: {errors.python()} sample.py --out_dir={run}')


def main(args: list[str]) -> None:
    settings, given = configurator.configure(sys.modules[__name__], args)
    check(settings)
    process = parallel.start(device, backend, deterministic)
    try:
        train(process, settings, given)
    finally:
        parallel.stop()


if __name__ == '__main__':
    errors.run(main)
