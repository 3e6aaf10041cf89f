"""The tokenizer of a corpus that is being prepared: one made for it, or that of a model."""
import os
from collections.abc import Callable

from plaingpt.corpus.tokenizer import Tokenizer

NAMES = ('char', 'byte', 'gpt2')  # tokenizers, even if there are folders of these names


def encoder_for(spec: str, build: Callable[[], Tokenizer]) -> Tokenizer:
    """Return the tokenizer of the run, file of weights, Hugging Face folder, prepared corpus or tokenizer.json at the
    path `spec`, or, if nothing is there, the one that `build` makes."""
    if spec in NAMES or not os.path.exists(spec):
        return build()
    from plaingpt.init_from import tokenizer_of  # it loads PyTorch, which the processes that tokenise do without

    return tokenizer_of(spec)
