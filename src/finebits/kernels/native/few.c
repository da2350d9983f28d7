/* x @ W^T for few tokens, on the packed codes of 2, 3 and 4 bits (AVX2).
 *
 * A group is the columns that 32 bytes of the first plane hold: 64 of 4 bits, 128 of 2 and 3. A byte shuffle looks 32 codes up at once, one
 * byte of their levels; interleaving the bytes gives the levels. Both work inside lanes of 128 bits, so a lane of every vector holds columns
 * of one half of the group, all of one block; x is rearranged once a call into the order that this gives. What a group adds to a row is
 * multiplied by the scales of its two halves.
 *
 * Float32 x takes levels of four bytes. X of 16 bits takes two: levels and x become integers of 15 bits with sign, x with a scale for every
 * half of a group, so that a multiply-add of 16-bit integers does 16 columns, at 2^-15 of the largest number of each. That is 10 vector
 * instructions for 32 weights instead of 18.
 */
#include "decode.h"

#include <float.h>
#include <stdlib.h>

enum { ROWS = 4, FEW = FEW_TOKENS, TOP = 1 << 14 };

struct few {
    const struct linear_job *job;
    int64_t groups;
    void *x;      /* (groups, tokens, columns) in the order of a group: float, or int16_t if `narrow` */
    float *by;    /* (groups, tokens, 8): what one of int16_t stands for */
    float *x_sum; /* (tokens, blocks), for the shift */
    int narrow;
    int32_t *base, *lane;  /* (groups), (groups, 8): the block of the first column; those of all lanes, counted from there */
    uint8_t plane[4][4][16] __attribute__((aligned(64))); /* by code of a half-byte: byte of its level */
};

#define UNROLL _Pragma("GCC unroll 16")

INLINE int group_columns(int bits) { return bits == 4 ? 64 : 128; }

int few_supports(const struct linear_job *job) {
    const int bits = job->t.bits;
    return !job->transposed && job->tokens <= FEW && bits >= 2 && bits <= 4 && job->t.block % (group_columns(bits) / 2) == 0;
}

/* The codes of a group in half-bytes: vector k has the codes k, k + per, k + 2 * per, ... in the low bits of its bytes, `per` a byte. Of 2
 * and 3 bits, other codes are above them, for which the tables repeat. */
INLINE void half_bytes(const uint8_t *p, const uint8_t *third, int bits, __m256i *v) {
    const __m256i low = _mm256_set1_epi8(15), c = _mm256_loadu_si256((const __m256i *)p);
    if (bits == 3) {
        const __m256i pairs = _mm256_set1_epi8(0x33), b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)third));
        const __m256i four = _mm256_and_si256(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), low); /* single bits of a byte's four codes */
        /* Single bits 0 and 2 (1 and 3) go to bits 2 and 6. */
        const __m256i t0 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
        const __m256i t1 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
        const __m256i even = _mm256_or_si256(_mm256_and_si256(c, pairs), _mm256_shuffle_epi8(t0, four));
        const __m256i odd = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(c, 2), pairs), _mm256_shuffle_epi8(t1, four));
        v[0] = _mm256_and_si256(even, low), v[2] = _mm256_and_si256(_mm256_srli_epi16(even, 4), low);
        v[1] = _mm256_and_si256(odd, low), v[3] = _mm256_and_si256(_mm256_srli_epi16(odd, 4), low);
        return;
    }
    const __m256i first = _mm256_and_si256(c, low), second = _mm256_and_si256(_mm256_srli_epi16(c, 4), low);
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

