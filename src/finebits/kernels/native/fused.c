/* x @ W^T for bfloat16 x and few tokens, on the packed codes of 2, 3 and 4 bits (AVX-512 with bfloat16 dot products).
 *
 * A group is the columns that 64 bytes of the first plane hold: GROUP = 128 for 4 bits, 256 for 2 and 3. Its word w (of 32) holds the PER
 * columns PER*w ... PER*w + PER - 1, so the k-th code of all words together is one vector of levels, found by shifting and one
 * vpermw; that instruction looks at 5 bits of its index only, and a table that repeats makes a mask unnecessary. x is rearranged once a
 * call into the same order. Float lane l of the dot products then holds columns 2*PER*l ... 2*PER*(l + 1) - 1, all of one block, and is
 * multiplied by that block's scale. Levels are rounded to bfloat16 after a multiplication by the factor that makes this least harmful.
 *
 * From MANY tokens on, and for blocks of whole SEGMENTs, that multiplication costs more than a table of its own for every segment: the
 * 32 entries of vpermw then hold the weights themselves, rounded as a dense bfloat16 weight is, for all segments of a group.
 */
#include "simd.h"

#include <stdlib.h>

enum { ROWS = 2, MANY = 4, SEGMENT = 64, L1_BYTES = 32768 /* of x, beside codes and sums */ };

struct fused {
    const struct linear_job *job;
    int64_t groups;
    uint16_t *x;     /* per tile of tokens: (groups, tile, PER, 32) */
    float *x_sum;    /* (tokens, blocks), for the shift */
    int32_t *lane;   /* (groups, 16): block of a lane, counted from `base` */
    int32_t *base;   /* (groups) */
    float undo;      /* 1 / factor */
    int many;        /* tables by segment */
    int32_t *entry;  /* (groups, 32): block of a table entry, counted from `base` */
    float values[32] __attribute__((aligned(64)));   /* level of a table entry */
    uint16_t segment[32] __attribute__((aligned(64))); /* first entry of a word's segment */
    uint16_t levels[32] __attribute__((aligned(64)));
};

/* Arrays live in registers only where every index is constant. */
#define UNROLL _Pragma("GCC unroll 8")

INLINE int per_word(int bits) { return bits == 4 ? 4 : 8; }
INLINE int tile_size(int bits, int many) { return many || bits == 4 ? 8 : 4; }

int fused_supports(const struct linear_job *job) {
    int bits = job->t.bits;
    return job->dtype == BF16 && !job->transposed && (bits == 2 || bits == 3 || bits == 4) && job->t.block % (2 * per_word(bits)) == 0;
}

static float best_factor(const float *levels, int count) {
    float best = 1.0f, best_error = INFINITY;
    for (int step = 0; step < 128; step++) {
        float factor = 1.0f + (float)step / 128, error = 0.0f;
        for (int i = 0; i < count; i++) {
            float a = levels[i] * factor, d = (from_bf16(to_bf16(a)) - a) / factor;
            error += d * d;
        }
        if (error < best_error)
            best = factor, best_error = error;
        if (error == 0.0f)
            break;
    }
    return best;
}

INLINE __m512i load_codes(const uint8_t *p, int64_t left) {
    return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p);
}

/* Bit 2 of eight codes a word, from their plane of single bits. */
INLINE __m512i load_third(const uint8_t *p, int64_t left) {
    __m256i b = left >= 32 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8((1u << left) - 1, p);
    return _mm512_slli_epi16(_mm512_cvtepu8_epi16(b), 2);
}

/* The k-th code of every word in its low bits; the bits above are of no use. */
INLINE __m512i low_codes(__m512i c, __m512i third, int bits, int k) {
    c = _mm512_srli_epi16(c, (bits == 4 ? 4 : 2) * k);
    return bits == 3 ? _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), c, _mm512_srli_epi16(third, k), 0xca) : c;
}

/* Groups first ... last - 1 of rows row, row + 1, ... row + ROWS - 1, whose sums so far are in `sums`; rows from `rows` on repeat the
 * first and are not stored. */
