/* The jobs for one instruction set: compiled once for each, with ISA = 0 (portable), 1 (AVX2), 2 (AVX-512). */
#include "decode.h"

#include <float.h>
#include <stdlib.h>

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

/* ---- values -> codes ---- */

INLINE uint64_t gather_codes(uint64_t x, int width) {
    switch (width) {
    case 4:
        x &= 0x0f0f0f0f0f0f0f0fu;
        x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
        x = (x | x >> 8) & 0x0000ffff0000ffffu;
        return (x | x >> 16) & 0xffffffffu;
    case 2:
        x &= 0x0303030303030303u;
        x = (x | x >> 6) & 0x000f000f000f000fu;
        x = (x | x >> 12) & 0x000000ff000000ffu;
        return (x | x >> 24) & 0xffff;
    case 1:
        x &= 0x0101010101010101u;
        x = (x | x >> 7) & 0x0003000300030003u;
        x = (x | x >> 14) & 0x0000000f0000000fu;
        return (x | x >> 28) & 0xff;
    default:
        return x;
    }
}

INLINE void pack_plane(uint8_t *plane, int64_t count, int width, int shift, const uint8_t *codes) {
    int64_t i = 0;
    uint8_t *p = plane;
#if ISA == 2
    const __m128i by = _mm_cvtsi32_si128(shift);
    for (; i + 64 <= count; i += 64, p += 8 * width) {
        __m512i v = _mm512_srl_epi16(_mm512_loadu_si512(codes + i), by);
        if (width == 8) {
            _mm512_storeu_si512(p, v);
        } else if (width == 4) {
            v = _mm512_and_si512(v, _mm512_set1_epi8(15));
            _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(_mm512_or_si512(v, _mm512_srli_epi16(v, 4))));
        } else if (width == 2) {
            v = _mm512_and_si512(v, _mm512_set1_epi8(3));
            v = _mm512_or_si512(v, _mm512_srli_epi32(v, 6));
            _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_or_si512(v, _mm512_srli_epi32(v, 12))));
        } else {
            uint64_t mask = _mm512_test_epi8_mask(v, _mm512_set1_epi8(1));
            memcpy(p, &mask, 8);
        }
    }
#endif
    for (; i < count; i += 8, p += width) {
        uint64_t x;
        memcpy(&x, codes + i, 8);
        x = gather_codes(x >> shift, width);
        memcpy(p, &x, (size_t)least(width, ((count - i) * width + 7) / 8));
    }
}

/* `codes` holds zeros for 7 more. */
static void pack(uint8_t *row, int64_t n, int bits, const uint8_t *codes) {
    int shift = 0;
    for (int width = 8; width; width /= 2) {
        if (!(bits & width))
            continue;
        switch (width) {
        case 8: pack_plane(row, n, 8, shift, codes); break;
        case 4: pack_plane(row, n, 4, shift, codes); break;
        case 2: pack_plane(row, n, 2, shift, codes); break;
        default: pack_plane(row, n, 1, shift, codes);
        }
        row += (n * width + 7) / 8;
        shift += width;
    }
}

struct encoder {
    struct rounding r;
    int identity;
    float mids[256] __attribute__((aligned(64))); /* filled up with infinity, which no number exceeds */
    float coarse[16] __attribute__((aligned(64))); /* every 16th of them */
    uint8_t order[256] __attribute__((aligned(64)));
};

/* Number of mids below u, in the sense of torch.bucketize: all of them for NaN. */
INLINE int rank_of(const struct encoder *e, float u) {
    const float *mids = e->mids;
    int rank = 0;
    for (int step = e->r.n_mids < 16 ? 8 : 128; step; step /= 2)
        if (!(mids[rank + step - 1] >= u))
            rank += step;
    return (int)least(rank, e->r.n_mids);
}

