"""A model on its way into a file of another project, whichever that is."""
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from model import GPTConfig
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.formats.weights import gpt_class
from plaingpt.machines.device import DTYPES


@dataclass(frozen=True)
class Exported:
    """All that a file is written from."""

    name: str
    config: GPTConfig
    weights: dict[str, Tensor]  # under GPT-2's names
    learned: Tokenizer | None  # None only on the way to a checkpoint of this project
    dtype: str  # of the weights in the file: a name of torch's, or 'q8_0'
    state: dict[str, Any]  # the checkpoint that the model comes from; {} if another project's file says no more

    @property
    def vocabulary(self) -> Tokenizer:
        assert self.learned, 'open_source has refused a model without a tokenizer'
        return self.learned

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the type of the weights in a format that has torch's types."""
        return DTYPES[self.dtype]

    @property
    def prompt(self) -> str:
        """Return a text to try the model with, which its tokenizer can encode."""
        knows_letters = {b'T', b'h', b'e'} <= set(self.vocabulary.pieces)
        return 'The' if knows_letters else self.vocabulary.decode([self.vocabulary.n_vocab // 2])

    def complete(self) -> Self:
        """Return the same function in the form that other projects expect: with biases, which may be zero, without the
        rows that pad the vocabulary, and without a head if it is the table of tokens."""
        config = replace(self.config, bias=self.config.arch == 'gpt2', vocab_size=self.vocabulary.n_vocab)
        shapes = {name: p.shape for name, p in gpt_class(config).on_meta(config).named_parameters()}
        weights = {name: p[:shapes[name][0]] for name, p in self.weights.items() if name in shapes}
        biases = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in weights}
        return replace(self, config=config, weights=weights | biases)
