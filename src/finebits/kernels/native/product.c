/* Products of many tokens for bfloat16 x (AVX-512 with bfloat16 dot products): x @ W^T and x @ W.
 *
 * Both are C = A @ B, where A gives a pair of neighbours of the sum to all lanes at once and B has 16 columns of C in the lanes, the pair
 * of each in its 32 bits. For x @ W^T, A is a decoded panel of W and B is x, rearranged once a call; for x @ W, A is x and B a decoded
 * panel. Panels are decoded once for PASS tokens into the second cache; the part of B in use, DEPTH of the sum, stays in the first.
 * Every sum runs in order, from the first term to the last, in one accumulator: nothing else changes a result.
 */
#include "decode.h"

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

INLINE int64_t up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

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
TILE(24, 1)
TILE(12, 2)
TILE(8, 3)
TILE(6, 4)
TILE(5, 4)
TILE(4, 4)
TILE(3, 4)
TILE(2, 4)
TILE(1, 4)

typedef void (*tile_fn)(const uint16_t *, const uint16_t *, int64_t, int, float *);
static const tile_fn by_lanes[] = {NULL, tile_24_1, tile_12_2, tile_8_3, tile_6_4};
static const tile_fn by_rows[] = {NULL, tile_1_4, tile_2_4, tile_3_4, tile_4_4, tile_5_4, tile_6_4};

/* ---- x @ W^T ---- */

/* A group is the columns that 64 bytes of the first plane hold, 128 of 4 bits, 256 of 2 and 3. Where blocks allow it, its columns are
 * summed in the order in which shifts and one vpermw decode them: first the first codes of all words, then the second ones, and so on.
 * The table that vpermw looks up holds the scaled levels of every 64 columns of the group, told apart by the upper bits of its index. */
INLINE int per_word(int bits) { return bits == 4 ? 4 : 8; }

INLINE int is_grouped(const struct table *t) { return t->bits >= 2 && t->bits <= 4 && t->block % 64 == 0 && t->n % 64 == 0; }

/* One group of a row: which bytes it has, and which block each part of its table takes its scale from. */
struct group {
    int64_t base;           /* block of the first column */
    int32_t second;         /* block of column 64, counted from there */
    __mmask8 blocks;        /* blocks of the group */
    __mmask32 entries, third; /* entries of columns there are; bytes of the plane of single bits */
    __mmask64 codes;        /* bytes of the first plane */
    __m512i block[2];       /* for every entry of the table, counted from `base` */
};

static void describe(const struct table *t, struct group *all) {
    const int bits = t->bits, shift = bits == 4 ? 4 : bits;
    const int64_t columns = 32 * per_word(bits);
    for (int64_t from = 0; from < t->n; from += columns) {
        struct group *g = all + from / columns;
        int32_t block[32];
        const int64_t count = least(columns, t->n - from), bytes = count * (bits == 3 ? 2 : bits) / 8;
        g->base = from / t->block;
        g->entries = 0;
        for (int i = 0; i < 32; i++) {
            const int64_t part = (i >> shift) % (columns / 64);
            block[i] = 64 * part < count ? (int32_t)((from + 64 * part) / t->block - g->base) : 0;
            g->entries |= (uint32_t)(64 * part < count) << i;
        }
        g->second = count > 64 ? (int32_t)((from + 64) / t->block - g->base) : 0;
        g->blocks = (__mmask8)((2 << ((from + count - 1) / t->block - g->base)) - 1);
        g->codes = bytes == 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
        g->third = count == 256 ? ~0u : (1u << count / 8) - 1;
        memcpy(g->block, block, sizeof block);
    }
}

/* Scales of some rows in float32, rows `pitch` apart. */
struct scales {
    const float *scale, *shift;
    int64_t pitch;
};

/* Of rows row, row + 1, ... row + rows - 1; `copy` has room for them. */
INLINE struct scales scales_of(const struct table *t, int64_t row, int64_t rows, float *copy) {
    const int64_t at = row * t->blocks;
    if (t->store != FP32)
        load_row(copy, t->scale, at, rows * t->blocks, t->store);
    return (struct scales){t->store == FP32 ? (const float *)t->scale + at : copy, t->shift ? t->shift + at : NULL, t->blocks};
}

