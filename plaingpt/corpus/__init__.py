"""The way of a corpus: text -> tokens -> batches."""
