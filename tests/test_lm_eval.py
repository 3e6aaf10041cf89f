"""EleutherAI's lm-eval, run as its users run it on an export, agrees with evaluate.py over the same files.

    pip install -e '.[lm-eval]'
"""
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import evaluate
import export
from model import GPT, GPTConfig
from plaingpt.corpus import tokenizer
from plaingpt.formats.exported import Exported
from plaingpt.formats.weights import gpt_class
from plaingpt.tasks import last_words, lm_eval, pieces, read, to_batch
from tests.waiting import PATIENT

FILES = {name: Path(__file__).parent / f'data/{name}.jsonl' for name in ('hellaswag', 'lambada')}
N = 20  # examples in each
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not find_spec('lm_eval'), reason="needs lm-eval: pip install -e '.[lm-eval]'")]


def learn(config: GPTConfig) -> GPT:
    """Return a small model with as many ids as GPT-2 that has learned the right answers of the first half of the
    examples."""
    gpt2, model = tokenizer.load_tiktoken('gpt2'), gpt_class(config)(config)
    questions = lm_eval(read('hellaswag', str(FILES['hellaswag'])), gpt2)
    right = [questions.pairs[4 * i + label] for i, label in enumerate(questions.labels)]
    words = last_words(read('lambada', str(FILES['lambada'])), gpt2)
    batches = [to_batch(list(pieces(pairs[:N // 2], model.config.block_size))) for pairs in (right, words)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        for x, y in batches:
            F.cross_entropy(model.score(model.transformer(x)[y >= 0]), y[y >= 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_lm_eval(model: Path, folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the results and the samples of lm-eval's own tasks hellaswag and lambada_openai, which read this project's
    files instead of the hub's. It runs outside this folder, whose evaluate.py it would take for a package of that
    name."""
    spec = find_spec('lm_eval')
    assert spec and spec.origin
    tasks = Path(spec.origin).parent / 'tasks'
    for name, path in (('hellaswag/hellaswag', FILES['hellaswag']), ('lambada/lambada_openai', FILES['lambada'])):
        task = (tasks / f'{name}.yaml').read_text(encoding='utf-8')
        splits = json.dumps(dict.fromkeys(('train', 'validation', 'test'), str(path)))
        task = re.sub(r'^dataset_path:.*', f'dataset_path: json\ndataset_kwargs: {{data_files: {splits}}}', task,
                      flags=re.MULTILINE)
        task = re.sub(r'^(task: .*)', r'\1_here', re.sub(r'^dataset_name:.*\n', '', task, flags=re.MULTILINE),
                      flags=re.MULTILINE)
        (folder / f'{Path(name).name}.yaml').write_text(task, encoding='utf-8')
    shutil.copy(tasks / 'hellaswag/utils.py', folder)
    subprocess.run(
        [sys.executable, '-m', 'lm_eval', 'run', '--model', 'hf', '--model_args', f'pretrained={model},dtype=float32',
         '--tasks', 'hellaswag_here,lambada_openai_here', '--include_path', str(folder), '--device', 'cpu',
         '--batch_size', '16', '--output_path', str(folder / 'out'), '--log_samples'],
        cwd=folder, check=True, timeout=PATIENT, env={**os.environ, 'HF_HOME': str(folder / 'cache')})
    results, = (folder / 'out').glob('*/results_*.json')
    samples = {task: [json.loads(line) for line in next((folder / 'out').glob(f'*/samples_{task}_here_*')).open(
        encoding='utf-8')] for task in ('hellaswag', 'lambada_openai')}
    return json.loads(results.read_text(encoding='utf-8'))['results'], samples


@pytest.mark.parametrize('config', [
    GPTConfig(128, 50257, 1, 2, 32), GPTConfig(128, 50257, 1, 2, 32, bias=False, tie_weights=False, arch='modern')
], ids=['gpt2', 'modern'])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_lm_eval_gives_the_same_figures(config: GPTConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = tmp_path / 'run'
    model = learn(config)
    export.write_run(run, Exported('run', model.config, model.state_dict(), tokenizer.load_tiktoken('gpt2'),
                                   'float32', {}))
    evaluate.main([f'--out_dir={run}', '--tasks=hellaswag,lambada', '--device=cpu', '--dtype=float32',
                   *(f'--{name}={path}' for name, path in FILES.items())])
    found, = json.loads((run / 'evaluation.json').read_text(encoding='utf-8'))['measured']
    export.main([f'--out_dir={run}', '--to=hf'])
    reference, samples = run_lm_eval(run / 'hf', tmp_path)

    assert [len(of_task) for of_task in samples.values()] == [N, N]
    for name in ('acc', 'acc_norm'):
        assert found['hellaswag_lm_eval'][name] == reference['hellaswag_here'][f'{name},none']
        assert 0.3 < found['hellaswag_lm_eval'][name] < 0.9, 'the model knows some of them'
    assert found['hellaswag_lm_eval']['acc_stderr'] == pytest.approx(reference['hellaswag_here']['acc_stderr,none'])
    assert found['hellaswag_completion'] != found['hellaswag_lm_eval']
    assert found['lambada_openai']['acc'] == reference['lambada_openai_here']['acc,none']
    assert 0.1 < found['lambada_openai']['acc'] < 0.9
    perplexity = reference['lambada_openai_here']['perplexity,none']
    assert found['lambada_openai']['perplexity'] == pytest.approx(perplexity, rel=1e-4)
