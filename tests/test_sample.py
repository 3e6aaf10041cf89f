"""The script sample.py as its users meet it: the text that it writes, its errors, and the moment at which it writes."""
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from torch import Tensor

import configurator
import sample
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.corpus import tokenizer
from plaingpt.init_from import open_model
from plaingpt.machines import int8
from plaingpt.run import checkpoint
from tests.comparing import needs_8_bits
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
BLOCK = 32
RULE = '-' * 15
ENDLESS = '--max_new_tokens=1000000000'  # only an interrupt can end such a process

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., list[str]]


@pytest.fixture(scope='module')
def trained(tiny_dataset: Path, run_script: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short real run on characters. Its corpus is gone: the checkpoint has to be enough."""
    folder = tmp_path_factory.mktemp('trained')
    shutil.copytree(tiny_dataset, folder / 'corpus')
    result = run_script('train.py', f'--dataset={folder / "corpus"}', '--n_layer=2', '--n_head=2', '--n_embd=32',
                        f'--block_size={BLOCK}', '--max_iters=20', '--batch_size=8', '--gradient_accumulation_steps=1',
                        '--learning_rate=1e-2', '--warmup_iters=2', '--lr_decay_iters=20', '--eval_iters=2',
                        '--sample_interval=0', '--device=cpu', '--dtype=float32', '--compile=False', cwd=folder)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(folder / 'corpus')
    return folder / 'out'


@pytest.fixture
def write(capsys: pytest.CaptureFixture[str]) -> Write:
    """Return a function that returns the samples of `python sample.py arguments...`: all text between the lines of
    dashes."""

    def write(*arguments: str) -> list[str]:
        capsys.readouterr()
        sample.main(['--device=cpu', *arguments])
        *samples, rest = capsys.readouterr().out.split(f'\n{RULE}\n')
        assert rest == '', 'nothing follows the last line of dashes'
        return samples

    return write


def saved(path: Path, favourites: dict[int, float], vocab_size: int, **others: Any) -> Path:
    """Save a checkpoint with nanoGPT's keys, and `others`, of a model that finds tokens as likely as `favourites`
    says."""
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1.0  # so that the logits are the first column of wte
        model.transformer.wte.weight[:, 0] = -100.0
        for token, probability in favourites.items():
            model.transformer.wte.weight[token, 0] = torch.tensor(probability).log()
    args = {name: getattr(model.config, name) for name in checkpoint.MODEL_ARGS}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'model': model.state_dict(), 'model_args': args, 'iter_num': 0, 'config': {}, **others}, path)
    return path


def bytes_of(text: str) -> dict[int, float]:
    return {byte: 1 / len(text.encode()) for byte in text.encode()}


def hugging_face(folder: Path, vocab_size: int) -> Any:
    """Save random weights in the shape of GPT-2, as transformers leaves them in `folder`; return the model."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=BLOCK, n_embd=16, n_layer=2, n_head=2,
                                     initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


# ------------------------------------------------------------------------------------------------
# Samples


def test_the_samples_are_what_the_model_generates_from_the_prompt(trained: Path, write: Write) -> None:
    samples = write(f'--out_dir={trained}', '--start=def ', '--num_samples=3', '--max_new_tokens=60')
    assert [text[:4] for text in samples] == ['def ', 'def ', 'def ']
    assert [len(text) for text in samples] == [64, 64, 64], 'one character for each token'
    assert len(set(samples)) == 3

    model, state = open_model(str(trained))
    vocabulary = tokenizer.from_state(state['tokenizer'])
    assert set(''.join(samples)) <= set(state['tokenizer']['characters'])
    ids = torch.tensor([vocabulary.encode('def ')] * 3)
    ids = model.generate(ids, 60, 0.8, 200, seed=1337, n_vocab=vocabulary.n_vocab)
    assert samples == [vocabulary.decode(row.tolist()) for row in ids]


def test_the_same_seed_gives_the_same_texts_and_another_seed_gives_others(trained: Path, write: Write) -> None:
    arguments = (f'--out_dir={trained}', '--num_samples=5', '--batch_size=2', '--max_new_tokens=60')
    samples = write(*arguments, '--seed=1')
    assert len(set(samples)) == 5, 'the samples of one run differ, within a batch and between batches'
    assert write(*arguments, '--seed=1') == samples
    assert write(f'--out_dir={trained}', '--num_samples=3', '--max_new_tokens=60', '--seed=1') == samples[:3]
    assert not set(write(*arguments, '--seed=2')) & set(samples)


def test_temperature_0_takes_the_likeliest_token_each_time(trained: Path, write: Write) -> None:
    arguments = (f'--out_dir={trained}', '--start=import', '--num_samples=2', '--max_new_tokens=50')
    model, state = open_model(str(trained))
    vocabulary = tokenizer.from_state(state['tokenizer'])
    ids = torch.tensor([vocabulary.encode('import')])
    for _ in range(50):
        logits, _ = model(ids[:, -BLOCK:])
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    expected = [vocabulary.decode(ids[0].tolist())] * 2
    assert write(*arguments, '--temperature=0') == expected
    assert write(*arguments, '--top_k=1') == expected
    assert write(*arguments, '--top_p=0') == expected
    assert write(*arguments, '--top_k=0') != expected


def test_all_samples_are_one_batch_that_reads_each_token_once(
        trained: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    read, forward = [], GPT.forward

    def counting(self: GPT, idx: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(tuple(idx.shape))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, 'forward', counting)
    write(f'--out_dir={trained}', '--start=def ', '--max_new_tokens=5')
    assert read == [(10, 4), (10, 1), (10, 1), (10, 1), (10, 1)]
    read.clear()
    write(f'--out_dir={trained}', '--start=def ', '--max_new_tokens=2', '--batch_size=6')
    assert read == [(6, 4), (6, 1), (4, 4), (4, 1)]


def test_a_top_p_that_is_off_costs_no_sorting(trained: Path, write: Write) -> None:
    for top_p, sorts in [('1.0', False), ('0.9', True)]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            write(f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=2', '--top_k=0', f'--top_p={top_p}')
        assert ('aten::topk' in {event.key for event in profile.key_averages()}) == sorts


def test_a_prompt_comes_from_a_file_and_may_be_longer_than_the_block(
        trained: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'import json\n\ndef encode(value):\n    return json.dumps(value)\n'
    assert len(text) > BLOCK
    (tmp_path / 'prompt.txt').write_text(text, encoding='utf-8')
    from_file = write(f'--out_dir={trained}', f'--start=FILE:{tmp_path / "prompt.txt"}', '--max_new_tokens=9')
    assert {sample[:len(text)] for sample in from_file} == {text}
    assert {len(sample) for sample in from_file} == {len(text) + 9}
    assert write(f'--out_dir={trained}', f'--start={text}', '--max_new_tokens=9') == from_file

    sample.main([f'--out_dir={trained}', '--device=cpu', f'--start={text}', '--max_new_tokens=0', '--num_samples=1'])
    out, err = capsys.readouterr()
    assert out == f'{text}\n{RULE}\n'
    assert f'the prompt has {len(text)} tokens: the model reads the last {BLOCK}' in err


def test_gpt2_weights_from_a_folder_continue_a_text_as_transformers_does(
        gpt2_stand_in: tiktoken.Encoding, write: Write, tmp_path: Path) -> None:
    reference = hugging_face(tmp_path, 50257)
    gpt2 = tokenizer.Tiktoken(gpt2_stand_in)
    prompt = '<|endoftext|>Hello, I am'
    ids = torch.tensor([[50256, *gpt2.encode('Hello, I am')]])
    expected = gpt2.decode(reference.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)[0].tolist())
    greedy = (f'--init_from={tmp_path}', '--temperature=0', '--num_samples=1', '--max_new_tokens=20')
    assert write(*greedy, f'--start={prompt}') == [expected]

    # an empty prompt is the beginning of a document
    begun = write(*greedy, '--start=<|endoftext|>')
    assert begun == ['<|endoftext|>' + text for text in write(*greedy, '--start=')]


def test_stop_ends_each_sample_at_the_end_of_its_document(write: Write, tmp_path: Path) -> None:
    vocabulary = tokenizer.build('byte', list, eot=True)
    path = saved(tmp_path / 'ckpt.pt', {ord('a'): 0.9, 256: 0.1}, 257, tokenizer=vocabulary.state())
    arguments = (f'--init_from={path}', '--start=', '--num_samples=9', '--max_new_tokens=40', '--temperature=1')
    free = write(*arguments)
    assert any('<|endoftext|>' in text for text in free)
    stopped = write(*arguments, '--stop=True')
    assert stopped == [text.partition('<|endoftext|>')[0] for text in free]
    assert len({len(text) for text in stopped}) > 3


def test_padding_of_the_vocabulary_is_never_written(
        gpt2_stand_in: tiktoken.Encoding, write: Write, tmp_path: Path) -> None:
    """nanoGPT's GPT-2 has 50304 ids, 47 of which stand for no token; here they are the likeliest by far."""
    word = gpt2_stand_in.encode_single_token(' keeper')
    path = saved(tmp_path / 'ckpt.pt', {50300: 0.99, word: 0.01}, 50304)
    assert write(f'--init_from={path}', '--num_samples=2', '--max_new_tokens=3') == ['\n keeper keeper keeper'] * 2


def test_a_checkpoint_of_nanogpt_takes_the_tokenizer_of_its_corpus(
        tiny_dataset: Path, write: Write, tmp_path: Path) -> None:
    meta = json.loads((tiny_dataset / 'meta.json').read_text(encoding='utf-8'))
    x = meta['tokenizer']['characters'].index('x')
    path = saved(tmp_path / 'ckpt.pt', {x: 1.0}, meta['vocab_size'], config={'dataset': str(tiny_dataset)})
    assert write(f'--init_from={path}', '--start=a', '--num_samples=1', '--max_new_tokens=5') == ['axxxxx']


def test_a_sample_cannot_steer_the_terminal(write: Write, tmp_path: Path) -> None:
    state = tokenizer.build('byte', list, eot=False).state()
    path = saved(tmp_path / 'ckpt.pt', bytes_of('\x1b[2J\a\r\n\t'), 256, tokenizer=state)
    text = ''.join(write(f'--init_from={path}', '--start=\x1b]0;title\a', '--max_new_tokens=200'))
    assert set(text) == {*r']0;title[2J\x1b07', '\n', '\t'}
    assert text.startswith(r'\x1b]0;title\x07')


def test_without_a_compiler_a_model_writes_uncompiled(trained: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('CXX', 'no-such-compiler')
    sample.main([f'--out_dir={trained}', '--device=cpu', '--num_samples=1', '--max_new_tokens=5', '--compile=True'])
    assert '\nnot compiled, as that needs a C++ compiler, no-such-compiler\n' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('c++'), reason='torch.compile needs a C++ compiler')
@pytest.mark.parametrize('dtype', ['float32', pytest.param('int8', marks=needs_8_bits)])
def test_a_compiled_model_writes_the_same_past_the_block(trained: Path, write: Write, dtype: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(0, -1)  # so that of several ways the last is taken
    monkeypatch.setattr(int8, 'time_of_token', lambda products, weights, least: next(seconds))
    arguments = (f'--out_dir={trained}', '--num_samples=2', f'--max_new_tokens={BLOCK + 9}', '--temperature=0',
                 f'--dtype={dtype}')
    expected = write(*arguments)
    torch.compiler.reset()
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    assert write(*arguments, '--compile=True') == expected
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > before


@pytest.mark.gpu
def test_a_gpu_writes_in_every_precision(trained: Path, write: Write) -> None:
    for dtype in ('auto', 'float32', 'float16'):
        samples = write(f'--out_dir={trained}', '--start=def ', '--device=cuda', f'--dtype={dtype}')
        assert {text[:4] for text in samples} == {'def '}
        assert len(set(samples)) == 10


# ------------------------------------------------------------------------------------------------
# The choice of the model


def test_without_a_run_in_out_the_newest_one_is_taken_and_named(
        trained: Path, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    state = tokenizer.build('byte', list, eot=False).state()
    runs = [(200, 'out-older', 'o'), (100, 'out-newer', 'n'), (300, 'out-oldest', 'x'), (0, 'run', 'r')]
    for age, name, letter in runs:
        path = saved(tmp_path / name / 'ckpt.pt', bytes_of(letter), 256, tokenizer=state)
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    arguments = ('--device=cpu', '--start=a', '--num_samples=1', '--max_new_tokens=3')
    sample.main([*arguments])
    out, err = capsys.readouterr()
    assert out == f'annn\n{RULE}\n'
    assert err.splitlines()[0] == 'out holds no checkpoint: this is the newest run here, --out_dir=out-newer'

    assert write(*arguments, '--out_dir=out-older') == ['aooo']
    assert write(*arguments, '--init_from=run') == ['arrr']
    assert write(*arguments, '--init_from=run/ckpt.pt') == ['arrr']
    with pytest.raises(errors.UserError, match=r'nowhere holds no .*\n.* out-newer, out-older, out-oldest$') as e:
        sample.main(['--out_dir=nowhere'])
    assert e.value.code == errors.CHECKPOINT

    saved(tmp_path / 'out' / 'ckpt.pt', bytes_of('d'), 256, tokenizer=state)
    os.utime(tmp_path / 'out' / 'ckpt.pt', (0, 0))
    assert write(*arguments) == ['addd'], 'out is the default, however old'


def test_the_checkpoint_alone_is_enough_and_stdout_holds_the_samples_alone(
        trained: Path, run_script: Run, write: Write, tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    shutil.copy(trained / 'ckpt.pt', tmp_path / 'out')
    arguments = ('--start=class', '--num_samples=2', '--max_new_tokens=30', '--device=cpu')
    result = run_script('sample.py', *arguments, cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (0, 1), result.stderr
    assert result.stderr.startswith('out; device cpu, ')
    assert result.stdout == ''.join(f'{text}\n{RULE}\n' for text in write(f'--out_dir={trained}', *arguments))


# ------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(('argument', 'code', 'message'), [
    ('--start=naïve', errors.DATA, r"character 'ï' \(position 2 of the text\) is not among the"),
    ('--start=', errors.COMMAND, r'--start is empty(.|\n)*--start=A'),
    ('--start=\udcff', errors.COMMAND, r'--start: start must be text in UTF-8'),
    ('--start=FILE:gone.txt', errors.DATA, r'gone.txt: there is no such file'),
    ('--start=FILE:.', errors.DATA, r'FILE:\.: this is a folder'),
    ('--start=FILE:latin1.txt', errors.DATA, r'latin1.txt is not UTF-8: byte 3 is 0xe9'),
    ('--start=FILE:empty.txt', errors.COMMAND, r'--start is empty'),
    ('--init_from=gone.pt', errors.CHECKPOINT, r'no checkpoint at gone.pt'),
    ('--init_from=here/gone.pt', errors.CHECKPOINT, r'no checkpoint at here/gone.pt'),
    ('--init_from=here', errors.CHECKPOINT, r'here.*not a checkpoint, a run'),
    ('--init_from=here/gone', errors.CHECKPOINT, r'here/gone.*not a checkpoint, a run'),
    ('--init_from=latin1.txt', errors.CHECKPOINT, r'latin1.txt is damaged, or not a checkpoint'),
    ('--init_from=cut.pt', errors.CHECKPOINT, r'cut.pt is damaged'),
    ('--out_dir=here', errors.CHECKPOINT, r'here holds no checkpoint(.|\n)* here does\n.*(train|prepare)(.|\n)*=gpt2'),
    ('--num_samples=0', errors.COMMAND, r'--num_samples=0: must be 1 or more'),
    ('--batch_size=0', errors.COMMAND, r'--batch_size=0: must be 1 or more'),
    ('--max_new_tokens=-1', errors.COMMAND, r'--max_new_tokens=-1: must be 0 or more'),
    ('--temperature=-0.1', errors.COMMAND, r'--temperature=-0.1: must be 0 or more'),
    ('--top_k=-1', errors.COMMAND, r'--top_k=-1: must be 0 or more'),
    ('--top_p=1.1', errors.COMMAND, r'--top_p=1.1: must be a probability'),
    ('--device=tpu', errors.COMMAND, r"--device=tpu: expected 'auto'"),
    ('--dtype=int4', errors.COMMAND, r"dtype must be 'auto' or 'float32'"),
    ('--tempreature=1', errors.COMMAND, r'did you mean --temperature\?'),
])
def test_each_mistake_has_its_line_and_its_exit_code(
        trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        argument: str, code: int, message: str) -> None:
    (tmp_path / 'here').mkdir()
    (tmp_path / 'latin1.txt').write_bytes('caf\xe9'.encode('latin-1'))
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'cut.pt').write_bytes((trained / 'ckpt.pt').read_bytes()[:-1000])
    monkeypatch.chdir(tmp_path)
    source = 'resume' if 'out_dir' in argument else trained
    with pytest.raises(errors.UserError, match=message) as error:
        sample.main([f'--init_from={source}', '--device=cpu', argument])
    assert error.value.code == code
    assert len(str(error.value).splitlines()) <= 3
    assert capsys.readouterr() == ('', '')


def test_without_any_run_the_command_that_makes_one_is_named(run_script: Run, tmp_path: Path) -> None:
    result = run_script('sample.py', cwd=tmp_path)
    assert (result.returncode, result.stdout) == (errors.CHECKPOINT, '')
    first, *others = result.stderr.splitlines()
    assert first == 'out holds no checkpoint, and no other out*/ here does'
    train, sample = (line.partition(': ')[2] for line in others)
    assert train.endswith((f' {ROOT}/data/stdlib/prepare.py', f' {ROOT}/train.py {ROOT}/config/train_stdlib.py'))
    assert sample.endswith(f' {ROOT}/sample.py --init_from=gpt2')


@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_model_with_a_vocabulary_that_cannot_be_its_own_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / 'ckpt.pt', {1: 1.0}, 65, config={'dataset': 'no-such-corpus'})
    with pytest.raises(errors.UserError, match=r'knows 65 tokens, .* 50257(.|\n)*python data/text/prepare.py') as error:
        sample.main([f'--init_from={path}'])
    assert error.value.code == errors.CHECKPOINT
    hugging_face(tmp_path / 'hf', 100)
    with pytest.raises(errors.UserError, match=r'knows 100 tokens, .* gpt2 has 50257: .*another one\n'):
        sample.main([f'--init_from={tmp_path / "hf"}'])


def test_a_pickled_vocabulary_is_refused_with_the_command_that_replaces_it(tmp_path: Path) -> None:
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for name in ('meta.pkl', 'train.bin'):
        (corpus / name).touch()
    path = saved(tmp_path / 'ckpt.pt', {1: 1.0}, 65, config={'dataset': str(corpus)})
    with pytest.raises(errors.UserError, match=r'meta.pkl is a pickle(.|\n)*prepare.py') as error:
        sample.main([f'--init_from={path}'])
    assert error.value.code == errors.DATA


def test_a_stop_that_cannot_happen_is_reported(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main([f'--out_dir={trained}', '--device=cpu', '--stop=True', '--num_samples=1', '--max_new_tokens=5'])
    assert '--stop=True changes nothing' in capsys.readouterr().err


def test_settings_have_nanogpts_names_and_defaults() -> None:
    settings, _ = configurator.configure(sample, [])
    nanogpt = {'init_from': 'resume', 'out_dir': 'out', 'start': '\n', 'num_samples': 10, 'max_new_tokens': 500,
               'temperature': 0.8, 'top_k': 200, 'seed': 1337, 'device': 'auto', 'dtype': 'auto', 'compile': 'auto'}
    assert {name: settings.get(name) for name in nanogpt} == nanogpt
    assert settings.keys() - nanogpt.keys() == {'top_p', 'stop', 'batch_size', 'interactive'}


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        sample.main(['--help'])
    assert end.value.code == 0
    assert 'max_new_tokens: int = 500' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Streaming


def streamed(*rows: str) -> Iterator[Tensor]:
    """Yield the bytes of each row, one a step, as a model would draw them. The rows are equally long."""
    columns = zip(*(row.encode() for row in rows), strict=True)
    return (torch.tensor(column) for column in columns)


def test_the_first_sample_is_shown_as_it_grows_and_the_others_in_their_turn() -> None:
    vocabulary = tokenizer.build('byte', list, eot=False)
    pieces = list(sample.texts(streamed('abc', 'xyz'), 2, '>', vocabulary, ()))
    assert [piece for piece in pieces if piece] == ['>', 'a', 'b', 'c', f'\n{RULE}\n', f'>xyz\n{RULE}\n']

    # . ends a sample: the second is shown as it grows once the first has ended, and the third after both
    stream = streamed('ab......', 'xyz.....', 'k.......', 'stuvwxyz')
    pieces = list(sample.texts(stream, 4, '>', vocabulary, [ord('.')]))
    assert pieces[:4] == ['>', 'a', 'b', f'\n{RULE}\n']
    assert [piece for piece in pieces[4:] if piece] == [
        '>xyz', f'\n{RULE}\n', f'>k\n{RULE}\n', '>stuv', 'w', 'x', 'y', 'z', f'\n{RULE}\n']


def test_characters_are_never_torn_and_line_ends_are_plain() -> None:
    vocabulary = tokenizer.build('byte', list, eot=False)
    pieces = list(sample.texts(streamed('é€\r\n\U0001f600\rz'), 1, 'ü\r\n', vocabulary, ()))
    assert [piece for piece in pieces if piece] == ['ü\n', 'é', '€', '\n', '\U0001f600', '\nz', f'\n{RULE}\n']
    torn = [torch.tensor([byte]) for byte in '\U0001f600'.encode()[:3]]
    assert ''.join(sample.texts(torn, 1, '', vocabulary, ())) == f'\ufffd\n{RULE}\n'


def test_every_piece_leaves_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BufferedWriter(left), encoding='utf-8'))  # as with a pipe

    def pieces() -> Iterator[str]:
        for number in range(3):
            yield str(number)
            assert left.getvalue() == b'012'[:number + 1]

    sample.show(pieces())


def test_a_terminal_shows_text_before_the_end(trained: Path) -> None:
    pty = pytest.importorskip('pty')
    controller, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / 'sample.py'), f'--out_dir={trained}', '--start=def ', ENDLESS, '--device=cpu']
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.DEVNULL)
    os.close(terminal)
    try:
        seen = b''
        while len(seen) < 200 and select.select([controller], [], [], PATIENT)[0]:
            seen += os.read(controller, 1000)
        assert seen.startswith(b'def ')
        assert len(seen) >= 200, 'the process is silent'
        assert process.poll() is None, 'the process has ended, and proves nothing'
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_a_reader_that_leaves_ends_it_without_a_word(trained: Path) -> None:
    command = [sys.executable, str(ROOT / 'sample.py'), f'--out_dir={trained}', '--start=def ', ENDLESS, '--device=cpu']
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    assert process.stdout.read(4) == b'def '
    process.stdout.close()
    assert process.wait(timeout=PATIENT) == errors.BROKEN_PIPE
    assert len(process.stderr.read().splitlines()) == 1, 'only the line about the device'
    process.stderr.close()


