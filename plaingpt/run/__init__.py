"""What a run leaves in its out_dir."""
