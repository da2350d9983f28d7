/* Packed rows -> values, for the instruction set this file is compiled for. */
#ifndef FINEBITS_DECODE_H
#define FINEBITS_DECODE_H

#include "simd.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are packed in little-endian order"
#endif

enum { CHUNK = 2048, PAD = 64 };

/* ---- packed planes -> codes, one a byte ---- */

INLINE uint64_t spread_codes(uint64_t x, int width) {
    switch (width) {
    case 4:
        x = (x | x << 16) & 0x0000ffff0000ffffu;
        x = (x | x << 8) & 0x00ff00ff00ff00ffu;
        return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
    case 2:
        x = (x | x << 24) & 0x000000ff000000ffu;
        x = (x | x << 12) & 0x000f000f000f000fu;
        return (x | x << 6) & 0x0303030303030303u;
    case 1:
        x = (x | x << 28) & 0x0000000f0000000fu;
        x = (x | x << 14) & 0x0003000300030003u;
        return (x | x << 7) & 0x0101010101010101u;
    default:
        return x;
    }
}

/* Through a variable of the right size: a wide read after a narrow write would have to wait for memory. */
INLINE uint64_t load_bytes(const uint8_t *p, int64_t bytes) {
    uint64_t x = 0;
    uint32_t x4;
    uint16_t x2;
    switch (bytes) {
    case 8: memcpy(&x, p, 8); return x;
    case 4: memcpy(&x4, p, 4); return x4;
    case 2: memcpy(&x2, p, 2); return x2;
    case 1: return *p;
    default: memcpy(&x, p, (size_t)bytes); return x;
    }
}

#if ISA == 1
/* 32 codes of `width` bits, one a byte. */
INLINE __m256i unpack32(const uint8_t *p, int width) {
    if (width == 8)
        return _mm256_loadu_si256((const __m256i *)p);
    if (width == 4) {
        const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
        return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
    }
    if (width == 2) {
        __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
        v = _mm256_or_si256(v, _mm256_slli_epi32(v, 12));
        return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 6)), _mm256_set1_epi8(3));
    }
    int32_t all;
    memcpy(&all, p, 4);
    /* Every byte gets the byte with its bit, and is 1 where that bit is set. */
    const __m256i from = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(all), from), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(1));
}
#endif

/* Eight codes of `width` bits take `width` bytes. */
INLINE void unpack_plane(const uint8_t *plane, int64_t start, int64_t count, int width, int shift, uint8_t *codes) {
    const uint8_t *p = plane + start / 8 * width;
    int64_t i = 0;
#if ISA == 2
    const __m512i low4 = _mm512_set1_epi8(15), low2 = _mm512_set1_epi8(3);
    for (; i < count; i += 64, p += 8 * width) {
        int64_t bytes = least(8 * width, ((count - i) * width + 7) / 8);
        __mmask64 mask = bytes == 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
        __m512i v;
        if (width == 8) {
            v = _mm512_maskz_loadu_epi8(mask, p);
        } else if (width == 4) {
            v = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)mask, p));
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), low4);
        } else if (width == 2) {
            v = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)mask, p));
            v = _mm512_or_si512(v, _mm512_slli_epi32(v, 12));
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 6)), low2);
        } else {
            v = _mm512_maskz_set1_epi8((__mmask64)_mm_cvtsi128_si64(_mm_maskz_loadu_epi8((__mmask16)mask, p)), 1);
        }
        if (shift)
            v = _mm512_or_si512(_mm512_sll_epi16(v, _mm_cvtsi32_si128(shift)), _mm512_loadu_si512(codes + i));
        _mm512_storeu_si512(codes + i, v);
    }
#else
#if ISA == 1
    for (; i + 32 <= count; i += 32, p += 4 * width) {
        __m256i v = unpack32(p, width);
        if (shift)
            v = _mm256_or_si256(_mm256_sll_epi16(v, _mm_cvtsi32_si128(shift)), _mm256_loadu_si256((const __m256i *)(codes + i)));
        _mm256_storeu_si256((__m256i *)(codes + i), v);
    }
#endif
    for (; i < count; i += 8, p += width) {
        int64_t bytes = least(width, ((count - i) * width + 7) / 8);
        uint64_t old, x = bytes == width ? load_bytes(p, width) : load_bytes(p, bytes);
        x = spread_codes(x, width) << shift;
        if (shift) {
            memcpy(&old, codes + i, 8);
            x |= old;
        }
        memcpy(codes + i, &x, 8);
    }
#endif
}

/* Columns [start, start + count) of a packed row; `codes` has room for 63 more. */
static void unpack(const uint8_t *row, int64_t n, int bits, int64_t start, int64_t count, uint8_t *codes) {
    int shift = 0;
    for (int width = 8; width; width /= 2) {
        if (!(bits & width))
            continue;
        switch (width) {
        case 8: unpack_plane(row, start, count, 8, shift, codes); break;
        case 4: unpack_plane(row, start, count, 4, shift, codes); break;
        case 2: unpack_plane(row, start, count, 2, shift, codes); break;
        default: unpack_plane(row, start, count, 1, shift, codes);
        }
        row += (n * width + 7) / 8;
        shift += width;
    }
}

/* ---- codes -> values ---- */

struct decoder {
    struct table t;
    int small; /* at most 16 levels */
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
#if ISA > 0
    if (!d->small || ISA == 1)
        for (int b = 0; b < 4; b++)
            for (int i = 0; i < 256; i++)
                d->planes[b][i] = (uint8_t)(bits_of(d->levels[i]) >> (8 * b));
#endif
}

