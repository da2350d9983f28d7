/* x @ W^T for up to four tokens, on the packed codes of 2, 3 and 4 bits, and of 8 bits whose levels lie one apart (AVX2). Reads every code and scale once; no weight is ever in memory.
 *
 * What a group (avx2.h) adds to a row is multiplied by one factor if all of it lies in one block (a unit is the group then), else by one for
 * each half. Float32 x takes levels of four bytes, and factors are scales. X of 16 bits, or as near, takes two: levels and x become integers of 15 bits
 * with sign, x with a scale for every unit, which goes into the factors, so that a multiply-add of 16-bit integers does 16 columns, at 2^-15 of
 * the largest number of each. That is 9 vector instructions for 32 weights and one token instead of 18; 128 weights of 4 bits are 40, of 3 bits
 * 47, of 2 bits 37, beside loads: 12.5, 15.0 and 11.6 cycles from the first cache.
 */
#include "product/packed/avx2.h"

enum { AHEAD = 8192 }; /* bytes of codes between fetching and use */

/* Of 2 and 3 bits, x would have but one scale for 128 columns. */
INLINE int halves_of(const struct table *t) { return t->bits >= 4 && t->block % 64 == 0 ? 1 : 2; }

/* Levels of 8 bits are added up as integers of 16 bits. */
INLINE int whole(const struct table *t) { return fabsf(t->levels[0]) < 1 << 10 && t->levels[0] == rintf(t->levels[0]) && evenly(t->levels, 256) > 0; }

int packed_avx2_supports(const struct linear_job *job) {
    const int bits = job->t.bits;
    if (job->transposed || job->tokens > FEW || bits < 2 || bits > 8 || job->t.block % (group_columns(bits) / 2))
        return 0;
    return bits <= 4 || (bits == 8 && whole(&job->t));
}

/* The factors of the lanes of a group, from those of its units. */
INLINE __m256 factors(const float *f, int halves) {
    return halves == 1 ? _mm256_broadcast_ss(f) : _mm256_blend_ps(_mm256_broadcast_ss(f), _mm256_broadcast_ss(f + 1), 0xf0);
}

/* The integers that stand for 32 levels, sixteen a vector. */
INLINE void words_of(const struct few *f, __m256i v, int bits, int k, __m256i *w0, __m256i *w1) {
    if (bits == 8) {
        const __m256i c = _mm256_min_epu8(v, _mm256_set1_epi8((char)f->last)), zero = _mm256_setzero_si256(), first = _mm256_set1_epi16((int16_t)f->first);
        *w0 = _mm256_add_epi16(_mm256_unpacklo_epi8(c, zero), first), *w1 = _mm256_add_epi16(_mm256_unpackhi_epi8(c, zero), first);
        return;
    }
    const __m256i a = look_up(f, table_of(bits, k), 0, v), b = look_up(f, table_of(bits, k), 1, v);
    *w0 = _mm256_unpacklo_epi8(a, b), *w1 = _mm256_unpackhi_epi8(a, b);
}

/* 32 levels, eight a vector. */
INLINE void floats_of(const struct few *f, __m256i v, int bits, int k, __m256 *w) {
    if (bits == 8) {
        const __m256i c = _mm256_min_epu8(v, _mm256_set1_epi8((char)f->last)), zero = _mm256_setzero_si256();
        const __m256i half[2] = {_mm256_unpacklo_epi8(c, zero), _mm256_unpackhi_epi8(c, zero)};
        const __m256 first = _mm256_set1_ps(f->first);
        UNROLL
        for (int i = 0; i < 4; i++) {
            const __m256i wide = i % 2 ? _mm256_unpackhi_epi16(half[i / 2], zero) : _mm256_unpacklo_epi16(half[i / 2], zero);
            w[i] = _mm256_add_ps(_mm256_cvtepi32_ps(wide), first);
        }
        return;
    }
    __m256i part[4];
    UNROLL
    for (int b = 0; b < 4; b++)
        part[b] = look_up(f, table_of(bits, k), b, v);
    const __m256i low0 = _mm256_unpacklo_epi8(part[0], part[1]), low1 = _mm256_unpackhi_epi8(part[0], part[1]);
    const __m256i high0 = _mm256_unpacklo_epi8(part[2], part[3]), high1 = _mm256_unpackhi_epi8(part[2], part[3]);
    w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0)), w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1)), w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