/* Ranks of u = (w - shift) * inverse, one a byte. */
INLINE void rank_block(const struct encoder *e, const float *w, int64_t count, const float *shift, float inverse, uint8_t *ranks) {
    const float top = (float)((1 << e->r.bits) - 1);
    int64_t i = 0;
    if (e->r.uniform) {
        for (; i + VL <= count; i += VL) {
            vf u = shift ? vsub(vload(w + i), vset(*shift)) : vload(w + i);
            u = vsub(vround(vmul(u, vset(inverse))), vset(e->r.first));
            vstore_bytes(ranks + i, vmin(vmax(u, vset(0.0f)), vset(top)));
        }
        for (; i < count; i++) {
            float u = (shift ? w[i] - *shift : w[i]) * inverse;
            u = rintf(u) - e->r.first;
            ranks[i] = u > 0 ? (uint8_t)(u < top ? u : top) : 0;
        }
        return;
    }
#if ISA == 2
    const __m512 table = _mm512_load_ps(e->r.n_mids < 16 ? e->mids : e->coarse);
    const __m512i limit = _mm512_set1_epi32(e->r.n_mids);
    for (; i < count; i += 16) {
        __mmask16 mask = mask16(count - i);
        __m512 u = _mm512_maskz_loadu_ps(mask, w + i);
        if (shift)
            u = _mm512_sub_ps(u, _mm512_set1_ps(*shift));
        u = _mm512_mul_ps(u, _mm512_set1_ps(inverse));
        __m512i rank = _mm512_setzero_si512();
        for (int step = 8; step; step /= 2) {
            __m512i at = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(at, table), u, _CMP_NGE_UQ);
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        if (e->r.n_mids >= 16) {
            rank = _mm512_slli_epi32(rank, 4);
            for (int step = 8; step; step /= 2) {
                __m512i at = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
                __mmask16 above = _mm512_cmp_ps_mask(_mm512_i32gather_ps(at, e->mids, 4), u, _CMP_NGE_UQ);
                rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
            }
        }
        rank = _mm512_min_epu32(rank, limit);
        _mm_mask_storeu_epi8(ranks + i, mask, _mm512_cvtepi32_epi8(rank));
    }
#elif ISA == 1
    const __m256i limit = _mm256_set1_epi32(e->r.n_mids);
    for (; i + 8 <= count; i += 8) {
        __m256 u = _mm256_loadu_ps(w + i);
        if (shift)
            u = _mm256_sub_ps(u, _mm256_set1_ps(*shift));
        u = _mm256_mul_ps(u, _mm256_set1_ps(inverse));
        __m256i rank = _mm256_setzero_si256();
        if (e->r.n_mids < 16) {
            for (int m = 0; m < e->r.n_mids; m++)
                rank = _mm256_sub_epi32(rank, _mm256_castps_si256(_mm256_cmp_ps(_mm256_set1_ps(e->mids[m]), u, _CMP_NGE_UQ)));
        } else {
            for (int step = 128; step; step /= 2) {
                __m256i at = _mm256_add_epi32(rank, _mm256_set1_epi32(step - 1));
                __m256 above = _mm256_cmp_ps(_mm256_i32gather_ps(e->mids, at, 4), u, _CMP_NGE_UQ);
                rank = _mm256_add_epi32(rank, _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(step)));
            }
            rank = _mm256_min_epi32(rank, limit);
        }
        vstore_int_bytes(ranks + i, rank);
    }
#endif
    for (; i < count; i++)
        ranks[i] = (uint8_t)rank_of(e, (shift ? w[i] - *shift : w[i]) * inverse);
}

INLINE void apply_order(const struct encoder *e, uint8_t *codes, int64_t count) {
    int64_t i = 0;
#if ISA == 2
    const __m512i o0 = _mm512_load_si512(e->order), o1 = _mm512_load_si512(e->order + 64);
    const __m512i o2 = _mm512_load_si512(e->order + 128), o3 = _mm512_load_si512(e->order + 192);
    for (; i < count; i += 64) {
        __m512i c = _mm512_loadu_si512(codes + i);
        __m512i low = _mm512_permutex2var_epi8(o0, c, o1), high = _mm512_permutex2var_epi8(o2, c, o3);
        _mm512_storeu_si512(codes + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(c), low, high));
    }
