"""Tokenizers, against independent implementations and real text."""
import importlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import tiktoken

from plaingpt.corpus import tokenizer
from plaingpt.errors import COMMAND, DATA, UserError

ODD = 'naïve café\n\tdef f(x): return "日本語 🙂"\r\n\x00 <|endoftext|> end  of   text\n\n'
SPECS = ['char', 'byte', 'bpe:300', 'gpt2']


def make(spec: str, eot: bool = True, texts: Iterable[str] = (ODD,)) -> tokenizer.Tokenizer:
    return tokenizer.build(spec, lambda: texts, eot)


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_text_comes_back_from_its_ids(spec: str) -> None:
    tokenizer = make(spec)
    ids = tokenizer.encode(ODD)
    assert tokenizer.decode(ids) == ODD
    assert tokenizer.decode_bytes(ids) == ODD.encode('utf-8')
    assert all(0 <= i < tokenizer.n_vocab and i != tokenizer.eot for i in ids)
    assert tokenizer.encode('') == []


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_the_name_of_the_end_of_text_is_ordinary_text_but_in_a_prompt(spec: str) -> None:
    tokenizer = make(spec)
    prompt = tokenizer.encode_prompt('end<|endoftext|>text<|endoftext|>')
    assert prompt == [*tokenizer.encode('end'), tokenizer.eot, *tokenizer.encode('text'), tokenizer.eot]
    assert tokenizer.decode(prompt) == 'end<|endoftext|>text<|endoftext|>'
    assert tokenizer.eot not in tokenizer.encode('end<|endoftext|>text')


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_the_sizes_of_tokens_add_up_to_the_bytes_of_the_text(spec: str) -> None:
    tokenizer = make(spec)
    sizes = tokenizer.token_sizes()
    assert len(sizes) == tokenizer.n_vocab
    assert sum(sizes[i] for i in tokenizer.encode(ODD)) == len(ODD.encode('utf-8'))
    assert tokenizer.eot is not None and sizes[tokenizer.eot] == 0


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_tokenizer_survives_a_checkpoint_that_loads_weights_only(
        spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = make(spec)
    file = io.BytesIO()
    torch.save({'tokenizer': before.state()}, file)
    assert file.tell() < 2_000_000
    file.seek(0)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))  # an empty folder: the state alone is enough
    after = tokenizer.from_state(torch.load(file, weights_only=True)['tokenizer'])
    assert (after.name, after.n_vocab, after.eot, after.pieces) == (spec, before.n_vocab, before.eot, before.pieces)
    assert after.encode(ODD) == before.encode(ODD)
    assert after.encode_prompt(ODD) == before.encode_prompt(ODD)


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_tokenizer_is_rebuilt_from_what_meta_json_keeps(spec: str) -> None:
    before = make(spec)
    after = tokenizer.from_state(json.loads(json.dumps(before.reference())))
    assert after.encode(ODD) == before.encode(ODD)
    assert after.state() == before.state()


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_batch_has_the_ids_of_its_texts(spec: str, documents: list[str]) -> None:
    texts = [ODD, '', *documents]
    tokenizer = make(spec, texts=texts)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_a_vocabulary_of_tiktokens_gives_the_ids_of_another_implementation(documents: list[str]) -> None:
    """A vocabulary that Hugging Face's code has learned, as tiktoken's: the tokens in the order of the merges."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    reference = ByteLevelBPETokenizer()
    reference.train_from_iterator(documents, 700, show_progress=False)
    learned = tokenizer.TrainedBPE('bpe:700', Tokenizer.from_str(reference.to_str()))
    ranks = {piece: i for i, piece in enumerate(learned.pieces)}
    vocabulary = tokenizer.Tiktoken(tiktoken.Encoding(
        'learned', pat_str=tokenizer.GPT2_PATTERNS[1], mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 700}))
    for document in [ODD, *documents]:
        assert vocabulary.encode(document) == reference.encode(document).ids
    found, expected = (json.loads(library.to_str())['model'] for library in (vocabulary.to_huggingface(), reference))
    assert len(found['merges']) == 700 - 256 and found['merges'] == expected['merges']


@pytest.mark.parametrize('name', ['r50k_base', 'cl100k_base', 'o200k_base', 'bpe:300'])
def test_a_long_text_is_cut_only_where_no_id_changes(name: str, small_encoding: 'tiktoken.Encoding',
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of every kind of neighbours, cut as often as possible, with the patterns that tiktoken publishes."""
    published, ranks = importlib.import_module('tiktoken_ext.openai_public'), small_encoding._mergeable_ranks
    draw = random.Random(1)
    vocabulary = make('bpe:300')
    if name != 'bpe:300':
        monkeypatch.setattr(published, 'load_tiktoken_bpe', lambda *_, **__: ranks)  # no download
        pattern = getattr(published, name)()['pat_str']
        vocabulary = tokenizer.Tiktoken(
            tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}))
    characters = " \n\t\r\u00a0\u3000\x1cab'sSL1é日🙂-./"
    texts = [''.join(draw.choices(characters, [12] + [1] * (len(characters) - 1), k=60)) for _ in range(500)]
    whole = [vocabulary.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer, 'PART', 1)
    assert sum(len(list(tokenizer.parts_of(text))) for text in texts) > 3000, 'the texts are cut'
    assert [vocabulary.encode(text) for text in texts] == whole
    assert [ids.tolist() for ids in vocabulary.encode_batch(texts)] == whole
    assert [vocabulary.decode(ids) for ids in whole] == texts


