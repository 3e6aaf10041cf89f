"""The modern model as Hugging Face's nanochat: its class computes the same logits and text from the same weights, and
what it saves comes back unchanged."""
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from tests.comparing import differences, refused
from tests.test_export import assert_same_weights, build, random_model, run, write_run

transformers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors.torch')
SHAPE = GPTConfig(block_size=16, vocab_size=384, n_layer=3, n_head=2, n_embd=16, bias=False, tie_weights=False,
                  arch='modern')


def model_like(config: GPTConfig) -> GPT:
    """Return a random model, with logits that the cap bends, and with one token whose embedding is so small that the
    constant in the norm decides its length."""
    model = random_model(config)
    with torch.no_grad():
        model.lm_head.weight *= 3
        model.transformer.wte.weight[5] *= 1e-3
    return model


def write_modern(folder: Path, eot: bool = True, **shape: Any) -> tuple[Path, GPT]:
    """Write the run of a random model of bytes, whose table has spare rows."""
    model = model_like(replace(SHAPE, **shape))
    return write_run(folder, model, build('byte', eot)), model


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | changes), encoding='utf-8')


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """Return an export whose config.json may be changed."""
    folder = run(write_modern(tmp_path)[0])
    (folder / 'plaingpt.json').unlink()
    (folder / 'tokenizer.json').unlink()
    return folder