/* A row's group: codes, and the table to look them up in. */
struct coded {
    __m512i c, odd, entries;
};

INLINE __m512 scaled(__m512 levels, __m512i block, __mmask8 mask, const float *scale, const float *shift) {
    const __m512 v = _mm512_mul_ps(levels, _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, scale))));
    return shift ? _mm512_add_ps(v, _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, shift)))) : v;
}

/* `codes` and `third` are those of the group in the row, `scale` and `shift` those of the row. */
INLINE struct coded load_group(const struct group *g, const uint8_t *codes, const uint8_t *third, const float *scale, const float *shift, __m512 levels,
                               int bits) {
    struct coded w = {.c = _mm512_maskz_loadu_epi8(g->codes, codes)};
    scale += g->base;
    shift = shift ? shift + g->base : NULL;
    __m512 low, high;
    if (bits == 4) {
        low = _mm512_mul_ps(levels, _mm512_set1_ps(scale[0])), high = _mm512_mul_ps(levels, _mm512_set1_ps(scale[g->second]));
        if (shift)
            low = _mm512_add_ps(low, _mm512_set1_ps(shift[0])), high = _mm512_add_ps(high, _mm512_set1_ps(shift[g->second]));
    } else {
        low = scaled(levels, g->block[0], g->blocks, scale, shift);
        high = bits == 2 ? low : scaled(levels, g->block[1], g->blocks, scale, shift);
    }
    w.entries = (__m512i)_mm512_maskz_cvtne2ps_pbh(g->entries, high, low);
    if (bits == 3)
        join_planes(w.c, _mm256_maskz_loadu_epi8(g->third, third), &w.c, &w.odd);
    return w;
}

/* Its k-th vector. Words of columns 64 i ... 64 i + 63 look up part i of the table. */
INLINE __m512i look_up(const struct coded *w, int bits, int k) {
    const __m512i word = _mm512_setr_epi64(0, 0, 0x0001000100010001, 0x0001000100010001, 0x0002000200020002, 0x0002000200020002, 0x0003000300030003,
                                           0x0003000300030003);
    const __m512i part = bits == 4 ? _mm512_slli_epi16(_mm512_srli_epi16(word, 1), 4) : _mm512_slli_epi16(word, (unsigned)bits);
    const __m512i code = _mm512_set1_epi16((short)((1 << bits) - 1));
    const __m512i v = bits == 3 ? _mm512_srli_epi16(k % 2 ? w->odd : w->c, (unsigned)(k / 2 * 4)) : _mm512_srli_epi16(w->c, (unsigned)(bits * k));
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(v, code, part, 0xea), w->entries);
}

/* The levels that every part of the table begins with. */
INLINE __m512 levels_of(const struct decoder *d, int bits) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << bits) - 1)), _mm512_load_ps(d->levels));
}

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

/* Where the next rows of a group are read; the last row of the table repeats. */
struct cursor {
    const struct group *group;
    const uint8_t *codes, *third, *last;
    const float *scale, *shift;
    int64_t row_bytes, pitch, ahead, ahead_scale; /* the latter in bytes, to what is fetched meanwhile */
};

/* The rows from `row` on, their group `index`; a tile has `rows`. */
INLINE struct cursor cursor_at(const struct product *q, const struct scales *by, int64_t row, int64_t rows, int64_t index, int64_t groups) {
    const struct table *t = &q->job->t;
    const uint8_t *codes = t->codes + least(row, t->rows - 1) * t->row_bytes;
    const int64_t wrap = index + AHEAD >= groups, soon = wrap ? least(index + AHEAD - groups, groups - 1) : index + AHEAD;
    return (struct cursor){
        .group = q->groups + index,
        .codes = codes + 64 * index,
        .third = codes + t->n / 4 + 32 * index,
        .last = t->codes + (t->rows - 1) * t->row_bytes + 64 * index,
        .scale = by->scale,
        .shift = by->shift,
        .row_bytes = t->row_bytes,
        .pitch = by->pitch,
        .ahead = 64 * (soon - index) + wrap * rows * t->row_bytes,
        .ahead_scale = 4 * (q->groups[soon].base + wrap * rows * t->blocks),
    };
}

