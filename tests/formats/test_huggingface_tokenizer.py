"""Tokenizers beside models of other projects: the ids, the stop tokens and the text are those of transformers."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import export
import sample
from plaingpt import errors
from plaingpt.corpus import tokenizer
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model, tokenizer_of
from tests.comparing import refused


def their_tokenizer(**options: Any) -> Any:
    """Return a byte-level BPE as other projects train it, special tokens first."""
    library = tokenizers.ByteLevelBPETokenizer(**options)
    library.train_from_iterator([__doc__], vocab_size=300, special_tokens=['<s>', '<|endoftext|>'], show_progress=False)
    library.enable_truncation(8)
    return library


def their_folder(folder: Path, vocab_size: int, **settings: Any) -> Path:
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=8, n_layer=1, n_head=2, **settings)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def learned(folder: Path) -> tokenizer.Tokenizer:
    model, state = open_model(str(folder))
    return learned_tokenizer(state, model.config.vocab_size, corpus_of(state))


def write(path: Path, **settings: Any) -> None:
    before = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    path.write_text(json.dumps(before | settings), encoding='utf-8')


# ------------------------------------------------------------------------------------------------
# Added tokens


TEXTS = ['Hi<|user|>hello  mytool<|bot|> and <|endoftext|>more</s>', ' <|user|> mytools', '', ' ', 'no such token\n',
         '<|user|><|bot|></s></s>mytool', 'naïve <|us er|> 日本語 🙂 \x00']
ADDED = ('mytool', '<|user|>', '<|bot|>', '</s>')
DECODER = {str(i): {'content': content, 'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False,
                    'special': content != 'mytool'} for i, content in enumerate(('<|endoftext|>', *ADDED), start=298)}
GPT2, FAST = {'tokenizer_class': 'GPT2Tokenizer'}, {'tokenizer_class': 'PreTrainedTokenizerFast'}
KINDS: dict[str, tuple[bool, dict[str, dict[str, Any]]]] = {  # whether it is tokenizer.json, and the other files
    'nothing said': (True, {}),
    'a space first': (True, {'tokenizer_config.json': GPT2 | {'add_prefix_space': True}}),
    'a space first, which their class does not look for there': (
        True, {'tokenizer_config.json': FAST | {'add_prefix_space': True}}),
    'eos by name': (True, {'tokenizer_config.json': FAST | {'eos_token': '</s>', 'bos_token': '<|user|>'}}),
    'eos by an entry': (True, {'tokenizer_config.json': GPT2 | {
        'eos_token': DECODER['302'] | {'__type': 'AddedToken'}}}),
    'eos in the map': (True, {'special_tokens_map.json': {'eos_token': '</s>'}, 'tokenizer_config.json': GPT2}),
    'eos by id': (True, {'config.json': {'eos_token_id': 302, 'bos_token_id': 298}}),
    'eos to generate': (True, {'config.json': {'eos_token_id': 298}, 'generation_config.json': {
        'eos_token_id': [301, 302], 'bos_token_id': 300}}),
    'eos that is unknown': (True, {'config.json': {'eos_token_id': 50256, 'bos_token_id': 50256}}),
    'two files': (False, {}),
    'two files, special ones named': (False, {
        'added_tokens.json': {'mytool': 299, '</s>': 302, '<|bot|>': 301, '<|user|>': 300},
        'special_tokens_map.json': {'eos_token': '</s>', 'additional_special_tokens': ['<|user|>', '<|bot|>']}}),
    'two files and a space first': (False, {'tokenizer_config.json': GPT2 | {
        'added_tokens_decoder': DECODER, 'eos_token': '</s>', 'add_prefix_space': True}}),
    'two files, which their list of added tokens outranks': (False, {
        'special_tokens_map.json': {'eos_token': '<|bot|>'}, 'tokenizer_config.json': GPT2 | {
            'added_tokens_decoder': DECODER, 'extra_special_tokens': ['<|user|>']}}),
    'two files, a map that outranks the settings': (False, {
        'special_tokens_map.json': {'eos_token': '<|bot|>'}, 'tokenizer_config.json': GPT2 | {'eos_token': '</s>'}}),
    'special with flags that the settings do not repeat': (True, {'tokenizer_config.json': GPT2 | {
        'eos_token': '</s>', 'added_tokens_decoder': DECODER | {'302': DECODER['302'] | {'lstrip': True}}}}),
    'a dict of more': (True, {'tokenizer_config.json': FAST | {'extra_special_tokens': {'tool_token': 'mytool'}}}),
    'two files, special in the vocabulary': (False, {'special_tokens_map.json': {'eos_token': 'e', 'unk_token': 'h'}}),
}


def save_tokenizer(folder: Path, is_one_file: bool, settings: dict[str, dict[str, Any]], space_first: bool) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=298, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    library.train_from_iterator([*TEXTS, 'the other thing, then, there ' * 3, *['hello more and'] * 9], trainer)
    if is_one_file:
        library.add_special_tokens(['<|endoftext|>'])
        library.add_tokens([tokenizers.AddedToken('mytool', normalized=False)])
        library.add_special_tokens(list(ADDED[1:]))
        library.save(str(folder / 'tokenizer.json'))
    else:
        library.model.save(str(folder))
        ids = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
        write(folder / 'vocab.json', **{'<|endoftext|>': len(ids)})
        write(folder / 'added_tokens.json', **{name: 299 + i for i, name in enumerate(ADDED)})
    for name, content in settings.items():
        if name == 'added_tokens.json':
            (folder / name).unlink()
        write(folder / name, **content)


@pytest.mark.parametrize('space_first', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_added_tokens_are_read_as_transformers_reads_them(kind: str, space_first: bool, tmp_path: Path) -> None:
    """Compare the ids of texts, the texts of ids, and the tokens at which a text, and `generate`, ends; also after an
    export."""
    transformers = pytest.importorskip('transformers')
    is_one_file, settings = KINDS[kind]
    folder = their_folder(tmp_path / 'source', 303, **settings.get('config.json', {}))
    save_tokenizer(folder, is_one_file, settings, space_first)
    found = learned(folder)
    export.main([f'--init_from={folder}', f'--to_dir={tmp_path}/exported'])
    for path in (folder, tmp_path / 'exported'):
        reference = transformers.AutoTokenizer.from_pretrained(path)
        for text in TEXTS:
            ids = reference(text).input_ids
            assert found.encode_prompt(text) == found.encode(text) == ids
            assert [i.tolist() for i in found.encode_batch([text, text])] == [ids, ids]
            assert found.decode(ids) == reference.decode(ids)
        assert {i for i in found.special if i is not None} == set(reference.all_special_ids) | {
            i for i, token in reference.added_tokens_decoder.items() if token.special}
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        generation = model.generation_config
        stops = [generation.eos_token_id] if isinstance(generation.eos_token_id, int) else generation.eos_token_id
        known = [i for i in stops if i is not None and i < len(reference)]
        assert found.eot == (known or [reference.eos_token_id or reference.convert_tokens_to_ids('<|endoftext|>')])[0]
        if known:
            assert found.bos == generation.bos_token_id
    assert tokenizer.from_state(found.state()).state() == found.state() == tokenizer_of(str(folder)).state()
    assert found.token_sizes()[found.pieces.index(b'mytool')] == 6
    without_text = {i for i, n_bytes in enumerate(found.token_sizes()) if not n_bytes}
    assert without_text == {found.eot, found.bos} & found.special


def test_a_tokenizer_that_adds_only_the_end_of_a_text_is_read_as_plaingpts(tmp_path: Path) -> None:
    """So a run that was exported, and lost its plaingpt.json, is the same again: the token's name in a text is text."""
    found = tokenizer.build('bpe:300', lambda: [__doc__ or ''], eot=True)
    folder = their_folder(tmp_path, 300)
    found.to_huggingface().save(str(folder / 'tokenizer.json'))
    assert learned(folder).state() == found.state() == tokenizer_of(str(folder / 'tokenizer.json')).state()
    assert learned(folder).encode('<|endoftext|>') == found.encode('<|endoftext|>') != [found.eot]


