/* Values -> packed rows, rounded to nearest as kernels/reference.py does, bit for bit. Compiled once for each instruction set.
 *
 * A row is read once from memory and twice more from the cache (the range of a block, then its ranks): 4 bytes a weight or 2, and bits / 8
 * written. Up to 16 levels of no uniform grid are found by four comparisons of 16 weights with AVX-512, one for each midpoint with AVX2.
 */
#include "decode/planes.h"
#include "runtime/runtime.h"

#include <float.h>
#include <stdlib.h>

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

int FOR_ISA(quantize)(const struct quantize_job *job, int threads) {
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
