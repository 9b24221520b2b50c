/* The few loops that torch has no single fast operation for. Each has a twin in plain torch that gives the same bits
 * (_radix.py, _draw.py, _sums.py, _votes.py; of `sample` the same to rounding, _sampled.py; of `read_finite` Checkpoint.read);
 * _compiled.py builds this file with the machine's compiler.
 * No product is fused with a sum (-ffp-contract=off), since that would round differently. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define SIGNLESS 0x7FFFFFFFu
#define HIGH 32768   /* upper 15 bits of |x| */
#define LOW 65536    /* lower 16 bits */
#define BLOCK 4096   /* as in _sums.py */
#define LANES 512
#define STEPS 8       /* entries of a block in each lane */
#define SIDE 16      /* lanes that are added side by side */
#define PIECE 65536  /* read at a time, so that they stay in a core's cache */
#define NEAR 1024     /* entries of several rows that stay in a core's nearest cache */
#define GROUP 16     /* entries that are compared at once */

/* the bits of |x|, which sort as the numbers do */
static uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & SIGNLESS;
}

/* how many entries of each row less `origin` (n, or NULL) have these upper bits of their magnitude */
void count_upper(const float *x, int64_t rows, int64_t n, const float *origin, int64_t *out) {
    for (int64_t row = 0; row < rows; row++, x += n, out += HIGH)
        if (origin)
            for (int64_t i = 0; i < n; i++) out[magnitude(x[i] - origin[i]) >> 16]++;
        else
            for (int64_t i = 0; i < n; i++) out[magnitude(x[i]) >> 16]++;
}

/* how many entries of each bucket of a row have these lower bits of their magnitude; bucket -1 has none */
void count_lower(const float *x, int64_t rows, int64_t n, const float *origin, const int64_t *buckets, int64_t per_row,
                 int64_t *out) {
    for (int64_t row = 0; row < rows; row++, x += n)
        for (int64_t b = 0; b < per_row; b++, buckets++, out += LOW) {
            uint32_t wanted = (uint32_t)*buckets, keys[GROUP];
            for (int64_t i = 0; i < n; i += GROUP) {
                int size = n - i < GROUP ? (int)(n - i) : GROUP, any = 0;
                if (origin)
                    for (int j = 0; j < size; j++) keys[j] = magnitude(x[i + j] - origin[i + j]);
                else
                    for (int j = 0; j < size; j++) keys[j] = magnitude(x[i + j]);
                for (int j = 0; j < size; j++) any |= keys[j] >> 16 == wanted;
                if (any) /* most groups have none */
                    for (int j = 0; j < size; j++)
                        if (keys[j] >> 16 == wanted) out[keys[j] & (LOW - 1)]++;
            }
        }
}

/* n bfloat16 of a file as float32; whether they are there and all finite */
int64_t read_finite(int64_t descriptor, int64_t place, int64_t n, float *out) {
    uint16_t piece[PIECE], most = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        int64_t size = n - at < PIECE ? n - at : PIECE;
        if (pread((int)descriptor, piece, 2 * size, place + 2 * at) != 2 * size) return 0;
        for (int64_t i = 0; i < size; i++) {
            uint32_t bits = (uint32_t)piece[i] << 16;
            uint16_t magnitude = piece[i] & 0x7FFF;
            most = magnitude > most ? magnitude : most;
            memcpy(out + at + i, &bits, sizeof bits);
        }
    }
    return most < 0x7F80;
}

/* how many entries of each row are not zero */
void count_nonzero(const float *x, int64_t rows, int64_t n, int64_t *out) {
    for (int64_t row = 0; row < rows; row++, x += n) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++) count += x[i] != 0;
        out[row] = count;
    }
}

/* SplitMix64 of key and element index, as multiples of 2^-24 in [0, 1) */
void uniform(uint64_t key, uint64_t start, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint64_t z = key + (start + (uint64_t)i + 1) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        out[i] = (float)(int32_t)((z ^ (z >> 31)) >> 40) * 0x1p-24f;
    }
}