def test_a_text_that_a_token_may_span_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts with tokens that have a space in them, or that take the spaces around them; without such tokens, texts are
    cut."""
    transformers = pytest.importorskip('transformers')
    monkeypatch.setattr(tokenizer, 'PART', 3)
    for number, flags in enumerate([{}, {'lstrip': True}, {'rstrip': True}, {'single_word': True}]):
        for name in ('mytool', 'my tool'):
            folder = their_folder(tmp_path / f'{number}{name}', 303)
            save_tokenizer(folder, False, {}, False)
            (folder / 'added_tokens.json').unlink()
            decoder = {str(i): entry for i, entry in DECODER.items() if i in ('298', '299')}
            decoder['299'] = decoder['299'] | {'content': name} | flags
            write(folder / 'tokenizer_config.json', **GPT2, added_tokens_decoder=decoder)
            found, text = learned(folder), 'then my tool and  mytool  or mytools there ' * 3
            assert found.encode(text) == transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
            assert found.may_cut == (name == 'mytool' and not flags)
            assert (len(list(found.parts(text))) > 10) == found.may_cut


def test_a_sample_stops_at_the_models_own_token_and_ollama_is_told_which_it_is(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip('gguf')
    folder = their_folder(tmp_path / 'source', 303, tie_word_embeddings=False)
    save_tokenizer(folder, True, {'tokenizer_config.json': FAST | {'eos_token': '</s>'}}, False)
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # the model always predicts </s>
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.ln_f.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[302] = 1.0
    model.save_pretrained(folder)
    sample.main([f'--init_from={folder}', '--start=<|user|>', '--stop=True', '--num_samples=1', '--temperature=0'])
    assert capsys.readouterr().out == f'<|user|>\n{sample.RULE}\n'

    export.main([f'--init_from={folder}', f'--to_dir={tmp_path}/gguf', '--to=gguf'])
    assert 'PARAMETER stop "</s>"' in (tmp_path / 'gguf/Modelfile').read_text(encoding='utf-8')
    fields = gguf.GGUFReader(tmp_path / 'gguf/model.gguf').fields
    assert fields['tokenizer.ggml.eos_token_id'].contents() == 302
    types = fields['tokenizer.ggml.token_type'].contents()
    control, added, normal = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.NORMAL
    assert types[297:] == [normal, control, added, control, control, control]

    write(folder / 'tokenizer_config.json', **GPT2, add_prefix_space=True)
    assert 'cannot be written as GGUF' in refused(
        export.main, [f'--init_from={folder}', f'--to_dir={tmp_path}/2', '--to=gguf'], code=errors.COMMAND)


def test_a_special_token_keeps_the_flags_that_it_was_added_with(tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    folder = their_folder(tmp_path, 303)
    save_tokenizer(folder, True, {'tokenizer_config.json': FAST | {'eos_token': '</s>'}}, False)
    its = json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))
    its['added_tokens'][-1] |= {'lstrip': True, 'rstrip': True}
    write(folder / 'tokenizer.json', added_tokens=its['added_tokens'])
    found, reference = learned(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = 'hello </s> there </s>'
    assert found.encode(text) == reference(text).input_ids and found.eot == 302
    assert not found.may_cut


def test_an_eos_that_is_an_ordinary_token_gets_no_name(tmp_path: Path) -> None:
    """One example is GPT2Config's 50256 in a larger vocabulary; such a token may even be half a character."""
    pytest.importorskip('gguf')
    transformers = pytest.importorskip('transformers')
    for number, eos in enumerate((125, 261)):
        folder = their_folder(tmp_path / f'source{number}', 303, eos_token_id=eos, bos_token_id=eos)
        save_tokenizer(folder, True, {'tokenizer_config.json': FAST}, False)
        found = learned(folder)
        assert found.eot == eos and found.token_sizes()[eos] > 0
        for to in ('hf', 'gguf'):
            export.main([f'--init_from={folder}', f'--to={to}', f'--to_dir={tmp_path}/{number}{to}'])
        assert 'stop' not in (tmp_path / f'{number}gguf/Modelfile').read_text(encoding='utf-8').split('"""')[2]
        before, after = map(transformers.AutoTokenizer.from_pretrained, (folder, tmp_path / f'{number}hf'))
        assert len(after) == len(before) == 303
        assert [after(text).input_ids for text in TEXTS] == [before(text).input_ids for text in TEXTS]