INLINE void tile(const struct fused *f, int64_t row, int rows, int64_t token, int tokens, int bits, const float *scale, int64_t first,
                 int64_t last, float *sums) {
    const struct linear_job *job = f->job;
    const struct table *t = &job->t;
    const int per = bits == 4 ? 4 : 8;
    const int64_t plane = bits == 3 ? (t->n * 2 + 7) / 8 : t->row_bytes, pitch = t->blocks + 16;
    const __m512i levels = _mm512_load_si512(f->levels);
    const uint16_t *x = f->x + token * f->groups * per * 32;
    const uint8_t *codes[ROWS];
    __m512 acc[ROWS][8];
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        codes[r] = t->codes + (row + (r < rows ? r : 0)) * t->row_bytes;
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[r][i] = first ? _mm512_load_ps(sums + (r * tokens + i) * 16) : _mm512_setzero_ps();
    }
    for (int64_t g = first; g < last; g++) {
        __m512i w[ROWS][8];
        __m512 s[ROWS];
        const __m512i lane = _mm512_load_si512(f->lane + 16 * g);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *p = codes[r] + 64 * g;
            __m512i c = load_codes(p, plane - 64 * g);
            _mm_prefetch((const char *)(p + 2048), _MM_HINT_T0);
            const __m512i third = bits == 3 ? load_third(codes[r] + plane + 32 * g, t->row_bytes - plane - 32 * g) : c;
            UNROLL
            for (int k = 0; k < per; k++)
                w[r][k] = _mm512_permutexvar_epi16(low_codes(c, third, bits, k), levels);
            s[r] = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scale + r * pitch + f->base[g]));
        }
        UNROLL
        for (int i = 0; i < tokens; i++) {
            __m512 d[ROWS];
            UNROLL
            for (int r = 0; r < ROWS; r++)
                d[r] = _mm512_setzero_ps();
            UNROLL
            for (int k = 0; k < per; k++) {
                const __m512i v = _mm512_load_si512(x + ((g * tokens + i) * per + k) * 32);
                UNROLL
                for (int r = 0; r < ROWS; r++)
                    d[r] = _mm512_dpbf16_ps(d[r], (__m512bh)w[r][k], (__m512bh)v);
            }
            UNROLL
            for (int r = 0; r < ROWS; r++)
                acc[r][i] = _mm512_fmadd_ps(d[r], s[r], acc[r][i]);
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int i = 0; i < tokens; i++)
            _mm512_store_ps(sums + (r * tokens + i) * 16, acc[r][i]);
    if (last < f->groups)
        return;
    for (int i = 0; i < tokens; i++)
        for (int r = 0; r < rows; r++) {
            float y = _mm512_reduce_add_ps(_mm512_load_ps(sums + (r * tokens + i) * 16)) * f->undo;
            if (t->shift) {
                const float *shift = t->shift + (row + r) * t->blocks, *sum = f->x_sum + (token + i) * t->blocks;
                __m512 a = _mm512_setzero_ps();
                for (int64_t k = 0; k < t->blocks; k += 16) {
                    __mmask16 mask = t->blocks - k >= 16 ? 0xffff : (__mmask16)((1u << (t->blocks - k)) - 1);
                    a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, shift + k), _mm512_maskz_loadu_ps(mask, sum + k), a);
                }
                y += _mm512_reduce_add_ps(a);
            }
            ((uint16_t *)job->y)[(token + i) * t->rows + row + r] = to_bf16(y);
        }
}

/* As tile, with a table for every segment, shift included. */
INLINE void tile_many(const struct fused *f, int64_t row, int rows, int64_t token, int tokens, int bits, const float *scale, int64_t first,
                      int64_t last, float *sums) {
    const struct table *t = &f->job->t;
    const int per = bits == 4 ? 4 : 8;
    const int64_t plane = bits == 3 ? (t->n * 2 + 7) / 8 : t->row_bytes, pitch = t->blocks + 16;
    const __m512i segment = _mm512_load_si512(f->segment), code = _mm512_set1_epi16((short)((1 << bits) - 1));
    const __m512 low = _mm512_load_ps(f->values), high = _mm512_load_ps(f->values + 16);
    const uint16_t *x = f->x + token * f->groups * per * 32;
    const uint8_t *codes[ROWS];
    __m512 acc[ROWS][8];
    UNROLL
    for (int r = 0; r < ROWS; r++) {
        codes[r] = t->codes + (row + (r < rows ? r : 0)) * t->row_bytes;
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[r][i] = first ? _mm512_load_ps(sums + (r * tokens + i) * 16) : _mm512_setzero_ps();
    }
    for (int64_t g = first; g < last; g++) {
        const __m512i entry = _mm512_load_si512(f->entry + 32 * g), next = _mm512_load_si512(f->entry + 32 * g + 16);
        __m512i c[ROWS], third[ROWS], table[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) {
            const float *s = scale + r * pitch + f->base[g];
            __m512 all = _mm512_loadu_ps(s), a = _mm512_mul_ps(low, _mm512_permutexvar_ps(entry, all));
            __m512 b = _mm512_mul_ps(high, _mm512_permutexvar_ps(next, all));
            if (t->shift) {
                all = _mm512_loadu_ps(s + ROWS * pitch);
                a = _mm512_add_ps(a, _mm512_permutexvar_ps(entry, all));
                b = _mm512_add_ps(b, _mm512_permutexvar_ps(next, all));
            }
            table[r] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            c[r] = load_codes(codes[r] + 64 * g, plane - 64 * g);
            _mm_prefetch((const char *)(codes[r] + 64 * g + 2048), _MM_HINT_T0);
            third[r] = bits == 3 ? load_third(codes[r] + plane + 32 * g, t->row_bytes - plane - 32 * g) : c[r];
        }
        UNROLL
        for (int half = 0; half < per; half += 4) {
            __m512i w[ROWS][4];
            UNROLL
            for (int r = 0; r < ROWS; r++)
                UNROLL
                for (int k = 0; k < 4; k++) {
                    __m512i index = low_codes(c[r], third[r], bits, half + k);
                    w[r][k] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(code, index, segment, 0xca), table[r]);
                }
            UNROLL
            for (int k = 0; k < 4; k++)
                UNROLL
                for (int i = 0; i < tokens; i++) {
                    const __m512i v = _mm512_load_si512(x + ((g * tokens + i) * per + half + k) * 32);
                    UNROLL
                    for (int r = 0; r < ROWS; r++)
                        acc[r][i] = _mm512_dpbf16_ps(acc[r][i], (__m512bh)w[r][k], (__m512bh)v);
                }
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int i = 0; i < tokens; i++)
            _mm512_store_ps(sums + (r * tokens + i) * 16, acc[r][i]);
    if (last < f->groups)
        return;
    for (int i = 0; i < tokens; i++)
        for (int r = 0; r < rows; r++)
            ((uint16_t *)f->job->y)[(token + i) * t->rows + row + r] =
                to_bf16(_mm512_reduce_add_ps(_mm512_load_ps(sums + (r * tokens + i) * 16)));
}

