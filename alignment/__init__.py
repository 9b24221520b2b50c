"""Alignment here means correspondence between networks (which unit of one is which of another), not RLHF.

Pure maths on tensors and strings: this package knows no recipe, no checkpoint format and no trainer, and it never
imports `fusion`.

* `alignment.tokens`: the bytes each token of a text covers, and the byte boundaries two tokenizations share;
  needs NumPy and `tokenizers` only.
* `alignment.vocab`: one vocabulary into another, and distributions over one projected onto the other.
"""