/* acc += a group of one row times x of all tokens; `factor` has those of the group for every token, `pitch` apart. */
INLINE void multiply(const struct few *f, const __m256i *c, int bits, int narrow, int halves, int tokens, int64_t g, const float *factor,
                     int64_t pitch, __m256 *acc) {
    const int per = group_columns(bits) / 32;
    __m256i v[4];
    half_bytes(c, bits, v);
    if (narrow) {
        const __m256i *x = (const __m256i *)f->x + g * tokens * per * 2;
        __m256i sum[FEW];
        UNROLL
        for (int k = 0; k < per; k++) {
            __m256i w0, w1;
            words_of(f, v[k], bits, k, &w0, &w1);
            UNROLL
            for (int i = 0; i < tokens; i++) {
                const __m256i s = _mm256_add_epi32(_mm256_madd_epi16(w0, _mm256_load_si256(x + (i * per + k) * 2)),
                                                   _mm256_madd_epi16(w1, _mm256_load_si256(x + (i * per + k) * 2 + 1)));
                sum[i] = k ? _mm256_add_epi32(sum[i], s) : s;
            }
        }
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]), factors(factor + i * pitch, halves), acc[i]);
        return;
    }
    const float *x = (const float *)f->x + g * tokens * per * 32;
    __m256 sum[FEW];
    UNROLL
    for (int k = 0; k < per; k++) {
        __m256 w[4];
        floats_of(f, v[k], bits, k, w);
        UNROLL
        for (int i = 0; i < tokens; i++)
            UNROLL
            for (int j = 0; j < 4; j++) {
                const __m256 b = _mm256_load_ps(x + ((i * per + k) * 4 + j) * 8);
                sum[i] = k + j ? _mm256_fmadd_ps(w[j], b, sum[i]) : _mm256_mul_ps(w[j], b);
            }
    }
    UNROLL
    for (int i = 0; i < tokens; i++)
        acc[i] = _mm256_fmadd_ps(sum[i], factors(factor + i * pitch, halves), acc[i]);
}

/* The sums of four vectors, each in the order of vsum. */
INLINE __m128 four_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m128 p = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), q = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)), s = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
    _MM_TRANSPOSE4_PS(p, q, r, s);
    return _mm_add_ps(_mm_add_ps(p, r), _mm_add_ps(q, s));
}

