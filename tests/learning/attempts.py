"""Attempts that learners might write, in other words than the plain file's, and the answer to each; '': it passes."""

ATTEMPTS: list[tuple[str, str, str]] = [
    ('merge', """
def merge(ids, pair, new):
    out = []
    for token in ids:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return out
""", ''),
    ('merge', """
def merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out
""", 'the last id is lost'),
    ('merge', """
def merge(ids, pair, new):
    i = 0
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) == pair:
            ids[i:i + 2] = [new]
        i += 1
    return ids
""", 'its arguments are changed'),
    ('merge', """
def merge(ids, pair, new):
    for i in range(len(ids)):
        if ids[i] == pair[0] and ids[i + 1] == pair[1]:
            return ids[:i] + [new] + merge(ids[i + 2:], pair, new)
    return ids
""", 'line 4: if ids[i] == pair[0] and ids[i + 1] == pair[1]:\nIndexError'),
    ('most_frequent_pair', """
def most_frequent_pair(words):
    counts = {}
    for word, n in words.items():
        for i in range(len(word) - 1):
            counts[word[i], word[i + 1]] = counts.get((word[i], word[i + 1]), 0) + n
    if not counts:
        return None
    most = max(counts.values())
    return sorted(pair for pair in counts if counts[pair] == most)[0]
""", ''),
    ('most_frequent_pair', """
def most_frequent_pair(words):
    counts = Counter(pair for word in words for pair in zip(word, word[1:]))
    return min(counts, key=lambda pair: (-counts[pair], pair), default=None)
""", 'a word counts once'),
    ('most_frequent_pair', """
def most_frequent_pair(words):
    counts = Counter()
    for word, n in words.items():
        i = 0
        while i + 1 < len(word):
            counts[word[i], word[i + 1]] += n
            i += 2 if word[i] == word[i + 1] else 1
    return min(counts, key=lambda pair: (-counts[pair], pair), default=None)
""", 'should be (1, 1), and here it is (0, 3)'),
    ('most_frequent_pair', """
def most_frequent_pair(words):
    counts = Counter()
    while words:
        word, n = words.popitem()
        for pair in pairwise(word):
            counts[pair] += n
    return min(counts, key=lambda pair: (-counts[pair], pair), default=None)
""", 'its arguments are changed'),
    ('most_frequent_pair', """
def most_frequent_pair(words):
    counts = Counter()
    for word, n in words.items():
        for pair in pairwise(word):
            counts[pair] += n
    min(counts, key=lambda pair: (-counts[pair], pair), default=None)
""", 'this returns nothing (does it have a `return`?)'),
    ('encode', """
def encode(text, merges):
    numbers = {pair: 256 + i for i, pair in enumerate(merges)}
    out = []
    for word in cut(text):
        while True:
            pairs = [pair for pair in zip(word, word[1:]) if pair in numbers]
            if not pairs:
                break
            first = min(pairs, key=numbers.get)
            word = merge(word, first, numbers[first])
        out.extend(word)
    return out
""", ''),
    ('encode', """
def encode(text, merges):
    return [merge(word, pair, 256 + i) for word in cut(text) for i, pair in enumerate(merges)]
""", 'here it is [['),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    p = torch.softmax(logits, -1)
    return -torch.log(p.gather(-1, targets.unsqueeze(-1))).mean()
""", 'the logarithm of a probability that rounds to 0'),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
""", ''),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    log_p = torch.log_softmax(logits, 1)
    return -log_p.gather(-1, targets[..., None]).mean()