/* Block number `block` of a row of length n, less `origin` (n, or NULL), filled with zeros */
static void cut(const float *row, int64_t n, const float *origin, int64_t block, float *d) {
    int64_t start = block * BLOCK, size = n - start < BLOCK ? n - start : BLOCK;
    if (origin)
        for (int64_t i = 0; i < size; i++) d[i] = row[start + i] - origin[start + i];
    else
        memcpy(d, row + start, size * sizeof *d);
    memset(d + size, 0, (BLOCK - size) * sizeof *d);
}

static double folded(double *lanes) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[half + lane];
    return lanes[0];
}

/* (rows, rows) inner products over a block d (rows, BLOCK): 512 lanes that each add their 8 products in order, folded in
 * halves. SIDE lanes of all rows at a time, so that sums stay in registers and what they are made of in the nearest
 * cache; `scratch` has room for (rows, SIDE * 8) and (rows, rows, LANES). */
static void products(const float *d, int64_t rows, double *scratch, double *out) {
    double *wide = scratch, *lanes = scratch + rows * SIDE * STEPS;
    for (int lane = 0; lane < LANES; lane += SIDE) {
        for (int64_t row = 0; row < rows; row++)
            for (int step = 0; step < STEPS; step++)
                for (int i = 0; i < SIDE; i++)
                    wide[(row * STEPS + step) * SIDE + i] = d[row * BLOCK + step * LANES + lane + i];
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j <= i; j++) {
                const double *a = wide + i * STEPS * SIDE, *b = wide + j * STEPS * SIDE;
                double sums[SIDE] = {0};
                for (int step = 0; step < STEPS; step++, a += SIDE, b += SIDE)
                    for (int l = 0; l < SIDE; l++) sums[l] += a[l] * b[l];
                memcpy(lanes + (i * rows + j) * LANES + lane, sums, sizeof sums);
            }
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j <= i; j++)
            out[i * rows + j] = out[j * rows + i] = folded(lanes + (i * rows + j) * LANES);
}

/* (blocks, rows, rows) inner products of rows of length n, less `origin`, block by block; `d` has room for (rows, BLOCK),
 * `scratch` for what `products` needs */
void block_products(const float *x, int64_t rows, int64_t n, const float *origin, float *d, double *scratch,
                    double *out) {
    for (int64_t block = 0; block * BLOCK < n; block++) {
        for (int64_t row = 0; row < rows; row++) cut(x + row * n, n, origin, block, d + row * BLOCK);
        products(d, rows, scratch, out + block * rows * rows);
    }
}

/* (blocks, rows) sums of the squares of rows of length n, less `origin`, block by block */
void block_squares(const float *x, int64_t rows, int64_t n, const float *origin, double *out) {
    float d[BLOCK];
    double scratch[SIDE * STEPS + LANES];
    for (int64_t block = 0; block * BLOCK < n; block++)
        for (int64_t row = 0; row < rows; row++) {
            cut(x + row * n, n, origin, block, d);
            products(d, 1, scratch, out + block * rows + row);
        }
}

/* Of the entries [0, n) of k models and of what was made of them, those of every `every`-th block of the tensor, in which
 * they begin at `start`: how many they are and how many have both signs among the models (counts), and (k + 2, k + 2)
 * inner products of models and result, less the origin, and of the origin: `base`, or the models' mean where it is NULL.
 * `rows` has room for (k + 2, BLOCK), `scratch` for what `products` needs and (k + 2, k + 2). */
