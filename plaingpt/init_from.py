"""The model that a name stands for: 'resume', 'gpt2-xl', a checkpoint, a folder or a URL; and what it has learned."""
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model import GPT, GPTConfig
from plaingpt.corpus import tokenizer
from plaingpt.corpus.folder import data_folder, how_to_prepare, is_prepared, read_meta
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import CHECKPOINT, DATA, UserError
from plaingpt.formats import huggingface, huggingface_tokenizer, llmc
from plaingpt.formats.weights import gpt_class
from plaingpt.machines import processes
from plaingpt.machines.processes import Process
from plaingpt.paths import is_url
from plaingpt.run import checkpoint, upload
from plaingpt.run.checkpoint import SHAPE, State

NOT_SHARED = 'out_dir must be one folder that all machines share, or --upload_to name a place that all can read'
GPT2_SIZES = (50257, tokenizer.model_vocab_size(50257))  # ids of GPT-2's tokenizer, and of a model that has learned it


# ------------------------------------------------------------------------------------------------
# A model that exists


def open_model(where: str, dropout: float = 0.0, answers: dict[str, Any] | None = None) -> tuple[GPT, State]:
    """Return the model that `where` names, and its checkpoint: a checkpoint file or the folder of a run, on this
    machine or at a URL; or llm.c's model file, a Hugging Face folder or a GPT-2 of the hub, whose checkpoint holds
    little or nothing. `answers` are those of `checkpoint.load`."""
    path = Path(where)
    if is_url(where):
        with tempfile.TemporaryDirectory() as folder:
            [file] = upload.fetch(where if where.endswith('.pt') else f'{where}/ckpt.pt', Path(folder))
            state = checkpoint.load(file, answers)
    elif checkpoint.holds_run(path):
        state = checkpoint.load_newest(path)
    elif path.is_file() and llmc.is_model(path):
        return GPT.from_weights(*llmc.load(path, dropout)), huggingface.read_origin(path.parent)
    elif path.is_file() or path.suffix in ('.pt', '.pth'):
        state = checkpoint.load(path, answers)
    elif (path / 'config.json').exists() or may_be_on_the_hub(where):
        config, weights = huggingface.load(where, dropout)
        model = gpt_class(config).from_weights(config, weights)
        return model, huggingface.read_origin(path) or huggingface_tokenizer.read(where)
    else:
        raise UserError(f'{where!r} is not a checkpoint, a run, a Hugging Face folder or the name of a GPT-2',
                        CHECKPOINT)
    return checkpoint.model_of(state, dropout), state


def may_be_on_the_hub(name: str) -> bool:
    path = Path(name)
    return (name.startswith('gpt2') and not path.exists()) or (name.count('/') == 1 and not path.parent.exists())


# ------------------------------------------------------------------------------------------------
# The model of a run


@dataclass(frozen=True)
class ModelSettings:
    """The settings of train.py that decide which model a run begins with, and which of all settings a user gave."""

    given: frozenset[str]
    out_dir: str
    init_from: str
    upload_to: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool
    gelu: Literal['tanh', 'exact']
    tie_weights: bool
    arch: Literal['gpt2', 'modern']
    shortcuts: bool

    @property
    def answers(self) -> dict[str, Any]:
        """Return what the user says about a foreign checkpoint, which may not say it itself."""
        return {name: getattr(self, name) for name in self.given & {'n_head', 'gelu'}}

    @property
    def is_new(self) -> bool:
        """Return whether the weights are drawn at random: no file gives them, and 'auto' has found no run to resume."""
        return self.init_from in ('scratch', 'start') or (
            self.init_from == 'auto' and not checkpoint.holds_run(Path(self.out_dir)))

    def new_config(self, n_vocab: int) -> GPTConfig:
        """Return the shape of a new model, for a tokenizer of n_vocab ids."""
        return GPTConfig(self.block_size, self.vocab_size or tokenizer.model_vocab_size(n_vocab), self.n_layer,
                         self.n_head, self.n_embd, self.dropout, self.bias, self.gelu, self.tie_weights, self.arch,
                         self.shortcuts and self.arch == 'modern')

    def refuse_other_shape(self, config: GPTConfig) -> None:
        """Raise UserError if a setting that the user gave contradicts the weights, which decide the shape of their
        model. Only the block_size may differ: it may be shorter."""
        for name in self.given.intersection(SHAPE) - {'block_size'}:
            asked, found = getattr(self, name), getattr(config, name)
            if asked != found and (name, asked) != ('vocab_size', 0):
                raise UserError(f'{name}={asked} was given, and the model in {self.init_from!r} has {found}\n'
                                f'leave {name} out, or start another model with --init_from=scratch')


