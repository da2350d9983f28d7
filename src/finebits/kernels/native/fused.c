/* x @ W^T for bfloat16 x and few tokens, on the packed codes of 2, 3, 4 and 8 bits (AVX-512 with bfloat16 dot products).
 *
 * A group is the columns that 64 bytes of the first plane hold: GROUP = 64 for 8 bits, 128 for 4, 256 for 2 and 3. Its word w (of 32) holds the PER
 * columns PER*w ... PER*w + PER - 1, so the k-th code of all words together is one vector of levels, found by shifting and one
 * vpermw; that instruction looks at 5 bits of its index only, and a table that repeats makes a mask unnecessary. x is rearranged once a
 * call into the same order. Float lane l of the dot products then holds columns 2*PER*l ... 2*PER*(l + 1) - 1, all of one block, and is
 * multiplied by that block's scale. Levels are rounded to bfloat16 after a multiplication by the factor that makes this least harmful.
 */
#include "decode_bf16.h"

#include <stdlib.h>

enum { ROWS = 4, STEP = 32, FEW = 4, L1_BYTES = 32768 /* of x, beside codes and sums */ };

struct fused {
    const struct linear_job *job;
    int64_t groups;
    uint16_t *x;     /* (groups, tokens, PER, 32) */
    float *x_sum;    /* (tokens, blocks), for the shift */
    int32_t *lane;   /* (groups, 16): block of a lane, counted from `base` */
    int32_t *base;   /* (groups) */
    float undo;      /* 1 / factor */
    uint16_t levels[32] __attribute__((aligned(64)));
    uint8_t halves[2][256] __attribute__((aligned(64))); /* of 256 levels: their lower bytes and their upper ones */
};

/* Arrays live in registers only where every index is constant. */
#define UNROLL _Pragma("GCC unroll 8")

INLINE int per_word(int bits) { return bits == 8 ? 2 : bits == 4 ? 4 : 8; }

int fused_supports(const struct linear_job *job) {
    int bits = job->t.bits;
    return job->dtype == BF16 && job->tokens <= FEW && !job->transposed && (bits == 2 || bits == 3 || bits == 4 || bits == 8) && job->t.block % (2 * per_word(bits)) == 0;
}

/* Of the factors between 1 and 2, the one that rounds 16 levels or fewer with the least error; the last answer is kept. */
static float best_factor(const float *levels, int count) {
    static _Thread_local struct {
        float levels[16], factor;
        int count;
    } kept;
    if (count > 16)
        return 1.0f;
    if (count == kept.count && memcmp(levels, kept.levels, sizeof(float) * (size_t)count) == 0)
        return kept.factor;
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
    memcpy(kept.levels, levels, sizeof(float) * (size_t)count);
    kept.count = count, kept.factor = best;
    return best;
}

/* Scales of the rows of a tile, `pitch` apart; 16 may be read from any block on. */
struct factors {
    const float *scale;
    int64_t pitch;
};

INLINE __m512i load_codes(const uint8_t *p, int64_t left) {
    return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p);
}

INLINE __m256i load_bits(const uint8_t *p, int64_t left) {
    return left >= 32 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8((1u << left) - 1, p);
}

/* The k-th code of every word in its low bits; the bits above are of no use. */
INLINE __m512i low_codes(__m512i c, __m512i odd, int bits, int k) {
    if (bits == 3)
        return _mm512_srli_epi16(k % 2 ? odd : c, k / 2 * 4);
    return _mm512_srli_epi16(c, bits * k);
}

/* One byte of each of 64 levels. */
INLINE __m512i half_of(const uint8_t *table, __m512i codes, __mmask64 upper) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
    return _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), codes, _mm512_load_si512(table + 192)));
}

/* The levels of the lower and of the upper codes of 32 words. */
INLINE void levels_of_bytes(const struct fused *f, __m512i codes, __m512i *w) {
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const __m512i low = half_of(f->halves[0], codes, upper), high = half_of(f->halves[1], codes, upper), byte = _mm512_set1_epi16(255);
    w[0] = _mm512_ternarylogic_epi32(byte, low, _mm512_slli_epi16(high, 8), 0xca);
    w[1] = _mm512_ternarylogic_epi32(byte, _mm512_srli_epi16(low, 8), high, 0xca);
}

