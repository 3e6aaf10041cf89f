"""What the stages share. Imports point down; tests/test_imports.py says from where to where."""