void sample(const float *x, int64_t k, int64_t n, const float *base, const float *out, int64_t start, int64_t every,
            float *rows, double *scratch, double *gram, int64_t *counts) {
    double *sums = scratch + (k + 2) * SIDE * STEPS + (k + 2) * (k + 2) * LANES;
    for (int64_t at = 0, size; at < n; at += size) {
        int64_t place = (start + at) % (every * BLOCK), left = n - at;
        if (place >= BLOCK) {
            size = every * BLOCK - place;
            continue;
        }
        size = BLOCK - place < left ? BLOCK - place : left;
        float origin[BLOCK], low[BLOCK] = {0}, high[BLOCK] = {0};
        for (int64_t i = 0; i < size; i++) origin[i] = base ? base[at + i] : 0;
        if (!base) {
            for (int64_t row = 0; row < k; row++)
                for (int64_t i = 0; i < size; i++) origin[i] += x[row * n + at + i];
            for (int64_t i = 0; i < size; i++) origin[i] /= (float)k;
        }
        for (int64_t row = 0; row <= k + 1; row++) {
            const float *from = row < k ? x + row * n + at : out + at;
            float d[BLOCK];
            for (int64_t i = 0; i < size; i++) d[i] = row > k ? origin[i] : from[i] - origin[i];
            cut(d, size, NULL, 0, rows + row * BLOCK);
            if (row < k)
                for (int64_t i = 0; i < size; i++) {
                    low[i] = d[i] < low[i] ? d[i] : low[i];
                    high[i] = d[i] > high[i] ? d[i] : high[i];
                }
        }
        products(rows, k + 2, scratch, sums);
        for (int64_t i = 0; i < (k + 2) * (k + 2); i++) gram[i] += sums[i];
        counts[0] += size;
        for (int64_t i = 0; i < size; i++) counts[1] += low[i] < 0 && high[i] > 0;
    }
}

/* sum(w x) over k rows of length n; given an origin (n, else NULL), origin + scale * sum(w (x - origin)) */
void weigh(const float *x, int64_t k, int64_t n, const float *origin, const float *weights, float scale, float *out) {
    for (int64_t at = 0; at < n; at += NEAR) {
        int64_t size = n - at < NEAR ? n - at : NEAR;
        float sum[NEAR] = {0};
        for (int64_t row = 0; row < k; row++) {
            const float *from = x + row * n + at, w = weights[row];
            if (origin)
                for (int64_t i = 0; i < size; i++) sum[i] += (from[i] - origin[at + i]) * w;
            else
                for (int64_t i = 0; i < size; i++) sum[i] += from[i] * w;
        }
        if (origin)
            for (int64_t i = 0; i < size; i++) out[at + i] = sum[i] * scale + origin[at + i];
        else
            memcpy(out + at, sum, size * sizeof *out);
    }
}

/* one row less the origin, with 0 where its magnitude is below `least` */
static void shrunk(const float *from, const float *origin, float least, int64_t size, float *d) {
    uint32_t bound = magnitude(least), bits;
    if (origin)
        for (int64_t i = 0; i < size; i++) d[i] = from[i] - origin[i];
    else
        memcpy(d, from, size * sizeof *d);
    if (bound)
        for (int64_t i = 0; i < size; i++) {
            memcpy(&bits, d + i, sizeof bits);
            bits = (bits & SIGNLESS) >= bound ? bits : 0;
            memcpy(d + i, &bits, sizeof bits);
        }
}

/* (n,) what `agreed` in _votes.py says; `votes` weigh the election, `shares` what is summed, `divisors` (or NULL) what it
 * is divided by; `kept` counts the entries of each row that are not zero */