# ------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize('eot', [True, False])
@pytest.mark.parametrize('n_head', [1, 2, 8])
def test_transformers_computes_the_same_logits_and_the_same_greedy_text(n_head: int, eot: bool, tmp_path: Path) -> None:
    run_folder, model = write_modern(tmp_path, eot, n_head=n_head)
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(run(run_folder), output_loading_info=True)
    assert type(reference).__name__ == 'NanoChatForCausalLM' and not any(info.values())
    n_vocab = 256 + eot
    for T in (1, 7, 16):
        idx = torch.randint(n_vocab, (4, T))
        idx[0, 0] = 5
        with torch.no_grad():
            expected = model(idx)[0][:, :, :n_vocab]
            torch.testing.assert_close(reference(idx).logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 5, 'the cap bends these logits'
    end = 256 if eot else None
    settings = reference.config
    assert (settings.bos_token_id, settings.eos_token_id, settings.vocab_size) == (end, end, n_vocab)
    assert settings.pad_token_id is None, 'the loss ignores no token'
    continued = reference.generate(idx[:, :3], attention_mask=torch.ones_like(idx[:, :3]), do_sample=False)
    assert torch.equal(continued, model.generate(idx[:, :3], 13, temperature=0, stop=end, n_vocab=n_vocab))


@pytest.mark.parametrize('decides', ['generation_config.json', 'config.json'])
def test_generation_in_transformers_stops_at_no_ordinary_token(decides: str, tmp_path: Path) -> None:
    """By default, nanochat's generation would begin with token 0 and stop at token 1."""
    vocabulary = build('char', False, ('ab',))
    folder = run(write_run(tmp_path, model_like(replace(SHAPE, vocab_size=8)), vocabulary))
    if decides == 'config.json':
        (folder / 'generation_config.json').unlink()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert reference.config.bos_token_id is reference.config.eos_token_id is None
    assert reference.generation_config.eos_token_id is None
    for is_random in (False, True):
        text = reference.generate(torch.tensor([[1]]), do_sample=is_random, max_length=16)
        assert text.shape == (1, 16) and text[:, 1:15].eq(1).any()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(text[0]) == vocabulary.decode(text[0].tolist())
    assert tokenizer.bos_token is None and tokenizer.eos_token is None


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_weights_are_rounded_as_asked(dtype: str, tmp_path: Path) -> None:
    run_folder, model = write_modern(tmp_path)
    folder = run(run_folder, dtype=dtype)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert str(reference.dtype) == f'torch.{dtype}'
    after = open_model(str(folder))[0]
    for name, p in after.state_dict().items():
        assert torch.equal(p, model.state_dict()[name][:len(p)].to(getattr(torch, dtype)).float()), name
    idx = torch.randint(6, 257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(reference.float()(idx).logits, after(idx)[0], rtol=1e-5, atol=1e-5)


def test_the_card_says_which_class_loads_it_and_does_not_call_it_a_gpt_2(tmp_path: Path) -> None:
    run_folder, model = write_modern(tmp_path / 'my-run')
    text = (run(run_folder) / 'README.md').read_text(encoding='utf-8')
    n_parameters = sum(p[:257].numel() if name.endswith(('wte.weight', 'lm_head.weight')) else p.numel()
                       for name, p in model.named_parameters())
    for part in ('# my-run', f'{n_parameters:,} parameters', 'NanoChatForCausalLM', 'tags: [nanochat', '| steps | 7 |'):
        assert part in text, part
    assert 'GPT-2' not in text and 'gpt2' not in text


@pytest.mark.slow
def test_the_code_of_the_card_makes_text(tmp_path: Path) -> None:
    folder = run(write_modern(tmp_path)[0])
    code = (folder / 'README.md').read_text(encoding='utf-8').partition('```python\n')[2].partition('```')[0]
    result = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True, encoding='utf-8',
                            errors='replace', check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('The')


@pytest.mark.parametrize(('to', 'shortcuts', 'message'), [
    ('hf', True, '--shortcuts=False'), ('gguf', True, 'llama.cpp computes GPT-2'), ('gguf', False, '--to=hf'),
    ('llmc', True, 'llm.c computes GPT-2'), ('llmc', False, '--to=hf')])
def test_what_a_format_does_not_hold_is_refused_before_anything_is_written(
        to: str, shortcuts: bool, message: str, tmp_path: Path) -> None:
    folder, _ = write_modern(tmp_path, shortcuts=shortcuts)
    assert message in refused(run, folder, to=to, code=errors.COMMAND)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']


# ------------------------------------------------------------------------------------------------
# Import


@pytest.mark.parametrize('eot', [True, False])
@pytest.mark.parametrize('n_head', [1, 4])
def test_a_modern_model_comes_back_bit_for_bit(n_head: int, eot: bool, tmp_path: Path) -> None:
    run_folder, before = write_modern(tmp_path, eot, n_head=n_head)
    after, state = open_model(str(run(run_folder)))
    assert_same_weights(before, after, 256 + eot)
    learned = learned_tokenizer(state, after.config.vocab_size, corpus_of(state))
    assert learned.state() == build('byte', eot).state()
    assert (state['iter_num'], state['best']['loss'], state['config']['dataset']) == (7, [1.25, 6], 'novels')


@pytest.mark.parametrize('shortcuts', [True, False])
def test_a_modern_model_becomes_a_run_again(shortcuts: bool, tmp_path: Path) -> None:
    old, before = write_modern(tmp_path / 'old', shortcuts=shortcuts)
    for source in (old,) if shortcuts else (old, run(old)):
        new = tmp_path / f'new-{source.name}'
        run(new, init_from=source, to='ckpt')
        after, state = open_model(str(new))
        assert_same_weights(before, after, after.config.vocab_size)
        assert state['config']['arch'] == 'modern' and state['config']['shortcuts'] == shortcuts


def test_what_transformers_saves_is_read(hf_folder: Path, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(hf_folder).save_pretrained(tmp_path / 'again')
    again = json.loads((tmp_path / 'again/config.json').read_text(encoding='utf-8'))
    assert again['transformers_version'] and again['pad_token_id'] is None
    first, second = (open_model(str(folder))[0] for folder in (hf_folder, tmp_path / 'again'))
    assert first.config == second.config and not differences(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(('name', 'value'), [
    ('hidden_act', 'gelu'), ('rms_norm_eps', 1e-5), ('final_logit_softcapping', 30.0),
    ('final_logit_softcapping', None), ('attention_bias', True), ('tie_word_embeddings', True),
    ('num_key_value_heads', 1), ('head_dim', 4), ('intermediate_size', 32), ('rope_theta', 5000.0),
    ('rope_parameters', {'rope_type': 'default', 'rope_theta': 5000.0}),
    ('rope_parameters', {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 10000.0}),
    ('rope_scaling', {'rope_type': 'linear', 'factor': 2.0}), ('quantization_config', {'load_in_4bit': True})])
def test_a_setting_that_makes_another_model_of_it_is_refused(name: str, value: Any, hf_folder: Path) -> None:
    rewrite(hf_folder / 'config.json', **{name: value})
    message = refused(open_model, str(hf_folder), code=errors.CHECKPOINT)
    assert f'a different model from model_modern.py: it has {name}=' in message and str(hf_folder) in message


@pytest.mark.parametrize(('name', 'value', 'message'), [
    ('num_hidden_layers', 10**4, 'too few for n_layer=10000'), ('num_hidden_layers', None, 'num_hidden_layers is None'),
    ('hidden_size', 2**40, 'hidden_size is'), ('hidden_size', 10**6, 'more than any machine holds'),
    ('vocab_size', 300, 'by the settings'), ('num_attention_heads', 0, 'num_attention_heads is 0'),
    ('num_attention_heads', 3, 'n_head=3'), ('num_attention_heads', 16, 'must be even'),
    ('model_type', 'llama', 'llama')])
def test_a_config_that_promises_what_the_weights_do_not_hold_is_refused(
        name: str, value: Any, message: str, hf_folder: Path) -> None:
    rewrite(hf_folder / 'config.json', **{name: value})
    assert message in refused(open_model, str(hf_folder), code=errors.CHECKPOINT)


def test_nanochats_defaults_decide_if_a_config_is_silent(hf_folder: Path) -> None:
    path = hf_folder / 'config.json'
    settings = json.loads(path.read_text(encoding='utf-8'))
    for name in ('hidden_act', 'num_key_value_heads', 'head_dim', 'rope_parameters', 'final_logit_softcapping'):
        del settings[name]
    path.write_text(json.dumps(settings), encoding='utf-8')
    found, reference = open_model(str(hf_folder))[0], transformers.AutoModelForCausalLM.from_pretrained(hf_folder)
    idx = torch.randint(257, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(reference(idx).logits, found(idx)[0], rtol=1e-5, atol=1e-5)
    del settings['intermediate_size']
    path.write_text(json.dumps(settings), encoding='utf-8')
    assert 'intermediate_size=8192' in refused(open_model, str(hf_folder), code=errors.CHECKPOINT)


@pytest.mark.parametrize('part', ['q', 'k', 'v'])
def test_parts_of_attention_that_do_not_fit_together_are_refused(part: str, hf_folder: Path) -> None:
    path, name = hf_folder / 'model.safetensors', f'model.layers.1.self_attn.{part}_proj.weight'
    right = safetensors.load_file(path)
    for wrong in ({name: right[name][:8].clone()}, {name: right[name].to(torch.int8)}, {}):
        safetensors.save_file({other: p for other, p in right.items() if other != name} | wrong, path)
        message = refused(open_model, str(hf_folder), code=errors.CHECKPOINT)
        assert 'transformer.h.1.attn.c_attn.weight is missing' in message
    safetensors.save_file({other: p for other, p in right.items() if other != 'lm_head.weight'}, path)
    assert 'lm_head.weight is missing' in refused(open_model, str(hf_folder), code=errors.CHECKPOINT)


def test_an_exported_folder_is_sampled_from_and_evaluated(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    run_folder, _ = write_modern(tmp_path / 'run', vocab_size=257)
    folder, text = run(run_folder), tmp_path / 'text.txt'
    text.write_text('An old text, read anew. ' * 20, encoding='utf-8')
    losses = []
    for place in (run_folder, folder):
        evaluate.main([f'--init_from={place}', f'--dataset={text}', '--device=cpu', '--dtype=float32',
                       f'--json={tmp_path}/measured.json'])
        [measured] = json.loads((tmp_path / 'measured.json').read_text(encoding='utf-8'))['measured']
        losses.append(measured['text'])
    assert losses[0] == losses[1]
    sampled = [run_script('sample.py', f'--init_from={place}', '--start=An old', '--num_samples=2',
                          '--max_new_tokens=12', '--device=cpu') for place in (run_folder, folder)]
    assert [result.returncode for result in sampled] == [0, 0], sampled
    assert sampled[0].stdout == sampled[1].stdout and sampled[0].stdout.count('An old') == 2
