/* x @ W^T for many blocks of tokens: SPAN columns of PANEL rows are decoded first, 192 KiB of bfloat16, and serve up to PASS tokens. */
#include "product/bf16/tokens.h"

TILE(24, 1)
TILE(12, 2)
TILE(8, 3)
TILE(6, 4)
static const tile_fn by_lanes[] = {NULL, tile_24_1, tile_12_2, tile_8_3, tile_6_4};

INLINE void decode_groups(const struct product *q, int64_t row, int64_t rows, int64_t from, int64_t to, int bits, float *copy, uint16_t *out) {
    const struct table *t = &q->job->t;
    const int64_t columns = 32 * per_word(bits);
    const __m512 levels = levels_of(&q->d, bits);
    const struct scales by = scales_of(t, row, rows, copy);
    for (int64_t g = from / columns; g * columns < to; g++)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *codes = t->codes + (row + r) * t->row_bytes;
            const struct coded w = load_group(q->groups + g, codes + 64 * g, codes + t->n / 4 + 32 * g, by.scale + r * by.pitch,
                                              by.shift ? by.shift + r * by.pitch : NULL, levels, bits);
            UNROLL
            for (int k = 0; k < per_word(bits); k++)
                _mm512_store_si512(out + r * PITCH + g * columns - from + 32 * k, look_up(&w, bits, k));
        }
}

/* What the next span will decode, fetched into the second cache while the products of this one work in the caches. */
struct ahead {
    const uint8_t *codes;
    int64_t pitch, lines, rows, line, share;
};

INLINE struct ahead fetch_from(const struct table *t, int64_t row, int64_t column, int64_t steps) {
    const int width = t->bits == 3 ? 2 : t->bits;
    const int64_t lines = (least(SPAN, t->n - column) * width + 511) / 512, rows = least(PANEL, t->rows - row);
    return (struct ahead){t->codes + row * t->row_bytes + column * width / 8, t->row_bytes, lines, rows, 0, (lines * PANEL + steps - 1) / steps};
}

INLINE void fetch(struct ahead *a) {
    for (int64_t i = 0; i < a->share && a->rows > 0; i++) {
        _mm_prefetch((const char *)a->codes + 64 * a->line, _MM_HINT_T1);
        if (++a->line == a->lines)
            a->line = 0, a->codes += a->pitch, a->rows--;
    }
}

static int panel_rows(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const struct split s = split_tokens(q->tokens);
    const int64_t depth = depth_of(t);
    const size_t count = (size_t)(s.vectors * PANEL * 16);
    float *c = scratch(sizeof(float) * (count + (size_t)(PANEL * t->blocks)) + sizeof(uint16_t) * PANEL * PITCH);
    if (!c)
        return 1;
    uint16_t *W = (uint16_t *)(c + count);
    float *copy = (float *)(W + PANEL * PITCH);
    for (int64_t row = first; row < last; row += PANEL) {
        const int64_t rows = least(PANEL, last - row);
        for (int64_t r = rows; r < up(rows, 24); r++)
            memset(W + r * PITCH, 0, sizeof *W * SPAN);
        for (int64_t from = 0; from < depth; from += SPAN) {
            const int64_t to = least(from + SPAN, depth), tiles = s.blocks * ((to - from + DEPTH - 1) / DEPTH) * (PANEL / 6);
            switch (is_grouped(t) ? t->bits : 0) {
            case 2: decode_groups(q, row, rows, from, to, 2, copy, W); break;
            case 3: decode_groups(q, row, rows, from, to, 3, copy, W); break;
            case 4: decode_groups(q, row, rows, from, to, 4, copy, W); break;
            default:
                for (int64_t r = 0; r < rows; r++) {
                    decode_product(&q->d, row + r, from, least(to, t->n), W + r * PITCH);
                    if (to > t->n)
                        W[r * PITCH + t->n - from] = 0;
                }
            }
            struct ahead ahead = fetch_from(t, to < t->n ? row : row + PANEL, to < t->n ? to : 0, tiles);
            for (int64_t block = 0; block < s.blocks; block++) {
                const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start, step = 24 / lanes;
                const tile_fn fn = by_lanes[lanes];
                for (int64_t j = from; j < to; j += DEPTH)
                    for (int64_t r = 0; r < rows; r += step) {
                        fetch(&ahead);
                        fn(W + r * PITCH + j - from, q->x + (start * depth + j * lanes) * 16, least(DEPTH, to - j) / 2, !j,
                           c + (start * PANEL + r * lanes) * 16);
                    }
            }
        }
        store_panel(q, c, row, rows);
    }
    free(c);
    return 0;
}

int bf16_forward(struct product *q, int threads) { return parallel(panel_rows, q, q->job->t.rows, PANEL, threads); }
