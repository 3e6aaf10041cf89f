"""The code that the stages share. Imports point down; tests/test_imports.py says from where to where."""
import os
import sys

from plaingpt.paths import IS_INSTALLED, STAGES

# PyTorch reads this when it is imported. It would print pages of C++ frames about a lost process, above the one line of
# this project's.
TORCH_CPP_LOG_LEVEL = os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

if IS_INSTALLED and sys.argv[:1] == ['-m']:  # python -m plaingpt.something, which may import model
    sys.path.insert(0, str(STAGES))
