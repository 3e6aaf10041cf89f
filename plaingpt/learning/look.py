"""What happens inside a model while it reads a text. Hooks see what its own parts are given; none of it is computed by
other code than the model's, but for the table of attention, which its kernel never stores."""
import math
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

import model_modern
from model import GPT


class Seen(NamedTuple):
    """What was seen while a model read T tokens."""

    lens: Tensor  # (n_layer + 1, T, V): log-probabilities of the next token, as if there were only 0, 1, ... layers
    tables: Tensor  # (n_layer, H, T, T): row t holds the shares of token t's attention that went to tokens 0 to t


class Prediction(NamedTuple):
    """The prediction of a model for the place of a token, and what that token cost."""

    nats: float  # what that token cost
    rank: int  # of that token: 1 for the likeliest
    best: list[tuple[int, float]]  # the likeliest tokens, and their probabilities
    lens: list[tuple[int, float, float]]  # after 0, 1, ... layers: the likeliest, its probability, that of what came


def attention(q: Tensor, k: Tensor) -> Tensor:
    """q and k (H, T, D) -> how each token (row) shares out its attention among itself and those before it, (H, T, T)"""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    is_future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(is_future, -math.inf).softmax(dim=-1)


@torch.no_grad()
def look(model: GPT, idx: Tensor) -> Seen:
    """Let a model read idx (1, T), at most a block of tokens. The lens applies its final norm and its head to the
    residual stream as each layer finds it (nostalgebraist 2020, "interpreting GPT: the logit lens")."""
    assert not model.training, 'dropout would blur what is seen'
    streams, tables = list[Tensor](), list[Tensor]()

    def keep_stream(block: Any, given: tuple[Any, ...]) -> None:
        streams.append(given[0])

    def keep_table(part: Any, given: tuple[Any, ...]) -> None:
        *taken, _ = given  # the last one is the cache
        q, k, *_ = part.heads(*taken)  # each (1, H, T, D)
        tables.append(attention(q[0], k[0]))

    with ExitStack() as hooks:
        for block in model.transformer.h:
            hooks.enter_context(block.register_forward_pre_hook(keep_stream))
            hooks.enter_context(block.get_submodule('attn').register_forward_pre_hook(keep_table))
        last = model.transformer(idx)
    norm = model.transformer.ln_f if model.config.arch == 'gpt2' else model_modern.norm  # before the head
    logits = [model.score(x)[0] for x in (*map(norm, streams), last)]  # each (T, V)
    return Seen(torch.stack([z.log_softmax(dim=-1) for z in logits]), torch.stack(tables))


def predictions(lens: Tensor, ids: list[int], top: int, n_vocab: int) -> list[Prediction]:
    """Return what was expected where each token but the first came: it was predicted at the one before it. Ids from
    n_vocab on pad the vocabulary, and stand for no token."""
    found = list[Prediction]()
    for t, token in enumerate(ids[1:]):
        logs = lens[:, t, :n_vocab]  # (n_layer + 1, n_vocab)
        best, first, of_token = logs[-1].topk(min(top, n_vocab)), logs.max(dim=-1), logs[:, token]
        lens_of_token = zip(first.indices, first.values.exp(), of_token.exp(), strict=True)
        found.append(Prediction(
            nats=-of_token[-1].item(),
            rank=int((logs[-1] > of_token[-1]).sum()) + 1,
            best=list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)),
            lens=[(int(choice), p.item(), came.item()) for choice, p, came in lens_of_token],
        ))
    return found