/* acc += a group of one row times x of all tokens. */
INLINE void multiply(const struct few *f, const uint8_t *p, const uint8_t *third, int bits, int narrow, int tokens, int64_t g, __m256 scale,
                     __m256 *acc) {
    const int per = group_columns(bits) / 32;
    __m256i v[4];
    half_bytes(p, third, bits, v);
    if (narrow) {
        const __m256i *x = (const __m256i *)f->x + g * tokens * per * 2;
        const float *by = f->by + g * tokens * 8;
        UNROLL
        for (int half = 0; half < per / 2; half++) { /* 64 codes: eight products a lane, which 31 bits hold */
            __m256i sum[FEW];
            UNROLL
            for (int k = 2 * half; k < 2 * half + 2; k++) {
                const __m256i a = look_up(f, table_of(bits, k), 0, v[k]), b = look_up(f, table_of(bits, k), 1, v[k]);
                const __m256i w0 = _mm256_unpacklo_epi8(a, b), w1 = _mm256_unpackhi_epi8(a, b);
                UNROLL
                for (int i = 0; i < tokens; i++) {
                    const __m256i s = _mm256_add_epi32(_mm256_madd_epi16(w0, _mm256_load_si256(x + (i * per + k) * 2)),
                                                       _mm256_madd_epi16(w1, _mm256_load_si256(x + (i * per + k) * 2 + 1)));
                    sum[i] = k == 2 * half ? s : _mm256_add_epi32(sum[i], s);
                }
            }
            UNROLL
            for (int i = 0; i < tokens; i++)
                acc[i] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[i]), _mm256_load_ps(by + 8 * i)), scale, acc[i]);
        }
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
        acc[i] = _mm256_fmadd_ps(sum[i], scale, acc[i]);
}

/* `rows` rows from `row` on; `copy` has their scales, `pitch` apart. */
INLINE void rows_of(const struct few *f, int64_t row, int rows, int bits, int narrow, int tokens, const float *copy, int64_t pitch) {
    const struct linear_job *job = f->job;
    const struct table *t = &job->t;
    const int columns = group_columns(bits);
    const uint8_t *codes = t->codes + row * t->row_bytes;
    const int64_t plane = (t->n * (bits == 3 ? 2 : bits) + 7) / 8, full = t->n / columns;
    __m256 acc[ROWS][FEW];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[r][i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < full; g++) {
        const __m256i lane = _mm256_load_si256((const __m256i *)(f->lane + 8 * g));
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = codes + r * t->row_bytes + 32 * g;
            /* The rows of the next tile, in the order of memory. */
            _mm_prefetch((const char *)codes + rows * t->row_bytes + (g * rows + r) * (bits == 3 ? 48 : 32), _MM_HINT_T0);
            multiply(f, p, codes + r * t->row_bytes + plane + 16 * g, bits, narrow, tokens, g,
                     _mm256_permutevar8x32_ps(_mm256_loadu_ps(copy + r * pitch + f->base[g]), lane), acc[r]);
        }
    }
    if (full < f->groups) { /* the last one, of a part of the columns: where x is zero, codes do not count */
        const __m256i lane = _mm256_load_si256((const __m256i *)(f->lane + 8 * full));
        UNROLL
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = codes + r * t->row_bytes;
            uint8_t rest[48] = {0};
            memcpy(rest, p + 32 * full, (size_t)(plane - 32 * full));
            memcpy(rest + 32, p + plane + 16 * full, bits == 3 ? (size_t)(t->row_bytes - plane - 16 * full) : 0);
            multiply(f, rest, rest + 32, bits, narrow, tokens, full,
                     _mm256_permutevar8x32_ps(_mm256_loadu_ps(copy + r * pitch + f->base[full]), lane), acc[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < tokens; i++) {
            float y = vsum(acc[r][i]);
            for (int64_t k = 0; t->shift && k < t->blocks; k++)
                y += t->shift[(row + r) * t->blocks + k] * f->x_sum[i * t->blocks + k];
            store_as(job->y, i * t->rows + row + r, y, job->dtype);
        }
}

typedef void (*rows_fn)(const struct few *, int64_t, const float *, int64_t);
#define TILE(bits, narrow, tokens, rows)                                                                                                \
    static __attribute__((noinline)) void rows_##bits##_##narrow##_##tokens##_##rows(const struct few *f, int64_t row, const float *copy, \
                                                                                     int64_t pitch) {                                     \
        rows_of(f, row, rows, bits, narrow, tokens, copy, pitch);                                                                       \
    }
#define TILES(bits, narrow)                                                                                                             \
    TILE(bits, narrow, 1, 1) TILE(bits, narrow, 1, 4) TILE(bits, narrow, 2, 1) TILE(bits, narrow, 3, 1) TILE(bits, narrow, 4, 1)
TILES(2, 0) TILES(3, 0) TILES(4, 0) TILES(2, 1) TILES(3, 1) TILES(4, 1)