/* Rows of a tile: more of them are more streams of codes at a time, and more sums to keep. */
INLINE int tile_rows(int64_t tokens) { return tokens == 1 ? ROWS : ROWS / 2; }

/* The codes of group g of some rows; not `full`: the last one, of a part of the columns. */
INLINE void load_rows(const struct table *t, const uint8_t *const *codes, int rows, int bits, int64_t g, int full, __m512i *c, __m512i *odd) {
    const int64_t plane = bits == 3 ? (t->n * 2 + 7) / 8 : t->row_bytes, left = full ? 64 : plane - 64 * g;
    UNROLL
    for (int r = 0; r < rows; r++) {
        const uint8_t *third = codes[r] + plane + 32 * g;
        c[r] = load_codes(codes[r] + 64 * g, left);
        /* The rows of the next tile, in the order of memory. */
        const char *next = (const char *)codes[0] + rows * t->row_bytes + (g * rows + r) * (bits == 3 ? 96 : 64);
        _mm_prefetch(next, _MM_HINT_T0);
        if (bits == 3) {
            join_planes(c[r], full ? _mm256_loadu_si256((const __m256i *)third) : load_bits(third, t->row_bytes - plane - 32 * g), &c[r], &odd[r]);
            _mm_prefetch(next + 48, _MM_HINT_T0);
        }
    }
}

/* Their products with group g of x. */
INLINE void multiply(const struct fused *f, const float *const *scale, int rows, int tokens, int bits, int64_t g, const __m512i *c, const __m512i *odd,
                     __m512 acc[ROWS][FEW]) {
    /* Levels are looked up shortly before they are used, `some` at a time; a sum is a chain of `per` dot products, or two shorter ones. */
    const int per = per_word(bits), some = bits == 4 ? 4 : tokens > 1 ? 2 : bits == 8 ? 2 : 1, chains = tokens > 2 ? 1 : 2;
    const __m512i levels = _mm512_load_si512(f->levels), lane = _mm512_load_si512(f->lane + 16 * g);
    const uint16_t *x = f->x + g * tokens * per * 32;
    __m512i w[ROWS][8];
    __m512 d[FEW][ROWS][2];
    UNROLL
    for (int r = 0; r < rows; r++) {
        if (bits == 8)
            levels_of_bytes(f, c[r], w[r]);
        UNROLL
        for (int i = 0; i < tokens; i++)
            d[i][r][0] = d[i][r][1] = _mm512_setzero_ps();
    }
    UNROLL
    for (int from = 0; from < per; from += some) {
        UNROLL
        for (int r = 0; r < rows && bits < 8; r++)
            UNROLL
            for (int k = 0; k < some; k++)
                w[r][from + k] = _mm512_permutexvar_epi16(low_codes(c[r], odd[r], bits, from + k), levels);
        UNROLL
        for (int i = 0; i < tokens; i++)
            UNROLL
            for (int k = from; k < from + some; k++) {
                const __m512i v = _mm512_load_si512(x + (i * per + k) * 32);
                UNROLL
                for (int r = 0; r < rows; r++)
                    d[i][r][k % chains] = _mm512_dpbf16_ps(d[i][r][k % chains], (__m512bh)w[r][k], (__m512bh)v);
            }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        const __m512 s = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scale[r] + f->base[g]));
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[r][i] = _mm512_fmadd_ps(chains == 2 ? _mm512_add_ps(d[i][r][0], d[i][r][1]) : d[i][r][0], s, acc[r][i]);
    }
}

/* Groups first ... last - 1 of tile_rows(tokens) rows from `row` on, whose sums so far are in `sums`; rows from `rows` on repeat the first
 * and are not stored. */
