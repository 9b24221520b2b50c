"""Divergences between a teacher's target and the student: one file per word, one function per file."""