#define NAMES(bits, narrow)                                                                                                             \
    {rows_##bits##_##narrow##_1_4, rows_##bits##_##narrow##_1_1, rows_##bits##_##narrow##_2_1, rows_##bits##_##narrow##_3_1,            \
     rows_##bits##_##narrow##_4_1}
/* By bits, narrowness and tokens; first of all, four rows of one token. */
static const rows_fn tiles[][2][1 + FEW] = {{NAMES(2, 0), NAMES(2, 1)}, {NAMES(3, 0), NAMES(3, 1)}, {NAMES(4, 0), NAMES(4, 1)}};

static int few_rows(void *p, int64_t first, int64_t last) {
    const struct few *f = p;
    const struct table *t = &f->job->t;
    const int64_t pitch = t->blocks + 8;
    const rows_fn *fn = tiles[t->bits - 2][f->narrow];
    float *copy = scratch(sizeof(float) * (size_t)(ROWS * pitch));
    if (!copy)
        return 1;
    memset(copy, 0, sizeof(float) * (size_t)(ROWS * pitch));
    for (int64_t row = first; row < last;) {
        const int high = f->job->tokens == 1 && last - row >= ROWS ? ROWS : 1;
        for (int r = 0; r < high; r++)
            load_row(copy + r * pitch, t->scale, (row + r) * t->blocks, t->blocks, t->store);
        fn[high == ROWS ? 0 : f->job->tokens](f, row, copy, pitch);
        row += high;
    }
    free(copy);
    return 0;
}

/* The column of a group that lies in place i of x. */
INLINE int column_at(int bits, int narrow, int i) {
    const int per = group_columns(bits) / 32, step = narrow ? 16 : 8, k = i / 32, vector = i % 32 / step, half = i % step / (step / 2);
    return (16 * half + vector * (step / 2) + i % (step / 2)) * per + k;
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
            for (int half = 0; half < 2; half++) {
                float most = 0.0f;
                int finite = 1;
                for (int i = 0; i < columns / 2; i++) {
                    const float a = fabsf(x[half * columns / 2 + i]);
                    most = a > most ? a : most;
                    finite &= a <= FLT_MAX;
                }
                if (!finite)
                    return 1;
                const float inverse = most > 0x1p-100f ? (TOP - 1) / most : 0.0f;
                for (int i = 0; i < columns / 2; i++)
                    whole[half * columns / 2 + i] = (int16_t)rintf(x[half * columns / 2 + i] * inverse);
                for (int i = 0; i < 4; i++)
                    f->by[at * 8 + half * 4 + i] = most / (TOP - 1);
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
    float most = 0.0f, factor = TOP;
    for (int i = 0; i < 1 << t->bits; i++)
        most = fabsf(t->levels[i]) > most ? fabsf(t->levels[i]) : most;
    while (most * factor > TOP)
        factor /= 2;
    while (most > 0x1p-60f && most * factor * 2 <= TOP)
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
    struct few f = {.job = job, .narrow = job->dtype != FP32};
    const struct table *t = &job->t;
    const int64_t columns = group_columns(t->bits), tokens = job->tokens;
    f.groups = (t->n + columns - 1) / columns;
    float *row = scratch(sizeof(float) * (size_t)(f.groups * columns));
    f.x = scratch(sizeof(float) * (size_t)(tokens * f.groups * columns));
    f.by = scratch(sizeof(float) * (size_t)(tokens * f.groups * 8));
    f.x_sum = scratch(sizeof(float) * (size_t)(tokens * t->blocks));
    f.lane = scratch(sizeof(int32_t) * (size_t)(9 * f.groups));
    int failed = !row || !f.x || !f.by || !f.x_sum || !f.lane;
    if (!failed) {
        f.base = f.lane + 8 * f.groups;
        for (int64_t g = 0; g < f.groups; g++) {
            f.base[g] = (int32_t)(g * columns / t->block);
            for (int l = 0; l < 8; l++)
                f.lane[8 * g + l] = (int32_t)((g * columns + l / 4 * columns / 2) / t->block - f.base[g]);
        }
        memset(row + t->n, 0, sizeof(float) * (size_t)(f.groups * columns - t->n));
        if (arrange(&f, row)) {
            f.narrow = 0;
            arrange(&f, row);
        }
        const float undo = fill_planes(&f);
        for (int64_t i = 0; f.narrow && i < tokens * f.groups * 8; i++)
            f.by[i] *= undo;
        failed = parallel(few_rows, &f, t->rows, piece_rows(t->rows, 8 * ROWS, threads), threads);
    }
    free(row), free(f.x), free(f.by), free(f.x_sum), free(f.lane);
    return failed;
}
