/* x @ W^T for few tokens, on the packed codes of 2, 3 and 4 bits (AVX2).
 *
 * A group is the columns that 32 bytes of the first plane hold: 64 of 4 bits, 128 of 2 and 3. A byte shuffle looks 32 codes up at once, one
 * byte of their levels; interleaving the bytes gives the levels. Both work inside lanes of 128 bits, so a lane of every vector holds columns
 * of one half of the group; x is rearranged once a call into the order that this gives. What a group adds to a row is multiplied by one
 * factor if all of it lies in one block (a unit is the group then), else by one for each half.
 *
 * Float32 x takes levels of four bytes, and factors are scales. X of 16 bits takes two: levels and x become integers of 15 bits with sign, x
 * with a scale for every unit, which goes into the factors, so that a multiply-add of 16-bit integers does 16 columns, at 2^-15 of the
 * largest number of each. That is 9 vector instructions for 32 weights instead of 18.
 */
#include "decode.h"

#include <stdlib.h>

enum { ROWS = 4, FEW = FEW_TOKENS, TOP = (1 << 14) - 1, AHEAD = 8192 /* bytes of codes */ };

struct few {
    const struct linear_job *job;
    int64_t groups, units;
    void *x;      /* (groups, tokens, columns) in the order of a group: float, or int16_t if `narrow` */
    float *by;    /* (tokens, units): what one of these integers stands for, or 1 */
    float *x_sum; /* (tokens, blocks), for the shift */
    int narrow, halves; /* units of a group */
    uint8_t plane[4][4][16] __attribute__((aligned(64))); /* by code of a half-byte: byte of its level */
};

#define UNROLL _Pragma("GCC unroll 16")

INLINE int group_columns(int bits) { return bits == 4 ? 64 : 128; }

/* Of 2 and 3 bits, x would have but one scale for 128 columns. */
INLINE int halves_of(const struct table *t) { return t->bits == 4 && t->block % 64 == 0 ? 1 : 2; }

int few_supports(const struct linear_job *job) {
    const int bits = job->t.bits;
    return !job->transposed && job->tokens <= FEW && bits >= 2 && bits <= 4 && job->t.block % (group_columns(bits) / 2) == 0;
}

/* The codes of a group as they are in memory; those of 3 bits joined in half-bytes, 0 and 2 of every byte in c[0], 1 and 3 in c[1]. */
INLINE void load_codes(const uint8_t *p, const uint8_t *third, int bits, __m256i *c) {
    c[0] = _mm256_loadu_si256((const __m256i *)p);
    if (bits != 3)
        return;
    const __m256i even = _mm256_set1_epi8(0x33), b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)third));
    const __m256i four = _mm256_and_si256(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), _mm256_set1_epi8(15)); /* single bits of a byte's four codes */
    /* Single bits 0 and 2 (1 and 3) go to bits 2 and 6. */
    const __m256i t0 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const __m256i t1 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
    c[1] = _mm256_or_si256(_mm256_and_si256(even, _mm256_srli_epi16(c[0], 2)), _mm256_shuffle_epi8(t1, four));
    c[0] = _mm256_or_si256(_mm256_and_si256(even, c[0]), _mm256_shuffle_epi8(t0, four));
}

/* The codes of a group in half-bytes: vector k has the codes k, k + per, k + 2 * per, ... in the low bits of its bytes, `per` a byte. What
 * is above them (of 2 bits in bits 2 and 3 already, for which the tables repeat) a shuffle does not look at, but bit 7, which is zero. */
INLINE void half_bytes(const __m256i *c, int bits, __m256i *v) {
    const __m256i low = _mm256_set1_epi8(15), upper = _mm256_srli_epi16(c[0], 4);
    if (bits == 3) {
        v[0] = c[0], v[1] = c[1], v[2] = upper, v[3] = _mm256_srli_epi16(c[1], 4);
        return;
    }
    const __m256i first = _mm256_and_si256(c[0], low), second = _mm256_and_si256(upper, low);
    if (bits == 4)
        v[0] = first, v[1] = second;
    else
        v[0] = v[1] = first, v[2] = v[3] = second;
}

