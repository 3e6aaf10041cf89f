"""The places of this project's own files; and what a path that a user gives stands for: a file or folder of that very
name, what a glob matches, or a URL."""
import glob
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IS_INSTALLED = (PACKAGE / 'stages').is_dir()  # from a wheel, in which the stages are part of the package
STAGES = PACKAGE / 'stages' if IS_INSTALLED else PACKAGE.parent  # the folder of the stages, config/ and data/
PREPARE = STAGES / 'data'  # has a <name>/prepare.py for each text
CORPORA = Path('data') if IS_INSTALLED else PREPARE  # has a folder for each corpus


def is_url(where: str) -> bool:
    """Return whether this is s3://..., file://... and the like, rather than a path (C:\\... is one)."""
    return re.match(r'[a-zA-Z][\w.+-]+://', where) is not None


def matching(path: Path, hidden: bool = False) -> list[Path]:
    """Return what a path stands for, in the order of names: the path itself, if it exists, whatever characters it has;
    or all that it matches as a glob. The glob begins below the last folder that exists under its very name."""
    if path.exists():
        return [path]
    folder = next(folder for folder in path.parents if folder.exists())
    pattern = str(path.relative_to(folder))
    names = glob.glob(pattern, root_dir=folder, recursive=True, include_hidden=hidden)
    return sorted({folder / name for name in names})


def here_or_installed(path: str) -> Path:
    """Return the file of this name in the current folder, or else, if pip has installed the stages, beside them."""
    return STAGES / path if IS_INSTALLED and not Path(path).exists() else Path(path)
