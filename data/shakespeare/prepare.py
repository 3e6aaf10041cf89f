"""
Tiny Shakespeare in GPT-2's tokens, as nanoGPT has it: 301,966 for training and 36,059 for validation.

    python data/shakespeare/prepare.py

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
tokenizer: str = 'gpt2'  # nanoGPT's; or 'char', 'byte', 'bpe:N', or the path of a run or model that has one
to_dir: str = ''  # the folder to write; '' is data/shakespeare
# ------------------------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    tiny_shakespeare.prepare(input, folder_for('shakespeare', to_dir), tokenizer, 'gpt2', 'finetune_shakespeare')


if __name__ == '__main__':
    errors.run(main)
