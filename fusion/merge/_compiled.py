"""The few loops that torch has no single fast operation for, compiled (numba): loaded by the primitives that use them.

All release the interpreter's lock and are cached on disk. Each has a twin in plain torch that gives the same bits, used
on other devices and where numba is not installed.
"""

import numpy as np
from numba import njit
from torch import Tensor

SIGNLESS = np.uint32(0x7FFFFFFF)
SIXTEEN, LOWER = np.uint32(16), np.uint32(0xFFFF)
BYTE = np.uint32(255)
STEP = np.int64(1)
BLOCK, LANES = 4096, 512  # as in _sums.py
S30, S27, S31, S40 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(40)
GAMMA, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
UNIT = np.float32(2.0**-24)


def bits(x: Tensor) -> np.ndarray:
    """A float32 tensor's memory as unsigned integers."""
    out: np.ndarray = x.numpy().view(np.uint32)
    return out


@njit(nogil=True, cache=True)
def count_upper(x, out):  # (K, n) uint32, (K, 32768) int64
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[row, (x[row, i] & SIGNLESS) >> SIXTEEN] += STEP


@njit(nogil=True, cache=True)
def count_lower(x, buckets, out):  # (K, n) uint32, (K, B) int64, (K, B, 65536) int64
    for row in range(x.shape[0]):
        for b in range(buckets.shape[1]):
            wanted = np.uint32(buckets[row, b])  # -1 is no bucket's number, as an unsigned one neither
            for i in range(x.shape[1]):
                key = x[row, i] & SIGNLESS
                if key >> SIXTEEN == wanted:
                    out[row, b, key & LOWER] += STEP


@njit(nogil=True, cache=True)
def uniform(key, start, out):  # 64 bits each, (n,) float32
    z0 = np.uint64(key) + np.uint64(start) * GAMMA
    for i in range(out.shape[0]):
        z = z0 + np.uint64(i + 1) * GAMMA
        z = (z ^ (z >> S30)) * MIX1
        z = (z ^ (z >> S27)) * MIX2
        out[i] = np.float32((z ^ (z >> S31)) >> S40) * UNIT


@njit(nogil=True, cache=True)
def block_products(x, out):  # (m, n) float32, (blocks, m, m) float64, n at most blocks * BLOCK
    m = x.shape[0]
    wide = np.zeros((m, BLOCK))
    lanes = np.empty(LANES)
    for block in range(out.shape[0]):
        size = min(BLOCK, x.shape[1] - block * BLOCK)
        for row in range(m):
            for i in range(size):
                wide[row, i] = np.float64(x[row, block * BLOCK + i])
            for i in range(size, BLOCK):
                wide[row, i] = 0.0
        for i in range(m):
            for j in range(i + 1):
                lanes[:] = 0.0
                for at in range(0, BLOCK, LANES):
                    for lane in range(LANES):
                        lanes[lane] += wide[i, at + lane] * wide[j, at + lane]
                out[block, i, j] = out[block, j, i] = _folded(lanes)


@njit(nogil=True, cache=True)
def _folded(lanes):  # (LANES,) float64, overwritten
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[half + lane]
        half //= 2
    return lanes[0]


@njit(nogil=True, cache=True)
def ranks(x, out):  # (rows, n) uint32, (rows, n) int32
    """Place of each |x| in its row's ascending order, earlier ones first among equals.

    Two rounds of radix sort by the uppermost 16 bits that differ leave little to do for insertion; where that turns out
    wrong (many that differ in lower bits only), four rounds by all bits.
    """
    rows, n = x.shape
    keys = np.empty(n, np.uint32)
    order, moved = np.empty(n, np.int32), np.empty(n, np.int32)
    counts = np.empty(256, np.int32)
    for row in range(rows):
        differ = np.uint32(0)
        for i in range(n):
            keys[i] = x[row, i] & SIGNLESS
            differ |= keys[i] ^ keys[0]
            order[i] = i
        width = 0
        while differ >> np.uint32(width):
            width += 1
        low = max(0, width - 16)
        _by_byte(keys, order, moved, np.uint32(low), counts)
        _by_byte(keys, moved, order, np.uint32(low + 8), counts)
        if low > 0 and not _inserted(keys, order, 8 * n):
            for i in range(n):
                order[i] = i
            for shift in (0, 16):
                _by_byte(keys, order, moved, np.uint32(shift), counts)
                _by_byte(keys, moved, order, np.uint32(shift + 8), counts)
        for i in range(n):
            out[row, order[i]] = i


@njit(nogil=True, cache=True)
def _by_byte(keys, order, moved, shift, counts):
    """`moved` is `order`, sorted by one byte of the keys, equal ones as they stood."""
    counts[:] = 0
    for i in range(keys.shape[0]):
        counts[(keys[i] >> shift) & BYTE] += STEP
    place = 0
    for digit in range(256):
        count = counts[digit]
        counts[digit] = place
        place += count
    for i in range(keys.shape[0]):
        digit = (keys[order[i]] >> shift) & BYTE
        moved[counts[digit]] = order[i]
        counts[digit] += STEP


@njit(nogil=True, cache=True)
def _inserted(keys, order, budget):
    """Sorts `order`, nearly sorted by keys; False, with some of it undone, when that takes more than `budget` moves."""
    for i in range(1, keys.shape[0]):
        index = order[i]
        key = keys[index]
        j = i
        while j > 0 and keys[order[j - 1]] > key:
            order[j] = order[j - 1]
            j -= 1
        order[j] = index
        budget -= i - j
        if budget < 0:
            return False
    return True