/* ROWS rows of one token, or one row, from `row` on; `factor` (rows, tokens, units). */
INLINE void rows_of(const struct few *f, int64_t row, int rows, int bits, int narrow, int halves, int tokens, const float *factor) {
    const struct linear_job *job = f->job;
    const struct table *t = &job->t;
    const int columns = group_columns(bits), wide = group_bytes(bits), bytes = wide + (bits == 3 ? 16 : 0); /* of a group and row */
    const uint8_t *codes = t->codes + row * t->row_bytes;
    const int64_t plane = (t->n * (bits == 3 ? 2 : bits) + 7) / 8, full = t->n / columns, pitch = tokens * f->units;
    __m256 acc[ROWS][FEW];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[r][i] = _mm256_setzero_ps();
    /* Codes are loaded and joined one row before they are multiplied: it is a long chain of instructions. */
    __m256i c[2], next[2];
    if (full)
        load_codes(codes, codes + plane, bits, next);
    for (int64_t g = 0; g < full; g++) {
        UNROLL
        for (int i = 0; i < rows * bytes; i += 64) /* what lies ahead in memory, in its order */
            _mm_prefetch((const char *)codes + AHEAD + g * rows * bytes + i, _MM_HINT_T0);
        UNROLL
        for (int r = 0; r < rows; r++) {
            const int64_t then = r + 1 < rows || g + 1 == full ? g : g + 1;
            const uint8_t *p = codes + (r + 1) % rows * t->row_bytes;
            c[0] = next[0], c[1] = next[1];
            load_codes(p + wide * then, p + plane + 16 * then, bits, next);
            multiply(f, c, bits, narrow, halves, tokens, g, factor + r * pitch + halves * g, f->units, acc[r]);
        }
    }
    if (full < f->groups) { /* the last one, of a part of the columns: where x is zero, codes do not count */
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = codes + r * t->row_bytes;
            uint8_t rest[64] = {0};
            memcpy(rest, p + wide * full, (size_t)(plane - wide * full));
            memcpy(rest + 32, p + plane + 16 * full, bits == 3 ? (size_t)(t->row_bytes - plane - 16 * full) : 0);
            load_codes(rest, rest + 32, bits, c);
            multiply(f, c, bits, narrow, halves, tokens, full, factor + r * pitch + halves * full, f->units, acc[r]);
        }
    }
    float y[ROWS * FEW];
    if (rows == ROWS)
        _mm_storeu_ps(y, four_sums(acc[0][0], acc[1][0], acc[2][0], acc[3][0]));
    UNROLL /* arrays live in registers only where every index is constant */
    for (int i = 0; i < tokens && rows < ROWS; i++)
        y[i] = vsum(acc[0][i]);
    for (int r = 0; r < rows && t->shift; r++)
        for (int i = 0; i < tokens; i++)
            for (int64_t k = 0; k < t->blocks; k++)
                y[i * rows + r] += t->shift[(row + r) * t->blocks + k] * f->x_sum[i * t->blocks + k];
    UNROLL
    for (int i = 0; i < tokens; i++)
        store_row(job->y, i * t->rows + row, y + i * rows, rows, job->dtype);
}

typedef void (*rows_fn)(const struct few *, int64_t, const float *);
#define TILE(bits, narrow, halves, tokens, rows)                                                                                   \
    static __attribute__((noinline)) void rows_##bits##_##narrow##_##halves##_##tokens##_##rows(const struct few *f, int64_t row,  \
                                                                                                const float *factor) {             \
        rows_of(f, row, rows, bits, narrow, halves, tokens, factor);                                                               \
    }
#define TILES(bits, narrow, halves)                                                                                                \
    TILE(bits, narrow, halves, 1, 1) TILE(bits, narrow, halves, 1, 4) TILE(bits, narrow, halves, 2, 1) TILE(bits, narrow, halves, 3, 1) \
    TILE(bits, narrow, halves, 4, 1)
TILES(2, 0, 2) TILES(3, 0, 2) TILES(4, 0, 1) TILES(4, 0, 2) TILES(2, 1, 2) TILES(3, 1, 2) TILES(4, 1, 1) TILES(4, 1, 2)
TILES(8, 0, 1) TILES(8, 0, 2) TILES(8, 1, 1) TILES(8, 1, 2)