#if ISA == 2
INLINE __mmask16 mask16(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

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

/* out = levels[code] for up to 256 levels; writes up to 63 more. */
INLINE void lookup_large(const struct decoder *d, const uint8_t *codes, int64_t count, float *out) {
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
#else
    for (int64_t i = 0; i < count; i++)
        out[i] = d->levels[codes[i]];
#endif
}

#if ISA == 1
/* 32 codes of 2, 3 or 4 bits in the order of levels32; `third` has the single bits of 3. */
INLINE __m256i codes32(const uint8_t *p, const uint8_t *third, int bits) {
    if (bits == 4) {
        const __m256i word = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1,
                                              15, -1);
        const __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)), word);
        return _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 4)), _mm256_set1_epi8(15));
    }
    int64_t all;
    memcpy(&all, p, 8);
    const __m256i dword = _mm256_setr_epi8(0, -1, -1, -1, 2, -1, -1, -1, 4, -1, -1, -1, 6, -1, -1, -1, 1, -1, -1, -1, 3, -1, -1, -1, 5, -1, -1, -1, 7, -1,
                                           -1, -1);
    __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi64x(all), dword);
    v = _mm256_or_si256(v, _mm256_slli_epi32(v, 12));
    v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 6)), _mm256_set1_epi8(3));
    if (bits == 2)
        return v;
    int32_t ones;
    memcpy(&ones, third, 4);
    /* Every byte gets the byte with its bit, and is 4 where that bit is set. */
    const __m256i from = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303));
    const __m256i bit = _mm256_inserti128_si256(_mm256_set1_epi32(0x08040201), _mm_set1_epi32((int)0x80402010), 1);
    const __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(ones), from), bit);
    return _mm256_or_si256(v, _mm256_and_si256(_mm256_cmpeq_epi8(b, bit), _mm256_set1_epi8(4)));
}

/* Columns of one block, `count` a multiple of 32. */
INLINE void decode_columns(const struct quarters *q, const uint8_t *p, const uint8_t *third, int64_t count, int bits, float by, const float *plus, float *out) {
    const __m256 scale = _mm256_set1_ps(by), shift = _mm256_set1_ps(plus ? *plus : 0.0f);
    for (; count; count -= 32, p += bits == 4 ? 16 : 8, third += 4, out += 32) {
        __m256 v[4];
        levels32(q, codes32(p, third, bits), v);
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_mul_ps(v[i], scale);
            _mm256_storeu_ps(out + 8 * i, plus ? _mm256_add_ps(v[i], shift) : v[i]);
        }
    }
}

/* Columns [start, stop) of a row in float32: start, stop and the block are multiples of 32. */
INLINE void decode_whole(const struct decoder *d, int64_t row, int64_t start, int64_t stop, int bits, float *out) {
    const struct table *t = &d->t;
    const struct quarters q = quarters_of(d);
    const uint8_t *codes = t->codes + row * t->row_bytes, *p = codes + start * (bits == 3 ? 2 : bits) / 8, *third = codes + (t->n * 2 + 7) / 8 + start / 8;
    const int64_t block = t->block;
    int64_t k = start / block, left = (k + 1) * block - start;
    for (k += row * t->blocks; start < stop; k++, left = block) {
        const int64_t count = least(left, stop - start);
        const float scale = load_as(t->scale, k, t->store);
        if (t->shift)
            decode_columns(&q, p, third, count, bits, scale, t->shift + k, out);
        else
            decode_columns(&q, p, third, count, bits, scale, NULL, out);
        p += count * (bits == 3 ? 2 : bits) / 8, third += count / 8, out += count, start += count;
    }
}
#endif

/* Columns [start, stop) of a row in float32; at most CHUNK of them, start a multiple of 8. */
static void decode(const struct decoder *d, int64_t row, int64_t start, int64_t stop, float *out) {
    const struct table *t = &d->t;
#if ISA == 1
    if (t->bits >= 2 && t->bits <= 4 && t->block % 32 == 0 && start % 32 == 0) {
        const int64_t whole = start + (stop - start) / 32 * 32;
        switch (t->bits) {
        case 2: decode_whole(d, row, start, whole, 2, out); break;
        case 3: decode_whole(d, row, start, whole, 3, out); break;
        default: decode_whole(d, row, start, whole, 4, out);
        }
        if (whole == stop)
            return;
        out += whole - start, start = whole;
    }
#endif
    uint8_t codes[CHUNK + PAD] __attribute__((aligned(64)));
    float value[CHUNK + PAD] __attribute__((aligned(64)));
    unpack(t->codes + row * t->row_bytes, t->n, t->bits, start, stop - start, codes);
    if (!d->small)
        lookup_large(d, codes, stop - start, value);
    for (int64_t k = start / t->block, j = start; j < stop; k++) {
        int64_t end = least((k + 1) * t->block, stop), at = row * t->blocks + k;
        float scale = load_as(t->scale, at, t->store);
        const float *shift = t->shift ? t->shift + at : NULL;
        if (d->small) {
            map_small(d, codes + (j - start), end - j, scale, shift, out + (j - start));
            j = end;
        } else {
            for (; j + VL <= end; j += VL) {
                vf v = vmul(vload(value + (j - start)), vset(scale));
                vstore(out + (j - start), shift ? vadd(v, vset(*shift)) : v);
            }
            for (; j < end; j++) {
                float v = value[j - start] * scale;
                out[j - start] = shift ? v + *shift : v;
            }
        }
    }
}

#endif