def test_a_special_token_that_only_the_settings_name_is_added_if_the_model_has_an_id_for_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip('transformers')
    for n_vocab, added in ((320, ['<a>', '<b>', '<c>']), (304, ['<a>']), (303, [])):
        folder = their_folder(tmp_path / str(n_vocab), n_vocab)
        save_tokenizer(folder, True, {'tokenizer_config.json': FAST | {
            'eos_token': '<a>', 'pad_token': '<b>', 'additional_special_tokens': ['<c>']}}, False)
        found, reference = learned(folder), transformers.AutoTokenizer.from_pretrained(folder)
        text = 'one<a>two' if added else 'one two'
        assert found.encode(text) == reference(text).input_ids and found.n_vocab == 303 + len(added)
        assert [piece.decode() for piece in found.pieces[303:]] == added
        assert found.eot == (303 if added else 298)


def test_a_text_may_end_at_any_of_several_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends as `generate` ends it; also after an export."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('gguf')
    folder = their_folder(tmp_path / 'source', 303, tie_word_embeddings=False)
    save_tokenizer(folder, True, {'generation_config.json': {'eos_token_id': [301, 302]}}, False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # the model always predicts </s>, the second of them
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.ln_f.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[302] = 1.0
    model.save_pretrained(folder)
    for path in (folder, tmp_path / 'hf'):
        found = learned(path)
        assert (found.eot, found.stops) == (301, (301, 302))
        assert tokenizer.from_state(found.state()).stops == found.stops
        reference = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert len(reference.generate(torch.tensor([[5]]), do_sample=False, max_new_tokens=9)[0]) == 2
        capsys.readouterr()
        sample.main([f'--init_from={path}', '--start=<|user|>', '--stop=True', '--num_samples=1', '--temperature=0'])
        assert capsys.readouterr().out == f'<|user|>\n{sample.RULE}\n'
        export.main([f'--init_from={folder}', f'--to_dir={tmp_path}/hf', '--overwrite=True'])
    export.main([f'--init_from={folder}', f'--to_dir={tmp_path}/gguf', '--to=gguf'])
    modelfile = (tmp_path / 'gguf/Modelfile').read_text(encoding='utf-8')
    assert 'PARAMETER stop "<|bot|>"\nPARAMETER stop "</s>"\n' in modelfile


def test_names_of_special_tokens_in_a_text_count_as_text(tmp_path: Path) -> None:
    """So bits per byte count the whole text."""
    folder = their_folder(tmp_path, 303)
    save_tokenizer(folder, True, {'tokenizer_config.json': FAST | {'eos_token': '</s>'}}, False)
    found, text = learned(folder), 'hello<|user|> and<|bot|>mytool'
    assert sum(found.token_sizes()[i] for i in found.encode(text)) == len(text.encode())


def test_a_folder_without_a_tokenizer_is_not_taken_for_gpt2s(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    for folder in (tmp_path / 'empty', their_folder(tmp_path / 'small', 420)):
        assert 'no run, no corpus and no tokenizer' in refused(tokenizer_of, str(folder), code=errors.CHECKPOINT)


def test_a_token_that_begins_every_text_begins_every_prompt(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip('transformers')
    folder, library = their_folder(tmp_path, 300, bos_token_id=0), their_tokenizer()
    library.no_truncation()
    library.post_processor = tokenizers.processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 0)])
    library.save(str(folder / 'tokenizer.json'))
    found, reference = learned(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ('', 'the ids', '<|endoftext|> of\n'):
        assert found.encode_prompt(text) == [0, *found.encode(text)] == reference(text).input_ids
    sample.main([f'--init_from={folder}', '--start=', '--num_samples=1', '--max_new_tokens=0'])
    assert found.bos == 0 and capsys.readouterr().out.endswith(f'\n{sample.RULE}\n')


# ------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize('is_one_file', [True, False])
def test_a_tokenizer_of_gpt2s_kind_is_read_from_a_folder(is_one_file: bool, tmp_path: Path) -> None:
    folder, reference = their_folder(tmp_path / 'source', 300), their_tokenizer()
    if is_one_file:
        reference.save(str(folder / 'tokenizer.json'))
    else:
        reference.save_model(str(folder))
    model, state = open_model(str(folder))
    found = learned_tokenizer(state, model.config.vocab_size, corpus_of(state))
    reference.no_truncation()
    for text in (__doc__, 'naïve café 日本語 \x00 end  of\n'):
        assert found.encode(text) == reference.encode(text).ids
        assert found.decode(found.encode(text)) == text
    assert (found.eot, found.n_vocab, found.pieces[0]) == (1, reference.get_vocab_size(), b'<s>')
    export.main([f'--init_from={folder}', f'--to_dir={tmp_path}/exported'])
    assert open_model(f'{tmp_path}/exported')[1]['tokenizer'] == found.state()
    exported = tokenizers.Tokenizer.from_file(f'{tmp_path}/exported/tokenizer.json')
    assert exported.encode(__doc__).ids == found.encode(__doc__)


def test_a_model_of_the_hub_has_the_tokenizer_beside_it(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    """Without network, the tokenizer comes out of the cache that a download has left."""
    cache = tmp_path / 'hub/models--alice--novels'
    (cache / 'refs').mkdir(parents=True)
    (cache / 'refs/main').write_text('0' * 40, encoding='utf-8')
    folder = their_folder(cache / 'snapshots' / ('0' * 40), 300)
    their_tokenizer().save(str(folder / 'tokenizer.json'))
    arguments = ['export.py', '--init_from=alice/novels', f'--to_dir={tmp_path}/exported']
    result = run_script(*arguments, cwd=tmp_path, environment={'HF_HOME': str(tmp_path)})
    assert result.returncode == 0, result.stderr
    state = json.loads((tmp_path / 'exported/plaingpt.json').read_text(encoding='utf-8'))
    expected = open_model(str(folder))[1]['tokenizer']
    assert state['tokenizer'] == expected and expected['name'].startswith('bpe:')


def test_gpt2s_tokenizer_is_known_by_its_tokens(tmp_path: Path, tiktoken_cache: Path) -> None:
    folder = their_folder(tmp_path, 50257)
    for name, file in (('vocab.json', '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6'),
                       ('merges.txt', '6d1cbeee0f20b3d9449abfede4726ed8212e3aee')):
        shutil.copy(tiktoken_cache / file, folder / name)
    assert open_model(str(folder))[1] == {}
    pytest.importorskip('transformers').AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert (folder / 'tokenizer.json').is_file() and open_model(str(folder))[1] == {}


@pytest.mark.parametrize('kind', ['lowercase', 'without all bytes', 'words', 'damaged', 'odd settings'])
def test_a_tokenizer_of_another_kind_is_not_taken_for_gpt2s(kind: str, tmp_path: Path) -> None:
    library = their_tokenizer(lowercase=kind == 'lowercase')
    text = library.to_str()
    if kind == 'without all bytes':
        tree = json.loads(text)
        vocab = tree['model']['vocab']
        vocab['ĀĀ'] = vocab.pop('Ā')
        text = json.dumps(tree)
    if kind == 'words':
        text = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, '')).to_str()
    path = their_folder(tmp_path, 300) / 'tokenizer.json'
    path.write_text('{' if kind == 'damaged' else text, encoding='utf-8')
    if kind == 'odd settings':
        write(tmp_path / 'tokenizer_config.json', eos_token=['</s>'])
    message = refused(open_model, str(tmp_path), code=errors.CHECKPOINT)
    assert f"the tokenizer of {tmp_path} is damaged, or of another kind than GPT-2's" in message
    path.unlink()
    assert open_model(str(tmp_path))[1] == {}, 'as the message advises'
