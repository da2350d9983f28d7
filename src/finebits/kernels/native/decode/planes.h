/* Packed planes -> codes, one a byte.
 *
 * A row has a plane for every power of two that its bits are the sum of, from the largest to the smallest: codes of 3 bits a plane of their lower
 * two bits and behind it one of their third. In a plane, columns follow each other from the low bits of a byte on; it ends on a whole byte.
 * 64 codes of a plane are a load of 8 bytes times its width, at most two shifts, two ors and a mask with AVX-512, twice that with AVX2; every
 * further plane adds as much, a shift and an or.
 */
#ifndef FINEBITS_PLANES_H
#define FINEBITS_PLANES_H

#include "lanes/lanes.h"
#include "runtime/runtime.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are packed in little-endian order"
#endif

enum { CHUNK = 2048, PAD = 64 }; /* columns that are decoded at a time, and room behind them */

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

#if ISA == 2
/* Codes of 3 bits: their plane of two bits (eight codes a word) and that of one bit become two vectors of half-bytes, even codes and odd
 * ones, three of whose bits are a code and the highest is of no use. */
INLINE void join_planes(__m512i c, __m256i b, __m512i *even, __m512i *odd) {
    /* Byte by byte: the single bits of four codes, from bit 0 on, then of the four that follow. */
    const __m512i four = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1c1814100c080400), _mm512_cvtepu32_epi64(b));
    const __m512i pairs = _mm512_set1_epi16(0x3333);
    /* Products of bit matrices: source bits 0 and 2 (1 and 3) move to bits 2 and 6. */
    *even = _mm512_ternarylogic_epi32(pairs, c, _mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x0000010000000400), 0), 0xca);
    *odd = _mm512_ternarylogic_epi32(pairs, _mm512_srli_epi16(c, 2), _mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x0000020000000800), 0), 0xca);
}
#endif

#endif
