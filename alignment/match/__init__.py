"""Two sets of units, one correspondence: a word takes similarities (n, m), target by donor, larger for a better match.

A hard matcher returns int64 (n,), the donor unit of each target unit (-1 for none); a soft one a coupling (n, m),
non-negative, that sums to one. `procrustes` returns an orthogonal matrix instead, for spaces that rotate.
"""
