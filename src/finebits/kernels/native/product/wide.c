/* x @ W^T for bfloat16 x, any layout: for few tokens, and for those that product/bf16 has no faster way for (AVX-512 with bfloat16 dot products).
 *
 * PANEL_COLUMNS columns of PANEL_ROWS decoded rows (decode/rows_bf16.h) stay in the second cache, against STEP_COLUMNS columns of up to STEP_TOKENS
 * tokens, which stay in the first. A tile is TILE_TOKENS x ROWS sums of 16 lanes: ten loads and 24 dot products for 32 columns. Lanes are added up at
 * the end. x lies by steps, see wide_arg.
 */
#include "decode/rows_bf16.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum { ROWS = 4, PANEL_ROWS = 16, PANEL_COLUMNS = 8192, STEP_COLUMNS = 1024, TILE_TOKENS = 6, STEP_TOKENS = 4 * TILE_TOKENS };

struct wide_arg {
    const struct linear_job *job;
    struct decoder d;
    uint16_t *x; /* per STEP_COLUMNS columns, per tile of tokens: (steps, tile, 32), columns filled up with zeros */
};

#define UNROLL _Pragma("GCC unroll 8")

INLINE void wide_tile(const uint16_t *x, int tokens, const uint16_t *W, int64_t pitch, int64_t steps, int begin, float *sums) {
    __m512 acc[TILE_TOKENS][ROWS];
    UNROLL
    for (int i = 0; i < tokens; i++)
        UNROLL
        for (int r = 0; r < ROWS; r++)
            acc[i][r] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + (i * ROWS + r) * 16);
    for (int64_t j = 0; j < steps; j++) {
        __m512bh w[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++)
            w[r] = (__m512bh)_mm512_load_si512(W + r * pitch + 32 * j);
        UNROLL
        for (int i = 0; i < tokens; i++) {
            const __m512bh v = (__m512bh)_mm512_load_si512(x + (j * tokens + i) * 32);
            UNROLL
            for (int r = 0; r < ROWS; r++)
                acc[i][r] = _mm512_dpbf16_ps(acc[i][r], v, w[r]);
        }
    }
    UNROLL
    for (int i = 0; i < tokens; i++)
        UNROLL
        for (int r = 0; r < ROWS; r++)
            _mm512_store_ps(sums + (i * ROWS + r) * 16, acc[i][r]);
}

/* The totals of four vectors, rounded. */
INLINE void store_sums(const float *sums, uint16_t *y) {
    const __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + 16), c = _mm512_load_ps(sums + 32), d = _mm512_load_ps(sums + 48);
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 v = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 total = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m256i rounded = round_bf16(_mm512_castps128_ps512(total));
    memcpy(y, &rounded, 8);
}

