"""Where this project's own files are; and what a path that a user gives stands for: a file or folder of that very name,
what a glob matches, or a URL."""
import glob
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IS_INSTALLED = (PACKAGE / 'stages').is_dir()  # from a wheel, in which the stages are a part of the package
STAGES = PACKAGE / 'stages' if IS_INSTALLED else PACKAGE.parent  # the folder of the stages, config/ and data/
PREPARE = STAGES / 'data'  # has a <name>/prepare.py for each text
CORPORA = Path('data') if IS_INSTALLED else PREPARE  # has a folder for each corpus


def is_url(where: str) -> bool:
    """Return whether this is s3://..., file://... and the like, rather than a path (C:\\... is one)."""
    return re.match(r'[a-zA-Z][\w.+-]+://', where) is not None


def matching(path: Path, hidden: bool = False) -> list[Path]:
    """Return what a path stands for, in the order of names: itself, if it is there, whatever characters it has; or what
    it matches as a glob, of which the folders that are there under their very names are no part."""
    if path.exists():
        return [path]
    folder = next(folder for folder in path.parents if folder.exists())
    pattern = str(path.relative_to(folder))
    names = glob.glob(pattern, root_dir=folder, recursive=True, include_hidden=hidden)
    return sorted({folder / name for name in names})


def here_or_installed(path: str) -> Path:
    """Return the file of this name in the current folder, or else, if pip has installed the stages, beside these."""
    return STAGES / path if IS_INSTALLED and not Path(path).exists() else Path(path)
