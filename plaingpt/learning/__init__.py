"""What helps to understand: exercises, and a look inside a model."""
