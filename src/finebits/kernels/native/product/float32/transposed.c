/* x @ W in float32 (tile.h): the panel is DEPTH rows of COLUMNS columns, 120 KiB; x once more in float32, in order. */
#include "product/float32/tile.h"

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

int FOR_ISA(float32_transposed)(struct product *q, int threads) {
    return parallel(widen_items, q, q->tokens, 32, threads) || parallel(panel_columns, q, q->job->t.n, COLUMNS, threads);
}