#define NAMES(bits, narrow, halves)                                                                                                \
    {rows_##bits##_##narrow##_##halves##_1_4, rows_##bits##_##narrow##_##halves##_1_1, rows_##bits##_##narrow##_##halves##_2_1,    \
     rows_##bits##_##narrow##_##halves##_3_1, rows_##bits##_##narrow##_##halves##_4_1}
/* By bits (2, 3, 4 and 8), units of a group, narrowness and tokens; first of all, ROWS rows of one token. */
static const rows_fn tiles[4][2][2][1 + FEW] = {
    {{{0}}, {NAMES(2, 0, 2), NAMES(2, 1, 2)}},
    {{{0}}, {NAMES(3, 0, 2), NAMES(3, 1, 2)}},
    {{NAMES(4, 0, 1), NAMES(4, 1, 1)}, {NAMES(4, 0, 2), NAMES(4, 1, 2)}},
    {{NAMES(8, 0, 1), NAMES(8, 1, 1)}, {NAMES(8, 0, 2), NAMES(8, 1, 2)}},
};

/* factor (tokens, units) of one row, whose scales are in `scale`. */
INLINE void fill_factors(const struct few *f, const float *restrict scale, float *restrict factor) {
    const struct table *t = &f->job->t;
    const int64_t unit = group_columns(t->bits) / f->halves, units = f->units;
    const float *restrict by = f->by;
    for (int64_t i = 0; i < f->job->tokens; i++, factor += units, by += units) {
        if (t->block == unit) {
            for (int64_t u = 0; u < t->blocks; u += 8) { /* what is written behind the last one is overwritten or not read */
                const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(t->blocks - u)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
                _mm256_storeu_ps(factor + u, _mm256_mul_ps(_mm256_maskload_ps(scale + u, some), _mm256_loadu_ps(by + u)));
            }
            continue;
        }
        for (int64_t k = 0, u = 0; k < t->blocks; k++)
            for (; u * unit < least((k + 1) * t->block, t->n); u++)
                factor[u] = scale[k] * by[u];
    }
}

static int few_rows(void *p, int64_t first, int64_t last) {
    const struct few *f = p;
    const struct table *t = &f->job->t;
    const rows_fn *fn = tiles[t->bits == 8 ? 3 : t->bits - 2][f->halves - 1][f->narrow];
    const int64_t size = f->job->tokens * f->units;
    float *factor = scratch(sizeof(float) * (size_t)(ROWS * size + 8 + t->blocks));
    if (!factor)
        return 1;
    float *copy = factor + ROWS * size + 8;
    memset(factor, 0, sizeof(float) * (size_t)(ROWS * size));
    for (int64_t row = first, high; row < last; row += high) {
        high = f->job->tokens == 1 && last - row >= ROWS ? ROWS : 1;
        for (int64_t r = 0; r < high; r++) {
            const float *scale = (const float *)t->scale + (row + r) * t->blocks;
            if (t->store != FP32) {
                load_row(copy, t->scale, (row + r) * t->blocks, t->blocks, t->store);
                scale = copy;
            }
            fill_factors(f, scale, factor + r * size);
        }
        fn[high == ROWS ? 0 : f->job->tokens](f, row, factor);
    }
    free(factor);
    return 0;
}

int packed_avx2_linear(const struct linear_job *job, int threads) {
    struct few f = {.job = job, .narrow = job->dtype != FP32 || job->near, .halves = halves_of(&job->t)};
    const struct table *t = &job->t;
    const int64_t columns = group_columns(t->bits), tokens = job->tokens;
    f.groups = (t->n + columns - 1) / columns;
    f.units = f.groups * f.halves;
    float *row = scratch(sizeof(float) * (size_t)((1 + tokens) * f.groups * columns + tokens * (f.units + t->blocks) + 8));
    int failed = !row;
    if (!failed) {
        f.x = row + f.groups * columns;
        f.by = row + (1 + tokens) * f.groups * columns;
        f.x_sum = f.by + tokens * f.units;
        memset(row + t->n, 0, sizeof(float) * (size_t)(f.groups * columns - t->n));
        if (packed_avx2_arrange(&f, row)) {
            f.narrow = 0;
            packed_avx2_arrange(&f, row);
        }
        const float undo = packed_avx2_levels(&f);
        for (int64_t i = 0; i < tokens * f.units; i++)
            f.by[i] = f.narrow ? f.by[i] * undo : 1.0f;
        failed = parallel(few_rows, &f, t->rows, piece_rows(t->rows, 16 * ROWS, threads), threads);
    }
    free(row);
    return failed;
}
