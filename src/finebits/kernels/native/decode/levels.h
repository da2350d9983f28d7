/* Codes -> values: levels[code] * scale (+ shift), product first, rounded once each, as kernels/reference.py computes it.
 *
 * Up to 16 levels are looked up in registers: with AVX-512 the scaled levels of a block are one register and 16 codes one vpermps; with AVX2
 * four byte shuffles and eight interleavings give 32 float32 levels, and a multiplication each eight of them. Of more levels, those that lie one
 * apart (integers) are computed from their codes: a widening, a conversion and an addition for VL of them. Others are four tables of bytes with
 * AVX-512, eight vpermi2b and eight interleavings for 64; with AVX2 they are gathered, eight at a time, and without it looked up one by one.
 */
#ifndef FINEBITS_LEVELS_H
#define FINEBITS_LEVELS_H

#include "decode/planes.h"

struct decoder {
    struct table t;
    int small; /* at most 16 levels */
    int last;  /* of more: levels[i] = levels[0] + least(i, last) exactly; 0 where that is not so */
    float levels[256] __attribute__((aligned(64)));
#if ISA > 0
    uint8_t planes[4][256] __attribute__((aligned(64))); /* byte b of every level */
#endif
};

static void prepare(struct decoder *d, const struct table *t) {
    int count = 1 << t->bits;
    d->t = *t;
    d->small = count <= 16;
    memset(d->levels, 0, sizeof d->levels);
    memcpy(d->levels, t->levels, sizeof(float) * (size_t)count);
    d->last = d->small ? 0 : evenly(d->levels, count);
#if ISA > 0
    if (!d->small || ISA == 1)
        for (int b = 0; b < 4; b++)
            for (int i = 0; i < 256; i++)
                d->planes[b][i] = (uint8_t)(bits_of(d->levels[i]) >> (8 * b));
#endif
}

#if ISA == 2
INLINE __m512 entries16(const float *levels, float scale, const float *shift) {
    __m512 v = _mm512_mul_ps(_mm512_load_ps(levels), _mm512_set1_ps(scale));
    return shift ? _mm512_add_ps(v, _mm512_set1_ps(*shift)) : v;
}
#endif

#if ISA == 1
/* Byte b of 16 levels, twice. */
struct quarters {
    __m256i plane[4];
};

INLINE struct quarters quarters_of(const struct decoder *d) {
    struct quarters q;
    for (int b = 0; b < 4; b++)
        q.plane[b] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)d->planes[b]));
    return q;
}

/* The levels of 32 codes, eight a vector. Interleaving works inside lanes of 128 bits: of every eight codes, the first four are in the lower
 * lane and the others in the upper one. */
INLINE void levels32(const struct quarters *q, __m256i c, __m256 *v) {
    __m256i part[4];
    for (int b = 0; b < 4; b++)
        part[b] = _mm256_shuffle_epi8(q->plane[b], c);
    const __m256i low0 = _mm256_unpacklo_epi8(part[0], part[1]), low1 = _mm256_unpackhi_epi8(part[0], part[1]);
    const __m256i high0 = _mm256_unpacklo_epi8(part[2], part[3]), high1 = _mm256_unpackhi_epi8(part[2], part[3]);
    v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0)), v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    v[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1)), v[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}
#endif