# ------------------------------------------------------------------------------------------------
# Prompts from stdin, one a line


def test_each_line_of_a_pipe_is_continued_after_all_lines_before_it(trained: Path, run_script: Run) -> None:
    arguments = (f'--out_dir={trained}', '--interactive=True', '--max_new_tokens=5', '--temperature=0', '--device=cpu')
    result = run_script('sample.py', *arguments, '--start=# ', typed='def\nd\u2603f\n\nimport os, sys, re\n')
    assert result.returncode == 0, result.stderr
    *answers, rest = result.stdout.split(f'\n{RULE}\n')
    assert rest == ''

    model, state = open_model(str(trained))
    vocabulary, context = tokenizer.from_state(state['tokenizer']), '# '
    for line, answer in zip(['def', None, '', 'import os, sys, re'], answers, strict=True):
        if line is None:
            assert answer == '', 'an unreadable line changes nothing'
            continue
        ids = torch.tensor([vocabulary.encode(context + line)[-BLOCK:]])
        assert answer == vocabulary.decode(model.generate(ids, 5, temperature=0)[0, -5:].tolist())
        context += line + answer
    assert len(context) > BLOCK
    assert f'longer than {BLOCK} tokens' in result.stderr
    assert 'is not among the' in result.stderr
    assert 'Traceback' not in result.stderr


def test_at_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_session(trained: Path) -> None:
    pty, fcntl, termios = map(pytest.importorskip, ('pty', 'fcntl', 'termios'))
    controller, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / 'sample.py'), f'--out_dir={trained}', '--interactive=True', '--device=cpu',
               ENDLESS]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                               preexec_fn=partial(fcntl.ioctl, terminal, termios.TIOCSCTTY, 0))
    os.close(terminal)
    seen = bytearray()

    def read_until(enough: Callable[[bytes], object]) -> None:
        while not enough(bytes(seen)) and select.select([controller], [], [], PATIENT)[0]:
            seen.extend(os.read(controller, 1000))

    try:
        for _ in range(2):
            read_until(partial(re.search, rb'> $'))
            seen.clear()
            os.write(controller, b'def \n')
            read_until(lambda text: len(text) > 200)
            os.write(controller, b'\x03')
            read_until(partial(re.search, RULE.encode()))
        read_until(partial(re.search, rb'> $'))
        os.write(controller, b'\x04')
        assert process.wait(timeout=PATIENT) == 0
        assert b'Traceback' not in seen
    finally:
        process.kill()
        process.wait()
        os.close(controller)
