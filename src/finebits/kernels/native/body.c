/* The jobs for one instruction set: compiled once for each, with ISA = 0 (portable), 1 (AVX2), 2 (AVX-512). */
#include "decode_bf16.h"
#include "encode.h"

#if ISA == 2
#define BODY body_avx512
#elif ISA == 1
#define BODY body_avx2
#else
#define BODY body_scalar
#endif

enum { ROWS = 4, TOKENS = 4 };

struct dequantize_arg {
    const struct dequantize_job *job;
    struct decoder d;
};

static int dequantize_rows(void *p, int64_t first, int64_t last) {
    const struct dequantize_arg *arg = p;
    const struct dequantize_job *job = arg->job;
    for (int64_t row = first; row < last; row++)
        for (int64_t start = job->start; start < job->stop; start += CHUNK) {
            int64_t stop = least(start + CHUNK, job->stop), at = row * job->stride + start - job->start;
            if (job->dtype == FP32) {
                decode(&arg->d, row, start, stop, (float *)job->out + at);
                continue;
            }
#if ISA > 0
            if (job->dtype == BF16 && arg->d.small) {
                decode_bf16(&arg->d, row, start, stop, (uint16_t *)job->out + at);
                continue;
            }
#endif
            float value[CHUNK] __attribute__((aligned(64)));
            decode(&arg->d, row, start, stop, value);
            store_row(job->out, at, value, stop - start, job->dtype);
        }
    return 0;
}

static int dequantize(const struct dequantize_job *job, int threads) {
    struct dequantize_arg arg = {.job = job};
    prepare(&arg.d, &job->t);
    int64_t step = 1 + 65536 / (job->stop - job->start + 1);
    return parallel(dequantize_rows, &arg, job->t.rows, step, threads);
}

/* ---- products with few tokens: float32 panels of decoded rows ---- */

struct linear_arg {
    const struct linear_job *job;
    struct decoder d;
    float *x;      /* (tokens, width), rows filled up with zeros */
    int64_t width;
};

