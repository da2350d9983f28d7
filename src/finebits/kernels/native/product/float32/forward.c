/* x @ W^T in float32 (tile.h): the panel is PANEL rows of DEPTH columns, 63 KiB; x once more in float32, with a token a lane. */
#include "lanes/transpose.h"
#include "product/float32/tile.h"

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

int FOR_ISA(float32_forward)(struct product *q, int threads) {
    const int64_t depths = (q->job->t.n + DEPTH - 1) / DEPTH;
    return parallel(rearrange_items, q, split_tokens(q->tokens).blocks * depths, 1, threads) || parallel(panel_rows, q, q->job->t.rows, PANEL, threads);
}