/* Which of its tables vector k looks its codes up in: of 2 bits, the lower or the upper ones of a half-byte. */
INLINE int table_of(int bits, int k) { return bits == 2 ? k % 2 : 0; }

INLINE __m256i look_up(const struct few *f, int which, int byte, __m256i v) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)f->plane[which][byte])), v);
}

/* The factors of the lanes of a group, from those of its units. */
INLINE __m256 factors(const float *f, int halves) {
    return halves == 1 ? _mm256_broadcast_ss(f) : _mm256_blend_ps(_mm256_broadcast_ss(f), _mm256_broadcast_ss(f + 1), 0xf0);
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
            const __m256i a = look_up(f, table_of(bits, k), 0, v[k]), b = look_up(f, table_of(bits, k), 1, v[k]);
            const __m256i w0 = _mm256_unpacklo_epi8(a, b), w1 = _mm256_unpackhi_epi8(a, b);
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
        __m256i part[4];
        UNROLL
        for (int b = 0; b < 4; b++)
            part[b] = look_up(f, table_of(bits, k), b, v[k]);
        const __m256i low0 = _mm256_unpacklo_epi8(part[0], part[1]), low1 = _mm256_unpackhi_epi8(part[0], part[1]);
        const __m256i high0 = _mm256_unpacklo_epi8(part[2], part[3]), high1 = _mm256_unpackhi_epi8(part[2], part[3]);
        const __m256i w[4] = {_mm256_unpacklo_epi16(low0, high0), _mm256_unpackhi_epi16(low0, high0), _mm256_unpacklo_epi16(low1, high1),
                              _mm256_unpackhi_epi16(low1, high1)};
        UNROLL
        for (int i = 0; i < tokens; i++)
            UNROLL
            for (int j = 0; j < 4; j++) {
                const __m256 a = _mm256_castsi256_ps(w[j]), b = _mm256_load_ps(x + ((i * per + k) * 4 + j) * 8);
                sum[i] = k + j ? _mm256_fmadd_ps(a, b, sum[i]) : _mm256_mul_ps(a, b);
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
    const int columns = group_columns(bits), bytes = bits == 3 ? 48 : 32; /* of a group and row */
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
            load_codes(p + 32 * then, p + plane + 16 * then, bits, next);
            multiply(f, c, bits, narrow, halves, tokens, g, factor + r * pitch + halves * g, f->units, acc[r]);
        }
    }
    if (full < f->groups) { /* the last one, of a part of the columns: where x is zero, codes do not count */
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = codes + r * t->row_bytes;
            uint8_t rest[48] = {0};
            memcpy(rest, p + 32 * full, (size_t)(plane - 32 * full));
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

#define NAMES(bits, narrow, halves)                                                                                                \
    {rows_##bits##_##narrow##_##halves##_1_4, rows_##bits##_##narrow##_##halves##_1_1, rows_##bits##_##narrow##_##halves##_2_1,    \
     rows_##bits##_##narrow##_##halves##_3_1, rows_##bits##_##narrow##_##halves##_4_1}
/* By bits (4 with two units a group, then with one), narrowness and tokens; first of all, ROWS rows of one token. */
static const rows_fn tiles[][2][1 + FEW] = {{NAMES(2, 0, 2), NAMES(2, 1, 2)}, {NAMES(3, 0, 2), NAMES(3, 1, 2)},
                                            {NAMES(4, 0, 2), NAMES(4, 1, 2)}, {NAMES(4, 0, 1), NAMES(4, 1, 1)}};

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
    const rows_fn *fn = tiles[t->bits == 4 && f->halves == 1 ? 3 : t->bits - 2][f->narrow];
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

/* The column of a group that lies in place i of x. */
INLINE int column_at(int bits, int narrow, int i) {
    const int per = group_columns(bits) / 32, step = narrow ? 16 : 8, k = i / 32, vector = i % 32 / step, half = i % step / (step / 2);
    return (16 * half + vector * (step / 2) + i % (step / 2)) * per + k;
}

/* Numbers as integers of 15 bits with sign times most / TOP, `most` the largest size; zero if there are infinities or NaN. */
INLINE int to_integers(const float *x, int count, int16_t *out, float *most) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    int32_t tops[8], largest = 0;
    for (int i = 0; i < count; i += 8) /* sizes compare as the integers that have their bits, and NaN is above infinity */
        top = _mm256_max_epi32(top, _mm256_and_si256(size, _mm256_loadu_si256((const __m256i *)(x + i))));
    _mm256_storeu_si256((__m256i *)tops, top);
    for (int i = 0; i < 8; i++)
        largest = tops[i] > largest ? tops[i] : largest;
    *most = float_of((uint32_t)largest);
    const __m256 inverse = _mm256_set1_ps(*most > 0x1p-100f ? TOP / *most : 0.0f);
    for (int i = 0; i < count; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }
    return largest < 0x7f800000;
}

/* x (groups, tokens, columns) in the order of a group; nonzero if there are infinities or NaN, which integers do not hold. */
static int arrange(const struct few *f, float *row) {
    const struct linear_job *job = f->job;
    const int bits = job->t.bits, columns = group_columns(bits);
    int16_t from[128];
    float *wide = f->x;
    int16_t *thin = f->x;
    for (int i = 0; i < columns; i++)
        from[i] = (int16_t)column_at(bits, f->narrow, i);
    for (int64_t token = 0; token < job->tokens; token++) {
        load_row(row, job->x, token * job->t.n, job->t.n, job->dtype);
        for (int64_t g = 0; g < f->groups; g++) {
            const float *x = row + g * columns;
            const int64_t at = g * job->tokens + token;
            if (!f->narrow) {
                for (int i = 0; i < columns; i++)
                    wide[at * columns + i] = x[from[i]];
                continue;
            }
            int16_t whole[128];
            const int unit = columns / f->halves;
            for (int u = 0; u < f->halves; u++) {
                float *by = f->by + token * f->units + g * f->halves + u;
                if (!to_integers(x + u * unit, unit, whole + u * unit, by))
                    return 1;
                *by = *by / TOP;
            }
            for (int i = 0; i < columns; i++)
                thin[at * columns + i] = whole[from[i]];
        }
        for (int64_t k = 0; job->t.shift && k < job->t.blocks; k++) {
            float sum = 0.0f;
            for (int64_t j = k * job->t.block; j < least((k + 1) * job->t.block, job->t.n); j++)
                sum += row[j];
            f->x_sum[token * job->t.blocks + k] = sum;
        }
    }
    return 0;
}

/* Tables of levels, or of integers next to them times a power of two, which holds the levels of whole numbers exactly; gives its inverse. */
static float fill_planes(struct few *f) {
    const struct table *t = &f->job->t;
    const float top = t->bits == 4 ? 1 << 14 : 1 << 13; /* a lane adds eight products of a group, or sixteen, which 31 bits hold */
    float most = 0.0f, factor = top;
    for (int i = 0; i < 1 << t->bits; i++)
        most = fabsf(t->levels[i]) > most ? fabsf(t->levels[i]) : most;
    while (most * factor > top)
        factor /= 2;
    while (most > 0x1p-60f && most * factor * 2 <= top)
        factor *= 2;
    for (int i = 0; i < 16; i++)
        for (int which = 0; which < 2; which++) {
            const float level = t->levels[(t->bits == 2 && which ? i / 4 : i) % (1 << t->bits)];
            const uint32_t value = f->narrow ? (uint32_t)(int32_t)rintf(level * factor) : bits_of(level);
            for (int b = 0; b < 4; b++)
                f->plane[which][b][i] = (uint8_t)(value >> (8 * b));
        }
    return f->narrow ? 1 / factor : 1.0f;
}

int few_linear(const struct linear_job *job, int threads) {
    struct few f = {.job = job, .narrow = job->dtype != FP32, .halves = halves_of(&job->t)};
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
        if (arrange(&f, row)) {
            f.narrow = 0;
            arrange(&f, row);
        }
        const float undo = fill_planes(&f);
        for (int64_t i = 0; i < tokens * f.units; i++)
            f.by[i] = f.narrow ? f.by[i] * undo : 1.0f;
        failed = parallel(few_rows, &f, t->rows, piece_rows(t->rows, 16 * ROWS, threads), threads);
    }
    free(row);
    return failed;
}
