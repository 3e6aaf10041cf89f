"""Folders in Hugging Face's format that other programs made, or that are damaged. test_export.py checks what export.py
writes."""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import export
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.corpus import tokenizer
from plaingpt.formats import huggingface
from plaingpt.formats.exported import Exported
from plaingpt.init_from import open_model
from tests.comparing import differences, refused

safetensors = pytest.importorskip('safetensors.torch')
WEIGHT = 'transformer.h.1.mlp.c_fc.weight'


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    vocabulary = tokenizer.build('bpe:300', lambda: [__doc__ or ''], eot=True)
    model = GPT(GPTConfig(16, vocabulary.n_vocab, 2, 2, 8))
    folder = tmp_path / 'export'
    folder.mkdir()
    exported = Exported('export', model.config, model.state_dict(), vocabulary, 'float32', {})
    huggingface.write(folder, exported.complete())
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | changes), encoding='utf-8')


def test_only_gpt2s_own_keys_of_a_config_are_read_and_no_others_are_passed_on(hf_folder: Path, tmp_path: Path) -> None:
    """transformers would fetch a kernel, or run the code of a class, that these keys name: it is not even imported."""
    right = open_model(str(hf_folder))[0].state_dict()
    evil = {'_attn_implementation': 'kernels-community/flash-attn', 'auto_map': {'AutoModelForCausalLM': 'evil.Model'},
            'trust_remote_code': True, 'architectures': ['Evil'], 'torch_dtype': 'int8', '_name_or_path': 'evil/evil'}
    rewrite(hf_folder / 'config.json', **evil)
    rewrite(hf_folder / 'tokenizer_config.json', auto_map={'AutoTokenizer': ['evil.Tokenizer', None]})
    (hf_folder / 'evil.py').write_text(f'open({str(tmp_path / "witness")!r}, "w")', encoding='utf-8')
    assert not differences(open_model(str(hf_folder))[0].state_dict(), right)
    code = (f'import sys; sys.modules["transformers"] = None; import export; '
            f'export.main(["--init_from={hf_folder}", "--to_dir={tmp_path}/again"])')
    subprocess.run([sys.executable, '-c', code], cwd=Path(export.__file__).parent, check=True, stdout=subprocess.PIPE)
    assert not (tmp_path / 'witness').exists()
    again = '\n'.join(path.read_text(encoding='utf-8') for path in (tmp_path / 'again').glob('*.json'))
    assert 'vil' not in again and 'kernels' not in again and 'auto_map' not in again


@pytest.mark.parametrize(('name', 'value', 'message'), [
    ('quantization_config', {'load_in_4bit': True}, 'a different model from GPT-2: it has quantization_config'),
    ('n_layer', 10**4, 'too few for n_layer=10000'), ('n_layer', 10**8, 'more than any'),
    ('n_layer', 10**9, 'n_layer is 1000000000'),
    ('n_embd', 2**40, 'n_embd is'), ('n_embd', 10**6, 'more than any machine holds'),
    ('vocab_size', 10**8, 'by the settings'),
    ('n_positions', 2**27, 'by the settings'), ('n_head', 0, 'n_head is 0'), ('n_head', 3, 'n_head=3'),
    ('n_head', None, 'n_head is None'), ('n_embd', [8], 'of the type list'), ('n_embd', True, 'n_embd is True'),
    ('activation_function', [], 'activation_function'), ('tie_word_embeddings', 'no', "tie_word_embeddings is 'no'"),
    ('model_type', '\x1b[31mgpt2', r"'\x1b[31mgpt2'"), ('model_type', ['gpt2'], 'of the type list'),
])
def test_a_config_that_promises_what_the_weights_do_not_hold_is_refused_before_it_is_built(
        name: str, value: Any, message: str, hf_folder: Path) -> None:
    rewrite(hf_folder / 'config.json', **{name: value})
    said = refused(open_model, str(hf_folder), code=errors.CHECKPOINT)
    assert message in said and str(hf_folder) in said


@pytest.mark.parametrize('text', ['[' * 200_000, '[]', '3', '{"n_layer": ' + '1' * 5000 + '}', '{"model_type": "gpt2'])
def test_a_config_that_is_no_json_or_no_dict_is_refused(text: str, hf_folder: Path) -> None:
    (hf_folder / 'config.json').write_text(text, encoding='utf-8')
    assert 'config.json is damaged' in refused(open_model, str(hf_folder), code=errors.CHECKPOINT)


@pytest.mark.parametrize('name', ['../secret.safetensors', '/etc/passwd', 'a/b.safetensors', '..', '', r'..\secret', 3,
                                  'C:secret', None])
def test_an_index_does_not_lead_out_of_its_folder(name: Any, hf_folder: Path) -> None:
    (hf_folder / 'model.safetensors').rename(hf_folder.parent / 'secret.safetensors')
    index = {'weight_map': {WEIGHT: name}}
    (hf_folder / 'model.safetensors.index.json').write_text(json.dumps(index), encoding='utf-8')
    said = refused(open_model, str(hf_folder), code=errors.CHECKPOINT)
    assert f'model.safetensors.index.json is damaged: weight_map[{WEIGHT!r}] is' in said


def test_weights_that_are_no_numbers_or_of_another_type_are_refused(hf_folder: Path) -> None:
    path = hf_folder / 'model.safetensors'
    right = safetensors.load_file(path)
    for bad in (float('nan'), float('inf')):
        weights = {name: p.clone() for name, p in right.items()}
        weights[WEIGHT][1, 1] = bad
        safetensors.save_file(weights, path)
        assert f'{WEIGHT} has numbers that are infinite or NaN' in refused(
            open_model, str(hf_folder), code=errors.CHECKPOINT)
    safetensors.save_file(right | {WEIGHT: right[WEIGHT].to(torch.int8)}, path)
    assert 'torch.int8' in refused(open_model, str(hf_folder), code=errors.CHECKPOINT)
    path.unlink()
    for tree in (right | {WEIGHT: 3}, [1], {3: torch.ones(1)}):
        torch.save(tree, hf_folder / 'pytorch_model.bin')
        assert 'pytorch_model.bin is damaged' in refused(open_model, str(hf_folder), code=errors.CHECKPOINT)


def test_a_tokenizer_that_its_library_would_answer_with_a_panic_is_refused(
        hf_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A panic is no Exception, and writes pages to stderr before any handler sees it."""
    (hf_folder / 'plaingpt.json').unlink(missing_ok=True)
    says = json.loads((hf_folder / 'tokenizer.json').read_text(encoding='utf-8'))
    for name in ('continuing_subword_prefix', 'end_of_word_suffix'):
        rewrite(hf_folder / 'tokenizer.json', model=says['model'] | {name: '##########'})
        refused(open_model, str(hf_folder), code=errors.CHECKPOINT)
        state = {'name': 'bpe:300', 'json': (hf_folder / 'tokenizer.json').read_text(encoding='utf-8')}
        assert f'model.{name} is' in refused(tokenizer.from_state, state, code=errors.DATA)
    assert capfd.readouterr().err == ''