class Origin(NamedTuple):
    """The model that a run begins with, and where it comes from."""

    model: GPT
    state: State  # the checkpoint that the weights come from; {} if there is none
    is_resumed: bool = False  # the run continues the one that wrote this checkpoint
    is_new: bool = False  # the weights have been drawn, and have learned nothing

    def tokenizer_reference(self, folder: Path) -> dict[str, Any]:
        """Return the tokenizer that the model has learned, or will learn from the corpus in `folder`."""
        return learned_reference(self.state, self.model.config.vocab_size, folder, is_of_corpus=self.is_new)


def begin(settings: ModelSettings, n_vocab: int, may_share_folder: bool, process: Process) -> Origin:
    """Return the model of a run on a corpus of n_vocab ids. Raise UserError if its folder holds another run already,
    unless it `may_share_folder`. Every process must call it."""
    run = Path(settings.out_dir)
    state = find_run(run, settings, process) if settings.init_from in ('resume', 'auto') else State()
    is_resumed = bool(state)
    if not is_resumed and checkpoint.holds_run(run) and not may_share_folder:
        raise UserError(f'{run} holds a run already: --init_from=resume continues it, --overwrite=True starts over,\n'
                        'another --out_dir leaves it alone')
    if not is_resumed and settings.is_new:
        config = settings.new_config(n_vocab)
        return Origin(gpt_class(config)(config), {}, is_new=True)
    if is_resumed:
        model = checkpoint.model_of(state, settings.dropout)
    else:
        model, state = open_model(settings.init_from, settings.dropout, settings.answers)
    settings.refuse_other_shape(model.config)
    if 'block_size' in settings.given and settings.block_size != model.config.block_size:
        model = model.crop_block_size(settings.block_size)
    return Origin(model, state, is_resumed)


def find_run(run: Path, settings: ModelSettings, process: Process) -> State:
    """Return the newest checkpoint in the folder of a run, which is fetched first if it was uploaded from another
    machine. If there is none, return {} for 'auto', and raise UserError for 'resume'. Raise it in all processes, too,
    if they find different ones."""
    if process.local_rank == 0:  # the others of this machine find what it has fetched
        checkpoint.fetch_run(run, settings.upload_to)
    processes.wait_for_all(process)
    state, error = State(), None
    if settings.init_from == 'resume' or checkpoint.holds_run(run):
        try:
            state = checkpoint.load_newest(run)
        except UserError as caught:
            error = caught
    processes.refuse_difference(process, {'checkpoint of step': state.get('iter_num')}, NOT_SHARED)
    if error:  # raised only now: every process must have reached the comparison
        raise error
    return state


# ------------------------------------------------------------------------------------------------
# Which tokenizer has this model learned?


def corpus_of(state: State, dataset: str = '') -> Path:
    """Return the folder of the corpus that was asked for, or else of the one that a checkpoint's run has read."""
    return data_folder(dataset or state.get('config', {}).get('dataset', 'openwebtext'))


