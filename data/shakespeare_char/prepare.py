"""
Tiny Shakespeare by characters, as nanoGPT has it: 65 of them, 1,003,854 for training and 111,540 for validation.

    python data/shakespeare_char/prepare.py

Downloads one megabyte, in a second.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from plaingpt import errors, tiny_shakespeare
from plaingpt.corpus.folder import folder_for

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
input: str = ''  # the path of the text, if this machine has it; '' downloads it
tokenizer: str = 'char'  # nanoGPT's; or 'byte', 'bpe:N', 'gpt2', or the path of a run or model that has one
to_dir: str = ''  # the folder to write; '' is data/shakespeare_char
# ------------------------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    tiny_shakespeare.prepare(input, folder_for('shakespeare_char', to_dir), tokenizer, 'char', 'train_shakespeare_char')


if __name__ == '__main__':
    errors.run(main)