INLINE void tile(const struct fused *f, int64_t row, int rows, int tokens, int bits, const struct factors *by, int64_t first,
                 int64_t last, float *sums) {
    const struct linear_job *job = f->job;
    const struct table *t = &job->t;
    const int high = tile_rows(tokens);
    const int64_t full = least(last, t->n / (32 * per_word(bits)));
    const uint8_t *codes[ROWS];
    const float *scale[ROWS];
    __m512 acc[ROWS][FEW];
    __m512i c[ROWS], odd[ROWS];
    UNROLL
    for (int r = 0; r < high; r++) {
        codes[r] = t->codes + (row + (r < rows ? r : 0)) * t->row_bytes;
        scale[r] = by->scale + (r < rows ? r : 0) * by->pitch;
        UNROLL
        for (int i = 0; i < tokens; i++)
            acc[r][i] = first ? _mm512_load_ps(sums + (r * tokens + i) * 16) : _mm512_setzero_ps();
    }
    /* The scales of the next tile; its codes are fetched group by group. */
    for (int64_t k = 0; k < high * by->pitch && !first; k += 16)
        _mm_prefetch((const char *)(scale[0] + high * by->pitch + k), _MM_HINT_T0);
    /* Two and three bits are loaded one group before they are multiplied: it is a long chain of instructions. */
    const int early = bits < 4 && tokens == 1;
    if (early && first < full)
        load_rows(t, codes, high, bits, first, 1, c, odd);
    for (int64_t g = first; g < full; g++) {
        __m512i c1[ROWS], odd1[ROWS];
        if (early)
            load_rows(t, codes, high, bits, g + 1 < full ? g + 1 : g, 1, c1, odd1);
        else
            load_rows(t, codes, high, bits, g, 1, c, odd);
        multiply(f, scale, high, tokens, bits, g, c, odd, acc);
        UNROLL
        for (int r = 0; r < high && early; r++)
            c[r] = c1[r], odd[r] = odd1[r];
    }
    if (full < last) {
        load_rows(t, codes, high, bits, full, 0, c, odd);
        multiply(f, scale, high, tokens, bits, full, c, odd, acc);
    }
    UNROLL
    for (int r = 0; r < high; r++)
        UNROLL
        for (int i = 0; i < tokens; i++)
            _mm512_store_ps(sums + (r * tokens + i) * 16, acc[r][i]);
    if (last < f->groups)
        return;
    for (int i = 0; i < tokens; i++)
        for (int r = 0; r < rows; r++) {
            float y = _mm512_reduce_add_ps(_mm512_load_ps(sums + (r * tokens + i) * 16)) * f->undo;
            if (t->shift) {
                const float *shift = t->shift + (row + r) * t->blocks, *sum = f->x_sum + i * t->blocks;
                __m512 a = _mm512_setzero_ps();
                for (int64_t k = 0; k < t->blocks; k += 16) {
                    __mmask16 mask = t->blocks - k >= 16 ? 0xffff : (__mmask16)((1u << (t->blocks - k)) - 1);
                    a = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, shift + k), _mm512_maskz_loadu_ps(mask, sum + k), a);
                }
                y += _mm512_reduce_add_ps(a);
            }
            ((uint16_t *)job->y)[i * t->rows + row + r] = to_bf16(y);
        }
}

#define TILE(bits, tokens)                                                                                                         \
    static __attribute__((noinline)) void tile_##bits##_##tokens(const struct fused *f, int64_t row, int rows,                     \
                                                                 const struct factors *by, int64_t first, int64_t last,            \
                                                                 float *sums) {                                                    \
        tile(f, row, rows, tokens, bits, by, first, last, sums);                                                            \
    }
#define TILES(bits) TILE(bits, 1) TILE(bits, 2) TILE(bits, 3) TILE(bits, 4)
TILES(2)
TILES(3)
TILES(4)
TILES(8)

