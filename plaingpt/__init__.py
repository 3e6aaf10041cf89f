"""What the stages share. Imports point down; tests/test_imports.py says from where to where."""
import os

# PyTorch reads this when it is imported. What it would say of a lost process are pages of C++ frames, before our line.
TORCH_CPP_LOG_LEVEL = os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