/* The next row, or if `doubled` the next two. */
INLINE void load_next(struct cursor *at, __m512 levels, int bits, int doubled, struct coded *w) {
    UNROLL
    for (int h = 0; h < 1 + doubled; h++) {
        _mm_prefetch((const char *)at->codes + at->ahead, _MM_HINT_T0);
        _mm_prefetch((const char *)at->scale + at->ahead_scale, _MM_HINT_T0);
        w[h] = load_group(at->group, at->codes, at->third, at->scale, at->shift, levels, bits);
        const int64_t more = at->codes != at->last;
        at->codes += more * at->row_bytes, at->third += more * at->row_bytes, at->scale += more * at->pitch;
        at->shift = at->shift ? at->shift + more * at->pitch : NULL;
    }
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

/* ---- x @ W ---- */

/* x (SPAN columns, token, PITCH); items are (SPAN columns, 16 tokens). */
static int slice_items(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const int64_t m = q->job->t.rows, groups = (q->tokens + 15) / 16;
    for (int64_t item = first; item < last; item++) {
        const int64_t from = item / groups * SPAN, count = least(SPAN, m - from);
        for (int64_t i = item % groups * 16; i < least(item % groups * 16 + 16, q->tokens); i++) {
            uint16_t *out = q->x + (item / groups * q->tokens + i) * PITCH;
            memcpy(out, (const uint16_t *)q->job->x + (q->first + i) * m + from, sizeof *out * (size_t)count);
            if (count % 2)
                out[count] = 0;
        }
    }
    return 0;
}

/* Two rows of 32 columns in pairs, in the order that store_columns undoes. */
INLINE void store_pairs(uint16_t *out, __m512i a, __m512i b) {
    _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(out + 32, _mm512_unpackhi_epi16(a, b));
}

/* Rows row, row + 1, ... row + count - 1 of 64 columns from `column` on, in pairs, `pairs` of them with the last ones filled up. */
INLINE void decode_pairs(const struct decoder *d, int64_t row, int64_t count, int64_t column, uint16_t *out) {
    const int64_t stop = least(column + 64, d->t.n);
    uint16_t w[2][64] __attribute__((aligned(64)));
    memset(w, 0, sizeof w);
    for (int64_t r = 0; r < count; r += 2) {
        decode_product(d, row + r, column, stop, w[0]);
        if (r + 1 < count)
            decode_product(d, row + r + 1, column, stop, w[1]);
        else
            memset(w[1], 0, sizeof w[1]);
        for (int i = 0; i < 64; i += 32)
            store_pairs(out + r * 64 + 2 * i, _mm512_load_si512(w[0] + i), _mm512_load_si512(w[1] + i));
    }
}

/* As decode_pairs, a whole group: vector k of both rows in pairs, for all k. */
INLINE void decode_group_pairs(const struct product *q, int64_t row, int64_t count, int64_t index, int bits, float *copy, uint16_t *out) {
    const struct table *t = &q->job->t;
    const int per = per_word(bits);
    const __m512 levels = levels_of(&q->d, bits);
    struct group group = q->groups[index];
    struct scales by = {(const float *)t->scale + row * t->blocks, t->shift ? t->shift + row * t->blocks : NULL, t->blocks};
    if (t->store != FP32) { /* those of this group alone */
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < __builtin_popcount(group.blocks); i++) {
                const int64_t from = (row + r) * t->blocks + group.base + i;
                copy[4 * r + i] = load_as(t->scale, from, t->store);
                copy[4 * (DEPTH + r) + i] = t->shift ? t->shift[from] : 0.0f;
            }
        by = (struct scales){copy, t->shift ? copy + 4 * DEPTH : NULL, 4};
        group.base = 0;
    }
    struct cursor at = cursor_at(q, &by, row, 1, index, index + AHEAD + 1);
    at.group = &group, at.ahead = 16 * t->row_bytes, at.ahead_scale = 4 * (16 * by.pitch + group.base);
    for (int64_t r = 0; r < count; r += 2) {
        struct coded w[2];
        load_next(&at, levels, bits, 1, w);
        if (r + 1 == count)
            w[1].entries = _mm512_setzero_si512();
        UNROLL
        for (int k = 0; k < per; k++)
            store_pairs(out + k / 2 * DEPTH * 64 + r * 64 + k % 2 * 64, look_up(&w[0], bits, k), look_up(&w[1], bits, k));
    }
}