def test_a_pattern_that_is_not_cut_and_fails_is_one_clear_message(small_encoding: 'tiktoken.Encoding') -> None:
    other = tokenizer.Tiktoken(tiktoken.Encoding(
        'other', pat_str=r'\s+(?!\S)|\s+|\S+', mergeable_ranks=small_encoding._mergeable_ranks, special_tokens={}))
    assert not other.may_cut and len(list(other.parts('a b ' * 10**6))) == 1
    with pytest.raises(UserError, match="the tokenizer 'other' cannot encode a text of 1,000,001 characters"):
        other.encode(' ' * 10**6 + 'x')


@pytest.mark.parametrize('spec', ['gpt2', 'bpe:300'])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_no_run_of_characters_is_too_long(spec: str) -> None:
    vocabulary = make(spec)
    for text in (' ' * 1_100_000 + 'x', 'a ' + 'b' * 1_100_000):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_vocabulary_learns_from_parts_of_endless_words(tiny_text: str) -> None:
    """A word of 300,000 letters would take minutes as a whole."""
    letters = ''.join(random.Random(1).choices('ACGT', k=300_000))
    assert sum(set(piece) <= set(b'ACGT') for piece in make('bpe:700', texts=[letters]).pieces) > 400
    make('bpe:300', texts=[' ' * 300_000])
    words = [word for word in tiny_text.split(' ') if word]
    assert list(tokenizer.without_long_words(tiny_text)) == [tiny_text], f'{max(map(len, words))} characters at most'


def test_gpt2_has_the_published_ids(tiktoken_cache: Path, shared_data: Path) -> None:
    """OpenAI's own vocabulary and merges, under the names that tiktoken gives its downloads, in Hugging Face's code;
    and the number of tokens in a thousand pages of OpenWebText."""
    from tokenizers import ByteLevelBPETokenizer

    vocabulary, merges = (tiktoken_cache / name for name in ('6c7ea1a7e38e3a7f062df639a5b80947f075ffe6',
                                                             '6d1cbeee0f20b3d9449abfede4726ed8212e3aee'))
    reference = ByteLevelBPETokenizer(str(vocabulary), str(merges))
    tokenizer = make('gpt2')
    assert (tokenizer.n_vocab, tokenizer.eot) == (50257, 50256)
    with open(shared_data / 'openwebtext/openwebtext-1000.jsonl', encoding='utf-8') as file:
        pages = [json.loads(line)['text'] for line in file]
    for page in [ODD.replace('<|endoftext|>', ''), *pages[:100]]:
        assert tokenizer.encode(page) == reference.encode(page).ids
    assert sum(map(len, tokenizer.encode_batch(pages))) == 1_053_999