#endif
    for (; i < count; i++)
        codes[i] = e->order[codes[i]];
}

/* Smallest and largest of the numbers that are not NaN. */
INLINE void range(const float *w, int64_t count, float *low, float *high) {
    float least_lane[VL], most_lane[VL];
    vf a = vset(INFINITY), b = vset(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= count; i += VL) {
        a = vmin(vload(w + i), a);
        b = vmax(vload(w + i), b);
    }
    vstore(least_lane, a);
    vstore(most_lane, b);
    *low = INFINITY, *high = -INFINITY;
    for (int l = 0; l < VL; l++) {
        *low = least_lane[l] < *low ? least_lane[l] : *low;
        *high = most_lane[l] > *high ? most_lane[l] : *high;
    }
    for (; i < count; i++) {
        *low = w[i] < *low ? w[i] : *low;
        *high = w[i] > *high ? w[i] : *high;
    }
}

INLINE float absmax(const float *w, int64_t count) {
    float lane[VL], most = 0.0f;
    vf a = vset(0.0f);
    int64_t i = 0;
    for (; i + VL <= count; i += VL)
        a = vmax(vabs(vload(w + i)), a);
    vstore(lane, a);
    for (int l = 0; l < VL; l++)
        most = lane[l] > most ? lane[l] : most;
    for (; i < count; i++)
        most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
    return most < FLT_MAX ? most : FLT_MAX; /* an infinity counts as the largest number */
}

struct quantize_arg {
    const struct quantize_job *job;
    struct encoder e;
};

static int quantize_rows(void *p, int64_t first, int64_t last) {
    const struct quantize_arg *arg = p;
    const struct quantize_job *job = arg->job;
    const struct rounding *r = &job->r;
    int64_t n = job->n;
    uint8_t *codes = scratch((size_t)n + PAD);
    float *copy = job->dtype == FP32 ? NULL : scratch(sizeof(float) * (size_t)n);
    if (!codes || (!copy && job->dtype != FP32)) {
        free(codes), free(copy);
        return 1;
    }
    for (int64_t row = first; row < last; row++) {
        const float *w = (const float *)job->w + row * n;
        if (copy) {
            load_row(copy, job->w, row * n, n, job->dtype);
            w = copy;
        }
        for (int64_t k = 0; k < job->blocks; k++) {
            int64_t start = k * r->block, count = least(r->block, n - start), at = row * job->blocks + k;
            float low, high, shift, scale;
            if (r->minmax) {
                range(w + start, count, &low, &high);
                store_as(job->shift, at, low, r->store);
                shift = load_as(job->shift, at, r->store);
                scale = (high - low) / r->peak;
            } else {
                scale = absmax(w + start, count) / r->peak;
            }
            store_as(job->scale, at, scale, r->store);
            scale = load_as(job->scale, at, r->store);
            rank_block(&arg->e, w + start, count, r->minmax ? &shift : NULL, scale >= 0x1p-126f ? 1.0f / scale : 0.0f, codes + start);
        }
        if (!arg->e.identity)
            apply_order(&arg->e, codes, n);
        memset(codes + n, 0, 8);
        pack(job->codes + row * job->row_bytes, n, r->bits, codes);
    }
    free(codes), free(copy);
    return 0;
}

static int quantize(const struct quantize_job *job, int threads) {
    struct quantize_arg arg = {.job = job, .e = {.r = job->r, .identity = 1}};
    struct encoder *e = &arg.e;
    for (int i = 0; i < 256; i++) {
        e->mids[i] = i < job->r.n_mids ? job->r.mids[i] : INFINITY;
        e->order[i] = i < job->r.n_order ? job->r.order[i] : 0;
        if (i < job->r.n_order && e->order[i] != i)
            e->identity = 0;
    }
    for (int i = 0; i < 16; i++)
        e->coarse[i] = e->mids[16 * i + 15];
    return parallel(quantize_rows, &arg, job->rows, 1 + 65536 / (job->n + 1), threads);
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
