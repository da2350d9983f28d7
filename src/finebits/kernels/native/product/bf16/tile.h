/* Products of many tokens for bfloat16 x (AVX-512 with bfloat16 dot products): what x @ W^T and x @ W share, and their tile.
 *
 * Both are C = A @ B, where A gives a pair of neighbours of the sum to all lanes at once and B has 16 columns of C in the lanes, the pair
 * of each in its 32 bits. For x @ W^T, A is a decoded panel of W and B is x, rearranged once a call; for x @ W, A is x and B a decoded
 * panel. Panels are decoded once for PASS tokens into the second cache; the part of B in use, DEPTH of the sum, stays in the first.
 * Every sum runs in order, from the first term to the last, in one accumulator: nothing else changes a result.
 *
 * A tile of 6 x 4 vectors is ten loads and 24 dot products for two terms of 384 sums: two dot products a cycle are what bounds it.
 */
#ifndef FINEBITS_BF16_TILE_H
#define FINEBITS_BF16_TILE_H

#include "decode/rows_bf16.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum {
    LANES = 4,       /* vectors of C in a tile, at most */
    DEPTH = 256,     /* columns of A that a tile takes */
    SPAN = 2048,     /* columns of A that lie together */
    PITCH = SPAN + 32, /* of A's rows: a power of two would put them into the same cache sets */
    PANEL = 48,      /* rows of A (x @ W^T): a multiple of every tile's */
    PASS = 512,      /* tokens */
    AHEAD = 2,       /* groups between fetching and decoding */
    STREAM_BYTES = 2 << 20, /* of x, at most, that are read again for every tile */
};

struct group;

struct product {
    const struct linear_job *job;
    struct decoder d;
    int64_t first, tokens; /* of this pass */
    uint16_t *x;
    struct group *groups;
    int doubled;           /* x holds every token twice, see stream_tile */
};

#define UNROLL _Pragma("GCC unroll 24")

/* acc += a (rows, `pitch` apart) @ x (pairs, lanes, 32); one value of A is a pair of a row, or if `doubled` of two. */
INLINE void multiply(__m512 acc[24][LANES], const uint16_t *a, int64_t pitch, int rows, const uint16_t *x, int lanes, int64_t pairs, int doubled) {
    for (int64_t j = 0; j < pairs; j++) {
        __m512bh column[LANES];
        UNROLL
        for (int v = 0; v < lanes; v++)
            column[v] = (__m512bh)_mm512_load_si512(x + (j * lanes + v) * 32);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint16_t *p = a + r * pitch + 2 * j * (1 + doubled);
            int32_t one;
            int64_t two = 0;
            memcpy(&one, p, 4);
            if (doubled)
                memcpy(&two, p, 8);
            const __m512bh value = (__m512bh)(doubled ? _mm512_set1_epi64(two) : _mm512_set1_epi32(one));
            UNROLL
            for (int v = 0; v < lanes; v++)
                acc[r][v] = _mm512_dpbf16_ps(acc[r][v], value, column[v]);
        }
    }
}

/* c (rows, lanes, 16) += a (rows, PITCH) @ b (pairs, lanes, 16 columns, 2); `begin` takes c for zero. */
INLINE void tile(const uint16_t *a, int rows, const uint16_t *b, int lanes, int64_t pairs, int begin, float *c) {
    __m512 acc[24][LANES];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < lanes; v++)
            acc[r][v] = begin ? _mm512_setzero_ps() : _mm512_load_ps(c + (r * lanes + v) * 16);
    multiply(acc, a, PITCH, rows, b, lanes, pairs, 0);
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < lanes; v++)
            _mm512_store_ps(c + (r * lanes + v) * 16, acc[r][v]);
}

#define TILE(rows, lanes)                                                                                                          \
    static __attribute__((noinline)) void tile_##rows##_##lanes(const uint16_t *a, const uint16_t *b, int64_t pairs, int begin,    \
                                                                float *c) {                                                        \
        tile(a, rows, b, lanes, pairs, begin, c);                                                                                  \
    }

typedef void (*tile_fn)(const uint16_t *, const uint16_t *, int64_t, int, float *);

/* One pass; nonzero if it failed. */
int bf16_rearrange(struct product *, int threads); /* x for the next two */
int bf16_stream(struct product *, int threads);
int bf16_forward(struct product *, int threads);
int bf16_transposed(struct product *, int threads);

#endif