/* y in order from the sums of a group's columns, or of 64. */
INLINE void store_columns(const struct product *q, const float *c, int64_t column, int64_t stop, int per) {
    const struct table *t = &q->job->t;
    uint16_t from[8][32] __attribute__((aligned(64)));
    __mmask32 part[4];
    for (int j = 0; j < per; j++)
        for (int i = 0; i < 32; i++) {
            const int word = (32 * j + i) / per, k = i % per, in_eight = word % 8;
            from[j][i] = (uint16_t)(k % 2 * 32 + in_eight / 4 * 16 + word / 8 * 4 + in_eight % 4);
        }
    for (int m = 0; m < 4; m++) {
        part[m] = 0;
        for (int i = 0; i < 32; i++)
            part[m] |= (uint32_t)(per == 1 || i % per / 2 == m) << i;
    }
    for (int64_t i = 0; i < q->tokens; i++) {
        __m512i v[8];
        for (int k = 0; k < per; k++) {
            const float *at = c + (k / 2 * q->tokens + i) * 64 + k % 2 * 32;
            v[k] = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(_mm512_load_ps(at))), round_bf16(_mm512_load_ps(at + 16)), 1);
        }
        uint16_t *y = (uint16_t *)q->job->y + (q->first + i) * t->n + column;
        for (int j = 0; j < per && column + 32 * j < stop; j++) {
            const __m512i index = _mm512_load_si512(from[j]);
            __m512i all = _mm512_setzero_si512();
            for (int m = 0; m < (per + 1) / 2; m++)
                all = _mm512_or_si512(all, _mm512_maskz_permutex2var_epi16(part[m], v[2 * m], index, v[per > 1 ? 2 * m + 1 : 0]));
            const int64_t left = stop - column - 32 * j;
            _mm512_mask_storeu_epi16(y + 32 * j, left >= 32 ? ~0u : (1u << left) - 1, all);
        }
    }
}

static int transposed_columns(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const int per = q->groups ? per_word(t->bits) : 2;
    const int64_t width = 32 * per, blocks = width / 64;
    const size_t count = (size_t)(blocks * q->tokens * 64), panel = (size_t)(blocks * DEPTH * 64);
    float *c = scratch(sizeof(float) * (count + 8 * DEPTH) + sizeof(uint16_t) * panel);
    if (!c)
        return 1;
    uint16_t *W = (uint16_t *)(c + count);
    float *copy = (float *)(W + panel);
    for (int64_t column = first; column < last; column += width) {
        for (int64_t from = 0; from < t->rows; from += DEPTH) {
            const int64_t depth = least(DEPTH, t->rows - from);
            switch (q->groups ? t->bits : 0) {
            case 2: decode_group_pairs(q, from, depth, column / width, 2, copy, W); break;
            case 3: decode_group_pairs(q, from, depth, column / width, 3, copy, W); break;
            case 4: decode_group_pairs(q, from, depth, column / width, 4, copy, W); break;
            default: decode_pairs(&q->d, from, depth, column, W);
            }
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t i = 0; i < q->tokens; i += 6)
                    by_rows[least(6, q->tokens - i)](q->x + (from / SPAN * q->tokens + i) * PITCH + from % SPAN, W + b * DEPTH * 64, (depth + 1) / 2,
                                                     !from, c + (b * q->tokens + i) * 64);
        }
        if (!q->groups)
            for (int64_t j = column; j < least(column + 64, t->n); j += 32)
                store_columns(q, c + (j - column), j, t->n, 1);
        else if (per == 4)
            store_columns(q, c, column, t->n, 4);
        else
            store_columns(q, c, column, t->n, 8);
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
            failed = parallel(slice_items, &q, spans * ((q.tokens + 15) / 16), 1, threads) ||
                     parallel(transposed_columns, &q, t->n, grouped ? columns : 64, threads);
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
