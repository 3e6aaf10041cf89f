"""The tokenizer of a corpus that is prepared: one that is made for it, or that of a model."""
import os
from collections.abc import Callable

from plaingpt.corpus.tokenizer import Tokenizer

NAMES = ('char', 'byte', 'gpt2')  # which may be folders, too


def encoder_for(spec: str, build: Callable[[], Tokenizer]) -> Tokenizer:
    """Return the tokenizer of a run, of a file of weights, of a Hugging Face folder, of a prepared corpus or of a
    tokenizer.json, if there is one at the path `spec`; if not, what `build` makes of that."""
    if spec in NAMES or not os.path.exists(spec):
        return build()
    from plaingpt.init_from import tokenizer_of  # it loads PyTorch, which processes that tokenise do without

    return tokenizer_of(spec)