#define TILE(kind, bits, tokens)                                                                                                   \
    static __attribute__((noinline)) void kind##_##bits##_##tokens(const struct fused *f, int64_t row, int rows, int64_t token,    \
                                                                   const float *scale, int64_t first, int64_t last, float *sums) { \
        kind(f, row, rows, token, tokens, bits, scale, first, last, sums);                                                         \
    }
#define TILES(kind, bits) TILE(kind, bits, 1) TILE(kind, bits, 2) TILE(kind, bits, 3) TILE(kind, bits, 4)
#define MORE_TILES(kind, bits) TILE(kind, bits, 5) TILE(kind, bits, 6) TILE(kind, bits, 7) TILE(kind, bits, 8)
#define NAMES(kind, bits) kind##_##bits##_1, kind##_##bits##_2, kind##_##bits##_3, kind##_##bits##_4
#define MORE_NAMES(kind, bits) kind##_##bits##_5, kind##_##bits##_6, kind##_##bits##_7, kind##_##bits##_8

TILES(tile, 2)
TILES(tile, 3)
TILES(tile, 4)
MORE_TILES(tile, 4)
TILE(tile_many, 2, 4)
TILE(tile_many, 3, 4)
TILE(tile_many, 4, 4)
MORE_TILES(tile_many, 2)
MORE_TILES(tile_many, 3)
MORE_TILES(tile_many, 4)

typedef void (*tile_fn)(const struct fused *, int64_t, int, int64_t, const float *, int64_t, int64_t, float *);
static const tile_fn tiles[3][8] = {{NAMES(tile, 2)}, {NAMES(tile, 3)}, {NAMES(tile, 4), MORE_NAMES(tile, 4)}};
static const tile_fn tiles_many[3][8] = {
    {tile_2_1, tile_2_2, tile_2_3, tile_many_2_4, MORE_NAMES(tile_many, 2)},
    {tile_3_1, tile_3_2, tile_3_3, tile_many_3_4, MORE_NAMES(tile_many, 3)},
    {tile_4_1, tile_4_2, tile_4_3, tile_many_4_4, MORE_NAMES(tile_many, 4)},
};

INLINE void load_scales(float *to, const struct table *t, int64_t row) {
    for (int64_t k = 0; k < t->blocks; k += 16) {
        int64_t at = row * t->blocks + k;
        __mmask16 mask = t->blocks - k >= 16 ? 0xffff : (__mmask16)((1u << (t->blocks - k)) - 1);
        __m512 v;
        if (t->store == FP32) {
            v = _mm512_maskz_loadu_ps(mask, (const float *)t->scale + at);
        } else {
            __m256i h = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)t->scale + at);
            v = t->store == FP16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
        }
        _mm512_storeu_ps(to + k, v);
    }
}

