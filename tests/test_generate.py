"""Text from the model: with the cache and without, greedy and drawn, alone and in a batch."""
import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import model_modern
from model import GPT, Cache, GPTConfig, choose
from plaingpt.chance import draw
from plaingpt.machines.replay import Replay
from tests.comparing import ROUNDING

Arch = Literal['gpt2', 'modern']
BLOCK, V = 16, 61


@torch.no_grad()
def random_gpt(dropout: float = 0.0, arch: Arch = 'gpt2') -> GPT:
    """Return a model with parameters large enough that each position and each earlier token matters to what follows.
    The head is not tied, since a random tied one tends to predict the last token again."""
    torch.manual_seed(1)
    shape = GPTConfig(BLOCK, V, n_layer=3, n_head=4, n_embd=32, dropout=dropout, tie_weights=False)
    model = GPT(shape) if arch == 'gpt2' else model_modern.GPT(replace(shape, arch=arch, bias=False, shortcuts=True))
    for name, p in model.named_parameters():
        p.normal_(1.0 if 'ln_' in name and name.endswith('weight') else 0.0, 0.3)
    return model.eval()


def prompt(B: int, T: int) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize('T', [1, 5, BLOCK - 1, BLOCK, BLOCK + 4])
@pytest.mark.parametrize('B', [1, 3])
@pytest.mark.parametrize('how', [{'temperature': 0.0}, {'temperature': 0.8, 'top_k': 20, 'top_p': 0.9, 'seed': 5}])
def test_cached_and_uncached_write_the_same_tokens_past_the_block(how: dict[str, Any], B: int, T: int) -> None:
    model = random_gpt()
    cached = model.generate(prompt(B, T), 2 * BLOCK, **how)
    assert cached.shape == (B, T + 2 * BLOCK)
    assert torch.equal(cached[:, :T], prompt(B, T))
    assert torch.equal(cached, model.generate(prompt(B, T), 2 * BLOCK, **how, use_cache=False))
    assert len(set(cached[:, T:].flatten().tolist())) > 3, 'one token repeated would prove little'


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('T', [1, 5, BLOCK - 1, BLOCK, BLOCK + 4])
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_a_cache_of_fixed_shape_gives_the_logits_of_one_that_grows(arch: Arch, T: int,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the work for a token is done anew each time; on a GPU it is recorded once. What a cache has not written yet
    is NaN."""
    model = random_gpt(arch=arch)
    monkeypatch.setattr(Tensor, 'new_empty', lambda x, *shape: x.new_full(shape, math.nan))

    scores, score_next = list[Tensor](), model.score_next

    def noting(idx: Tensor, caches: list[Cache] | None) -> Tensor:
        scores.append(score_next(idx, caches))
        return scores[-1]

    monkeypatch.setattr(model, 'score_next', noting)

    def written() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits of each next token and the token, of two texts, each with caches of its own."""
        for text in range(2):
            for token in model.stream((prompt(3, T) + text) % V, 2 * BLOCK, temperature=0.8, seed=5):
                yield scores[-1].clone(), token

    grown = list(written())
    model.replay = Replay(model)
    fixed = list(written())
    assert len(grown) == len(fixed) == 4 * BLOCK
    for (expected, token), (found, same) in zip(grown, fixed, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
        assert torch.equal(same, token)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_two_texts_that_take_turns_are_what_each_would_be_alone(arch: Arch) -> None:
    model = random_gpt(arch=arch)
    alone = [model.generate(prompt(1, T), 2 * BLOCK, temperature=0) for T in (3, 5)]
    model.replay = Replay(model)
    streams = [model.stream(prompt(1, T), 2 * BLOCK, temperature=0) for T in (3, 5)]
    with torch.inference_mode():  # as sample.py writes
        together = [torch.stack(tokens, dim=1) for tokens in zip(*zip(*streams, strict=True), strict=True)]
    for T, expected, found in zip((3, 5), alone, together, strict=True):
        assert torch.equal(found, expected[:, T:])


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_replayed_work_gives_in_bfloat16_the_logits_of_float32(arch: Arch, device: str) -> None:
    """A kernel that takes a mask may round differently, so both ways are as far from float32 as bfloat16 is."""
    exact = random_gpt(arch=arch).to(device)
    half, idx = random_gpt(arch=arch).to(device, torch.bfloat16), prompt(3, BLOCK).to(device)
    replay, caches = Replay(half), [Cache(BLOCK) for _ in half.transformer.h]
    with torch.no_grad():
        expected, plain = exact(idx)[0], half(idx)[0].float()  # (B, T, V)
        half(idx[:, :5], caches=caches)
        found = torch.stack([replay(idx[:, t:t + 1], caches).float().clone() for t in range(5, BLOCK)], dim=1)
    assert (found - expected[:, 5:]).norm() < 2 * (plain - expected)[:, 5:].norm() < expected[:, 5:].norm()


@pytest.mark.gpu
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_a_gpu_that_replays_its_work_writes_what_it_would_write_without(arch: Arch) -> None:
    model = random_gpt(arch=arch).cuda().double()
    replay = Replay(model)
    ways: list[dict[str, Any]] = [{'temperature': 0.0}, {'temperature': 0.8, 'top_k': 20, 'seed': 5}]
    for text in range(3):
        for how in ways:
            model.replay = None
            expected = model.generate(((prompt(3, 5) + text) % V).cuda(), 2 * BLOCK, **how)
            model.replay = replay
            with torch.inference_mode():  # as sample.py writes
                found = model.generate(((prompt(3, 5) + text) % V).cuda(), 2 * BLOCK, **how)
            assert torch.equal(found, expected)


def test_greedy_text_is_the_likeliest_next_token_each_time() -> None:
    model = random_gpt()
    text = prompt(3, 4)
    for _ in range(BLOCK + 5):
        logits, _ = model(text[:, -BLOCK:])
        text = torch.cat([text, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(prompt(3, 4), BLOCK + 5, temperature=0), text)
    assert torch.equal(model.generate(prompt(3, 4), BLOCK + 5, top_k=1, seed=1), text)
    assert torch.equal(model.generate(prompt(3, 4), BLOCK + 5, top_p=0.0, seed=1), text)


def test_a_row_of_a_batch_is_written_as_it_would_be_alone() -> None:
    model = random_gpt()
    together = model.generate(prompt(3, 4), 2 * BLOCK, temperature=0)
    for row in range(3):
        assert torch.equal(together[row:row + 1], model.generate(prompt(3, 4)[row:row + 1], 2 * BLOCK, temperature=0))


def test_the_cache_reads_each_token_once_until_the_window_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, forward = random_gpt(), [], GPT.forward

    def counting(self: GPT, idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(idx.size(1))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, 'forward', counting)
    model.generate(prompt(1, 12), 7)
    assert read == [12, 1, 1, 1, 1, BLOCK, BLOCK]  # the block's 16th token is the last that fits
    read.clear()
    model.generate(prompt(1, 12), 7, use_cache=False)
    assert read == [12, 13, 14, 15, 16, BLOCK, BLOCK]


def drawn(probabilities: Tensor, temperature: float = 1.0, top_k: int | None = None,
          top_p: float | None = None) -> Tensor:
    """Return how often each token is chosen, (V,), in 40,000 draws."""
    rows = probabilities.log().expand(40_000, -1)
    tokens = choose(rows, temperature, top_k, top_p, [draw(3, row) for row in range(len(rows))])
    return tokens.bincount(minlength=len(probabilities)) / len(rows)


@pytest.mark.parametrize(('how', 'expected'), [
    ({}, [0.1, 0.4, 0.05, 0.3, 0.15]),
    ({'temperature': 0.5}, [0.01, 0.16, 0.0025, 0.09, 0.0225]),  # squares
    ({'top_k': 1}, [0, 1, 0, 0, 0]),
    ({'top_k': 3}, [0, 0.4, 0, 0.3, 0.15]),
    ({'top_k': 99}, [0.1, 0.4, 0.05, 0.3, 0.15]),  # more than V
    ({'top_p': 0.0}, [0, 1, 0, 0, 0]),
    ({'top_p': 0.39}, [0, 1, 0, 0, 0]),
    ({'top_p': 0.41}, [0, 0.4, 0, 0.3, 0]),
    ({'top_p': 0.84}, [0, 0.4, 0, 0.3, 0.15]),
    ({'top_p': 0.86}, [0.1, 0.4, 0, 0.3, 0.15]),
    ({'top_p': 1.0}, [0.1, 0.4, 0.05, 0.3, 0.15]),
    ({'temperature': 0.5, 'top_p': 0.6}, [0, 0.16, 0, 0.09, 0]),  # of the probabilities after the temperature
    ({'top_k': 2, 'top_p': 0.5}, [0, 1, 0, 0, 0]),  # of 4/7 and 3/7
    ({'top_k': 2, 'top_p': 0.6}, [0, 0.4, 0, 0.3, 0]),
])
def test_tokens_are_drawn_by_their_probability_among_those_allowed(how: dict[str, Any], expected: list[float]) -> None:
    wanted = torch.tensor(expected) / sum(expected)
    found = drawn(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]), **how)
    assert not found[wanted == 0].any()
    five_sigma = 5 * (wanted * (1 - wanted) / 40_000).sqrt()
    assert ((found - wanted).abs() <= five_sigma).all(), f'{found} is not {wanted}'


def test_each_row_is_filtered_on_its_own() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [3.0, 0.0, 1.0, 2.9]]).log_softmax(-1)
    for top_k, top_p in [(2, None), (None, 0.85)]:
        rows = choose(logits.repeat(500, 1), 1.0, top_k, top_p, [draw(row) for row in range(1000)]).view(500, 2)
        assert set(rows[:, 0].tolist()) == {1, 2}
        assert set(rows[:, 1].tolist()) == {0, 3}


