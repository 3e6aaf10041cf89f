"""The questions that parts are asked. Numbers are float64 here, drawn from the same seed for the plain file and for the
learner's lines."""
import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import model_trivialised
import tokenizer_trivialised
from model import GPTConfig
from plaingpt.learning.part import Results

ARGUMENTS = 'what is left of the arguments of '


def ask(what: str, function: Callable[..., Any], *arguments: Any) -> Results:
    """Return what a function answers, and what it has made of copies of its arguments: they belong to the caller. If it
    draws numbers at random, each call draws new ones."""
    copies = copy.deepcopy(arguments)
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        answer = function(*copies)
    return [(what, answer), (ARGUMENTS + what, [value for value in copies if not isinstance(value, torch.nn.Module)])]


def small_gpt(m: Any, block_size: int = 8) -> Any:
    """Return a GPT made of the module's parts, all of whose parameters are random: gains and biases, too."""
    made = m.GPT(GPTConfig(block_size, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=True))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.2 + 0.5 * torch.randn(p.shape))
    return made


def batch() -> tuple[Tensor, Tensor]:
    """Return inputs and targets of seven windows, (7, 8) each."""
    return torch.randint(11, (7, 8)), torch.randint(11, (7, 8))


def run_merge(m: Any) -> Results:
    cases: tuple[list[int], ...] = ([1, 2, 1, 2], [1, 1, 2, 2], [1, 1, 1, 2], [2, 1], [], [1])
    return [result for ids in cases for result in ask(f'merge({ids}, (1, 2), 9)', m.merge, ids, (1, 2), 9)] + ask(
        'merge([1, 1, 1, 3, 1, 1], (1, 1), 9)', m.merge, [1, 1, 1, 3, 1, 1], (1, 1), 9)


def run_most_frequent_pair(m: Any) -> Results:
    cases: tuple[dict[tuple[int, ...], int], ...] = (
        {(1, 2, 3): 3, (3, 4): 4, (2, 3): 2}, {(1, 2): 1, (3, 4): 2, (1, 2, 9): 1, (8, 1, 2): 1, (3, 4, 5): 5},
        {(5, 6): 2, (7, 8): 2, (1, 2): 2}, {(1, 1, 1, 1): 1, (0, 3): 2}, {(1, 1, 1, 1): 1, (0, 3): 1},
        {(2, 3): 1, (1, 9): 1},
        {(1, 2, 3, 4): 2, (5, 6): 3}, {(1,): 4})
    return [result for words in cases for result in ask(
        f'most_frequent_pair({words})', m.most_frequent_pair, Counter(words))]


def run_encode(m: Any) -> Results:
    merges = tokenizer_trivialised.train('low lower lowest newer newest wider' * 3, 256 + 12)
    return [result for text in ('the lowest newer widest', 'west', '') for result in ask(
        f'encode({text!r}, merges)', m.encode, text, merges)]


def run_generate(m: Any) -> Results:
    results: Results = []
    for size in (8, 5):
        write, idx = small_gpt(m, size).generate, torch.randint(11, (2, 3))
        twelve = functools.partial(write, max_new_tokens=12)
        results += ask(f'generate(idx, 12), in a block of {size} tokens', twelve, idx)
    return results


def run_cross_entropy(m: Any) -> Results:
    logits, targets = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    return [*ask('cross_entropy(logits, targets)', m.cross_entropy, logits, targets),
            *ask('cross_entropy(1000 * logits, targets)', m.cross_entropy, logits * 1000, targets),
            *ask('cross_entropy(logits - 1000, targets)', m.cross_entropy, logits - 1000, targets)]


def run_gradient(m: Any) -> Results:
    logits, targets = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    return ask('gradient_of_cross_entropy(logits, targets)', m.gradient_of_cross_entropy, logits, targets)


def run_softmax(m: Any) -> Results:
    x = torch.randn(2, 3, 5)
    return [*ask('softmax(x) of x (2, 3, 5)', m.softmax, x), *ask('softmax(1000 * x)', m.softmax, x * 1000),
            *ask('softmax(x + 1000)', m.softmax, x + 1000)]


