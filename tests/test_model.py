"""The model is GPT-2: transformers computes the same from the same weights. And no token sees what follows it."""
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import model as gpt
from model import GPT, Attention, GPTConfig
from plaingpt import errors
from plaingpt.formats import huggingface
from plaingpt.init_from import open_model
from tests.comparing import ROUNDING

ROOT = Path(__file__).parents[1]
SHAPES = {  # layers, heads, width and number of parameters of OpenAI's four models
    'gpt2': (12, 12, 768, 124_439_808),
    'gpt2-medium': (24, 16, 1024, 354_823_168),
    'gpt2-large': (36, 20, 1280, 774_030_080),
    'gpt2-xl': (48, 25, 1600, 1_557_611_200),
}
BLOCK, V = 24, 307
SMALL = {'n_layer': 2, 'n_head': 2, 'n_embd': 8}


@pytest.fixture
def their_gpt2(tmp_path: Path) -> Callable[..., Any]:
    """Return a function: their_gpt2(n_layer=...) is transformers' GPT-2 with every parameter at random, biases and
    gains too, so that none can be left out or mistaken for another; it is saved in tmp_path."""
    transformers = pytest.importorskip('transformers')

    @torch.no_grad()
    def make(scale: float = 0.2, **shape: Any) -> Any:
        torch.manual_seed(1)
        settings = {'vocab_size': V, 'n_positions': BLOCK, 'bos_token_id': 0, 'eos_token_id': 0, **SMALL, **shape}
        reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
        for name, p in reference.named_parameters():
            p.normal_(1.0 if 'ln_' in name and name.endswith('weight') else 0.0, scale)
        reference.save_pretrained(tmp_path)
        return reference

    return make


def random_tokens(B: int, T: int, vocab_size: int = V) -> Tensor:
    return torch.randint(1, vocab_size, (B, T), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def random_gpt(**settings: Any) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{'block_size': BLOCK, 'vocab_size': V, **SMALL, **settings}))
    for name, p in model.named_parameters():
        p.normal_(1.0 if 'ln_' in name and name.endswith('weight') else 0.0, 0.2)
    return model


