"""What helps to understand: a look inside a model."""
