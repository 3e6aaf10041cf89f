"""Exports: the programs that load a model for other users find the same weights, logits, tokens and text in them."""
import inspect
import json
import os
import resource
import shlex
import signal
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiktoken
import torch
from torch import Tensor

import export
from model import GPT, GPTConfig
from plaingpt import errors, lock
from plaingpt.corpus import tokenizer
from plaingpt.errors import UserError
from plaingpt.formats import huggingface, llmc
from plaingpt.formats.exported import Exported
from plaingpt.formats.weights import gpt_class
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from plaingpt.run import checkpoint
from tests.comparing import ROUNDING, damaged, differences, refused

SHAPE = GPTConfig(block_size=16, vocab_size=0, n_layer=2, n_head=2, n_embd=8, bias=False)
ODD = 'naïve café\n\tdef f(x): return "日本語 🙂"\r\n\x00 <|endoftext|> end  of   text\n\n'
EDGES = ['', ' ', '   ', '\n', ' \n \n', '\t', "it's WE'LL", '12345 6', '<|endoftext|>', 'a<|endoftext|>',
         'of one\nof two', ODD]
CL100K = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
          r"""\s*[\r\n]|\s+(?!\S)|\s""")


def random_model(config: GPTConfig) -> GPT:
    """Return a model with weights so large, and biases so far from zero, that every one of them matters."""
    model = gpt_class(config)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return model.eval()


def write_run(folder: Path, model: GPT, vocabulary: tokenizer.Tokenizer | None, **more: Any) -> Path:
    """Write a checkpoint such as train.py leaves."""
    config = {name: getattr(model.config, name) for name in checkpoint.SHAPE}
    state = {'model': model.state_dict(), 'model_args': checkpoint.model_args(model.config), 'iter_num': 7,
             'config': config | {'dataset': '/home/alice/data/novels', 'batch_size': 2, 'block_size': 16,
                                 'gradient_accumulation_steps': 3, 'total_batch_size': 0},
             'best': {'loss': [1.25, 6], 'bits_per_byte': [0.75, 6]},
             'tokenizer': vocabulary.state() if vocabulary else None, **more}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / 'ckpt.pt')
    return folder


def run(folder: Path, **settings: Any) -> Path:
    """Run python export.py in this process; return the folder that it fills."""
    settings = {'to': 'hf'} | settings
    export.main([f'--out_dir={folder}', *(f'--{name}={value}' for name, value in settings.items())])
    return Path(settings.get('to_dir') or folder / settings['to'])


def build(spec: str, eot: bool = True, texts: tuple[str, ...] = (ODD,)) -> tokenizer.Tokenizer:
    return tokenizer.build(spec, lambda: texts, eot)


VOCABULARIES = [('char', False), ('char', True), ('byte', False), ('byte', True), ('bpe:300', True), ('gpt2', True)]


# ------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize(('bias', 'gelu', 'tied'), [(False, 'tanh', True), (True, 'exact', True), (True, 'tanh', False),
                                                    (False, 'exact', False)])
