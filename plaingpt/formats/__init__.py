"""The files of other projects."""