typedef void (*tile_fn)(const struct fused *, int64_t, int, const struct factors *, int64_t, int64_t, float *);
#define NAMES(bits) tile_##bits##_1, tile_##bits##_2, tile_##bits##_3, tile_##bits##_4
static const tile_fn tiles[][FEW] = {[2] = {NAMES(2)}, [3] = {NAMES(3)}, [4] = {NAMES(4)}, [8] = {NAMES(8)}};

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
    const struct table *t = &f->job->t;
    int64_t tokens = f->job->tokens, pitch = (t->blocks + 31) / 16 * 16, step = L1_BYTES / (tokens * per_word(t->bits) * 64);
    const int64_t high = tile_rows(tokens);
    size_t sums = (size_t)(high * tokens * 16);
    tile_fn fn = tiles[t->bits][tokens - 1];
    /* Scales as they are, where reading 16 of them does not leave the tensor. */
    int in_place = t->store == FP32 && last < t->rows - 16;
    float *copy = scratch(sizeof(float) * ((size_t)(high * pitch) + (size_t)(STEP / high) * sums));
    if (!copy)
        return 1;
    memset(copy, 0, sizeof(float) * (size_t)(high * pitch));
    for (int64_t top = first; top < last; top += STEP)
        for (int64_t g = 0; g < f->groups; g += step)
            for (int64_t row = top; row < least(top + STEP, last); row += high) {
                int rows = (int)least(high, last - row);
                struct factors by = {copy, pitch};
                if (in_place)
                    by = (struct factors){(const float *)t->scale + row * t->blocks, t->blocks};
                else
                    for (int r = 0; r < rows; r++)
                        load_scales(copy + r * pitch, t, row + r);
                fn(f, row, rows, &by, g, least(g + step, f->groups), copy + high * pitch + (size_t)((row - top) / high) * sums);
            }
    free(copy);
    return 0;
}

/* 32 words of `per` columns each: the first column of every word, then the second ones and so on. */
INLINE void rearrange(const uint16_t *from, int per, uint16_t *to) {
    for (int k = 0; k < per; k++)
        for (int w = 0; w < 32; w++)
            to[k * 32 + w] = from[w * per + k];
}

int fused_linear(const struct linear_job *job, int threads) {
    const struct table *t = &job->t;
    struct fused f = {.job = job};
    int per = per_word(t->bits), count = 1 << t->bits;
    int64_t group = 32 * per, n = t->n, tokens = job->tokens;
    f.groups = (n + group - 1) / group;
    f.x = scratch(sizeof(uint16_t) * (size_t)(tokens * f.groups * group));
    f.lane = scratch(sizeof(int32_t) * (size_t)(f.groups * 16));
    f.base = scratch(sizeof(int32_t) * (size_t)f.groups);
    f.x_sum = t->shift ? scratch(sizeof(float) * (size_t)(tokens * t->blocks)) : NULL;
    int failed = !f.x || !f.lane || !f.base || (t->shift && !f.x_sum);
    if (!failed) {
        for (int64_t i = 0; i < tokens; i++) {
            const uint16_t *from = (const uint16_t *)job->x + i * n;
            for (int64_t g = 0; g < f.groups; g++) {
                uint16_t *to = f.x + (g * tokens + i) * group;
                if ((g + 1) * group <= n) {
                    switch (per) {
                    case 2: rearrange(from + g * group, 2, to); break;
                    case 4: rearrange(from + g * group, 4, to); break;
                    default: rearrange(from + g * group, 8, to);
                    }
                } else {
                    memset(to, 0, sizeof(uint16_t) * (size_t)group);
                    for (int64_t j = g * group; j < n; j++)
                        to[(j % per) * 32 + (j % group) / per] = from[j];
                }
            }
            for (int64_t k = 0; t->shift && k < t->blocks; k++) {
                float sum = 0.0f;
                for (int64_t j = k * t->block; j < least((k + 1) * t->block, n); j++)
                    sum += from_bf16(from[j]);
                f.x_sum[i * t->blocks + k] = sum;
            }
        }
        for (int64_t g = 0; g < f.groups; g++) {
            f.base[g] = (int32_t)(g * group / t->block);
            for (int l = 0; l < 16; l++)
                f.lane[16 * g + l] = (int32_t)(least((g * group + l * 2 * per) / t->block, t->blocks - 1) - f.base[g]);
        }
        float factor = best_factor(t->levels, count);
        f.undo = 1.0f / factor;
        for (int i = 0; i < 32; i++)
            f.levels[i] = to_bf16(t->levels[i % count] * factor);
        for (int i = 0; count == 256 && i < 256; i++)
            f.halves[0][i] = to_bf16(t->levels[i]) & 255, f.halves[1][i] = (uint8_t)(to_bf16(t->levels[i]) >> 8);
        failed = parallel(fused_rows, &f, t->rows, piece_rows(t->rows, STEP, threads), threads);
    }
    free(f.x), free(f.lane), free(f.base), free(f.x_sum);
    return failed;
}