def run_gelu(m: Any) -> Results:
    return ask('gelu(x) of x from -4 to 4', m.gelu, torch.linspace(-4, 4, 33))


def run_layer_norm(m: Any) -> Results:
    """Ask with and without bias; and tokens whose channels are nearly equal, to see where the 1e-5 stands."""
    results = []
    for bias in (True, False):
        layer = m.LayerNorm(6, bias)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(6))
        results += ask(f'LayerNorm(6, bias={bias})(x) of x (2, 3, 6)', layer, torch.randn(2, 3, 6) * 3 + 5)
        results += ask(f'LayerNorm(6, bias={bias})(x) of nearly equal channels', layer, 1 + torch.randn(2, 3, 6) / 1000)
    return results


def run_attention(m: Any) -> Results:
    layer = small_gpt(m).transformer.h[0].attn
    return ask('Attention(config)(x) of x (2, 5, 8), with 2 heads', layer, torch.randn(2, 5, 8))


def run_attend(m: Any) -> Results:
    q, k, v = torch.randn(3, 2, 5, 4)
    return [*ask('attend(q, k, v) of 5 tokens', m.attend, q, k, v),
            *ask('attend(q, k, v) of 40 tokens', m.attend, *torch.randn(3, 1, 40, 4)),
            *ask('attend(q, k, v) of one token', m.attend, q[:, :1], k[:, :1], v[:, :1])]


def is_causal(m: Any) -> str | None:
    """Say what a row of attention sees that it should not, or does not see that it should."""
    q, k, v = torch.randn(3, 1, 40, 4)
    q = q / 1000  # so that no share of attention is too small to be seen, however scores are scaled
    before = m.attend(q, k, v)
    for t in range(40):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, t], other_v[:, t] = torch.randn(2, 1, 4)
        changed = (m.attend(q, other_k, other_v) - before).abs().amax(dim=(0, 2)) > 1e-12
        if changed[:t].any():
            return f'row {int(changed.nonzero()[0])} looks at token {t}, which comes later: the model reads the answer'
        if not changed[t:].all():
            return f'row {t + int((~changed[t:]).nonzero()[0])} does not look at token {t}'
    return None


def run_block(m: Any) -> Results:
    return ask('Block(config)(x) of x (2, 5, 8)', small_gpt(m).transformer.h[0], torch.randn(2, 5, 8))


def run_init_weights(m: Any) -> Results:
    made = m.GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=3, n_head=2, n_embd=32, bias=True))
    return [result for name, p in made.named_parameters() for result in (
        (f'the standard deviation of {name}', p.std(correction=0)), (f'the mean of {name}', p.mean()))]


def run_lr_at(m: Any) -> Results:
    return [result for warmup, total in ((4, 12), (0, 5), (3, 3)) for step in range(15) for result in ask(
        f'lr_at({step}, 1.0, 0.1, {warmup}, {total})', m.lr_at, step, 1.0, 0.1, warmup, total)]


def run_clip(m: Any) -> Results:
    gradients = [torch.randn(3, 4), torch.randn(5)]
    return [result for limit in (0.5, 100.0) for result in ask(
        f'clip(gradients, {limit})', m.clip, gradients, limit)]


def run_adamw(m: Any) -> Results:
    """Ask for three steps, and for one with a tiny gradient, to see where the 1e-8 stands."""
    p, mean, square = torch.randn(3, 4), torch.zeros(3, 4), torch.zeros(3, 4)
    results: Results = []
    for step in range(3):
        g = torch.randn(3, 4)
        m.adamw(p, g, mean, square, step, 0.1, 0.5)
        results += [(f'{name} after step {step}', value.clone())
                    for name, value in (('p', p), ('m', mean), ('v', square), ('g', g))]
    small = torch.randn(4)
    m.adamw(small, torch.randn(4) * 1e-8, torch.zeros(4), torch.zeros(4), 0, 0.1, 0.0)
    return [*results, ('p after a step with a gradient of about 1e-8', small)]


