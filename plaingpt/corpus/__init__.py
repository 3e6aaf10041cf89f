"""Corpora: text -> tokens -> batches."""
