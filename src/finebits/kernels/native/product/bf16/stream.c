/* x @ W^T where all tokens are one block of lanes and x stays in the second cache: the next group is decoded between the products of this one.
 *
 * A weight is decoded once for all tokens and never leaves the first cache; decoding goes on in the vector units that the dot products leave free,
 * so that 16 tokens take little more than their dot products (docs/decisions/0016).
 */
#include "product/bf16/tokens.h"

/* Two rows in turns: pairs 0, 1, 4, 5, ... of the vectors, then 2, 3, 6, 7, ... */
INLINE void store_two(uint16_t *out, __m512i a, __m512i b) {
    _mm512_store_si512(out, _mm512_unpacklo_epi32(a, b));
    _mm512_store_si512(out + 32, _mm512_unpackhi_epi32(a, b));
}

/* Vectors from ... to - 1 of them. */
INLINE void store_next(const struct coded *w, int bits, int doubled, int from, int to, uint16_t *out) {
    UNROLL
    for (int k = from; k < to; k++)
        if (doubled)
            store_two(out + 64 * k, look_up(&w[0], bits, k), look_up(&w[1], bits, k));
        else
            _mm512_store_si512(out + 32 * k, look_up(&w[0], bits, k));
}

/* All columns of 24 / lanes rows (twice as many if `doubled`) from `row` on, whose first group is decoded in `W` (2, rows, group) at
 * `*turn`; leaves there the first group of the rows that follow. Decoding goes in small steps between the products, which leave half of
 * the vector units free: a longer piece of it would let the products run dry. With up to 16 tokens (`doubled`), a vector holds eight of
 * them twice, and A gives two rows at once: one load for every product would be more than there can be. `by` are the scales of these
 * rows, `then` those of the rows that follow. */
INLINE void stream_tile(const struct product *q, int64_t row, int bits, int lanes, int doubled, const struct scales *by, const struct scales *then,
                        uint16_t *W, int *turn, float *c) {
    const int high = 1 + doubled, rows = 24 / lanes, per = per_word(bits), columns = 32 * per, pitch = columns * high;
    const int half = lanes < 3 ? per / 2 : per, steps = columns / 2 / (2 * half);
    const int64_t groups = (q->job->t.n + columns - 1) / columns;
    const __m512 levels = levels_of(&q->d, bits);
    const uint16_t *x = q->x;
    __m512 acc[24][LANES];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int v = 0; v < lanes; v++)
            acc[r][v] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, *turn ^= 1) {
        const uint16_t *a = W + *turn * rows * pitch;
        uint16_t *out = W + !*turn * rows * pitch;
        const int64_t next = g + 1 < groups ? g + 1 : 0;
        struct cursor at = cursor_at(q, next ? by : then, next ? row : row + rows * high, rows * high, next, groups);
        struct coded w[2];
        for (int i = 0; i < steps; i++) {
            multiply(acc, a, pitch, rows, x, lanes, half, doubled);
            a += 2 * half * high, x += half * lanes * 32;
            if (i < rows) {
                load_next(&at, levels, bits, doubled, w);
                store_next(w, bits, doubled, 0, per / 4, out + i * pitch);
            }
            multiply(acc, a, pitch, rows, x, lanes, half, doubled);
            a += 2 * half * high, x += half * lanes * 32;
            if (i < rows)
                store_next(w, bits, doubled, per / 4, per, out + i * pitch);
        }
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    UNROLL
    for (int r = 0; r < rows; r++)
        if (doubled) {
            _mm512_store_ps(c + 32 * r, _mm512_permutex2var_ps(acc[r][0], even, acc[r][1]));
            _mm512_store_ps(c + 32 * r + 16, _mm512_permutex2var_ps(acc[r][0], _mm512_add_epi32(even, _mm512_set1_epi32(1)), acc[r][1]));
        } else
            UNROLL
            for (int v = 0; v < lanes; v++)
                _mm512_store_ps(c + (r * lanes + v) * 16, acc[r][v]);
}

#define STREAM(bits, vectors, lanes, doubled)                                                                                      \
    static __attribute__((noinline)) void stream_##bits##_##vectors(const struct product *q, int64_t row, const struct scales *by, \
                                                                    const struct scales *then, uint16_t *W, int *turn, float *c) { \
        stream_tile(q, row, bits, lanes, doubled, by, then, W, turn, c);                                                           \
    }
#define STREAMS(bits) STREAM(bits, 1, 2, 1) STREAM(bits, 2, 2, 0) STREAM(bits, 3, 3, 0) STREAM(bits, 4, 4, 0)
STREAMS(2)
STREAMS(3)
STREAMS(4)

typedef void (*stream_fn)(const struct product *, int64_t, const struct scales *, const struct scales *, uint16_t *, int *, float *);
#define NAMES(bits) stream_##bits##_1, stream_##bits##_2, stream_##bits##_3, stream_##bits##_4
static const stream_fn streams[][LANES] = {[2] = {NAMES(2)}, [3] = {NAMES(3)}, [4] = {NAMES(4)}};

INLINE void decode_rows(struct cursor *at, __m512 levels, int bits, int doubled, int rows, uint16_t *out) {
    for (int r = 0; r < rows; r++) {
        struct coded w[2];
        load_next(at, levels, bits, doubled, w);
        store_next(w, bits, doubled, 0, per_word(bits), out + r * 32 * per_word(bits) * (1 + doubled));
    }
}

static void decode_first(const struct product *q, const struct scales *by, int64_t row, int rows, uint16_t *W) {
    const int bits = q->job->t.bits, columns = 32 * per_word(bits), doubled = q->doubled;
    struct cursor at = cursor_at(q, by, row, rows, 0, (q->job->t.n + columns - 1) / columns);
    const __m512 levels = levels_of(&q->d, bits);
    rows /= 1 + doubled;
    switch (bits) {
    case 2: doubled ? decode_rows(&at, levels, 2, 1, rows, W) : decode_rows(&at, levels, 2, 0, rows, W); break;
    case 3: doubled ? decode_rows(&at, levels, 3, 1, rows, W) : decode_rows(&at, levels, 3, 0, rows, W); break;
    default: doubled ? decode_rows(&at, levels, 4, 1, rows, W) : decode_rows(&at, levels, 4, 0, rows, W);
    }
}

static int stream_rows(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const int vectors = (int)split_tokens(q->tokens).vectors, step = 24 / vectors;
    const stream_fn fn = streams[t->bits][vectors - 1];
    uint16_t W[2 * 24 * 256] __attribute__((aligned(64)));
    float c[PANEL * LANES * 16] __attribute__((aligned(64)));
    float *copy = scratch(sizeof(float) * 2 * 24 * (size_t)t->blocks);
    if (!copy)
        return 1;
    int turn = 0, side = 0;
    struct scales by, then = scales_of(t, first, least(step, t->rows - first), copy);
    decode_first(q, &then, first, step, W);
    for (int64_t row = first; row < last; row += PANEL) {
        const int64_t rows = least(PANEL, last - row);
        for (int64_t r = 0; r < rows; r += step) {
            const int64_t next = least(row + r + step, t->rows - 1);
            by = then;
            side ^= 1;
            then = scales_of(t, next, least(step, t->rows - next), copy + side * 24 * t->blocks);
            fn(q, row + r, &by, &then, W, &turn, c + r * vectors * 16);
        }
        store_panel(q, c, row, rows);
    }
    free(copy);
    return 0;
}

int bf16_stream(struct product *q, int threads) { return parallel(stream_rows, q, q->job->t.rows, piece_rows(q->job->t.rows, PANEL, threads), threads); }