def test_transformers_computes_the_same_logits(bias: bool, gelu: Any, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    vocabulary = build('byte')
    config = replace(SHAPE, vocab_size=384, bias=bias, gelu=gelu, tie_weights=tied)  # 127 of them padding
    model = random_model(config)
    folder = run(write_run(tmp_path, model, vocabulary))
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    idx = torch.randint(257, (3, 16))
    with torch.no_grad():
        expected = model.double()(idx)[0][:, :, :257]
        torch.testing.assert_close(reference.double()(idx).logits, expected, rtol=0, atol=ROUNDING)
    settings = reference.config
    assert settings.n_ctx == settings.n_positions == 16
    assert (settings.bos_token_id, settings.eos_token_id, settings.vocab_size) == (256, 256, 257)
    assert (reference.lm_head.weight is reference.transformer.wte.weight) == tied
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, 'a user who may read one file may read all'


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(('spec', 'eot'), VOCABULARIES)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_model_and_its_tokenizer_come_back_from_hugging_face_bit_for_bit(
        spec: str, eot: bool, bias: bool, tmp_path: Path) -> None:
    pytest.importorskip('transformers')
    vocabulary = build(spec, eot)
    before = random_model(replace(SHAPE, vocab_size=-(-vocabulary.n_vocab // 128) * 128, bias=bias))
    folder = run(write_run(tmp_path, before, vocabulary))
    after, state = open_model(str(folder))
    assert_same_weights(before, after, vocabulary.n_vocab)
    learned = learned_tokenizer(state, after.config.vocab_size, corpus_of(state))
    assert learned.state() == vocabulary.state()
    assert (state['iter_num'], state['best']['loss'], state['config']['dataset']) == (7, [1.25, 6], 'novels')


def assert_same_weights(before: GPT, after: GPT, n_vocab: int) -> None:
    """Assert that weights are equal bit for bit, except for the padding of the vocabulary; that new biases are zero;
    and that the logits are the same."""
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() <= new.keys()
    for name, tensor in new.items():
        if name in old:
            rows = n_vocab if name.endswith(('wte.weight', 'lm_head.weight')) else None
            assert torch.equal(tensor, old[name][:rows]), name
        else:
            assert name.endswith('.bias') and not tensor.any(), name
    assert replace(after.config, bias=before.config.bias, vocab_size=before.config.vocab_size) == before.config
    idx = torch.randint(n_vocab, (2, 16))
    with torch.no_grad():
        expected = before.double()(idx)[0][:, :, :n_vocab]
        torch.testing.assert_close(after.double().eval()(idx)[0], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(('to', 'name'), [('llmc', 'model.bin'), ('llmc', 'plaingpt.json'), ('hf', 'model.safetensors'),
                                          ('hf', 'config.json'), ('hf', 'plaingpt.json')])
def test_none_of_200_random_damages_to_an_export_gives_another_model(to: str, name: str, tmp_path: Path) -> None:
    vocabulary = build('bpe:300')
    folder = run(write_run(tmp_path, random_model(replace(SHAPE, vocab_size=vocabulary.n_vocab)), vocabulary), to=to)
    where = str(folder / 'model.bin' if to == 'llmc' else folder)
    before, known = open_model(where)
    data, refusals = (folder / name).read_bytes(), list[UserError]()
    for number in range(200):
        (folder / name).write_bytes(damaged(data, number))
        try:
            after, state = open_model(where)
            assert not differences(after.state_dict(), before.state_dict()) and after.config == before.config
            assert state['tokenizer'] == known['tokenizer'], number
        except UserError as error:
            refusals.append(error)
    for refusal in refusals:
        assert refusal.code == errors.CHECKPOINT and str(refusal).count('\n') < 3
    assert len(refusals) > 150


def test_an_export_of_version_0_1_0_and_one_that_another_program_has_changed_are_loaded(tmp_path: Path) -> None:
    vocabulary = build('bpe:300')
    folder = run(write_run(tmp_path, random_model(replace(SHAPE, vocab_size=vocabulary.n_vocab)), vocabulary))
    origin = json.loads((folder / 'plaingpt.json').read_text(encoding='utf-8'))
    (folder / 'config.json').write_text((folder / 'config.json').read_text(encoding='utf-8') + '\n', encoding='utf-8')
    message = refused(open_model, str(folder), code=errors.CHECKPOINT)
    assert message.startswith(f'{folder}/config.json is not what export.py wrote')
    del origin['sha256']
    old = json.dumps(origin | {'files': sorted(origin['files'])})
    (folder / 'plaingpt.json').write_text(old, encoding='utf-8')
    assert open_model(str(folder))[1]['tokenizer'] == vocabulary.state()
    (folder / 'plaingpt.json').unlink()
    _, state = open_model(str(folder))
    assert learned_tokenizer(state, vocabulary.n_vocab, tmp_path).pieces == vocabulary.pieces


@pytest.mark.parametrize(('spec', 'eot'), VOCABULARIES)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_autotokenizer_gives_the_same_ids_and_text(spec: str, eot: bool, documents: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    texts = [*documents, *EDGES]
    vocabulary = build(spec, eot, tuple(texts))
    model = random_model(replace(SHAPE, vocab_size=vocabulary.n_vocab))
    reference = transformers.AutoTokenizer.from_pretrained(run(write_run(tmp_path, model, vocabulary)))
    for text in texts:
        ids = vocabulary.encode_prompt(text)
        assert reference(text)['input_ids'] == ids, repr(text[:80])
        assert reference.decode(ids) == text
        assert reference(text, split_special_tokens=True)['input_ids'] == vocabulary.encode(text)
    assert len(reference) == vocabulary.n_vocab
    assert reference.eos_token_id == reference.bos_token_id == vocabulary.eot
    assert reference.unk_token is None and reference.model_max_length == 16
    if spec != 'char':
        cut = vocabulary.encode('é日')[:-1]  # cut in the middle of a character
        assert reference.decode(cut) == vocabulary.decode(cut)


def test_an_unknown_character_has_no_id_there_either(tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    vocabulary = build('char', False, ('abc',))
    folder = run(write_run(tmp_path, random_model(replace(SHAPE, vocab_size=3)), vocabulary))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert reference('cab')['input_ids'] == [2, 0, 1]
    with pytest.raises(Exception, match='UNK'):
        reference('cabz')
    assert 'refuses any other' in (folder / 'README.md').read_text(encoding='utf-8')


def test_the_merges_of_gpt2_are_recovered_in_the_published_order(tiktoken_cache: Path) -> None:
    lines = (tiktoken_cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').read_text(encoding='utf-8').splitlines()
    library = json.loads(build('gpt2').to_huggingface().to_str())
    assert [' '.join(pair) for pair in library['model']['merges']] == lines[1:]
    published = json.loads((tiktoken_cache / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6').read_text(encoding='utf-8'))
    assert library['model']['vocab'] == published


@pytest.mark.parametrize('pattern', [CL100K, r' \w+$|\w+|[\s\S]'])
def test_another_pattern_of_tiktokens_cuts_words_in_the_same_places(
        pattern: str, documents: list[str], small_encoding: tiktoken.Encoding) -> None:
    """The pattern is cl100k_base's, or one that asks for the end of the text, with other tokens in place of their
    own."""
    vocabulary = tokenizer.Tiktoken(tiktoken.Encoding(
        'other', pat_str=pattern, mergeable_ranks=small_encoding._mergeable_ranks,
        special_tokens={'<|endoftext|>': 50300, '<|endofprompt|>': 50310}))
    library = huggingface.tokenizer_of(vocabulary)
    for text in [*documents, *EDGES]:
        assert library.encode(text).ids == vocabulary.encode_prompt(text), repr(text[:80])
    differ = [text for text in documents if vocabulary.encode(text) != small_encoding.encode_ordinary(text)]
    assert differ, 'the pattern matters'


def test_a_tokenizer_that_hugging_faces_format_cannot_hold_is_refused(small_encoding: tiktoken.Encoding) -> None:
    ranks = small_encoding._mergeable_ranks
    for pattern in (r'\p{L}{2}+\p{L}|[\s\S]', r'(?s).\w*'):  # they mean something else there, or nothing
        odd = tiktoken.Encoding('odd', pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        with pytest.raises(UserError, match="'odd' gives other ids"):
            huggingface.tokenizer_of(tokenizer.Tiktoken(odd))


def test_the_model_card_has_the_numbers_of_the_run(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, vocab_size=257))
    marks = {split: {'tokens': 12345, 'sha256': ''} for split in ('train', 'val')}
    folder = run(write_run(tmp_path / 'my-run', model, build('byte'), data=marks))
    text = (folder / 'README.md').read_text(encoding='utf-8')
    n_parameters = sum(p.numel() for p in GPT(replace(model.config, bias=True)).parameters())
    for part in ('# my-run', f'{n_parameters:,} parameters', '| corpus | novels |', '| steps | 7 |',
                 '| tokens seen | 672 |', '| tokens of the corpus | 12,345 |',
                 '| validation loss, nats per token | 1.2500, at step 6 |', '| bits per byte | 0.7500 |', "'byte'"):
        assert part in text, part
    assert 'alice' not in text + (folder / 'plaingpt.json').read_text(encoding='utf-8')
    assert 'license' in text and '@' not in text


@pytest.mark.slow
def test_the_commands_that_it_prints_and_the_card_make_text(tmp_path: Path) -> None:
    """The code runs in processes of its own, in the folder of a user, without network."""
    pytest.importorskip('transformers')
    run(write_run(tmp_path / 'my run', random_model(replace(SHAPE, vocab_size=257)), build('byte')))
    root = str(Path(export.__file__).parent)
    answer = subprocess.run([sys.executable, f'{root}/export.py', '--out_dir=my run'], cwd=tmp_path, text=True,
                            capture_output=True, encoding='utf-8', check=True).stdout
    command = shlex.split(answer.partition('next:')[2])
    assert command[1] == '-c' and len(command) == 3
    text = (tmp_path / 'my run/hf/README.md').read_text(encoding='utf-8')
    code = text.partition('```python\n')[2].partition('```')[0]
    for program, cwd in ((command[2], tmp_path), (code, tmp_path / 'my run/hf')):
        result = subprocess.run([sys.executable, '-c', program], cwd=cwd, capture_output=True, text=True,
                                encoding='utf-8', errors='replace', check=False)
        assert result.returncode == 0, result.stderr
        assert 'The' in result.stdout


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_weights_are_rounded_as_asked(dtype: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    model = random_model(replace(SHAPE, vocab_size=256))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        run(write_run(tmp_path, model, build('byte', False)), dtype=dtype))
    assert str(reference.dtype) == f'torch.{dtype}'
    assert torch.equal(reference.transformer.wte.weight, model.transformer.wte.weight.to(getattr(torch, dtype)))
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = 1e6
    if dtype == 'float16':
        folder = write_run(tmp_path / 'large', model, build('byte', False))
        assert 'float16 cannot hold' in refused(run, folder, dtype=dtype, code=errors.COMMAND)


# ------------------------------------------------------------------------------------------------
# GGUF

NAMES = {  # llama.cpp's, as its own gpt2 files have them
    'transformer.wte': 'token_embd', 'transformer.wpe': 'position_embd', 'transformer.ln_f': 'output_norm',
    'lm_head': 'output', 'ln_1': 'attn_norm', 'attn.c_attn': 'attn_qkv', 'attn.c_proj': 'attn_output',
    'ln_2': 'ffn_norm', 'mlp.c_fc': 'ffn_up', 'mlp.c_proj': 'ffn_down'}


def their_name(name: str) -> str:
    module, _, kind = name.rpartition('.')
    if module in NAMES:
        return f'{NAMES[module]}.{kind}'
    _, _, layer, inner = module.split('.', 3)
    return f'blk.{layer}.{NAMES[inner]}.{kind}'


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return the settings and the tensors of a file, by the gguf package's own reader."""
    gguf = pytest.importorskip('gguf')
    reader = gguf.GGUFReader(path)
    return ({name: field.contents() for name, field in reader.fields.items()},
            {tensor.name: tensor.data for tensor in reader.tensors})


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'q8_0'])
@pytest.mark.parametrize(('bias', 'tied', 'spec'), [(False, True, 'bpe:300'), (True, False, 'gpt2')])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_gguf_reads_back_every_weight(bias: bool, tied: bool, spec: str, dtype: str, tmp_path: Path) -> None:
    vocabulary = build(spec)
    n_vocab = vocabulary.n_vocab
    model = random_model(replace(SHAPE, n_embd=64, vocab_size=n_vocab + 47, bias=bias, tie_weights=tied))
    folder = run(write_run(tmp_path, model, vocabulary), to='gguf', dtype=dtype)
    settings, tensors = read_gguf(folder / 'model.gguf')
    expected = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    if tied:
        del expected['output.weight']
    without_bias = {'token_embd', 'position_embd', 'output'}
    modules = {name.rpartition('.')[0] for name in expected}
    assert tensors.keys() == expected.keys() | {f'{module}.bias' for module in modules - without_bias}
    for name, data in tensors.items():
        is_vector = data.ndim == 1 or name == 'position_embd.weight'
        part = expected.get(name, torch.zeros(data.shape))[:n_vocab if name.startswith(('token', 'output.')) else None]
        if dtype == 'q8_0' and not is_vector:
            weights, scales = from_q8_0(data)
            assert (np.abs(weights - part.numpy()) < 0.57 * scales).all(), 'half a unit, and the rounding of the scale'
            assert 0.99 < np.abs(part.numpy()).max() / (127 * scales.max()) < 1.01
        else:
            assert data.dtype == ('float32' if is_vector else dtype), name
            assert np.array_equal(data, part.numpy().astype(data.dtype)), name
    assert settings['general.file_type'] == {'float32': 0, 'float16': 1, 'q8_0': 7}[dtype]
    assert settings['gpt2.context_length'] == 16 and settings['gpt2.attention.head_count'] == 2
    assert settings['gpt2.block_count'] == 2 and settings['gpt2.embedding_length'] == 64
    assert settings['gpt2.feed_forward_length'] == 256
    assert settings['gpt2.attention.layer_norm_epsilon'] == pytest.approx(1e-5)


def from_q8_0(data: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Decode llama.cpp's q8_0: blocks of 34 bytes, each with the scale of 32 weights, float16, and the multiple of it
    for each of these, int8. Return the weights, and their scales."""
    blocks = data.reshape(len(data), -1, 34)
    scales = np.repeat(blocks[..., :2].copy().view('<f2').astype('<f4'), 32, axis=-1)
    weights = scales * blocks[..., 2:].view(np.int8)
    return weights.reshape(len(data), -1), scales.reshape(len(data), -1)


def test_its_tokenizer_is_gpt2s_kind(tiny_text: str, tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    vocabulary = build('bpe:400', True, (tiny_text,))
    folder = run(write_run(tmp_path, random_model(replace(SHAPE, vocab_size=400)), vocabulary), to='gguf')
    settings, _ = read_gguf(folder / 'model.gguf')
    assert (settings['tokenizer.ggml.model'], settings['tokenizer.ggml.pre']) == ('gpt2', 'gpt-2')
    assert settings['tokenizer.ggml.bos_token_id'] == settings['tokenizer.ggml.eos_token_id'] == 399
    assert settings['tokenizer.ggml.add_bos_token'] is False
    assert settings['tokenizer.ggml.token_type'] == [1] * 399 + [3]
    tokens, merges = settings['tokenizer.ggml.tokens'], settings['tokenizer.ggml.merges']
    rebuilt = ByteLevelBPETokenizer({token: i for i, token in enumerate(tokens)},
                                    [tuple(merge.split(' ')) for merge in merges])
    assert rebuilt.encode(tiny_text).ids == vocabulary.encode(tiny_text)
    modelfile = (folder / 'Modelfile').read_text(encoding='utf-8')
    assert 'FROM ./model.gguf\n' in modelfile and 'TEMPLATE """{{ .Prompt }}"""\n' in modelfile
    assert 'PARAMETER stop "<|endoftext|>"\n' in modelfile


@pytest.mark.slow
@pytest.mark.parametrize(('spec', 'eot', 'bias', 'tied', 'dtype'), [
    ('byte', False, False, True, 'float32'), ('byte', True, True, True, 'float16'), ('byte', True, True, True, 'q8_0'),
    ('bpe:300', True, False, False, 'q8_0'), ('gpt2', True, True, True, 'float32')])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_llama_cpp_reads_the_same_tokens_and_predicts_the_same(
        spec: str, eot: bool, bias: bool, tied: bool, dtype: str, documents: list[str], tmp_path: Path) -> None:
    """llama.cpp itself runs in a server within this process. In q8_0 it is compared with the weights of the file."""
    llama = pytest.importorskip('xllamacpp', reason='needs llama.cpp: pip install xllamacpp')
    texts = [text.replace('\0', '') for text in (*documents, *EDGES)]
    vocabulary = build(spec, eot, tuple(texts))
    n_vocab = vocabulary.n_vocab
    config = replace(SHAPE, n_embd=64, vocab_size=n_vocab + 47, bias=bias, tie_weights=tied)
    model = random_model(config)
    folder = run(write_run(tmp_path, model, vocabulary), to='gguf', dtype=dtype)
    if dtype == 'q8_0':
        _, tensors = read_gguf(folder / 'model.gguf')
        for name, p in model.named_parameters():
            if (data := tensors.get(their_name(name), np.empty(0))).dtype == np.uint8:
                p.data[:len(data)] = torch.from_numpy(from_q8_0(data)[0])  # a table has more rows here
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(folder / 'model.gguf'), 256, False
    settings.n_parallel = settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(settings)

    def ask(where: str, **question: Any) -> Any:
        request = urllib.request.Request(f'{server.listening_address}/{where}', json.dumps(question).encode(),
                                         {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    for text in texts:
        assert ask('tokenize', content=text, parse_special=True)['tokens'] == vocabulary.encode_prompt(text), text[:80]
    for text in filter(None, documents):
        ids = vocabulary.encode(text)[:12]
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0][0, -1, :n_vocab].log_softmax(dim=-1)
        if vocabulary.decode([int(expected.argmax())]).strip().isalnum():
            break  # the server returns neither half a character nor the end
    answer = ask('completion', prompt=ids, n_predict=1, temperature=0, n_probs=50)
    top = answer['completion_probabilities'][0]['top_logprobs']
    assert len(top) == 50 and top[0]['id'] == expected.argmax()
    found = torch.tensor([token['logprob'] for token in top])
    # llama.cpp looks GELU up in a table of float16; and with q8_0, activations have 8 bits, too
    torch.testing.assert_close(found, expected[[token['id'] for token in top]], rtol=0,
                               atol=0.3 if dtype == 'q8_0' else 2e-2)


def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    vocabulary = build('char')
    folder = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=vocabulary.n_vocab)), vocabulary)
    assert "'char' cannot be written as GGUF" in refused(run, folder, to='gguf', code=errors.COMMAND)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']


@pytest.mark.parametrize('to', ['gguf', 'llmc'])
def test_the_exact_gelu_is_refused_by_formats_that_would_make_it_another(to: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=300, gelu='exact')), build('bpe:300'))
    assert '--gelu=tanh' in refused(run, folder, to=to, code=errors.COMMAND)
    assert run(folder, to=to, gelu='tanh').is_dir()


# ------------------------------------------------------------------------------------------------
# llm.c


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(('spec', 'eot'), VOCABULARIES)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_model_and_its_tokenizer_come_back_from_llmc_bit_for_bit(spec: str, eot: bool, bias: bool,
                                                                   tmp_path: Path) -> None:
    vocabulary = build(spec, eot)
    before = random_model(replace(SHAPE, vocab_size=-(-vocabulary.n_vocab // 128) * 128, bias=bias))
    folder = run(write_run(tmp_path, before, vocabulary), to='llmc')
    after, state = open_model(str(folder / 'model.bin'))
    assert_same_weights(before, after, vocabulary.n_vocab)
    assert learned_tokenizer(state, after.config.vocab_size, corpus_of(state)).state() == vocabulary.state()
    (folder / 'plaingpt.json').unlink()
    assert open_model(str(folder / 'model.bin'))[1] == {}, 'as llm.c itself writes it'


def test_the_file_of_llmc_is_what_its_format_says(tmp_path: Path) -> None:
    """The file is written by hand, tensor after tensor, in llm.c's order."""
    model = random_model(replace(SHAPE, vocab_size=257, bias=True))
    folder = run(write_run(tmp_path, model, build('byte')), to='llmc')
    w = model.state_dict()
    expected = struct.pack('<256i', 20240326, 3, 16, 257, 2, 2, 8, 384, *[0] * 248)

    def add(tensor: Tensor) -> bytes:
        return struct.pack(f'<{tensor.numel()}f', *tensor.flatten().tolist())

    expected += add(w['transformer.wte.weight']) + bytes(4 * 127 * 8) + add(w['transformer.wpe.weight'])
    for module in ('ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'):
        for kind in ('weight', 'bias'):
            expected += b''.join(add(w[f'transformer.h.{layer}.{module}.{kind}']) for layer in range(2))
    expected += add(w['transformer.ln_f.weight']) + add(w['transformer.ln_f.bias'])
    assert (folder / 'model.bin').read_bytes() == expected
    tokens = b''.join(bytes([1, byte]) for byte in range(256)) + b'\x0d<|endoftext|>'
    assert (folder / 'tokenizer.bin').read_bytes() == struct.pack('<256i', 20240328, 2, 257, 256, *[0] * 252) + tokens


def test_bfloat16_weights_of_llmc_are_read_without_a_change(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, vocab_size=257, bias=True))
    path = run(write_run(tmp_path, model, build('byte')), to='llmc', dtype='bfloat16') / 'model.bin'
    assert struct.unpack('<2i', path.read_bytes()[:8]) == (20240326, 5)
    after = open_model(str(path))[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(after[name], tensor.bfloat16().float()), name


def test_a_damaged_file_of_llmcs_is_refused(tmp_path: Path) -> None:
    model = random_model(replace(SHAPE, vocab_size=257))
    whole = (run(write_run(tmp_path, model, build('byte')), to='llmc') / 'model.bin').read_bytes()
    path = tmp_path / 'model.bin'
    negative = struct.pack('<8i', 20240326, 3, 16, 257, 2, 2, -8, 384)
    versions = [struct.pack('<2i', 20240326, version) + whole[8:] for version in (1, 4, -1)]
    for data in (whole[:-1], whole + b'\0', whole[:2000], whole[:100], negative + whole[32:], *versions):
        path.write_bytes(data)
        assert str(path) in refused(open_model, str(path), code=errors.CHECKPOINT)


def test_llmc_has_no_untied_head(tmp_path: Path) -> None:
    folder = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=257, tie_weights=False)), build('byte'))
    assert 'another matrix' in refused(run, folder, to='llmc', code=errors.COMMAND)


def test_a_token_file_of_llmcs_is_left_out_if_it_cannot_be_written(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=256)), build('byte', False))
    assert not (run(folder, to='llmc') / 'tokenizer.bin').exists()
    assert 'no tokenizer.bin' in capsys.readouterr().out


def test_gpt2_has_the_size_of_the_published_file() -> None:
    """gpt2_124M.bin has 497,904,640 bytes: 124,475,904 float32 with the padded table, and the header."""
    tensors = llmc.tensors(T=1024, rows=50304, n_layer=12, C=768)
    assert 4 * sum(shape.numel() for _, shape in tensors) + 1024 == 497_904_640


# ------------------------------------------------------------------------------------------------
# Any format, the folder, and a checkpoint of plainGPT


def test_a_new_format_is_one_entry_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    """A toy format, under a name that `to` may have, is written, refused, replaced and explained as the others are."""
    def write(folder: Path, exported: Exported) -> None:
        biases = [name for name in exported.weights if name.endswith('ln_f.bias')]
        text = f'{exported.name} {exported.dtype} {exported.config.vocab_size} {biases} {exported.vocabulary.name}'
        (folder / 'toy.txt').write_text(text, encoding='utf-8')

    toy = export.Format(write, dtypes=('bfloat16',), needs={'n_layer': (2, 'a toy has two layers')},
                        next_step='cat {folder}/toy.txt')
    monkeypatch.setitem(export.FORMATS, 'gguf', toy)
    source = write_run(tmp_path / 'run', random_model(replace(SHAPE, vocab_size=300)), build('byte'))
    assert 'must be bfloat16' in refused(run, source, to='gguf', code=errors.COMMAND)
    for _ in range(2):
        folder = run(source, to='gguf', dtype='bfloat16')
        assert sorted(path.name for path in folder.iterdir()) == ['plaingpt.json', 'toy.txt']
    text = (folder / 'toy.txt').read_text(encoding='utf-8')
    assert text == "run bfloat16 257 ['transformer.ln_f.bias'] byte"
    assert capsys.readouterr().out.endswith(f'next:\n    cat {folder}/toy.txt\n')
    deep = write_run(tmp_path / 'deep', random_model(replace(SHAPE, vocab_size=300, n_layer=3)), build('byte'))
    assert 'a toy has two layers' in refused(run, deep, to='gguf', dtype='bfloat16', code=errors.COMMAND)
    assert not (deep / 'gguf').exists()


def test_every_name_that_to_may_have_is_in_the_table() -> None:
    assert list(export.FORMATS) == list(get_args(inspect.get_annotations(export)['to']))


def test_an_export_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    source = write_run(tmp_path / 'run', random_model(replace(SHAPE, vocab_size=256)), build('byte', False))
    folder = run(source)
    (folder / '.git').mkdir()
    old = (folder / 'model.safetensors').read_bytes()
    write_run(source, random_model(replace(SHAPE, vocab_size=256)), build('byte', False))
    assert (run(source) / 'model.safetensors').read_bytes() != old
    assert (folder / '.git').is_dir(), 'files that a user keeps there stay'

    other = tmp_path / 'other'
    other.mkdir()
    (other / 'thesis.txt').write_text('x', encoding='utf-8')
    (other / 'README.md').write_text('x', encoding='utf-8')
    assert '--overwrite=True' in refused(run, source, to_dir=other, code=errors.COMMAND)
    assert sorted(path.name for path in other.iterdir()) == ['README.md', 'thesis.txt']
    run(source, to_dir=other, overwrite=True)
    assert (other / 'config.json').exists() and (other / 'thesis.txt').exists()
    assert sorted(path.name for path in other.iterdir() if path.name.startswith('.')) == []
    assert 'is a file' in refused(run, source, to_dir=other / 'thesis.txt', code=errors.COMMAND)


def test_a_second_export_leaves_no_file_of_the_first(tmp_path: Path) -> None:
    """One such file is the tokenizer of another vocabulary, if the new one cannot be written. Another format does not
    count as a second export."""
    byte, char = build('byte'), build('char', False)
    source = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=257)), byte)
    folder = run(source, to='llmc')
    (folder / 'keep.txt').write_text('x', encoding='utf-8')
    write_run(source, random_model(replace(SHAPE, vocab_size=char.n_vocab)), char)
    assert run(source, to='llmc') == folder
    assert sorted(path.name for path in folder.iterdir()) == ['keep.txt', 'model.bin', 'plaingpt.json']

    assert '--to=hf' in refused(run, source, to_dir=folder, code=errors.COMMAND)
    run(source, to_dir=folder, overwrite=True)
    write_run(source, random_model(replace(SHAPE, vocab_size=257)), byte)
    run(source, to='llmc', to_dir=folder, overwrite=True)
    assert {'config.json', 'model.safetensors', 'model.bin', 'keep.txt'} < {path.name for path in folder.iterdir()}


def test_an_export_removes_no_file_that_the_one_before_merely_lists(tmp_path: Path) -> None:
    """plaingpt.json may be wrong, or have come from another folder."""
    source = write_run(tmp_path / 'run', random_model(replace(SHAPE, vocab_size=257)), build('byte'))
    for to in ('hf', 'gguf', 'llmc'):
        folder = run(source, to=to)
        precious = [folder / 'thesis.txt', source / 'thesis.txt', tmp_path / 'thesis.txt']
        for path in precious:
            path.write_text('x', encoding='utf-8')
        origin = json.loads((folder / 'plaingpt.json').read_text(encoding='utf-8'))
        origin['files'] = dict.fromkeys(['thesis.txt', '../thesis.txt', str(tmp_path / 'thesis.txt')], '')
        del origin['sha256']
        (folder / 'plaingpt.json').write_text(json.dumps(origin), encoding='utf-8')
        run(source, to=to)
        assert all(path.exists() for path in precious), to


def test_a_killed_export_leaves_no_folder_that_looks_whole(tmp_path: Path) -> None:
    source = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=257)), build('byte'))
    code = ('import export, sys, time\nfrom plaingpt.formats import huggingface\n'
            'def hang(*_): print("writing", flush=True); time.sleep(100)\n'
            'huggingface.card = hang\n'
            'export.main(sys.argv[1:])')
    process = subprocess.Popen([sys.executable, '-c', code, f'--out_dir={source}'], stdout=subprocess.PIPE, text=True,
                               cwd=Path(export.__file__).parent)
    assert process.stdout
    assert any('writing' in line for line in process.stdout), 'the export has come that far'
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / '.hf.exporting/model.safetensors').exists() and not (tmp_path / 'hf').exists()
    run(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ckpt.pt', 'hf']


@pytest.mark.slow
@pytest.mark.parametrize('to', ['hf', 'gguf', 'llmc'])
def test_a_full_disk_is_one_line_and_leaves_the_previous_export_as_it_was(to: str, tmp_path: Path) -> None:
    """The limit is that of `ulimit -f`, whichever library writes the file."""
    source = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=257)), build('byte'))
    for limit in (500, 12_000):
        result = subprocess.run(
            [sys.executable, 'export.py', f'--out_dir={source}', f'--to={to}'], cwd=Path(export.__file__).parent,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)), capture_output=True,
            text=True, check=False)
        assert result.returncode == errors.DISK_FULL, result.stderr
        assert f'{tmp_path}/{to}: the disk is full' in result.stderr and len(result.stderr.splitlines()) <= 3
        assert sorted(path.name for path in tmp_path.iterdir()) == ['ckpt.pt']


