"""
Tiny Shakespeare in GPT-2's tokens as llm.c splits it: 305,260 for training and 32,768 for validation.

    python data/tinyshakespeare/prepare.py

Speeches are documents: the end-of-text token stands before each, and the first 32,768 tokens are for validation.
Downloads one megabyte, in a second. data/shakespeare has nanoGPT's split of the same text.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import configurator
from plaingpt import console, errors, tiny_shakespeare
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.folder import folder_for, next_steps
from plaingpt.corpus.tokenizer import build
from plaingpt.encoder import encoder_for

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
input: str = ''  # the path of the text, if this machine has it; '' downloads it
tokenizer: str = 'gpt2'  # llm.c's; or 'char', 'byte', 'bpe:N', learned from all of it, or the path of a run or model
to_dir: str = ''  # the folder to write; '' is data/tinyshakespeare
# ------------------------------------------------------------------------------------------------

N_VALIDATION = 32768  # tokens


def split_sections(text: str) -> list[str]:
    """Split a text at blank lines, which stay at the end of their section."""
    *sections, last = text.split('\n\n')
    return [*(f'{section}\n\n' for section in sections), last]


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    folder = folder_for('tinyshakespeare', to_dir)
    sections = split_sections(tiny_shakespeare.read(input, folder))
    encoder = encoder_for(tokenizer, lambda: build(tokenizer, lambda: sections, eot=True))
    packer = tokenise.Packer(encoder, encoder.eot, eot_first=True)
    ids = np.frombuffer(packer.pack(map(documents.Passage, sections)).tokens, packer.dtype)
    sizes = np.array(encoder.token_sizes())  # bytes of text
    splits = []
    for split, part in [('val', ids[:N_VALIDATION]), ('train', ids[N_VALIDATION:])]:
        n_documents, n_bytes = int(np.isin(part, packer.end).sum()), int(sizes[part].sum())
        splits.append((split, tokenise.Packed(
            part.tobytes(), int(part.max(initial=0)), n_documents, n_bytes, tokenise.Marks(), n_hard_cuts=0)))
    tokenise.write_files(folder, packer, tiny_shakespeare.NAME, splits)
    console.say(next_steps(folder, 'overfit_tinyshakespeare', 'tinyshakespeare', 'out-tinyshakespeare', samples=False))


if __name__ == '__main__':
    errors.run(main)
