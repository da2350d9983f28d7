/* x @ W^T for many tokens, and both products (product.h). */
#include "product.h"

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

/* Vectors of 16 tokens are spread evenly over blocks of up to LANES. */
struct split {
    int64_t vectors, blocks;
};

static struct split split_tokens(int64_t tokens) {
    const int64_t vectors = (tokens + 15) / 16;
    return (struct split){vectors, (vectors + LANES - 1) / LANES};
}

INLINE int64_t block_start(struct split s, int64_t block) { return block * s.vectors / s.blocks; }

/* Columns of A: with groups, all of the last one's. */
INLINE int64_t depth_of(const struct table *t) { return is_grouped(t) ? up(t->n, 32 * per_word(t->bits)) : up(t->n, 2); }

/* 32 * per words in the order of a group. */
INLINE void reorder(const uint16_t *from, int64_t left, int per, uint16_t *to) {
    __m512i a[8], b[8];
    UNROLL
    for (int i = 0; i < per; i++) {
        const int64_t rest = left - 32 * i;
        a[i] = rest >= 32 ? _mm512_loadu_si512(from + 32 * i) : _mm512_maskz_loadu_epi16(rest > 0 ? (1u << rest) - 1 : 0, from + 32 * i);
    }
    if (per == 4) {
        uint16_t index[2][32] __attribute__((aligned(64)));
        for (int k = 0; k < 2; k++)
            for (int w = 0; w < 32; w++)
                index[k][w] = (uint16_t)(4 * (w % 16) + 2 * k + w / 16);
        UNROLL
        for (int k = 0; k < 2; k++) {
            const __m512i at = _mm512_load_si512(index[k]), low = _mm512_permutex2var_epi16(a[0], at, a[1]), high = _mm512_permutex2var_epi16(a[2], at, a[3]);
            _mm512_store_si512(to + 64 * k, _mm512_shuffle_i64x2(low, high, 0x44));
            _mm512_store_si512(to + 64 * k + 32, _mm512_shuffle_i64x2(low, high, 0xee));
        }
        return;
    }
    for (int k = 0; k < 2; k++) {
        uint16_t index[32] __attribute__((aligned(64)));
        for (int w = 0; w < 32; w++)
            index[w] = (uint16_t)(8 * (w % 8) + 4 * k + w / 8);
        const __m512i at = _mm512_load_si512(index);
        UNROLL
        for (int i = 0; i < 4; i++)
            b[i] = _mm512_permutex2var_epi16(a[2 * i], at, a[2 * i + 1]);
        UNROLL
        for (int i = 0; i < 2; i++) {
            b[4 + i] = _mm512_shuffle_i64x2(b[2 * i], b[2 * i + 1], 0x44);
            b[6 + i] = _mm512_shuffle_i64x2(b[2 * i], b[2 * i + 1], 0xee);
        }
        UNROLL
        for (int i = 0; i < 2; i++) {
            _mm512_store_si512(to + 128 * k + 64 * i, _mm512_shuffle_i64x2(b[4 + 2 * i], b[5 + 2 * i], 0x88));
            _mm512_store_si512(to + 128 * k + 64 * i + 32, _mm512_shuffle_i64x2(b[4 + 2 * i], b[5 + 2 * i], 0xdd));
        }
    }
}

/* Every token twice, in two vectors of eight, the 16 pairs in the order in which `store_two` interleaves those of two rows. */
INLINE void store_doubled(uint16_t *out, const __m512i *v) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    UNROLL
    for (int i = 0; i < 16; i++) {
        uint16_t *at = out + (i / 4 * 2 + i % 2 + i % 4 / 2 * 8) * 64;
        _mm512_store_si512(at, _mm512_permutexvar_epi32(low, v[i]));
        _mm512_store_si512(at + 32, _mm512_permutexvar_epi32(high, v[i]));
    }
}