@torch.no_grad()
def assert_equal_models(loaded: GPT, reference: Any, B: int, T: int) -> None:
    """Assert that two models have the same logits, the same loss, and the same likeliest continuation of the first half
    of a text of T tokens; in float64, which leaves no rounding to hide behind."""
    loaded, reference = loaded.double().eval(), reference.double()
    x = random_tokens(B, T, loaded.config.vocab_size)
    logits, _ = loaded(x)
    torch.testing.assert_close(logits, reference(x).logits, rtol=0, atol=ROUNDING)

    _, loss = loaded(x[:, :-1], x[:, 1:])  # transformers shifts by itself, and computes losses in float32
    torch.testing.assert_close(loss, reference(x, labels=x).loss.double(), rtol=1e-5, atol=0)

    prompt = x[:, :T // 2]
    continued = reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                   max_new_tokens=T // 2, eos_token_id=None, pad_token_id=0)
    assert torch.equal(loaded.generate(prompt, T // 2, temperature=0), continued)


@pytest.mark.parametrize('name', SHAPES)
def test_logits_loss_and_greedy_text_are_those_of_transformers(name: str, their_gpt2: Any, tmp_path: Path) -> None:
    n_layer, n_head, n_embd, _ = SHAPES[name]  # all layers and heads, and heads of 4 instead of 64 channels
    reference = their_gpt2(n_layer=n_layer, n_head=n_head, n_embd=n_embd // 16)
    loaded = GPT.from_pretrained(str(tmp_path))
    assert loaded.config == GPTConfig(BLOCK, V, n_layer, n_head, n_embd // 16)
    assert_equal_models(loaded, reference, 3, BLOCK)


@pytest.mark.parametrize('says', [None, True, False])
def test_a_head_that_is_not_the_table_is_kept_whatever_the_config_says(
        says: bool | None, their_gpt2: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = their_gpt2(n_layer=2, tie_word_embeddings=False)
    assert not torch.equal(reference.lm_head.weight, reference.transformer.wte.weight)
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    del config['tie_word_embeddings']
    more = {} if says is None else {'tie_word_embeddings': says}
    (tmp_path / 'config.json').write_text(json.dumps(config | more), encoding='utf-8')
    assert_equal_models(GPT.from_pretrained(str(tmp_path)), reference, 2, BLOCK)
    assert ('its head differs' in capsys.readouterr().err) == (says is not False)


def test_a_state_dict_of_transformers_is_recognised_by_its_transposed_matrices(their_gpt2: Any, tmp_path: Path) -> None:
    reference = their_gpt2(n_layer=2)
    answers = {'n_head': reference.config.n_head, 'gelu': 'tanh'}
    for part in (reference, reference.transformer):
        torch.save(part.float().state_dict(), tmp_path / 'pytorch_model.bin')
        loaded, _ = open_model(str(tmp_path / 'pytorch_model.bin'), answers=answers)
        assert_equal_models(loaded, reference.float(), 2, BLOCK)


@pytest.mark.slow
def test_the_smallest_gpt2_in_full_size_is_that_of_transformers(their_gpt2: Any, tmp_path: Path) -> None:
    reference = their_gpt2(0.02, vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768)
    loaded = GPT.from_pretrained(str(tmp_path))
    assert loaded.config == GPTConfig(vocab_size=50257)
    assert_equal_models(loaded, reference, 1, 64)


@pytest.mark.parametrize(('activation_function', 'gelu'), [('gelu_new', 'tanh'), ('gelu_pytorch_tanh', 'tanh'),
                                                           ('gelu', 'exact')])
def test_each_gelu_is_read_as_what_it_is(activation_function: str, gelu: str, their_gpt2: Any, tmp_path: Path) -> None:
    reference = their_gpt2(1.0, activation_function=activation_function).double()
    loaded = GPT.from_pretrained(str(tmp_path)).double()
    assert loaded.config.gelu == gelu
    x = random_tokens(2, BLOCK)
    # the two GELUs are about 1e-4 apart
    torch.testing.assert_close(loaded(x)[0], reference(x).logits, rtol=0, atol=ROUNDING)


def test_an_untied_head_stays_untied(their_gpt2: Any, tmp_path: Path) -> None:
    reference = their_gpt2(tie_word_embeddings=False)
    loaded = GPT.from_pretrained(str(tmp_path))
    assert not loaded.config.tie_weights
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert_equal_models(loaded, reference, 2, BLOCK)


def test_a_pretrained_model_is_ready_to_be_trained_with_the_dropout_asked_for(their_gpt2: Any, tmp_path: Path) -> None:
    their_gpt2()
    torch.manual_seed(1)
    loaded = GPT.from_pretrained(str(tmp_path), dropout=0.3)
    assert loaded.config.dropout == 0.3
    assert {module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight, 'a tied head is one parameter, not two'
    x = random_tokens(2, BLOCK)
    loaded(x[:, :-1], x[:, 1:])[1].backward()
    assert all(p.requires_grad and p.is_contiguous() and p.grad is not None for p in loaded.parameters())


def assert_refused(path: Path | str, *parts: str) -> None:
    """Assert that opening a path fails with one clear message, of at most three lines, that names the path."""
    with pytest.raises(errors.UserError) as caught:
        GPT.from_pretrained(str(path))
    assert caught.value.code == errors.CHECKPOINT
    assert len(str(caught.value).splitlines()) <= 3
    for part in (str(path), *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize('odd', [{'n_inner': 12}, {'scale_attn_by_inverse_layer_idx': True},
                                 {'scale_attn_weights': False}, {'add_cross_attention': True},
                                 {'activation_function': 'relu'}, {'layer_norm_epsilon': 1e-6}])
def test_a_gpt2_of_another_build_is_refused(odd: dict[str, Any], their_gpt2: Any, tmp_path: Path) -> None:
    their_gpt2(**odd)
    assert_refused(tmp_path, *(f'{name}={value!r}' for name, value in odd.items()))


@pytest.mark.parametrize(('changed', 'part'), [
    ({'quantization_config': {'bits': 8}}, 'quantization_config='), ({'n_head': 3}, 'n_head=3'),
    ({'n_layer': '2'}, '')])
def test_a_config_that_does_not_fit_is_refused(changed: dict[str, Any], part: str, their_gpt2: Any,
                                               tmp_path: Path) -> None:
    their_gpt2()
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    (tmp_path / 'config.json').write_text(json.dumps(config | changed), encoding='utf-8')
    assert_refused(tmp_path, part)


def test_another_model_than_gpt2_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    transformers.GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    assert_refused(tmp_path, 'gpt_neox')


def test_a_folder_without_all_the_weights_is_refused(their_gpt2: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip('safetensors.torch')
    their_gpt2()
    whole = tmp_path / 'model.safetensors'
    weights = safetensors.load_file(whole)

    def refuses(kind: str, change: Callable[[Path], object], *parts: str) -> None:
        copy = shutil.copytree(tmp_path, tmp_path.with_name(f'{tmp_path.name}-{kind}'))
        change(copy)
        assert_refused(copy, *parts)

    def rewrite(folder: Path, **changed: Tensor) -> None:
        left = {name: p for name, p in {**weights, **changed}.items() if p.numel()}
        safetensors.save_file(left, folder / 'model.safetensors', metadata={'format': 'pt'})

    c_fc, wte = 'transformer.h.1.mlp.c_fc.weight', 'transformer.wte.weight'
    refuses('missing', shutil.rmtree, 'no folder')
    refuses('unconfigured', lambda folder: (folder / 'config.json').unlink())
    refuses('unreadable', lambda folder: (folder / 'config.json').write_text('{', encoding='utf-8'), 'JSON')
    refuses('empty', lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors')
    refuses('cut', lambda folder: (folder / 'model.safetensors').write_bytes(whole.read_bytes()[:-9]))
    # transformers would draw these at random, with no more than a warning
    refuses('partial', lambda folder: rewrite(folder, **{c_fc: torch.empty(0)}), c_fc)
    refuses('misshapen', lambda folder: rewrite(folder, **{wte: torch.zeros(V, 9)}), f'{wte} is ({V}, 9)')


def test_a_name_that_is_neither_local_nor_on_the_hub_is_one_clear_message(tmp_path: Path) -> None:
    assert_refused(tmp_path / 'nowhere', 'no folder')
    assert_refused('no-such-owner/gpt2', 'no GPT-2 weights')  # conftest has turned the network off


@pytest.mark.parametrize('form', ['one file', 'without prefix', 'several files', 'float16', 'a head alone',
                                  'PyTorch', 'several of PyTorch'])
def test_each_form_in_which_folders_hold_the_weights_gives_the_same_model(form: str, their_gpt2: Any,
                                                                          tmp_path: Path) -> None:
    """OpenAI's own folder, 'gpt2', has no prefix, and holds the causal mask of each layer; older folders have PyTorch's
    files."""
    safetensors = pytest.importorskip('safetensors.torch')
    reference, path = their_gpt2(), tmp_path / 'model.safetensors'
    if form == 'float16':
        reference.half().float().save_pretrained(tmp_path)
    weights = safetensors.load_file(path)
    if form == 'without prefix':
        weights = {name.removeprefix('transformer.'): p for name, p in weights.items()}
        weights |= {f'h.{i}.attn.bias': torch.ones(1, 1, BLOCK, BLOCK).tril() for i in (0, 1)}
        weights |= {f'h.{i}.attn.masked_bias': torch.tensor(-1e4) for i in (0, 1)}
        safetensors.save_file(weights, path)
    elif form == 'float16':
        safetensors.save_file({name: p.half() for name, p in weights.items()}, path)
    elif form == 'a head alone':
        weights['lm_head.weight'] = weights.pop('transformer.wte.weight')
        safetensors.save_file(weights, path)
    elif form == 'several files':
        path.unlink()
        reference.save_pretrained(tmp_path, max_shard_size='10KB')
        assert not path.exists() and len(list(tmp_path.glob('model-*.safetensors'))) > 1
    elif form == 'PyTorch':
        path.unlink()
        torch.save(reference.state_dict(), tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
    elif form == 'several of PyTorch':
        path.unlink()
        files = {name: f'pytorch_model-{1 + i % 2}-of-2.bin' for i, name in enumerate(weights)}
        for file in set(files.values()):
            torch.save({name: p for name, p in weights.items() if files[name] == file}, tmp_path / file)
        index = json.dumps({'metadata': {}, 'weight_map': files})
        (tmp_path / 'pytorch_model.bin.index.json').write_text(index, encoding='utf-8')
    loaded = GPT.from_pretrained(str(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_equal_models(loaded, reference, 2, BLOCK)


def test_weights_are_read_in_a_process_that_cannot_import_transformers(their_gpt2: Any, tmp_path: Path) -> None:
    their_gpt2()
    code = ('import sys; sys.modules["transformers"] = None; import torch; from model import GPT; '
            'torch.save(GPT.from_pretrained(sys.argv[1]).state_dict(), sys.argv[2])')
    path = tmp_path / 'weights.pt'
    subprocess.run([sys.executable, '-c', code, str(tmp_path), str(path)], cwd=ROOT, check=True)
    alone, loaded = torch.load(path, weights_only=True), GPT.from_pretrained(str(tmp_path)).state_dict()
    assert alone.keys() == loaded.keys() and all(torch.equal(alone[name], loaded[name]) for name in loaded)


def test_weights_are_no_longer_tied_to_the_file_that_they_come_from(their_gpt2: Any, tmp_path: Path) -> None:
    their_gpt2()
    loaded, x = GPT.from_pretrained(str(tmp_path)), random_tokens(1, BLOCK)
    before = loaded(x)[0]
    path = tmp_path / 'model.safetensors'
    with open(path, 'r+b') as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded(x)[0], before)


def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    reference = pytest.importorskip('transformers').GPT2Config()
    assert {name: getattr(reference, name, None) for name in huggingface.DEFAULTS} == huggingface.DEFAULTS
    assert reference.attribute_map == huggingface.ALIASES
    config = tmp_path / 'config.json'
    config.write_text('{"model_type": "gpt2"}', encoding='utf-8')
    assert huggingface.read_config(str(tmp_path), 0.0) == (GPTConfig(vocab_size=50257), None)
    config.write_text('{"model_type": "gpt2", "num_hidden_layers": 3, "hidden_size": 24}', encoding='utf-8')
    assert huggingface.read_config(str(tmp_path), 0.0) == (GPTConfig(vocab_size=50257, n_layer=3, n_embd=24), None)


def test_a_file_of_weights_executes_nothing(their_gpt2: Any, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / 'executed',)

    their_gpt2()
    (tmp_path / 'model.safetensors').unlink()
    torch.save({'transformer.wte.weight': Harmful()}, tmp_path / 'pytorch_model.bin')
    assert_refused(tmp_path)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('name', SHAPES)
def test_the_four_sizes_have_gpt2s_number_of_parameters(name: str) -> None:
    n_layer, n_head, n_embd, expected = SHAPES[name]
    model = GPT.on_meta(GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_training_the_smallest_takes_854_7_million_operations_per_token() -> None:
    tied, untied = (GPT.on_meta(GPTConfig(tie_weights=tie_weights)) for tie_weights in (True, False))
    assert round(tied.flops_per_token() / 1e6, 1) == 854.7
    assert untied.flops_per_token() == tied.flops_per_token()  # an embedding is a choice of rows, not a product


@pytest.mark.parametrize('n_head', [3, 0, 20])
def test_a_width_that_heads_cannot_share_is_refused(n_head: int) -> None:
    with pytest.raises(errors.UserError, match=f'n_embd=10 .* n_head={n_head}'):
        GPTConfig(n_embd=10, n_head=n_head)


def test_a_token_changes_what_follows_it_and_nothing_before_it() -> None:
    model = random_gpt(n_layer=3)
    x = random_tokens(2, BLOCK)
    before, _ = model(x)
    for t in (0, 7, BLOCK - 1):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % V
        difference = (model(changed)[0] - before).abs().amax(dim=-1)  # (B, T)
        assert difference[0, :t].sum() == 0
        assert (difference[0, t:] > 1e-4).all()
        assert difference[1].sum() == 0, 'the other sequence of the batch has not changed'


def test_the_logits_of_a_beginning_are_those_in_the_whole() -> None:
    model = random_gpt(n_layer=3).double()
    x = random_tokens(2, BLOCK)
    whole, _ = model(x)
    for T in (1, 2, BLOCK - 1):
        torch.testing.assert_close(model(x[:, :T])[0], whole[:, :T], rtol=0, atol=ROUNDING)


def test_more_tokens_than_a_block_are_refused() -> None:
    with pytest.raises(AssertionError, match='25 tokens do not fit in a block of 24'):
        random_gpt()(random_tokens(1, BLOCK + 1))


def test_a_new_model_knows_nothing() -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(BLOCK, V, n_layer=4, n_head=4, n_embd=64))
    x = random_tokens(8, BLOCK + 1)
    assert abs(model(x[:, :-1], x[:, 1:])[1].item() - math.log(V)) < 0.05


def test_a_model_from_weights_is_the_same_model_and_draws_no_random_number() -> None:
    model = random_gpt(tie_weights=False)
    before = torch.get_rng_state()
    other = GPT.from_weights(model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert other.state_dict().keys() == model.state_dict().keys()
    x = random_tokens(2, BLOCK)
    assert torch.equal(other(x)[0], model(x)[0])


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('tie_weights', [True, False])
def test_the_first_weights_are_drawn_as_gpt2s(bias: bool, tie_weights: bool) -> None:
    torch.manual_seed(1)
    n_layer = 3
    model = GPT(GPTConfig(64, 512, n_layer=n_layer, n_head=4, n_embd=128, bias=bias, tie_weights=tie_weights))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert bias
            assert not p.any(), name
        elif '.ln_' in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / std - 1) < 0.03, name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    # every matrix but the two that add to the residual stream
    assert sum('c_proj.weight' in name for name, _ in model.named_parameters()) == 2 * n_layer
    assert sum(name.endswith('bias') for name, _ in model.named_parameters()) == (6 * n_layer + 1 if bias else 0)


@pytest.mark.parametrize('settings', [{}, {'bias': False}, {'tie_weights': False}, {'gelu': 'exact'}, {'dropout': 0.1}])
def test_every_parameter_gets_a_gradient(settings: dict[str, Any]) -> None:
    model = random_gpt(**settings)
    x = random_tokens(4, BLOCK + 1)
    model(x[:, :-1], x[:, 1:])[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.any() and p.grad.isfinite().all(), name


def test_dropout_acts_in_training_only() -> None:
    x = random_tokens(2, BLOCK)
    with_dropout, without = random_gpt(dropout=0.5), random_gpt()
    expected, _ = without(x)
    assert torch.equal(with_dropout.eval()(x)[0], expected)
    first, second = (with_dropout.train()(x)[0] for _ in range(2))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, expected)


@pytest.mark.parametrize('place', ['transformer.drop', 'transformer.h.0.attn.dropout', 'transformer.h.0.mlp.dropout'])
def test_the_embeddings_the_attention_and_the_mlp_each_drop_something(place: str) -> None:
    model, x = random_gpt(dropout=0.5, n_layer=1), random_tokens(2, BLOCK)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name != place:
            module.p = 0.0
    assert not torch.allclose(model(x)[0], random_gpt(n_layer=1)(x)[0])


@torch.no_grad()
def test_attention_drops_its_weights_and_channels_of_what_it_adds() -> None:
    C, H = 64, 8
    attention = Attention(GPTConfig(n_embd=C, n_head=H, dropout=0.5, bias=False))
    attention.c_attn.weight[2 * C:] = attention.c_proj.weight[:] = torch.eye(C)
    x = torch.randn(16, 1, C)
    kept = (attention(x) / x).view(16 * H, C // H)  # without dropout, a single token is returned unchanged
    # each of the two doubles what it keeps; the weights are dropped for a whole head, the rest channel by channel
    assert set(kept.flatten().tolist()) == {0.0, 4.0}
    heads_with_some = kept.any(dim=1)
    assert 0.3 < heads_with_some.float().mean() < 0.7
    assert 0.4 < (kept[heads_with_some] > 0).float().mean() < 0.6


def test_targets_of_minus_1_do_not_count() -> None:
    model = random_gpt().double()
    x = random_tokens(3, BLOCK + 1)
    x, y = x[:, :-1], x[:, 1:].clone()
    y[0, 5:] = -1
    y[2] = -1
    logits, loss = model(x, y)
    each = -logits.log_softmax(dim=-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]  # (B, T), nats
    torch.testing.assert_close(loss, each[y != -1].mean(), rtol=0, atol=ROUNDING)
    assert not torch.isclose(loss, each.mean())

    parameters = list(model.parameters())
    expected = torch.autograd.grad(each[y != -1].mean(), parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected, rtol=0, atol=ROUNDING)


def test_a_batch_without_any_target_has_loss_0_and_no_gradient() -> None:
    model, x = random_gpt(), random_tokens(2, BLOCK)
    _, loss = model(x, torch.full_like(x, -1))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize('with_targets', [True, False])
def test_logits_are_returned_as_asked_for(with_targets: bool) -> None:
    model, x = random_gpt().double(), random_tokens(2, BLOCK)
    targets = x.roll(-1, dims=1) if with_targets else None
    everything, loss = model(x, targets)
    assert everything.shape == (2, BLOCK, V)
    assert (loss is None) == (targets is None)
    last, loss_of_last = model(x, targets, logits='last')
    torch.testing.assert_close(last, everything[:, -1:], rtol=0, atol=ROUNDING)
    none, loss_of_none = model(x, targets, logits='none')
    assert none is None
    assert loss == loss_of_last == loss_of_none


def test_a_loss_in_half_precision_is_summed_in_float32() -> None:
    model, x = random_gpt().bfloat16(), random_tokens(4, BLOCK + 1)
    logits, loss = model(x[:, :-1], x[:, 1:])
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)  # of 96 terms; bfloat16 would leave 1e-3


def in_chunks(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Have the loss of a model in training computed for as many tokens at a time."""
    patch.setattr(gpt, 'MOST_LOGITS', 0)
    patch.setattr(gpt, 'CHUNK', rows * V)


@pytest.mark.parametrize('tie_weights', [True, False])
@pytest.mark.parametrize('rows', [1, 7, 1000])
@pytest.mark.parametrize('missing', ['none', 'some', 'all'])
def test_a_loss_in_chunks_is_the_same_and_so_is_each_gradient(
        tie_weights: bool, rows: int, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are chunks that divide the tokens and others, a gradient that comes from above, and two micro-batches added
    up."""
    model = random_gpt(tie_weights=tie_weights).double()
    x = random_tokens(3, BLOCK + 1)
    x, y = x[:, :-1], x[:, 1:].clone()
    y[0, 5:] = y[2] = -1 if missing != 'none' else y[0, 0]
    y[:] = -1 if missing == 'all' else y

    def learn() -> list[Tensor | None]:
        model.zero_grad()
        losses = [model(ids, targets, logits='none')[1] for ids, targets in ((x, y), (x[1:], y[1:]))]
        sum(0.7 * loss**2 for loss in losses).backward()
        return [*(loss.detach() for loss in losses), *(p.grad for p in model.parameters())]

    expected = learn()
    in_chunks(monkeypatch, rows)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, 'cross_entropy', None)  # not called
        found = learn()
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    if missing == 'all':
        assert all(not tensor.any() for tensor in found if tensor is not None)


@pytest.mark.parametrize('bias', [True, False])
def test_a_loss_in_chunks_is_for_training_alone(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation computes no gradient, nor does a caller that asks for logits."""
    model, x = random_gpt(bias=bias), random_tokens(2, BLOCK)
    in_chunks(monkeypatch, 7)
    monkeypatch.setattr(gpt.ChunkedNats, 'forward', None)
    with torch.no_grad():
        model(x, x, logits='none')
    model(x, x, logits='all')
    with pytest.raises(TypeError):
        model(x, x, logits='none')


@pytest.mark.parametrize(('precision', 'rounding'), [(torch.float64, 1e-12), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize('cap', [None, 15.0])
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=[
    pytest.mark.slow, pytest.mark.skipif(not shutil.which('c++'), reason='torch.compile needs a C++ compiler')])])
def test_a_compiled_loss_is_the_same_and_so_is_each_gradient(
        backend: str, cap: float | None, precision: torch.dtype, rounding: float,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for both models, tied or not, with targets that do not count; and in bfloat16 under autocast."""
    model, x = random_gpt(tie_weights=cap is None), random_tokens(3, BLOCK + 1)
    model = model.double() if precision == torch.float64 else model
    with torch.no_grad():
        model.lm_head.weight *= 20
    model.cap = cap
    x, y = x[:, :-1], x[:, 1:].clone()
    y[0, 5:] = -1
    assert (model.lm_head(model.transformer(x)).abs() > 15).any(), 'the cap has an effect'

    def learn() -> list[Tensor | None]:
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == torch.bfloat16):
            _, loss = model(x, y, logits='none')
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    expected = learn()
    torch.compiler.reset()
    model.compiled_nats = torch.compile(gpt.sum_of_nats, backend=backend, fullgraph=True)
    monkeypatch.setattr(model, 'score', None)  # not called
    for one, other in zip(learn(), expected, strict=True):
        assert one is not None and other is not None
        assert distance(one, other) < rounding


@pytest.mark.parametrize(('device', 'most', 'is_compiled', 'way'), [
    ('cuda', 2**26, True, 'compiled'), ('cuda', 0, True, 'compiled'), ('cuda', 0, False, 'in chunks'),
    ('cpu', 2**26, True, 'compiled'), ('cpu', 0, True, 'in chunks')])
def test_a_loss_is_compiled_on_a_gpu_at_every_size_and_on_a_cpu_if_it_is_small(
        device: str, most: int, is_compiled: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers take the place of a GPU's, and the layers before the loss are left out."""
    ways: list[str] = []

    def by(name: str) -> Callable[..., Tensor]:
        def nats(z: Tensor, *_: object) -> Tensor:
            ways.append(name)
            assert z.device.type == device
            return z.sum()

        return nats

    monkeypatch.setattr(gpt, 'MOST_LOGITS', most)
    monkeypatch.setattr(gpt, 'chunked_nats', by('in chunks'))
    model = GPT(GPTConfig(BLOCK, V, 1, 2, 8))
    monkeypatch.setattr(model.transformer, 'forward', lambda idx, _: torch.zeros(2, BLOCK, 8, device=idx.device))
    monkeypatch.setattr(model.lm_head, 'forward', lambda x: x)
    model.compiled_nats = by('compiled') if is_compiled else None
    with FakeTensorMode():
        x = torch.zeros(2, BLOCK, dtype=torch.int64, device=device)
        assert model(x, x, logits='none')[0] is None
    assert ways == [way]


def test_a_compiled_loss_is_for_training_alone() -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError

    model, x = random_gpt(), random_tokens(2, BLOCK)
    model.compiled_nats = fail
    with torch.no_grad():
        model(x, x, logits='none')
    model(x, x, logits='all')
    with pytest.raises(AssertionError):
        model(x, x, logits='none')


@pytest.mark.parametrize(('dtype', 'scale'), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
def test_a_loss_in_chunks_is_as_exact_as_a_whole_one_in_half_precision(
        dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are many tokens and a vocabulary so wide that the gradient of one logit is too small for float16 without
    the scale of the loss, which is applied after the chunks."""
    torch.manual_seed(0)
    head, states = torch.randn(20_000, 32) * 0.05, torch.randn(1024, 32)
    targets = torch.randint(20_000, (1024,))

    def gradients(scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, weight = states.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            nats = gpt.chunked_nats(x, weight, targets, None)
        assert nats.dtype == torch.float32
        (nats / len(targets) * scale).backward()
        assert x.grad is not None and weight.grad is not None
        return nats, x.grad / scale, weight.grad / scale

    exact = gradients(1.0, torch.float32)
    x, weight = states.double().requires_grad_(), head.double().requires_grad_()
    whole = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction='sum')
    (whole / len(targets)).backward()
    for one, other in zip(exact, (whole, x.grad, weight.grad), strict=True):
        assert distance(one, other) < 1e-5
    for one, other in zip(gradients(scale, dtype), exact, strict=True):
        assert distance(one, other) < 4 * torch.finfo(dtype).eps


def distance(one: Tensor, other: Tensor | None) -> float:
    """Return how far apart two tensors are, relative to their size."""
    assert other is not None
    return float((one.detach().double() - other.detach().double()).norm() / other.detach().double().norm())


@pytest.mark.parametrize('tie_weights', [True, False])
def test_a_model_cropped_to_a_shorter_block_computes_the_same(tie_weights: bool) -> None:
    model, x = random_gpt(tie_weights=tie_weights), random_tokens(2, 10)
    cropped = model.crop_block_size(10)
    assert cropped.config == GPTConfig(**{**vars(model.config), 'block_size': 10})
    assert cropped.transformer.wpe.weight.shape == (10, SMALL['n_embd'])
    assert (cropped.lm_head.weight is cropped.transformer.wte.weight) == tie_weights
    assert torch.equal(cropped(x)[0], model(x)[0])
    assert model.transformer.wpe.weight.shape == (BLOCK, SMALL['n_embd']), 'the first model is unchanged'
    assert cropped.generate(x, 5, temperature=0).shape == (2, 15)
    with pytest.raises(AssertionError):
        cropped(random_tokens(2, 11))
    with pytest.raises(errors.UserError, match=r'block_size=25 .* 24'):
        model.crop_block_size(BLOCK + 1)


def test_a_model_made_from_weights_draws_nothing_and_refuses_what_does_not_fit() -> None:
    model, before = random_gpt(), torch.get_rng_state()
    x = random_tokens(2, BLOCK)
    copy = GPT.from_weights(model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(copy(x)[0], model(x)[0])
    assert [name for name, _ in copy.named_parameters()] == [name for name, _ in model.named_parameters()]

    wider = GPTConfig(**{**vars(model.config), 'n_embd': 16})
    with pytest.raises(errors.UserError, match='size mismatch') as caught:
        GPT.from_weights(wider, model.state_dict())
    assert caught.value.code == errors.CHECKPOINT
    incomplete = {name: p for name, p in model.state_dict().items() if 'ln_f' not in name}
    with pytest.raises(errors.UserError, match='ln_f'):
        GPT.from_weights(model.config, incomplete)
