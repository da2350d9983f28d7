/* Products of some tokens and more in float32, whatever the dtype of x: x @ W^T and x @ W (AVX2 and AVX-512).
 *
 * Both are C = A @ B, where A gives one value to all lanes at once and B has VL columns of C in a vector. For x @ W^T, A is a decoded panel
 * of W and B is x with a token a lane, rearranged once a call; for x @ W, A is x and B a decoded panel. A panel is decoded once for PASS
 * tokens into the second cache, DEPTH of the sum at a time, and the part of B in use stays in the first: a weight costs its decoding and,
 * for VL tokens, one multiply-add. Every sum runs in order in one accumulator: nothing else changes a result.
 */
#include "decode.h"

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

#if ISA == 2
#define PRODUCT product32_avx512
#else
#define PRODUCT product32_avx2
#endif

struct product {
    const struct linear_job *job;
    struct decoder d;
    int64_t first, tokens; /* of this pass */
    float *x;
};

#define UNROLL _Pragma("GCC unroll 24")

INLINE int64_t up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

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

/* ---- x @ W^T ---- */

/* Vectors of VL tokens are spread evenly over blocks of up to LANES. */
struct split {
    int64_t vectors, blocks;
};

static struct split split_tokens(int64_t tokens) {
    const int64_t vectors = (tokens + VL - 1) / VL;
    return (struct split){vectors, (vectors + LANES - 1) / LANES};
}

INLINE int64_t block_start(struct split s, int64_t block) { return block * s.vectors / s.blocks; }

/* x (block, column, vector of the block, VL tokens); items are (block, DEPTH columns). */
static int rearrange_items(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const int64_t n = q->job->t.n, depths = (n + DEPTH - 1) / DEPTH;
    const struct split s = split_tokens(q->tokens);
    float row[VL][DEPTH] __attribute__((aligned(64)));
    memset(row, 0, sizeof row);
    for (int64_t item = first; item < last; item++) {
        const int64_t start = block_start(s, item / depths), lanes = block_start(s, item / depths + 1) - start;
        const int64_t from = item % depths * DEPTH, count = least(DEPTH, n - from);
        for (int64_t v = 0; v < lanes; v++) {
            float *out = q->x + (start * n + from * lanes + v) * VL;
            for (int64_t i = 0; i < VL; i++) {
                const int64_t token = (start + v) * VL + i;
                if (token < q->tokens)
                    load_row(row[i], q->job->x, (q->first + token) * n + from, count, q->job->dtype);
                else
                    memset(row[i], 0, sizeof row[i]);
            }
            for (int64_t j = 0; j < count; j += VL) {
                vf a[VL];
                for (int i = 0; i < VL; i++)
                    a[i] = vload(row[i] + j);
                vtranspose(a);
                for (int64_t i = 0; i < least(VL, count - j); i++)
                    vstore(out + (j + i) * lanes * VL, a[i]);
            }
        }
    }
    return 0;
}

/* Rows of y from the sums of one panel, (row, lanes, VL tokens) in every block. */
INLINE void store_panel(const struct product *q, const float *c, int64_t row, int64_t rows) {
    const struct split s = split_tokens(q->tokens);
    for (int64_t block = 0; block < s.blocks; block++) {
        const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start;
        for (int64_t v = 0; v < lanes; v++) {
            float y[VL][PANEL];
            for (int64_t r = 0; r < rows; r += VL) {
                vf a[VL];
                for (int i = 0; i < VL; i++)
                    a[i] = vload(c + (start * PANEL + (r + i) * lanes + v) * VL);
                vtranspose(a);
                for (int i = 0; i < VL; i++)
                    vstore(y[i] + r, a[i]);
            }
            for (int64_t i = 0; i < least(VL, q->tokens - (start + v) * VL); i++)
                store_row(q->job->y, (q->first + (start + v) * VL + i) * q->job->t.rows + row, y[i], rows, q->job->dtype);
        }
    }
}

/* Codes and scales that a row's next DEPTH columns take, or those of the row a panel below: they lie too far apart for the processor to foresee. */
INLINE void fetch(const struct table *t, int64_t row, int64_t column) {
    if (column >= t->n)
        row += PANEL, column = 0;
    if (row >= t->rows)
        return;
    const int width = t->bits == 3 ? 2 : t->bits;
    const char *codes = (const char *)t->codes + row * t->row_bytes + column * width / 8;
    for (int64_t i = 0; i < DEPTH * width / 8; i += 64)
        __builtin_prefetch(codes + i);
    if (t->bits == 3)
        __builtin_prefetch(t->codes + row * t->row_bytes + t->n / 4 + column / 8);
    __builtin_prefetch((const char *)t->scale + (row * t->blocks + column / t->block) * dtype_bytes(t->store));
}