def test_characters_are_numbered_as_nanogpt_numbers_them(documents: list[str]) -> None:
    text = ''.join(documents)
    tokenizer = make('char', eot=False, texts=[text])
    order = sorted(set(text))
    assert (tokenizer.n_vocab, tokenizer.eot) == (len(order), None)
    assert tokenizer.encode(text[:5000]) == [order.index(character) for character in text[:5000]]


def test_characters_and_bytes_get_an_end_of_text_only_when_asked() -> None:
    assert (make('byte', eot=False).n_vocab, make('byte', eot=False).eot) == (256, None)
    assert (make('byte').n_vocab, make('byte').eot) == (257, 256)
    assert make('char').n_vocab == make('char', eot=False).n_vocab + 1
    assert make('byte', eot=False).encode_prompt('<|endoftext|>') == list(b'<|endoftext|>')


def test_a_bpe_has_as_many_ids_as_asked_and_fewer_only_for_a_small_text(tiny_text: str) -> None:
    tokenizer = make('bpe:512', eot=False, texts=[tiny_text])
    assert (tokenizer.n_vocab, tokenizer.eot) == (512, 511)
    assert len(tokenizer.encode(tiny_text)) < 0.6 * len(make('byte').encode(tiny_text))
    small = make('bpe:512', texts=['aaaa'])
    assert 256 < small.n_vocab < 512
    assert small.decode(small.encode(ODD)) == ODD


def test_a_bpe_is_the_same_in_every_process(tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / 'text').write_text(tiny_text, encoding='utf-8', newline='')
    program = ('import sys\nfrom plaingpt.corpus import tokenizer\n'
               'text = open(sys.argv[1], encoding="utf-8", newline="").read()\n'
               'print(tokenizer.build("bpe:600", lambda: text.splitlines(True), True).state()["json"])')
    answers = [subprocess.run([sys.executable, '-c', program, str(tmp_path / 'text')], check=True, text=True,
                              cwd=Path(__file__).parents[2], capture_output=True, encoding='utf-8',
                              env={**os.environ, 'PYTHONHASHSEED': seed, 'RAYON_NUM_THREADS': seed}).stdout.strip()
               for seed in ('1', '4')]
    assert answers[0] == answers[1] == make('bpe:600', texts=tiny_text.splitlines(True)).state()['json']


def test_a_character_cut_in_two_decodes_to_a_replacement() -> None:
    tokenizer = make('byte')
    assert tokenizer.decode(tokenizer.encode('é')[:1]) == '\ufffd'
    assert tokenizer.decode_bytes(tokenizer.encode('é')[:1]) == b'\xc3'


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(UserError, match=r"character 'z' \(position 2 of the text\)") as caught:
        make('char', texts=['abc']).encode('abz')
    assert caught.value.code == DATA


@pytest.mark.parametrize(('spec', 'message'), [
    ('gpt9', "tokenizer 'gpt9' is unknown.*\n.*gpt2.*cl100k_base"), ('bpe:', 'bpe:N'), ('bpe:100', '257 or more'),
    ('bpe:1k', 'bpe:N'),
])
def test_a_wrong_name_of_a_tokenizer_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(spec)
    assert caught.value.code == COMMAND


def test_without_network_one_line_names_the_remedy(tmp_path: Path) -> None:
    """The script runs in a process of its own, which has loaded no vocabulary yet and finds no proxy."""
    program = ('from plaingpt import errors; from plaingpt.corpus.tokenizer import build; '
               'errors.run(lambda _: print(build("gpt2", list, True)))')
    answer = subprocess.run([sys.executable, '-c', program], capture_output=True, check=False, encoding='utf-8',
                            cwd=Path(__file__).parents[2],
                            env=os.environ | {'TIKTOKEN_CACHE_DIR': str(tmp_path), 'HTTPS_PROXY': 'http://127.0.0.1:9'})
    assert answer.returncode == DATA
    assert 'TIKTOKEN_CACHE_DIR' in answer.stderr and 'Traceback' not in answer.stderr
    assert len(answer.stderr.splitlines()) <= 3
