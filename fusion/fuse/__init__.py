"""Rules that make one target of several teachers: one file per word, one function per file."""