def test_an_export_becomes_a_run_again(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    vocabulary = build('char', False, (ODD,))
    before = random_model(replace(SHAPE, vocab_size=vocabulary.n_vocab))
    folder = run(write_run(tmp_path / 'old', before, vocabulary), to='llmc')
    with lock.owned(tmp_path / 'new'):  # as by a run that has not saved yet
        assert 'belongs to process' in refused(run, tmp_path / 'new', init_from=folder / 'model.bin', to='ckpt',
                                               code=errors.PEER_LOST)
    run(tmp_path / 'new', init_from=folder / 'model.bin', to='ckpt')
    after, state = open_model(str(tmp_path / 'new'))
    assert_same_weights(before, after, vocabulary.n_vocab)
    assert state['tokenizer'] == vocabulary.state()
    again = refused(run, tmp_path / 'new', init_from=folder / 'model.bin', to='ckpt', code=errors.COMMAND)
    assert 'holds a run already' in again
    result = run_script('sample.py', f'--out_dir={tmp_path}/new', '--num_samples=1', '--max_new_tokens=3')
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('damage', [
    '{', '[]', '{"tokenizer": 3}', b'\xff', '[' * 200_000, '{"tokenizer": {"name": "byte", "eot": true}}'])
def test_a_damaged_origin_is_one_line(damage: str | bytes, tmp_path: Path) -> None:
    folder = run(write_run(tmp_path, random_model(replace(SHAPE, vocab_size=257)), build('byte')), to='llmc')
    (folder / 'plaingpt.json').write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    message = refused(open_model, str(folder / 'model.bin'), code=errors.CHECKPOINT)
    assert 'plaingpt.json is damaged' in message


def test_wrong_commands_are_answered_in_a_line_or_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, random_model(replace(SHAPE, vocab_size=257)), build('byte'))
    assert 'has 2: leave it out' in refused(run, folder, n_head=4, code=errors.COMMAND)
    assert 'float16 or q8_0' in refused(run, folder, to='gguf', dtype='bfloat16', code=errors.COMMAND)
    assert 'not a multiple of 32' in refused(run, folder, to='gguf', dtype='q8_0', code=errors.COMMAND)
    assert 'float32 or bfloat16' in refused(run, folder, to='llmc', dtype='float16', code=errors.COMMAND)
    assert 'to must be' in refused(run, folder, to='onnx', code=errors.COMMAND)
    assert '--to_dir' in refused(export.main, ['--out_dir=s3://bucket/run'], code=errors.COMMAND)
    assert 'nothing' in refused(run, tmp_path / 'nothing', code=errors.CHECKPOINT)
    for package in ('tokenizers', 'safetensors'):  # from the last that it needs to the first
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=package):
            run(folder)
    assert not [name for name in os.listdir(tmp_path) if name.endswith('.exporting')]
