/* x @ W^T for bfloat16 x and up to four tokens, on the packed codes of 2, 3, 4 and 8 bits (AVX-512 with bfloat16 dot products).
 *
 * Reads every code and scale once; no weight is ever in memory. 128 weights of 4 bits (a group, avx512.h) are one load, three shifts, four vpermw
 * and, for a token, four dot products with their loads; then two vectors of sums are added and multiplied by the scales of their lanes. 256
 * of 3 bits take eight more, which join the planes; the levels of 64 codes of 8 bits are four vpermi2b, two blends and four to join bytes.
 * Levels are rounded to bfloat16 after a multiplication by the factor that makes this least harmful (avx512_arrange.c); scales stay in float32.
 */
#include "product/packed/avx512.h"

enum { ROWS = 4, STEP = 32, L1_BYTES = 32768 /* of x, beside codes and sums */ };

int packed_avx512_supports(const struct linear_job *job) {
    int bits = job->t.bits;
    return job->dtype == BF16 && job->tokens <= FEW && !job->transposed && (bits == 2 || bits == 3 || bits == 4 || bits == 8) && job->t.block % (2 * per_word(bits)) == 0;
}

/* Scales of the rows of a tile, `pitch` apart; 16 may be read from any block on. */
struct factors {
    const float *scale;
    int64_t pitch;
};

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

int packed_avx512_linear(const struct linear_job *job, int threads) {
    const struct table *t = &job->t;
    struct fused f = {.job = job};
    const int64_t group = 32 * per_word(t->bits), tokens = job->tokens;
    f.groups = (t->n + group - 1) / group;
    f.x = scratch(sizeof(uint16_t) * (size_t)(tokens * f.groups * group));
    f.lane = scratch(sizeof(int32_t) * (size_t)(f.groups * 16));
    f.base = scratch(sizeof(int32_t) * (size_t)f.groups);
    f.x_sum = t->shift ? scratch(sizeof(float) * (size_t)(tokens * t->blocks)) : NULL;
    int failed = !f.x || !f.lane || !f.base || (t->shift && !f.x_sum);
    if (!failed) {
        packed_avx512_arrange(&f);
        failed = parallel(fused_rows, &f, t->rows, piece_rows(t->rows, STEP, threads), threads);
    }
    free(f.x), free(f.lane), free(f.base), free(f.x_sum);
    return failed;
}
