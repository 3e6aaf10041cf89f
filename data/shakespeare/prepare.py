"""
Tiny Shakespeare in GPT-2's tokens, as nanoGPT has it: 301,966 for training and 36,059 for validation.

    python data/shakespeare/prepare.py

Downloads one megabyte, in a second.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from plaingpt import errors
from plaingpt.corpus import documents, tokenise, tokenizer

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
input: str = ''  # the text, where it is on this machine already; '' downloads it
# ------------------------------------------------------------------------------------------------

FOLDER = Path(__file__).resolve().parent


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    text = documents.read_tiny_shakespeare(input, FOLDER)
    encoder = tokenizer.build('gpt2', lambda: [text], eot=True)
    parts, validation = tokenise.split_text(text, 0.1)
    tokenise.write_corpus(FOLDER, tokenise.Packer(encoder, eot=None), parts, validation, 'tiny Shakespeare')
    print(f'next:\n    {errors.python()} train.py config/finetune_shakespeare.py\n'
          f'    {errors.python()} sample.py --out_dir=out-shakespeare')


if __name__ == '__main__':
    errors.run(main)