def test_temperature_0_takes_the_likeliest_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert choose(torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]]), 0.0, None, None, []).tolist() == [1, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_ids_are_never_drawn() -> None:
    model = random_gpt()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(0.1)
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50:] += 10.0  # the ids from 50 on are now the likeliest by far
    for how in ({'temperature': 0.0}, {'seed': 1}, {'seed': 1, 'top_k': 60}, {'seed': 1, 'top_p': 0.99}):
        assert model.generate(prompt(2, 3) % 50, 30, **how)[:, 3:].min() >= 50  # drawn, unless masked
        assert model.generate(prompt(2, 3) % 50, 30, **how, n_vocab=50).max() < 50


def test_a_row_that_has_stopped_repeats_the_stop_token_until_all_have_stopped() -> None:
    model = random_gpt()
    free = model.generate(prompt(3, 4), 40, seed=7)[:, 4:]  # (3, 40)
    # a token that all three rows choose, at different times, the last of them before the end
    said_by_all = [token for token in range(V) if (free[:, :30] == token).any(dim=1).all()]
    stop = next(token for token in said_by_all if len({row.tolist().index(token) for row in free}) == 3)
    ends = [row.tolist().index(stop) for row in free]

    text = model.generate(prompt(3, 4), 40, seed=7, stop=stop)[:, 4:]
    assert text.size(1) == max(ends) + 1 < 40
    for row, end, without_stop in zip(text, ends, free, strict=True):
        assert torch.equal(row[:end + 1], without_stop[:end + 1])
        assert (row[end:] == stop).all()


