"""The meaning of a name in init_from; and for every stage, the same answer to which tokenizer a model has learned."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import export
import sample
import train
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.corpus.token_files import make_header
from plaingpt.formats import others
from plaingpt.init_from import learned_tokenizer, open_model
from plaingpt.run import checkpoint
from tests.comparing import refused

V, T = 128, 16


@pytest.mark.usefixtures('gpt2_stand_in')
def test_weights_without_a_tokenizer_have_that_of_gpt2_or_of_their_corpus(tiny_dataset: Path, tmp_path: Path) -> None:
    assert learned_tokenizer({}, 50304, tmp_path).name == learned_tokenizer({}, 50257, tmp_path).name == 'gpt2'
    assert learned_tokenizer({'tokenizer': {'name': 'byte', 'eot': False}}, 50304, tmp_path).name == 'byte'
    assert learned_tokenizer({}, V, tiny_dataset).name == 'char'
    assert '--dataset=' in refused(learned_tokenizer, {}, 50, tiny_dataset, code=errors.CHECKPOINT)
    assert 'prepare.py' in refused(learned_tokenizer, {}, V, tmp_path, code=errors.CHECKPOINT)


@pytest.mark.usefixtures('gpt2_stand_in')
def test_every_stage_says_the_same_of_a_checkpoint_without_a_tokenizer(
        tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nanoGPT's checkpoint of 50,304 ids has GPT-2's tokens, although the corpus of that name here has other tokens."""
    model = GPT(GPTConfig(T, 50304, 1, 1, 8))
    run = tmp_path / 'run'
    run.mkdir()
    checkpoint.write(run, others.complete({
        'model': model.state_dict(), 'model_args': checkpoint.model_args(model.config),
        'config': {'dataset': str(tiny_dataset), **checkpoint.shape_of(model.config)}}), 2, False)
    questions = tmp_path / 'lambada.jsonl'
    questions.write_text(json.dumps({'text': 'A naïve reader asks for bread'}), encoding='utf-8')  # 'char' has no ï

    sample.main([f'--out_dir={run}', '--num_samples=1', '--max_new_tokens=5', '--start=naïve', '--device=cpu'])
    assert capsys.readouterr().out.startswith('naïve'), 'no character of the corpus could write it'
    evaluate.main([f'--out_dir={run}', '--tasks=lambada', f'--lambada={questions}', '--device=cpu'])
    export.main([f'--out_dir={run}', '--to=ckpt', f'--to_dir={tmp_path / "new"}'])
    assert open_model(str(tmp_path / 'new'))[1]['tokenizer']['name'] == 'gpt2'
    export.main([f'--out_dir={run}', '--to=ckpt', f'--to_dir={tmp_path / "named"}', f'--dataset={tiny_dataset}'])
    assert open_model(str(tmp_path / 'named'))[1]['tokenizer']['name'] == 'char', 'the setting of the user comes first'
    message = refused(train.main, [f'--init_from={run}', f'--dataset={tiny_dataset}', f'--out_dir={tmp_path / "tuned"}',
                                   '--device=cpu'], code=errors.DATA)
    assert 'the tokenizer char, and the model has learned another: gpt2' in message


def test_a_model_is_opened_with_the_numbers_that_were_saved(tmp_path: Path) -> None:
    model = GPT(GPTConfig(T, V, 1, 1, 8))
    checkpoint.write(tmp_path, others.complete({
        'model': model.state_dict(), 'model_args': checkpoint.model_args(model.config),
        'config': checkpoint.shape_of(model.config)}), 2, False)
    for name in (tmp_path, tmp_path / 'ckpt.pt', tmp_path.as_uri()):
        opened, state = open_model(str(name), dropout=0.25)
        assert (opened.config.dropout, state['iter_num']) == (0.25, 0)
        assert all(torch.equal(p, model.state_dict()[key]) for key, p in opened.state_dict().items())
    message = refused(open_model, str(tmp_path / 'nothing'), code=errors.CHECKPOINT)
    assert 'is not a checkpoint, a run, a Hugging Face folder or the name of a GPT-2' in message


def test_damaged_weights_end_every_stage_in_a_line(tiny_dataset: Path, tmp_path: Path) -> None:
    """NaN is found when weights are read; numbers that are merely far too large, when the model predicts something."""
    model, meta = GPT(GPTConfig(T, V, 1, 1, 8)), json.loads((tiny_dataset / 'meta.json').read_text(encoding='utf-8'))
    model.get_parameter('transformer.wte.weight').data.mul_(1e4)
    (tmp_path / 'lambada.jsonl').write_text('{"text": "return self"}', encoding='utf-8')
    for bad, code in ((1e37, errors.NOT_FINITE), (float('nan'), errors.CHECKPOINT)):
        model.get_parameter('transformer.ln_f.weight').data.fill_(bad)
        checkpoint.write(tmp_path, others.complete({
            'model': model.state_dict(), 'model_args': checkpoint.model_args(model.config),
            'config': checkpoint.shape_of(model.config), 'tokenizer': meta['tokenizer']}), 2, False)
        (tmp_path / 'ckpt.1.pt').unlink(missing_ok=True)
        common = [f'--init_from={tmp_path}/ckpt.pt', '--device=cpu']
        for temperature in (0, 1):
            message = refused(sample.main, [*common, f'--temperature={temperature}'], code=code)
            assert 'infinite or NaN' in message
        for task in ('val', 'hellaswag', 'lambada'):
            message = refused(evaluate.main, [
                *common, f'--dataset={tiny_dataset}', f'--tasks={task}', f'--hellaswag={tiny_dataset}/hellaswag.jsonl',
                f'--lambada={tmp_path}/lambada.jsonl'], code=code)
            assert 'infinite or NaN' in message
    assert 'infinite or NaN' in refused(export.main, [common[0]], code=errors.CHECKPOINT)


def test_a_run_whose_tokenizer_is_unavailable_continues_and_is_evaluated(tmp_path: Path) -> None:
    """llm.c's shards for Llama 3 use a tokenizer that tiktoken does not know: the corpus says whose tokens they are."""
    for name, n_tokens in (('train_000001', 400), ('val_000000', 200)):
        ids = np.arange(n_tokens, dtype='<u4') % 1000
        (tmp_path / f'{name}.bin').write_bytes(make_header(ids.dtype, n_tokens) + ids.tobytes())
    command = [f'--dataset={tmp_path}', f'--out_dir={tmp_path / "run"}', '--n_layer=1', '--n_head=1', '--n_embd=8',
               '--block_size=16', '--batch_size=2', '--gradient_accumulation_steps=1', '--eval_interval=1',
               '--eval_iters=1', '--sample_interval=0', '--device=cpu']
    train.main([*command, '--max_iters=1'])
    assert checkpoint.load(tmp_path / 'run/ckpt.pt')['tokenizer'] is None
    train.main([*command, '--max_iters=2', '--init_from=resume'])
    assert checkpoint.load(tmp_path / 'run/ckpt.pt')['iter_num'] == 2
    evaluate.main([f'--out_dir={tmp_path / "run"}', '--eval_iters=1', '--batch_size=2', '--device=cpu'])
    [measured] = json.loads((tmp_path / 'run/evaluation.json').read_text(encoding='utf-8'))['measured']
    assert measured['val']['loss'] > 5 and 'bits_per_byte' not in measured['val']
