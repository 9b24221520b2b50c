"""Two sets of units, one correspondence: a word takes similarities (n, m), target by donor, larger for a better match.

A hard matcher returns int64 (n,), the donor unit of each target unit (-1 for none); a soft one a float64 coupling
(n, m), non-negative, whose sum is the matched mass: one, or less where units may stay unmatched, with rows and columns
of zeros. A matcher that names `target` and `donor` is given similarities within each network, (n, n) and (m, m).
`procrustes` returns an orthogonal matrix instead, for spaces that rotate.
"""
