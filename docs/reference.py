"""
Write the settings of the stages into docs/reference.md, below what is written there by hand.

    python docs/reference.py            what `make reference` does
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/reference.md'
SCRIPTS = ('train.py', 'sample.py', 'evaluate.py', 'export.py', 'xray.py', 'data/text/prepare.py')
RULE = f'# {"-" * 96}\n'  # above and below the settings of a script
FIRST = f'### {SCRIPTS[0]}'


def settings_of(script: str) -> str:
    """Return the settings of a script as it has them, without the words that introduce them."""
    _, block, *_ = (ROOT / script).read_text(encoding='utf-8').split(RULE)
    lines = block.splitlines()
    start = next(i for i, line in enumerate(lines) if line and not line.startswith('# Settings'))
    if '' in lines[start:] and lines[start].startswith('# '):  # the rest of that paragraph
        start = lines.index('', start) + 1
    return '\n'.join(lines[start:])


def page() -> str:
    """Return the page as it should be."""
    by_hand = PAGE.read_text(encoding='utf-8').partition(f'\n{FIRST}\n')[0].rstrip('\n')
    blocks = (f'### {script}\n\n```python\n{settings_of(script)}\n```' for script in SCRIPTS)
    return '\n\n'.join([by_hand, *blocks]) + '\n'


def main(args: list[str]) -> None:
    if args:
        sys.exit((__doc__ or '').strip())
    PAGE.write_text(page(), encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1:])