def test_each_row_stops_at_the_first_of_several_tokens_and_repeats_that() -> None:
    model = random_gpt()
    free = model.generate(prompt(3, 4), 40, seed=7)[:, 4:]
    stops = [int(free[0, 5]), int(free[1, 9])]
    text = model.generate(prompt(3, 4), 40, seed=7, stop=stops)[:, 4:]
    for row, without_stop in zip(text, free, strict=True):
        end = next((i for i, token in enumerate(without_stop.tolist()) if token in stops), 39)
        assert torch.equal(row[:end + 1], without_stop[:len(row)][:end + 1])
        assert (row[end:] == without_stop[end]).all()


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    model = random_gpt()
    free = model.generate(prompt(1, 4), 10, seed=7)
    unsaid = next(token for token in prompt(1, 4)[0].tolist() if token not in free[0, 4:].tolist())
    assert torch.equal(model.generate(prompt(1, 4), 10, seed=7, stop=unsaid), free)


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_generator_alone() -> None:
    model = random_gpt()
    before = torch.get_rng_state()
    texts = [model.generate(prompt(2, 4), 20, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])

    torch.manual_seed(4)
    unseeded = model.generate(prompt(2, 4), 20)
    assert not torch.equal(model.generate(prompt(2, 4), 20), unseeded)
    torch.manual_seed(4)
    assert torch.equal(model.generate(prompt(2, 4), 20), unseeded)