def run_accumulate(m: Any) -> Results:
    made, (x, y) = small_gpt(model_trivialised), batch()
    results: Results = []
    for size, what in ((7, 'of 7 windows'), (3, 'of 7 windows'), (3, 'once more')):  # of the same model
        with made.register_forward_pre_hook(memory_for(size)):
            results.append((f'accumulate(model, x, y, batch_size={size}) {what}', m.accumulate(made, x, y, size)))
    return results


def memory_for(n_windows: int) -> Callable[..., None]:
    """Return what a model does first if no more windows fit into memory."""
    def refuse(model: object, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > n_windows:
            raise MemoryError(f'the model was given {len(arguments[0])} windows, and only {n_windows} fit into memory')
    return refuse


def run_reduce_scatter(m: Any) -> Results:
    cases = [(n, (2, 6)) for n in (1, 2, 3, 4)] + [(2, (5,)), (3, (7,)), (4, (3,))]
    return [result for n, shape in cases for result in ask(
        f'reduce_scatter(parts) of {n} machines, {shape} each', m.reduce_scatter, list(torch.randn(n, *shape)))]


def run_data_parallel(m: Any) -> Results:
    made, (x, y) = small_gpt(model_trivialised), batch()
    results: Results = []
    for n in (1, 2, 3):
        with made.register_forward_pre_hook(memory_for(-(-len(x) // n))):
            results.append((f'data_parallel(model, x, y, n_machines={n}) of 7 windows', m.data_parallel(made, x, y, n)))
    return results


def run_zero1(m: Any) -> Results:
    """Ask for a fourth step of one, two and three machines."""
    results: Results = []
    for n in (1, 2, 3):
        weights = [torch.randn(3, 2), torch.randn(4), torch.randn(2, 2), torch.randn(5)]
        gradients = [torch.randn(p.shape) for p in weights]
        moments = [{i: (torch.randn(p.shape), torch.rand(p.shape)) for i, p in enumerate(weights) if i % n == machine}
                   for machine in range(n)]
        copies = [[p.clone() for p in weights] for _ in range(n)]
        m.zero1(copies, [gradients] * n, moments, 3, 0.1, 0.5)
        results += [(f'the weights of machine {machine} of {n}', held) for machine, held in enumerate(copies)]
        results.append((f'how many tensors {n} machines hold', len({p.data_ptr() for held in copies for p in held})))
        results += [(f'the moments of machine {machine} of {n}', list(held.values()))
                    for machine, held in enumerate(moments)]
    return results


def run_cache(m: Any) -> Results:
    results: Results = []
    cache = m.Cache(6)
    for read, new in enumerate([3, 1, 1, 1, 1, 1]):
        k, v = cache.extend(torch.randn(2, 3, new, 5), torch.randn(2, 3, new, 5))
        order = k[0, 0, :, 0].argsort()  # attention does not ask in which order they come
        results += [(f'the keys after call {read} of extend, with room for 6', k[:, :, order]),
                    (f'the values after call {read} of extend', v[:, :, order])]
    return [*results, ('length after 8 tokens', cache.length)]


def run_choose(m: Any) -> Results:
    """Ask how often each token is drawn, since tokens may be sorted in any way before one is."""
    results: Results = []
    n = 2000
    draws = [i * 2**63 // n for i in range(n)]  # evenly, so that a token is drawn as often as it is likely
    for temperature, top_k, top_p in ((1.0, None, None), (0.5, 3, None), (1.0, None, 0.7), (2.0, 4, 0.7),
                                      (1.0, None, 0.0), (6.0, None, 0.9), (6.0, None, 0.5)):
        drawn = m.choose(torch.randn(1, 6).expand(n, 6), temperature, top_k, top_p, draws)
        results.append((f'how often each token is drawn with {temperature=}, {top_k=}, {top_p=}',
                        (torch.bincount(drawn, minlength=6) / n).round(decimals=2)))
    return [*results, ('choose with temperature=0', m.choose(torch.randn(3, 6), 0.0, None, None, [0, 0, 0]))]