static int fused_rows(void *p, int64_t first, int64_t last) {
    const struct fused *f = p;
    const struct linear_job *job = f->job;
    const struct table *t = &job->t;
    int64_t pitch = t->blocks + 16, pairs = (last - first + ROWS - 1) / ROWS;
    int per = per_word(t->bits), size = tile_size(t->bits, f->many);
    size_t sums = (size_t)(ROWS * size * 16);
    float *scale = scratch(sizeof(float) * ((size_t)(2 * ROWS * pitch + 31) / 16 * 16 + (size_t)pairs * sums));
    if (!scale)
        return 1;
    float *sum = scale + (2 * ROWS * pitch + 31) / 16 * 16;
    memset(scale, 0, sizeof(float) * (size_t)(2 * ROWS * pitch));
    for (int64_t token = 0; token < job->tokens; token += size) {
        int64_t tokens = least(size, job->tokens - token), step = L1_BYTES / (tokens * per * 64);
        tile_fn fn = (f->many ? tiles_many : tiles)[t->bits - 2][tokens - 1];
        for (int64_t g = 0; g < f->groups; g += step)
            for (int64_t row = first; row < last; row += ROWS) {
                int rows = (int)least(ROWS, last - row);
                for (int r = 0; r < rows; r++) {
                    load_scales(scale + r * pitch, t, row + r);
                    if (t->shift && f->many)
                        memcpy(scale + (ROWS + r) * pitch, t->shift + (row + r) * t->blocks, sizeof(float) * (size_t)t->blocks);
                }
                fn(f, row, rows, token, scale, g, least(g + step, f->groups), sum + (size_t)((row - first) / ROWS) * sums);
            }
    }
    free(scale);
    return 0;
}

int fused_linear(const struct linear_job *job, int threads) {
    const struct table *t = &job->t;
    struct fused f = {.job = job};
    f.many = job->tokens >= MANY && t->block % SEGMENT == 0;
    int per = per_word(t->bits), size = tile_size(t->bits, f.many), count = 1 << t->bits;
    int64_t group = 32 * per, n = t->n;
    f.groups = (n + group - 1) / group;
    f.x = scratch(sizeof(uint16_t) * (size_t)(job->tokens * f.groups * group));
    f.lane = scratch(sizeof(int32_t) * (size_t)(f.groups * 16));
    f.base = scratch(sizeof(int32_t) * (size_t)f.groups);
    f.entry = scratch(sizeof(int32_t) * (size_t)(f.groups * 32));
    f.x_sum = t->shift ? scratch(sizeof(float) * (size_t)(job->tokens * t->blocks)) : NULL;
    int failed = !f.x || !f.lane || !f.base || !f.entry || (t->shift && !f.x_sum);
    if (!failed) {
        for (int64_t token = 0; token < job->tokens; token += size) {
            int64_t tokens = least(size, job->tokens - token);
            for (int64_t i = 0; i < tokens; i++) {
                const uint16_t *from = (const uint16_t *)job->x + (token + i) * n;
                for (int64_t g = 0; g < f.groups; g++) {
                    uint16_t *to = f.x + token * f.groups * group + (g * tokens + i) * group;
                    if ((g + 1) * group <= n) {
                        for (int k = 0; k < per; k++)
                            for (int w = 0; w < 32; w++)
                                to[k * 32 + w] = from[g * group + w * per + k];
                    } else {
                        memset(to, 0, sizeof(uint16_t) * (size_t)group);
                        for (int64_t j = g * group; j < n; j++)
                            to[(j % per) * 32 + (j % group) / per] = from[j];
                    }
                }
                if (t->shift)
                    for (int64_t k = 0; k < t->blocks; k++) {
                        float sum = 0.0f;
                        for (int64_t j = k * t->block; j < least((k + 1) * t->block, n); j++)
                            sum += from_bf16(from[j]);
                        f.x_sum[(token + i) * t->blocks + k] = sum;
                    }
            }
        }
        for (int64_t g = 0; g < f.groups; g++) {
            f.base[g] = (int32_t)(g * group / t->block);
            for (int l = 0; l < 16; l++)
                f.lane[16 * g + l] = (int32_t)(least((g * group + l * 2 * per) / t->block, t->blocks - 1) - f.base[g]);
            for (int i = 0; i < 32; i++)
                f.entry[32 * g + i] = (int32_t)(least((g * group + i / count * SEGMENT) / t->block, t->blocks - 1) - f.base[g]);
        }
        float factor = best_factor(t->levels, count);
        f.undo = 1.0f / factor;
        for (int i = 0; i < 32; i++) {
            f.values[i] = t->levels[i % count];
            f.segment[i] = (uint16_t)(i * per / SEGMENT * count);
            f.levels[i] = to_bf16(t->levels[i % count] * factor);
        }
        failed = parallel(fused_rows, &f, t->rows, 32, threads);
    }
    free(f.x), free(f.lane), free(f.base), free(f.entry), free(f.x_sum);
    return failed;
}