def learned_tokenizer(state: State, vocab_size: int, folder: Path, is_of_corpus: bool = False) -> Tokenizer:
    """Return the tokenizer that `learned_reference` names. Raise UserError if it has more ids than the model."""
    code = CHECKPOINT if state.get('tokenizer') else DATA
    vocabulary = tokenizer.from_state(learned_reference(state, vocab_size, folder, is_of_corpus), code)
    if vocabulary.n_vocab > vocab_size:
        remedy = '' if state.get('tokenizer') else (
            f'\nit brings none: evaluate.py and export.py take that of any corpus, as --dataset=\n'
            f'or prepare its own corpus: {how_to_prepare(folder)}')
        raise UserError(f'the model knows {vocab_size} tokens, and the tokenizer {vocabulary.name} has '
                        f'{vocabulary.n_vocab}: it has learned another one{remedy}', CHECKPOINT)
    return vocabulary


def learned_reference(state: State, vocab_size: int, folder: Path, is_of_corpus: bool = False) -> dict[str, Any]:
    """Return the tokenizer that a model of vocab_size ids has learned, in the form of `Tokenizer.state()` or of
    `reference()`: that of its checkpoint. If the checkpoint has none, it is that of the corpus in `folder`, provided
    that there is one and that one of these holds: the caller knows that it `is_of_corpus`; the run was this project's,
    and the tokenizer's files were not available to it; the model's number of ids is not GPT-2's. Otherwise it is
    GPT-2's."""
    if state.get('tokenizer'):
        return dict(state['tokenizer'])
    is_known = is_of_corpus or bool(state.get('data'))
    if is_prepared(folder) and (is_known or vocab_size not in GPT2_SIZES):
        return dict(read_meta(folder)['tokenizer'])
    return {'name': 'gpt2'}


def tokenizer_of(where: str) -> Tokenizer:
    """Return the tokenizer of what a path names: a run, a file of weights, a Hugging Face folder, a corpus or a
    tokenizer.json."""
    path = Path(where)
    if checkpoint.holds_run(path) or path.suffix in ('.pt', '.pth'):
        state = checkpoint.load_newest(path) if path.is_dir() else checkpoint.load(path)
        return learned_tokenizer(state, state['model_args']['vocab_size'], corpus_of(state))
    if path.is_dir() and is_prepared(path):
        return tokenizer.from_state(read_meta(path)['tokenizer'])
    state = huggingface.read_origin(path) or huggingface_tokenizer.read(where)
    if path.is_dir() and not state and not huggingface_tokenizer.is_in(path):
        config = huggingface.read_config(where, 0.0)[0] if (path / 'config.json').is_file() else None
        if config is None or config.vocab_size not in GPT2_SIZES:
            raise UserError(f'--tokenizer={where}: this folder holds no run, no corpus and no tokenizer',
                            CHECKPOINT)
    return tokenizer.from_state(state.get('tokenizer') or {'name': 'gpt2'}, CHECKPOINT)


def shared_tokenizer(learned: dict[str, Any], folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a corpus, which must be the one that the model has learned; None if its files are not
    available. Raise UserError if it is another one."""
    meta = read_meta(folder)
    of_corpus = meta['tokenizer']
    try:
        vocabulary = tokenizer.from_state(learned, DATA if learned == of_corpus else CHECKPOINT)
    except tokenizer.Unavailable:
        vocabulary = None
    if learned['name'] != of_corpus['name'] or (vocabulary and vocabulary.reference() != of_corpus):
        raise UserError(f'the corpus was prepared with the tokenizer {of_corpus["name"]}, and the model has learned '
                        f'another: {learned["name"]}\nprepare the text again with the path of the model, or of its '
                        'run, as --tokenizer=', DATA)
    if vocabulary and vocabulary.n_vocab != meta['vocab_size']:
        raise UserError(f'{folder}/meta.json is damaged: its tokenizer has {vocabulary.n_vocab} ids, and vocab_size is '
                        f'{meta["vocab_size"]}\nrebuild the corpus: {how_to_prepare(folder)}', DATA)
    return vocabulary
