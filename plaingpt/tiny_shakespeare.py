"""Tiny Shakespeare, a megabyte of the plays, and the corpora that nanoGPT makes from it."""
from pathlib import Path

from plaingpt import console
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.download import download
from plaingpt.corpus.folder import next_steps
from plaingpt.encoder import encoder_for

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
NAME = 'tiny Shakespeare'  # in meta.json


def read(path: str, folder: Path) -> str:
    """Return the text at `path`; if that is '', download it to folder/input.txt."""
    path = path or str(download(URL, folder / 'input.txt', SHA256))
    return next(documents.read_documents(documents.find_pieces(documents.find_files(path, folder)[0])))


def prepare(path: str, folder: Path, spec: str, usual: str, config: str) -> None:
    """Split the text by position, tokenise it as `spec` says, and name the commands that train on it and sample. The
    `config` is for a corpus in the `usual` tokens; with any others, training starts from scratch."""
    text = read(path, folder)
    parts, validation = tokenise.split_text(text, 0.1)
    encoder = encoder_for(spec, lambda: tokenise.build_tokenizer(spec, parts, validation, eot=False))
    tokenise.write_corpus(folder, tokenise.Packer(encoder, eot=None), parts, validation, NAME)
    dataset = config.partition('_')[2]  # train_shakespeare_char trains on shakespeare_char
    run = f'out-{dataset.replace("_", "-")}'
    steps = next_steps(folder, config, dataset, run) if spec == usual else next_steps(
        folder, 'train_stdlib', 'stdlib', 'out-stdlib', run)
    console.say(steps)