/* The next panel's codes are fetched while this one's products run. */
static int wide_rows(void *p, int64_t first, int64_t last) {
    const struct wide_arg *arg = p;
    const struct linear_job *job = arg->job;
    const struct table *t = &job->t;
    const int64_t pitch = least(PANEL_COLUMNS, (t->n + 31) / 32 * 32) + 32; /* rows a power of two apart would share their cache sets */
    const size_t count = (size_t)(job->tokens * PANEL_ROWS * 16);
    float *sums = scratch(sizeof(float) * count + sizeof(uint16_t) * (size_t)(PANEL_ROWS * pitch));
    if (!sums)
        return 1;
    uint16_t *W = (uint16_t *)(sums + count);
    memset(W, 0, sizeof(uint16_t) * (size_t)(PANEL_ROWS * pitch));
    for (int64_t row = first; row < last; row += PANEL_ROWS) {
        const int64_t rows = least(PANEL_ROWS, last - row);
        for (int64_t from = 0; from < t->n; from += PANEL_COLUMNS) {
            const int64_t to = least(from + PANEL_COLUMNS, t->n);
            for (int64_t r = 0; r < rows; r++) {
                decode_product(&arg->d, row + r, from, to, W + r * pitch);
                if ((to - from) % 32)
                    memset(W + r * pitch + (to - from), 0, sizeof(uint16_t) * (size_t)(32 - (to - from) % 32));
            }
            /* All that follows works in the caches: time to fetch what the next panel needs. */
            const uint8_t *next = t->codes + (row + PANEL_ROWS) * t->row_bytes;
            const int64_t tiles = (job->tokens + TILE_TOKENS - 1) / TILE_TOKENS * ((rows + ROWS - 1) / ROWS) * ((to - from + STEP_COLUMNS - 1) / STEP_COLUMNS);
            const int64_t bytes = to < t->n ? 0 : PANEL_ROWS * t->row_bytes, share = (bytes / tiles + 63) / 64 * 64;
            const uint8_t *end = next + bytes;
            for (int64_t group = 0; group < job->tokens; group += STEP_TOKENS)
                for (int64_t start = from; start < to; start += STEP_COLUMNS) {
                    const int64_t steps = (least(STEP_COLUMNS, to - start) + 31) / 32;
                    for (int64_t r = 0; r < rows; r += ROWS)
                        for (int64_t i = group; i < least(group + STEP_TOKENS, job->tokens); i += TILE_TOKENS) {
                            const uint16_t *x = arg->x + start * job->tokens + i * steps * 32, *w = W + r * pitch + start - from;
                            float *sum = sums + (r * job->tokens + i * ROWS) * 16;
                            for (const uint8_t *stop = next + share; next < stop && next < end; next += 64)
                                _mm_prefetch((const char *)next, _MM_HINT_T1);
                            switch (least(TILE_TOKENS, job->tokens - i)) {
                            case 1: wide_tile(x, 1, w, pitch, steps, !start, sum); break;
                            case 2: wide_tile(x, 2, w, pitch, steps, !start, sum); break;
                            case 3: wide_tile(x, 3, w, pitch, steps, !start, sum); break;
                            case 4: wide_tile(x, 4, w, pitch, steps, !start, sum); break;
                            case 5: wide_tile(x, 5, w, pitch, steps, !start, sum); break;
                            default: wide_tile(x, 6, w, pitch, steps, !start, sum);
                            }
                        }
                }
        }
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int64_t i = 0; i < job->tokens; i++) {
                const float *sum = sums + (r * job->tokens + i * ROWS) * 16;
                uint16_t *y = (uint16_t *)job->y + i * t->rows + row + r, some[4];
                store_sums(sum, rows - r >= ROWS ? y : some);
                if (rows - r < ROWS)
                    memcpy(y, some, sizeof(uint16_t) * (size_t)(rows - r));
            }
    }
    free(sums);
    return 0;
}

int wide_supports(const struct linear_job *job) { return !job->transposed; }

int wide_linear(const struct linear_job *job, int threads) {
    struct wide_arg arg = {.job = job};
    int64_t n = job->t.n, width = (n + 31) / 32 * 32;
    arg.x = scratch(sizeof(uint16_t) * (size_t)(job->tokens * width));
    if (!arg.x)
        return 1;
    for (int64_t start = 0; start < n; start += STEP_COLUMNS) {
        int64_t steps = (least(STEP_COLUMNS, n - start) + 31) / 32;
        for (int64_t i = 0; i < job->tokens; i++) {
            int64_t tile = i / TILE_TOKENS * TILE_TOKENS, tokens = least(TILE_TOKENS, job->tokens - tile);
            const uint16_t *from = (const uint16_t *)job->x + i * n + start;
            uint16_t *to = arg.x + start * job->tokens + (tile * steps + i - tile) * 32;
            for (int64_t j = 0; j < steps; j++) {
                int64_t left = n - start - 32 * j;
                __m512i v = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, from + 32 * j);
                _mm512_store_si512(to + j * tokens * 32, v);
            }
        }
    }
    prepare(&arg.d, &job->t);
    int failed = parallel(wide_rows, &arg, job->t.rows, piece_rows(job->t.rows, PANEL_ROWS, threads), threads);
    free(arg.x);
    return failed;
}