def test_a_sample_is_the_same_whatever_else_is_in_its_batch() -> None:
    model = random_gpt().double()
    together = model.generate(prompt(1, 4).expand(5, -1), 2 * BLOCK, 0.9, top_p=0.95, seed=1)
    assert len({tuple(row) for row in together.tolist()}) == 5
    for first, count in ((0, 1), (3, 2), (4, 1)):
        some = model.generate(prompt(1, 4).expand(count, -1), 2 * BLOCK, 0.9, top_p=0.95, seed=1, first=first)
        assert torch.equal(some, together[first:first + count])


@pytest.mark.parametrize(('part', 'token'), [
    (0, 0), (0.0999, 0), (0.1001, 1), (0.4999, 1), (0.5001, 3), (1 - 2**-40, 4)])
def test_a_number_draws_the_token_at_which_the_running_sum_passes_it(part: float, token: int) -> None:
    logits = torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2]], dtype=torch.float64).log()
    assert choose(logits, 1.0, None, None, [int(part * 2**63)]).item() == token


def test_the_lowest_temperatures_are_greedy() -> None:
    model = random_gpt()
    greedy = model.generate(prompt(2, 4), 20, temperature=0)
    assert torch.equal(model.generate(prompt(2, 4), 20, temperature=1e-38, seed=1), greedy)
    assert torch.equal(model.generate(prompt(2, 4), 20, temperature=1e-5, seed=1), greedy)


def test_two_streams_of_one_model_do_not_disturb_each_other_nor_its_training() -> None:
    model = random_gpt(dropout=0.5)
    first, second = model.generate(prompt(1, 4), 20, seed=1), model.generate(prompt(2, 6), 30, seed=2)
    model.train()
    a, b = model.stream(prompt(1, 4), 20, seed=1), model.stream(prompt(2, 6), 30, seed=2)
    tokens_a, tokens_b = [], []
    for _ in range(20):
        tokens_a.append(next(a))
        tokens_b.append(next(b))
        assert all(module.training for module in model.modules())
    assert next(a, None) is None
    tokens_b += list(b)  # one continues after the other's end
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.stack(tokens_a, dim=1), first[:, 4:])
    assert torch.equal(torch.stack(tokens_b, dim=1), second[:, 6:])


@pytest.mark.parametrize('training', [True, False])
def test_a_stream_that_is_left_early_or_fails_leaves_the_model_as_it_was(training: bool) -> None:
    model = random_gpt(dropout=0.5).train(training)
    stream = model.stream(prompt(1, 4), 20)
    assert isinstance(stream, Generator)
    next(stream)
    stream.close()
    assert all(module.training == training for module in model.modules())
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[V]]), 1)  # an id beyond the vocabulary
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()
    assert model(prompt(1, 4), prompt(1, 4))[1].requires_grad


def test_nothing_is_drawn_for_no_tokens() -> None:
    model, before = random_gpt(), torch.get_rng_state()
    assert torch.equal(model.generate(prompt(2, 4), 0), prompt(2, 4))
    assert torch.equal(torch.get_rng_state(), before)