""", 'softmax runs over the tokens'),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    log_p = torch.log_softmax(logits, -1)
    return -log_p[:, :, targets].mean()
""", 'should be 2.14851, and is 2.18579'),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    return -torch.log_softmax(logits, -1).gather(-1, targets[..., None]).mean().item()
""", 'this returns a number; it should be a tensor of shape ()'),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    return -torch.log_softmax(logits.detach(), -1).gather(-1, targets[..., None]).mean()
""", 'does a gradient flow through it? .item(), .detach() and numpy cut it off'),
    ('cross_entropy', """
def cross_entropy(logits, targets):
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    return -torch.log(p.gather(-1, targets[..., None])).mean()
""", 'subtract the largest first'),
    ('gradient_of_cross_entropy', """
def gradient_of_cross_entropy(logits, targets):
    z = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten())
    return torch.autograd.grad(loss, z)[0]
""", ''),
    ('gradient_of_cross_entropy', """
def gradient_of_cross_entropy(logits, targets):
    p = softmax(logits)
    for b in range(logits.size(0)):
        for t in range(logits.size(1)):
            p[b, t, targets[b, t]] -= 1
    return p
""", 'divide by the number of tokens'),
    ('softmax', """
def softmax(x):
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)
""", 'exp(1000) is infinite'),
    ('softmax', """
def softmax(x):
    top, _ = torch.max(x, -1, True)
    e = torch.exp(x - top)
    return e / torch.sum(e, -1, True)
""", ''),
    ('softmax', """
def softmax(x):
    x -= x.amax(-1, keepdim=True)
    e = x.exp()
    return e / e.sum(-1, keepdim=True)
""", 'its arguments are changed'),
    ('softmax', """
def softmax(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(0)
""", 'sums run over the first dimension'),
    ('softmax', """
def softmax(x):
    e = (x - x.amax(-1)).exp()
    return e / e.sum(-1)
""", 'RuntimeError: The size of tensor a'),
    ('softmax', """
def softmax(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    e / e.sum(-1, keepdim=True)
""", 'nothing (does it have a `return`?)'),
    ('gelu', """
def gelu(x):
    return torch.nn.functional.gelu(x, approximate='tanh')
""", ''),
    ('gelu', """
def gelu(x):
    return torch.nn.functional.gelu(x)
""", 'this is the exact GELU'),
    ('gelu', """
def gelu(x):
    assert x.dim() == 1
    return torch.nn.functional.gelu(x, approximate='tanh')
""", 'a GPT with it cannot learn: AssertionError'),
    ('gelu', """
torch.set_grad_enabled(False)
def gelu(x):
    return torch.nn.functional.gelu(x, approximate='tanh')
""", ''),
    ('LayerNorm.forward', """
class LayerNorm(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias)
""", ''),
    ('LayerNorm.forward', """
class LayerNorm(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        out = self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        return out + self.bias if self.bias is not None else out
""", 'divides by C - 1'),
    ('Attention.forward', """
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (z.reshape(B, self.n_head, T, C // self.n_head) for z in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))
""", 'view(B, H, T, D) mixes tokens with channels'),
    ('attend', """
def attend(q, k, v):
    w = torch.einsum('btd,bsd->bts', q, k) * q.shape[-1] ** -0.5
    T = q.shape[1]
    mask = torch.triu(torch.full((T, T), float('-inf')), diagonal=1)
    return torch.softmax(w + mask, -1) @ v
""", ''),
    ('attend', """
def attend(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
""", ''),
    ('attend', """
def attend(q, k, v):
    w = torch.einsum('btd,bsd->bts', q, k) * q.shape[-1] ** -0.5
    T = q.shape[1]
    mask = torch.triu(torch.full((T, T), float('-inf')), diagonal=2)
    return torch.softmax(w + mask, -1) @ v
""", 'shifted by one'),
    ('attend', """
def attend(q, k, v):
    w = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    w = torch.softmax(w, dim=-1) * torch.tril(torch.ones(q.size(1), q.size(1)))
    return w @ v
""", 'no longer has sum 1'),
    ('attend', """
def attend(q, k, v):
    w = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    hidden = torch.tril(torch.ones(q.size(1), q.size(1))) == 0
    return torch.softmax(w.masked_fill(hidden, -1e4), dim=1) @ v
""", 'softmax runs over the queries'),
    ('attend', """
def attend(q, k, v):
    B, T, D = q.shape
    out = torch.zeros_like(v)
    for t in range(T):
        s = (q[:, t:t + 1] * k[:, :t + 2]).sum(-1) / D
        out[:, t] = (torch.softmax(s, -1)[..., None] * v[:, :t + 2]).sum(1)
    return out
""", 'the mask is shifted by one\nand: divided by D, not by its root'),
    ('attend', """
def attend(q, k, v):
    w = (q @ k.transpose(-2, -1) / 3).softmax(-1)
    return w @ v
""", 'the model reads the answer'),
    ('attend', """
def attend(q, k, v):
    s = q @ k.transpose(1, 2) / math.sqrt(q.size(2))
    s = s + torch.triu(torch.ones(s.shape[1:]), 1) * float('-inf')
    return softmax(s) @ v
""", 'the one at [0, 0, 0] should be -0.70123, and is nan (inf - inf, 0 * inf and 0 / 0 are nan)'),
    ('attend', """
def attend(q, k, v):
    s = q @ k.transpose(1, 2) / math.sqrt(q.size(2))
    s = s.masked_fill(torch.ones(s.shape[1:]).triu(1) == 1, -math.inf)
    return torch.dropout(softmax(s), 0.1, True) @ v
""", 'this gives different answers: is it random?'),
    ('attend', """
def attend(q, k, v):
    s = q @ k.transpose(1, 2) / math.sqrt(q.size(2))
    T = q.size(1)
    s = s.masked_fill(torch.ones(T, T).triu(1) + torch.ones(T, T).tril(-16) == 1, -math.inf)
    return softmax(s) @ v
""", 'row 16 does not look at token 0'),
    ('attend', """
def attend(q, k, v):
    s = q @ k.transpose(1, 2) * q.size(2)
    return softmax(s.masked_fill(torch.ones(s.shape[1:]).triu(1) == 1, -math.inf)) @ v
""", 'attend(q, k, v) of 5 tokens: '),
    ('attend', """
def attend(q, k, v):
    import numpy as np
    s = q @ k.transpose(1, 2) + torch.from_numpy(np.triu(np.full((q.size(1), q.size(1)), 1.0), 1)) * -5
    return softmax(s) @ v
""", 'row 0 looks at token 1, which comes later'),
    ('lr_at', """
def lr_at(step, peak, floor, warmup, total):
    if step < warmup:
        return peak * step / warmup
    if step > total:
        return floor
    ratio = (step - warmup) / max(1, total - warmup)
    return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - floor)
""", 'count from 1'),
    ('lr_at', """
def lr_at(step, peak, floor, warmup, total):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    ratio = min(1, (step - warmup) / (total - warmup))
    return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - floor)
""", 'ZeroDivisionError: division by zero'),
    ('clip', """
def clip(gradients, limit):
    out = []
    for g in gradients:
        n = g.norm().item()
        out.append(g * limit / (n + 1e-6) if n > limit else g)
    return out, math.sqrt(sum((g ** 2).sum().item() for g in gradients))
""", 'each weight is clipped on its own'),
    ('clip', """
def clip(gradients, limit):
    length = math.sqrt(sum((g ** 2).sum().item() for g in gradients) + 1e-6)
    return [g * min(1.0, limit / length) for g in gradients], length
""", 'added to the square of the length'),
    ('clip', """
def clip(gradients, limit):
    length = math.sqrt(sum((g ** 2).sum().item() for g in gradients))
    return [g * min(1.0, limit / (length + 1e-6)) for g in gradients]
""", 'a tensor of shape (5,)); it should be (tuple of 2: (list of 2: a tensor of shape (3, 4)'),
    ('clip', """
def clip(gradients, limit):
    length = math.sqrt(sum((g ** 2).sum().item() for g in gradients))
    for g in gradients:
        g *= min(1.0, limit / length)
    return gradients, length
""", 'the 1e-6 is missing, with which PyTorch keeps a length of 0 from dividing\nand: its arguments are changed'),
    ('adamw', """
def adamw(p, g, m, v, step, lr, decay):
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    t = step + 1
    p.mul_(1 - lr * decay)
    p.addcdiv_(m / (1 - beta1 ** t), (v / (1 - beta2 ** t)).sqrt() + 1e-8, value=-lr)
""", ''),
    ('adamw', """
def adamw(p, g, m, v, step, lr, decay):
    g = g + decay * p
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    t = step + 1
    p.addcdiv_(m / (1 - beta1 ** t), (v / (1 - beta2 ** t)).sqrt() + 1e-8, value=-lr)
""", 'Adam with L2'),
    ('adamw', """
def adamw(p, g, m, v, step, lr, decay):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g ** 2
    t = step + 1
    p -= lr * decay * p
    p -= lr * (m / (1 - beta1 ** t)) / ((v / (1 - beta2 ** t)).sqrt() + 1e-8)
""", 'update them in place'),
    ('accumulate', """
def accumulate(model, x, y, batch_size):
    model.zero_grad()
    parts = list(zip(x.split(batch_size), y.split(batch_size)))
    for a, b in parts:
        (model(a, b)[1] / len(parts)).backward()
    return [p.grad for p in model.parameters()]
""", 'the last part is smaller, and counts as much'),
    ('accumulate', """
def accumulate(model, x, y, batch_size):
    model.zero_grad()
    for a, b in zip(x.split(batch_size), y.split(batch_size)):
        (model(a, b)[1] * len(a) / len(x)).backward()
    return [p.grad for p in model.parameters()]
""", ''),
    ('accumulate', """
def accumulate(model, x, y, batch_size):
    return list(torch.autograd.grad(model(x, y)[1], list(model.parameters())))
""", 'MemoryError: the model was given 7 windows, and only 3 fit into memory'),
    ('accumulate', """
def accumulate(model, x, y, batch_size):
    for a, b in zip(x.split(batch_size), y.split(batch_size)):
        (model(a, b)[1] * len(a) / len(x)).backward()
    return [p.grad.clone() for p in model.parameters()]
""", 'of 7 windows: '),
    ('reduce_scatter', """
def reduce_scatter(parts):
    n = len(parts)
    return [sum(part.flatten().tensor_split(n)[i] for part in parts) for i in range(n)]
""", ''),
    ('reduce_scatter', """
def reduce_scatter(parts):
    return [sum(parts) for part in parts]
""", 'reduce_scatter(parts) of 1 machines, (2, 6) each: this returns'),
    ('reduce_scatter', """
def reduce_scatter(parts):
    return list(sum(parts).view(len(parts), -1))
""", "RuntimeError: shape '[2, -1]' is invalid for input of size 5"),
    ('data_parallel', """
def data_parallel(model, x, y, n_machines):
    whole = torch.autograd.grad(model(x, y)[1], list(model.parameters()))
    return [list(whole) for _ in range(n_machines)]
""", 'MemoryError: the model was given 7 windows, and only 4 fit into memory'),
    ('data_parallel', """
def data_parallel(model, x, y, n_machines):
    found = []
    for a, b in zip(x.tensor_split(n_machines), y.tensor_split(n_machines)):
        found.append(torch.autograd.grad(model(a, b)[1], list(model.parameters())))
    mean = [sum(of_weight) / n_machines for of_weight in zip(*found)]
    return [mean for _ in range(n_machines)]
""", 'machines with fewer windows count as much'),
    ('zero1', """
def zero1(weights, gradients, moments, step, lr, decay):
    n = len(weights)
    for i in range(len(weights[0])):
        m, v = moments[i % n][i]
        adamw(weights[i % n][i], gradients[i % n][i], m, v, step, lr, decay)
        for machine in range(n):
            weights[machine][i] = weights[i % n][i]
""", 'how many tensors 2 machines hold should be 8, and here it is 4'),
    ('Cache.extend', """
class Cache:
    def __init__(self, room):
        self.room, self.length, self.k, self.v = room, 0, None, None

    def extend(self, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k], 2)[:, :, -self.room:]
        self.v = v if self.v is None else torch.cat([self.v, v], 2)[:, :, -self.room:]
        self.length += k.size(2)
        return self.k, self.v
""", ''),
    ('choose', """
def choose(logits, temperature, top_k, top_p, draws):
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        p[:, top_k:] = 0
        p = p / p.sum(-1, keepdim=True)
    if top_p is not None:
        p = p * (p.cumsum(-1) - p < top_p).logical_or(torch.arange(p.size(1)) == 0)
    sums = p.cumsum(-1)
    drawn = torch.tensor(draws)[:, None] / 2**63 * sums[:, -1:]
    return ids.gather(-1, (sums <= drawn).sum(-1, keepdim=True))[:, 0]
""", ''),
]