/* out = levels[code] * scale (+ shift) for at most 16 levels. */
INLINE void map_small(const struct decoder *d, const uint8_t *codes, int64_t count, float scale, const float *shift, float *out) {
    const float *levels = d->levels;
#if ISA == 2
    const __m512 entries = entries16(levels, scale, shift);
    for (int64_t i = 0; i < count; i += 16) {
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
        _mm512_mask_storeu_ps(out + i, mask16(count - i), _mm512_permutexvar_ps(code, entries));
    }
#elif ISA == 1
    __m256 low = _mm256_mul_ps(_mm256_load_ps(levels), _mm256_set1_ps(scale));
    __m256 high = _mm256_mul_ps(_mm256_load_ps(levels + 8), _mm256_set1_ps(scale));
    if (shift) {
        low = _mm256_add_ps(low, _mm256_set1_ps(*shift));
        high = _mm256_add_ps(high, _mm256_set1_ps(*shift));
    }
    int64_t i = 0;
    const struct quarters q = quarters_of(d);
    for (; i + 32 <= count; i += 32) {
        __m256 v[4];
        levels32(&q, _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)(codes + i)), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)), v);
        for (int k = 0; k < 4; k++) {
            v[k] = _mm256_mul_ps(v[k], _mm256_set1_ps(scale));
            _mm256_storeu_ps(out + i + 8 * k, shift ? _mm256_add_ps(v[k], _mm256_set1_ps(*shift)) : v[k]);
        }
    }
    for (; i < count; i += 8) {
        __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
        __m256 a = _mm256_permutevar8x32_ps(low, code), b = _mm256_permutevar8x32_ps(high, code);
        a = _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        if (count - i >= 8) {
            _mm256_storeu_ps(out + i, a);
        } else {
            float tail[8];
            _mm256_storeu_ps(tail, a);
            memcpy(out + i, tail, sizeof(float) * (size_t)(count - i));
        }
    }
#else
    for (int64_t i = 0; i < count; i++) {
        out[i] = levels[codes[i]] * scale;
        if (shift)
            out[i] += *shift;
    }
#endif
}

#if ISA > 0
/* levels[code] of VL codes that lie one apart. */
INLINE vf level_of(const struct decoder *d, const uint8_t *codes) {
    const vf first = vset(d->levels[0]);
#if ISA == 2
    const __m128i c = _mm_min_epu8(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8((char)d->last));
    return vadd(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(c)), first);
#else
    const __m128i c = _mm_min_epu8(_mm_loadl_epi64((const __m128i *)codes), _mm_set1_epi8((char)d->last));
    return vadd(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(c)), first);
#endif
}
#endif

/* out = levels[code] for up to 256 levels; writes up to 63 more. */
INLINE void lookup_large(const struct decoder *d, const uint8_t *codes, int64_t count, float *out) {
#if ISA > 0
    if (d->last) {
        for (int64_t i = 0; i < count; i += VL)
            vstore(out + i, level_of(d, codes + i));
        return;
    }
#endif
#if ISA == 2
    __m512i plane[4][4];
    for (int b = 0; b < 4; b++)
        for (int q = 0; q < 4; q++)
            plane[b][q] = _mm512_load_si512(d->planes[b] + 64 * q);
    /* The interleaving below works inside 128-bit lanes: lane q of register i must come from codes 16 i + 4 q. */
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < count; i += 64) {
        __m512i code = _mm512_permutexvar_epi32(turn, _mm512_loadu_si512(codes + i)), part[4];
        __mmask64 upper = _mm512_movepi8_mask(code);
        for (int b = 0; b < 4; b++)
            part[b] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(plane[b][0], code, plane[b][1]),
                                             _mm512_permutex2var_epi8(plane[b][2], code, plane[b][3]));
        __m512i low0 = _mm512_unpacklo_epi8(part[0], part[1]), low1 = _mm512_unpackhi_epi8(part[0], part[1]);
        __m512i high0 = _mm512_unpacklo_epi8(part[2], part[3]), high1 = _mm512_unpackhi_epi8(part[2], part[3]);
        _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(low0, high0));
        _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(low0, high0));
        _mm512_storeu_si512(out + i + 32, _mm512_unpacklo_epi16(low1, high1));
        _mm512_storeu_si512(out + i + 48, _mm512_unpackhi_epi16(low1, high1));
    }
#elif ISA == 1
    for (int64_t i = 0; i < count; i += 8)
        vstore(out + i, _mm256_i32gather_ps(d->levels, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i))), 4));
#else
    for (int64_t i = 0; i < count; i++)
        out[i] = d->levels[codes[i]];
#endif
}

#endif