/* x (block, pair, vector of the block, 16 tokens, 2); items are (vector, DEPTH columns). */
static int rearrange_items(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const int64_t n = t->n, depth = depth_of(t), depths = (depth + DEPTH - 1) / DEPTH, pairs = depth / 2;
    const int per = is_grouped(t) ? per_word(t->bits) : 1;
    const struct split s = split_tokens(q->tokens);
    uint16_t row[16][DEPTH] __attribute__((aligned(64)));
    for (int64_t item = first; item < last; item++) {
        const int64_t vector = item / depths, from = item % depths * DEPTH, to = least(from + DEPTH, depth);
        int64_t block = 0;
        while (block_start(s, block + 1) <= vector)
            block++;
        const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start;
        uint16_t *out = q->x + (start * pairs + vector - start) * 32;
        for (int i = 0; i < 16; i++) {
            const int64_t token = vector * 16 + i;
            const uint16_t *x = (const uint16_t *)q->job->x + (q->first + token) * n;
            if (token >= q->tokens)
                memset(row[i], 0, sizeof row[i]);
            else if (per == 4)
                for (int64_t j = from; j < to; j += 128)
                    reorder(x + j, n - j, 4, row[i] + j - from);
            else if (per == 8)
                reorder(x + from, n - from, 8, row[i]);
            else {
                memcpy(row[i], x + from, sizeof *x * (size_t)least(DEPTH, n - from));
                memset(row[i] + least(DEPTH, n - from), 0, sizeof *x * (size_t)(DEPTH - least(DEPTH, n - from)));
            }
        }
        for (int64_t j = from; j < to; j += 32) {
            __m512i v[16];
            UNROLL
            for (int i = 0; i < 16; i++)
                v[i] = _mm512_load_si512(row[i] + j - from);
            transpose(v);
            if (q->doubled)
                store_doubled(q->x + j * 32, v);
            else
                for (int i = 0; i < 16 && j / 2 + i < pairs; i++)
                    _mm512_store_si512(out + (j / 2 + i) * lanes * 32, v[i]);
        }
    }
    return 0;
}

/* Rows of y from the sums of one panel, (row, lanes, 16 tokens) in every block. */
INLINE void store_panel(const struct product *q, const float *c, int64_t row, int64_t rows) {
    const struct split s = split_tokens(q->tokens);
    const int64_t m = q->job->t.rows;
    for (int64_t block = 0; block < s.blocks; block++) {
        const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start;
        for (int64_t v = 0; v < lanes; v++)
            for (int64_t r = 0; r < rows; r += 16) {
                const __mmask16 mask = mask16(rows - r);
                __m512i a[16];
                for (int i = 16; i < 32 && (start + v) * 16 + i < q->tokens; i++)
                    __builtin_prefetch((uint16_t *)q->job->y + (q->first + (start + v) * 16 + i) * m + row + r, 1);
                UNROLL
                for (int i = 0; i < 16; i++)
                    a[i] = _mm512_load_si512(c + (start * PANEL + (r + i) * lanes + v) * 16);
                transpose(a);
                UNROLL
                for (int i = 0; i < 16; i++) {
                    const int64_t token = (start + v) * 16 + i;
                    if (token < q->tokens)
                        _mm256_mask_storeu_epi16((uint16_t *)q->job->y + (q->first + token) * m + row + r, mask, round_bf16(_mm512_castsi512_ps(a[i])));
                }
            }
    }
}

/* ---- one block of tokens: the next group is decoded between the products of this one ---- */

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

/* ---- many blocks of tokens: a panel is decoded first ---- */

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

/* Fewer tokens are faster in the tiles of body.c (measured). */
int product_supports(const struct linear_job *job) { return job->dtype == BF16 && (job->transposed || job->tokens > (is_grouped(&job->t) ? 8 : 64)); }

int product_linear(const struct linear_job *job, int threads) {
    struct product q = {.job = job};
    const struct table *t = &job->t;
    const int64_t inputs = job->transposed ? t->rows : depth_of(t), most = least(job->tokens, PASS);
    const int64_t depths = (inputs + DEPTH - 1) / DEPTH, spans = (inputs + SPAN - 1) / SPAN;
    const int64_t columns = 32 * per_word(t->bits);
    /* Whole groups only, where the columns of y are cut by them; enough for all threads. */
    const int grouped = is_grouped(t) && (!job->transposed || (t->n % columns == 0 && t->n / columns >= 4 * threads));
    const int stream = grouped && !job->transposed && 2 * inputs * up(job->tokens, 16) <= STREAM_BYTES && job->tokens <= 16 * LANES;
    q.doubled = stream && job->tokens <= 16;
    q.x = borrow(sizeof(uint16_t) * (size_t)(job->transposed ? spans * PITCH * most : inputs * up(most, q.doubled ? 32 : 16)));
    q.groups = grouped ? scratch(sizeof(struct group) * (size_t)((t->n + columns - 1) / columns)) : NULL;
    int failed = !q.x || (grouped && !q.groups);
    prepare(&q.d, t);
    if (!failed && grouped)
        describe(t, q.groups);
    for (; q.first < job->tokens && !failed; q.first += PASS) {
        q.tokens = least(PASS, job->tokens - q.first);
        if (job->transposed)
            failed = product_transposed(&q, threads);
        else
            failed = parallel(rearrange_items, &q, (q.tokens + 15) / 16 * depths, 1, threads) ||
                     (stream ? parallel(stream_rows, &q, t->rows, piece_rows(t->rows, PANEL, threads), threads)
                             : parallel(panel_rows, &q, t->rows, PANEL, threads));
    }
    free(q.groups);
    if (q.x)
        give_back(q.x);
    return failed;
}
