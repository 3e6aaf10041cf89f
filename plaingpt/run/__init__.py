"""A training run, and the files that it leaves in its out_dir."""
