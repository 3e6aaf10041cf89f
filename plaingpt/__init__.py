"""What the stages share. Imports point down; tests/test_imports.py says from where to where."""
import os
import sys

from plaingpt.paths import IS_INSTALLED, STAGES

# PyTorch reads this when it is imported. What it would say of a lost process are pages of C++ frames, before our line.
TORCH_CPP_LOG_LEVEL = os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

if IS_INSTALLED and sys.argv[:1] == ['-m']:  # python -m plaingpt.something: its process is ours, and may import model
    sys.path.insert(0, str(STAGES))
