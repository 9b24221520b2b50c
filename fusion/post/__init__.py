"""What follows any merge method: one file per word, one function per file."""