static int panel_rows(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const struct split s = split_tokens(q->tokens);
    float *c = scratch(sizeof(float) * (size_t)(s.vectors * PANEL * VL));
    float W[PANEL * PITCH] __attribute__((aligned(64)));
    if (!c)
        return 1;
    memset(W, 0, sizeof W);
    for (int64_t row = first; row < last; row += PANEL) {
        const int64_t rows = least(PANEL, last - row);
        for (int64_t from = 0; from < t->n; from += DEPTH) {
            const int64_t to = least(from + DEPTH, t->n);
            for (int64_t r = 0; r < rows; r++) {
                fetch(t, row + r, to);
                decode(&q->d, row + r, from, to, W + r * PITCH);
            }
            for (int64_t block = 0; block < s.blocks; block++) {
                const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start, step = SUMS / lanes;
                const float *x = q->x + (start * t->n + from * lanes) * VL;
                for (int64_t r = 0; r < rows; r += step)
                    by_lanes[lanes](W + r * PITCH, PITCH, x, to - from, !from, c + (start * PANEL + r * lanes) * VL, lanes * VL);
            }
        }
        store_panel(q, c, row, rows);
    }
    free(c);
    return 0;
}

/* ---- x @ W ---- */

/* x (DEPTH columns, token, PITCH), tokens filled up to a tile's; items are tokens. */
static int widen_items(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const int64_t m = q->job->t.rows;
    for (int64_t from = 0; from < m; from += DEPTH)
        for (int64_t i = first; i < last; i++)
            load_row(q->x + (from / DEPTH * up(q->tokens, HIGH) + i) * PITCH, q->job->x, (q->first + i) * m + from, least(DEPTH, m - from), q->job->dtype);
    return 0;
}

static int panel_columns(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const int64_t tokens = up(q->tokens, HIGH); /* what lies behind the last one is multiplied too, and not stored */
    float *W = scratch(sizeof(float) * (size_t)(COLUMNS * DEPTH + tokens * COLUMNS));
    float row[COLUMNS] __attribute__((aligned(64))) = {0};
    if (!W)
        return 1;
    float *c = W + COLUMNS * DEPTH;
    for (int64_t column = first; column < last; column += COLUMNS) {
        const int64_t width = least(COLUMNS, last - column);
        for (int64_t from = 0; from < t->rows; from += DEPTH) {
            const int64_t depth = least(DEPTH, t->rows - from);
            for (int64_t k = 0; k < depth; k++) { /* W (WIDE columns, depth, WIDE) */
                decode(&q->d, from + k, column, column + width, row);
                for (int64_t j = 0; j < width; j += WIDE)
                    memcpy(W + j * DEPTH + k * WIDE, row + j, sizeof(float) * WIDE);
            }
            const float *x = q->x + from / DEPTH * tokens * PITCH;
            for (int64_t block = 0; block < tokens; block += BLOCK)
                for (int64_t j = 0; j < width; j += WIDE)
                    for (int64_t i = block; i < least(block + BLOCK, tokens); i += HIGH)
                        by_lanes[2](x + i * PITCH, PITCH, W + j * DEPTH, depth, !from, c + i * COLUMNS + j, COLUMNS);
        }
        for (int64_t i = 0; i < q->tokens; i++)
            store_row(q->job->y, (q->first + i) * t->n + column, c + i * COLUMNS, width, q->job->dtype);
    }
    free(W);
    return 0;
}

int PRODUCT(const struct linear_job *job, int threads) {
    struct product q = {.job = job};
    const struct table *t = &job->t;
    const int64_t most = least(job->tokens, PASS), depths = (t->n + DEPTH - 1) / DEPTH, rounds = (t->rows + DEPTH - 1) / DEPTH;
    q.x = borrow(sizeof(float) * (size_t)(job->transposed ? rounds * PITCH * up(most, HIGH) : up(most, VL) * t->n));
    if (!q.x)
        return 1;
    prepare(&q.d, t);
    int failed = 0;
    for (; q.first < job->tokens && !failed; q.first += PASS) {
        q.tokens = least(PASS, job->tokens - q.first);
        if (job->transposed)
            failed = parallel(widen_items, &q, q.tokens, 32, threads) || parallel(panel_columns, &q, t->n, COLUMNS, threads);
        else
            failed = parallel(rearrange_items, &q, split_tokens(q.tokens).blocks * depths, 1, threads) ||
                     parallel(panel_rows, &q, t->rows, PANEL, threads);
    }
    give_back(q.x);
    return failed;
}