void agree(const float *x, int64_t k, int64_t n, const float *origin, const float *least, const float *votes,
           const float *divisors, const float *shares, float even, float *out, int64_t *kept) {
    for (int64_t at = 0; at < n; at += NEAR) {
        int64_t size = n - at < NEAR ? n - at : NEAR;
        const float *below = origin ? origin + at : NULL;
        float d[NEAR], sign[NEAR] = {0}, sum[NEAR] = {0}, divisor[NEAR] = {0};
        for (int64_t row = 0; row < k; row++) {
            float vote = votes[row];
            int32_t count = 0;
            shrunk(x + row * n + at, below, least ? least[row] : 0, size, d);
            for (int64_t i = 0; i < size; i++) sign[i] += d[i] * vote;
            for (int64_t i = 0; i < size; i++) count += d[i] != 0;
            kept[row] += count;
        }
        for (int64_t i = 0; i < size; i++)
            sign[i] = (sign[i] > 0 ? 1.0f : 0.0f) - (sign[i] < 0 ? 1.0f : 0.0f) + (sign[i] == 0 ? even : 0.0f);
        for (int64_t row = 0; row < k; row++) {
            float own = votes[row] < 0 ? -1 : 1, divides = divisors ? divisors[row] : 0, share = shares[row];
            if (votes[row] == 0) continue;
            shrunk(x + row * n + at, below, least ? least[row] : 0, size, d);
            for (int64_t i = 0; i < size; i++) d[i] *= sign[i] * own; /* above 0 where the signs agree */
            for (int64_t i = 0; i < size; i++) d[i] = d[i] > 0 ? d[i] : 0.0f;
            for (int64_t i = 0; i < size; i++) sum[i] += d[i] * share;
            if (divisors)
                for (int64_t i = 0; i < size; i++) divisor[i] += d[i] > 0 ? divides : 0.0f;
        }
        for (int64_t i = 0; i < size; i++) sum[i] *= sign[i];
        if (divisors)
            for (int64_t i = 0; i < size; i++) {
                float part = sum[i] / divisor[i];
                sum[i] = part - part == 0 ? part : 0.0f;
            }
        memcpy(out + at, sum, size * sizeof *out);
    }
}

/* `moved` is `order`, sorted by one byte of the keys, equal ones as they stood */
static void by_byte(const uint32_t *keys, const int32_t *order, int32_t *moved, int64_t n, int shift) {
    int32_t places[256] = {0}, place = 0;
    for (int64_t i = 0; i < n; i++) places[(keys[i] >> shift) & 255]++;
    for (int digit = 0; digit < 256; digit++) {
        int32_t count = places[digit];
        places[digit] = place;
        place += count;
    }
    for (int64_t i = 0; i < n; i++) moved[places[(keys[order[i]] >> shift) & 255]++] = order[i];
}

/* sorts `order`, nearly sorted by keys; 0, with some of it undone, when that takes more than `budget` moves */
static int inserted(const uint32_t *keys, int32_t *order, int64_t n, int64_t budget) {
    for (int64_t i = 1; i < n; i++) {
        int32_t index = order[i];
        int64_t j = i;
        for (; j > 0 && keys[order[j - 1]] > keys[index]; j--) order[j] = order[j - 1];
        order[j] = index;
        budget -= i - j;
        if (budget < 0) return 0;
    }
    return 1;
}

/* Place of each |x| in its row's ascending order, earlier ones first among equals; `scratch` has room for 3 n numbers.
 * Two rounds of radix sort by the uppermost 16 bits that differ leave little to do for insertion; where that turns out
 * wrong (many that differ in lower bits only), four rounds by all bits. */
void ranks(const uint32_t *x, int64_t rows, int64_t n, int32_t *scratch, int32_t *out) {
    uint32_t *keys = (uint32_t *)scratch;
    int32_t *order = scratch + n, *moved = order + n;
    for (int64_t row = 0; row < rows; row++) {
        uint32_t differ = 0;
        for (int64_t i = 0; i < n; i++) {
            keys[i] = x[row * n + i] & SIGNLESS;
            differ |= keys[i] ^ keys[0];
            order[i] = (int32_t)i;
        }
        int width = 0;
        while (width < 32 && differ >> width) width++;
        int low = width > 16 ? width - 16 : 0;
        by_byte(keys, order, moved, n, low);
        by_byte(keys, moved, order, n, low + 8);
        if (low > 0 && !inserted(keys, order, n, 8 * n)) {
            for (int64_t i = 0; i < n; i++) order[i] = (int32_t)i;
            for (int shift = 0; shift < 32; shift += 16) {
                by_byte(keys, order, moved, n, shift);
                by_byte(keys, moved, order, n, shift + 8);
            }
        }
        for (int64_t i = 0; i < n; i++) out[row * n + order[i]] = (int32_t)i;
    }
}