/* sum[t][r] += x[t] . W[r] */
INLINE void dot_tile(const float *x, int64_t width, const float *W, int64_t count, int tokens, float *sum) {
    vf acc[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++)
            acc[t][r] = vset(0.0f);
    for (int64_t j = 0; j < count; j += VL) {
        vf w[ROWS];
        for (int r = 0; r < ROWS; r++)
            w[r] = vload(W + r * (CHUNK + PAD) + j);
        for (int t = 0; t < tokens; t++) {
            vf v = vload(x + t * width + j);
            for (int r = 0; r < ROWS; r++)
                acc[t][r] = vfma(v, w[r], acc[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++)
            sum[t * ROWS + r] += vsum(acc[t][r]);
}

static int forward_rows(void *p, int64_t first, int64_t last) {
    const struct linear_arg *arg = p;
    const struct linear_job *job = arg->job;
    const struct table *t = &job->t;
    float *sum = scratch(sizeof(float) * (size_t)(job->tokens * ROWS));
    float W[ROWS * (CHUNK + PAD)] __attribute__((aligned(64)));
    if (!sum)
        return 1;
    memset(W, 0, sizeof W);
    for (int64_t row = first; row < last; row += ROWS) {
        int64_t rows = least(ROWS, last - row);
        memset(sum, 0, sizeof(float) * (size_t)(job->tokens * ROWS));
        for (int64_t start = 0; start < t->n; start += CHUNK) {
            int64_t stop = least(start + CHUNK, t->n), count = stop - start;
            for (int64_t r = 0; r < rows; r++) {
                decode(&arg->d, row + r, start, stop, W + r * (CHUNK + PAD));
                memset(W + r * (CHUNK + PAD) + count, 0, sizeof(float) * PAD);
            }
            int64_t i = 0;
            for (; i + TOKENS <= job->tokens; i += TOKENS)
                dot_tile(arg->x + i * arg->width + start, arg->width, W, count, TOKENS, sum + i * ROWS);
            for (; i < job->tokens; i++)
                dot_tile(arg->x + i * arg->width + start, arg->width, W, count, 1, sum + i * ROWS);
        }
        for (int64_t i = 0; i < job->tokens; i++)
            for (int64_t r = 0; r < rows; r++)
                store_as(job->y, i * t->rows + row + r, sum[i * ROWS + r], job->dtype);
    }
    free(sum);
    return 0;
}

#if ISA == 2
/* Bfloat16 panels: PANEL_COLUMNS columns of PANEL_ROWS decoded rows, which stay in the second cache, against STEP_COLUMNS columns of up to
 * STEP_TOKENS tokens, which stay in the first. The next panel's codes are fetched meanwhile. */
enum { PANEL_ROWS = 16, PANEL_COLUMNS = 8192, STEP_COLUMNS = 1024, TILE_TOKENS = 6, STEP_TOKENS = 4 * TILE_TOKENS };

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

static int wide_linear(const struct linear_job *job, int threads) {
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
#endif

static int transposed_columns(void *p, int64_t first, int64_t last) {
    const struct linear_arg *arg = p;
    const struct linear_job *job = arg->job;
    const struct table *t = &job->t;
    int64_t start = first * 8, stop = least(last * 8, t->n), width = (stop - start + PAD - 1) / PAD * PAD;
    float *sum = scratch(sizeof(float) * (size_t)(job->tokens * width));
    float W[ROWS * (CHUNK + PAD)] __attribute__((aligned(64)));
    if (!sum)
        return 1;
    memset(W, 0, sizeof W);
    memset(sum, 0, sizeof(float) * (size_t)(job->tokens * width));
    for (int64_t row = 0; row < t->rows; row += ROWS) {
        int64_t rows = least(ROWS, t->rows - row);
        for (int64_t r = 0; r < rows; r++)
            decode(&arg->d, row + r, start, stop, W + r * (CHUNK + PAD));
        for (int64_t i = 0; i < job->tokens; i++) {
            const float *x = arg->x + i * arg->width + row;
            float *y = sum + i * width;
            const vf x0 = vset(x[0]), x1 = vset(x[1]), x2 = vset(x[2]), x3 = vset(x[3]);
            if (rows == ROWS)
                for (int64_t j = 0; j < width; j += VL) {
                    vf a = vfma(x0, vload(W + j), vload(y + j));
                    a = vfma(x1, vload(W + (CHUNK + PAD) + j), a);
                    a = vfma(x2, vload(W + 2 * (CHUNK + PAD) + j), a);
                    vstore(y + j, vfma(x3, vload(W + 3 * (CHUNK + PAD) + j), a));
                }
            else
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t j = 0; j < width; j += VL)
                        vstore(y + j, vfma(vset(x[r]), vload(W + r * (CHUNK + PAD) + j), vload(y + j)));
        }
    }
    for (int64_t i = 0; i < job->tokens; i++)
        store_row(job->y, i * t->n + start, sum + i * width, stop - start, job->dtype);
    free(sum);
    return 0;
}

static int linear(const struct linear_job *job, int threads) {
#if ISA == 2
    if (job->dtype == BF16 && !job->transposed)
        return wide_linear(job, threads);
#endif
    struct linear_arg arg = {.job = job};
    const struct table *t = &job->t;
    int64_t inputs = job->transposed ? t->rows : t->n;
    arg.width = (inputs + PAD - 1) / PAD * PAD;
    arg.x = scratch(sizeof(float) * (size_t)(job->tokens * arg.width));
    if (!arg.x)
        return 1;
    for (int64_t i = 0; i < job->tokens; i++) {
        load_row(arg.x + i * arg.width, job->x, i * inputs, inputs, job->dtype);
        memset(arg.x + i * arg.width + inputs, 0, sizeof(float) * (size_t)(arg.width - inputs));
    }
    prepare(&arg.d, t);
    int failed;
    if (job->transposed) {
        int64_t eighths = (t->n + 7) / 8, step = eighths / (2 * threads) / 8 * 8 + 8;
        failed = parallel(transposed_columns, &arg, eighths, least(step, CHUNK / 8), threads);
    } else {
        failed = parallel(forward_rows, &arg, t->rows, 4 * ROWS, threads);
    }
    free(arg.x);
    return failed;
}

const struct body BODY = {quantize, dequantize, linear};
