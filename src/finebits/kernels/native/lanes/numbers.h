/* float16 and bfloat16 to and from float32, one by one and a row at a time. Rounding is to nearest, ties to even; subnormal numbers and NaN are kept. */
#ifndef FINEBITS_NUMBERS_H
#define FINEBITS_NUMBERS_H

#include "jobs.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

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

/* Up to which of the levels each is one more than that before it, if those behind are all the same; else 0. */
INLINE int evenly(const float *levels, int count) {
    int last = 0;
    while (last + 1 < count && fabsf(levels[0]) < 1 << 16 && levels[last + 1] == levels[0] + (float)(last + 1))
        last++;
    for (int i = last; i < count; i++)
        if (levels[i] != levels[last])
            return 0;
    return last;
}

#endif
