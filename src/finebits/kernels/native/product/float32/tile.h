/* Products of some tokens and more in float32, whatever the dtype of x (AVX2 and AVX-512): what x @ W^T and x @ W share, and their tile.
 *
 * Both are C = A @ B, where A gives one value to all lanes at once and B has VL columns of C in a vector. For x @ W^T, A is a decoded panel
 * of W and B is x with a token a lane, rearranged once a call; for x @ W, A is x and B a decoded panel. A panel is decoded once for PASS
 * tokens into the second cache, DEPTH of the sum at a time, and the part of B in use stays in the first: a weight costs its decoding and,
 * for VL tokens, one multiply-add. Every sum runs in order in one accumulator: nothing else changes a result.
 */
#ifndef FINEBITS_FLOAT32_TILE_H
#define FINEBITS_FLOAT32_TILE_H

#include "decode/rows.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum {
    LANES = ISA == 2 ? 4 : 2, /* vectors of C in a tile, at most */
    SUMS = 6 * LANES,         /* of a tile: as many as there are registers for */
    WIDE = 2 * VL, HIGH = SUMS / 2, /* columns and rows of a tile (x @ W) */
    DEPTH = 320,              /* of the sum, at a time */
    PITCH = DEPTH + 16,       /* of A's rows: a power of two would put them into the same cache sets */
    PANEL = 48,               /* rows of W (x @ W^T): a multiple of every tile's */
    COLUMNS = 96,             /* columns of W (x @ W) */
    PASS = 512,               /* tokens */
    BLOCK = 192,              /* tokens of x that stay in the second cache beside a panel (x @ W) */
};

struct product {
    const struct linear_job *job;
    struct decoder d;
    int64_t first, tokens; /* of this pass */
    float *x;
};

#define UNROLL _Pragma("GCC unroll 24")

/* c (rows, `across` apart, lanes, VL) += a (rows, `pitch` apart, depth) @ b (depth, lanes, VL); `begin` takes c for zero. */
INLINE void tile(const float *a, int64_t pitch, int rows, const float *b, int lanes, int64_t depth, int begin, float *c, int64_t across) {
    vf sum[SUMS][LANES];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < lanes; v++)
            sum[r][v] = begin ? vset(0.0f) : vload(c + r * across + v * VL);
    for (int64_t k = 0; k < depth; k++) {
        vf column[LANES];
        UNROLL
        for (int v = 0; v < lanes; v++)
            column[v] = vload(b + (k * lanes + v) * VL);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const vf value = vset(a[r * pitch + k]);
            UNROLL
            for (int v = 0; v < lanes; v++)
                sum[r][v] = vfma(value, column[v], sum[r][v]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < lanes; v++)
            vstore(c + r * across + v * VL, sum[r][v]);
}

typedef void (*tile_fn)(const float *, int64_t, const float *, int64_t, int, float *, int64_t);
#define TILE(rows, lanes)                                                                                                          \
    static __attribute__((noinline)) void tile_##rows##_##lanes(const float *a, int64_t pitch, const float *b, int64_t depth,      \
                                                                int begin, float *c, int64_t across) {                             \
        tile(a, pitch, rows, b, lanes, depth, begin, c, across);                                                                   \
    }
#if ISA == 2
TILE(24, 1)
TILE(12, 2)
TILE(8, 3)
TILE(6, 4)
static const tile_fn by_lanes[] = {NULL, tile_24_1, tile_12_2, tile_8_3, tile_6_4};
#else
TILE(12, 1)
TILE(6, 2)
static const tile_fn by_lanes[] = {NULL, tile_12_1, tile_6_2};
#endif

/* One pass; nonzero if it failed. */
int FOR_ISA(float32_forward)(struct product *, int threads);
int FOR_ISA(float32_transposed)(struct product *, int threads);

#endif
