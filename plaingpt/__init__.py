"""The code that the stages share. Imports point down; tests/test_imports.py says from where to where."""
import gc
import os
import sys
from pathlib import Path

from plaingpt.paths import IS_INSTALLED, STAGES

# PyTorch reads this when it is imported. It would print pages of C++ frames about a lost process, above the one line of
# this project's.
TORCH_CPP_LOG_LEVEL = os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

COLLECTED = gc.get_threshold()  # how often Python looks for garbage, unless it is told otherwise
RARELY = 100_000  # objects between two looks, while a stage is imported, until errors.run
if Path(*sys.argv[:1]).resolve().parent == STAGES:  # a stage, and not a program or a test that imports one
    gc.set_threshold(RARELY)  # PyTorch leaves next to no garbage when it is imported, and to look for it takes long

if IS_INSTALLED and sys.argv[:1] == ['-m']:  # python -m plaingpt.something, which may import model
    sys.path.insert(0, str(STAGES))
