/* One float vector type and the few operations that the bodies need, for the instruction set this file is compiled for. */
#ifndef FINEBITS_SIMD_H
#define FINEBITS_SIMD_H

#include "finebits.h"

#include <math.h>
#include <string.h>

#if ISA > 0
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if ISA == 2
typedef __m512 vf;
#define VL 16
#define vload _mm512_loadu_ps
#define vstore _mm512_storeu_ps
#define vset _mm512_set1_ps
#define vadd _mm512_add_ps
#define vsub _mm512_sub_ps
#define vmul _mm512_mul_ps
#define vfma _mm512_fmadd_ps
#define vsum _mm512_reduce_add_ps
#define vabs _mm512_abs_ps
/* The second operand where the first is NaN. */
#define vmax _mm512_max_ps
#define vmin _mm512_min_ps
#define vround(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE void vstore_bytes(uint8_t *to, vf a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a))); }

/* 16 x 16. */
INLINE void transpose(__m512i *v) {
    __m512i a[16];
    _Pragma("GCC unroll 16")
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    _Pragma("GCC unroll 16")
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    _Pragma("GCC unroll 16")
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    _Pragma("GCC unroll 16")
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}

INLINE void vtranspose(vf *v) {
    __m512i a[16];
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_castps_si512(v[i]);
    transpose(a);
    for (int i = 0; i < 16; i++)
        v[i] = _mm512_castsi512_ps(a[i]);
}

#elif ISA == 1
typedef __m256 vf;
#define VL 8
#define vload _mm256_loadu_ps
#define vstore _mm256_storeu_ps
#define vset _mm256_set1_ps
#define vadd _mm256_add_ps
#define vsub _mm256_sub_ps
#define vmul _mm256_mul_ps
#define vfma _mm256_fmadd_ps
#define vabs(a) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a)
#define vmax _mm256_max_ps
#define vmin _mm256_min_ps
#define vround(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE float vsum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE void vstore_int_bytes(uint8_t *to, __m256i a) {
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1,
                                         -1, -1, -1, -1, -1);
    a = _mm256_shuffle_epi8(a, low);
    _mm_storel_epi64((__m128i *)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

INLINE void vstore_bytes(uint8_t *to, vf a) { vstore_int_bytes(to, _mm256_cvttps_epi32(a)); }

/* 8 x 8. */
INLINE void vtranspose(vf *v) {
    vf a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

#else
typedef float vf;
#define VL 1
#define vset(a) (a)
#define vadd(a, b) ((a) + (b))
#define vsub(a, b) ((a) - (b))
#define vmul(a, b) ((a) * (b))
#define vfma(a, b, c) ((a) * (b) + (c))
#define vsum(a) (a)
#define vabs fabsf
#define vround rintf

INLINE vf vload(const float *p) { return *p; }
INLINE void vstore(float *p, vf a) { *p = a; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE void vstore_bytes(uint8_t *to, vf a) { *to = a > 0 ? (uint8_t)a : 0; }
#endif

INLINE uint32_t bits_of(float a) {
    uint32_t u;
    memcpy(&u, &a, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float a;
    memcpy(&a, &u, 4);
    return a;
}

INLINE uint16_t to_bf16(float a) {
    uint32_t u = bits_of(a);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float from_bf16(uint16_t a) { return float_of((uint32_t)a << 16); }

INLINE uint16_t to_fp16(float a) {
    uint32_t u = bits_of(a), sign = (u >> 16) & 0x8000, x = u & 0x7fffffff;
    if (x >= 0x47800000)
        return (uint16_t)(sign | (x > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (x < 0x38800000) /* subnormal: the addition rounds to multiples of 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(x) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((x + 0xc8000fff + ((x >> 13) & 1)) >> 13));
}

INLINE float from_fp16(uint16_t a) {
    uint32_t sign = (uint32_t)(a & 0x8000) << 16, x = a & 0x7fff;
    if (x >= 0x7c00)
        return float_of(sign | 0x7f800000 | (x & 0x3ff) << 13);
    if (x >= 0x400)
        return float_of(sign | ((x << 13) + 0x38000000));
    return float_of(sign | bits_of((float)x * 0x1p-24f));
}

INLINE float load_as(const void *p, int64_t i, int dtype) {
    return dtype == FP32 ? ((const float *)p)[i] : dtype == BF16 ? from_bf16(((const uint16_t *)p)[i]) : from_fp16(((const uint16_t *)p)[i]);
}

INLINE void store_as(void *p, int64_t i, float a, int dtype) {
    if (dtype == FP32)
        ((float *)p)[i] = a;
    else
        ((uint16_t *)p)[i] = dtype == BF16 ? to_bf16(a) : to_fp16(a);
}

INLINE void load_row(float *to, const void *from, int64_t start, int64_t count, int dtype) {
    if (dtype == FP32)
        memcpy(to, (const float *)from + start, (size_t)count * 4);
    else if (dtype == BF16)
        for (int64_t i = 0; i < count; i++)
            to[i] = from_bf16(((const uint16_t *)from)[start + i]);
    else
        for (int64_t i = 0; i < count; i++)
            to[i] = from_fp16(((const uint16_t *)from)[start + i]);
}

INLINE void store_row(void *to, int64_t start, const float *from, int64_t count, int dtype) {
    if (dtype == FP32)
        memcpy((float *)to + start, from, (size_t)count * 4);
    else if (dtype == BF16)
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)to)[start + i] = to_bf16(from[i]);
    else
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)to)[start + i] = to_fp16(from[i]);
}

#endif
