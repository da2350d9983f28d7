/* What the parts of the AVX-512 product on packed codes share (avx512.c): groups, and their codes in registers.
 *
 * A group is the columns that 64 bytes of the first plane hold: 64 of 8 bits, 128 of 4, 256 of 2 and 3. Its word w (of 32) holds the PER
 * columns PER*w ... PER*w + PER - 1, so the k-th code of all words together is one vector of levels, found by shifting and one
 * vpermw; that instruction looks at 5 bits of its index only, and a table that repeats makes a mask unnecessary. x is rearranged once a
 * call into the same order. Float lane l of the dot products then holds columns 2*PER*l ... 2*PER*(l + 1) - 1, all of one block.
 */
#ifndef FINEBITS_PACKED_AVX512_H
#define FINEBITS_PACKED_AVX512_H

#include "decode/planes.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum { FEW = FEW_TOKENS };

struct fused {
    const struct linear_job *job;
    int64_t groups;
    uint16_t *x;     /* (groups, tokens, PER, 32) */
    float *x_sum;    /* (tokens, blocks), for the shift */
    int32_t *lane;   /* (groups, 16): block of a lane, counted from `base` */
    int32_t *base;   /* (groups) */
    float undo;      /* 1 / factor */
    uint16_t levels[32] __attribute__((aligned(64)));
    uint8_t halves[2][256] __attribute__((aligned(64))); /* of 256 levels: their lower bytes and their upper ones */
};

/* Arrays live in registers only where every index is constant. */
#define UNROLL _Pragma("GCC unroll 8")

INLINE int per_word(int bits) { return bits == 8 ? 2 : bits == 4 ? 4 : 8; }

INLINE __m512i load_codes(const uint8_t *p, int64_t left) {
    return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, p);
}

INLINE __m256i load_bits(const uint8_t *p, int64_t left) {
    return left >= 32 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8((1u << left) - 1, p);
}

/* The k-th code of every word in its low bits; the bits above are of no use. */
INLINE __m512i low_codes(__m512i c, __m512i odd, int bits, int k) {
    if (bits == 3)
        return _mm512_srli_epi16(k % 2 ? odd : c, k / 2 * 4);
    return _mm512_srli_epi16(c, bits * k);
}

/* One byte of each of 64 levels. */
INLINE __m512i half_of(const uint8_t *table, __m512i codes, __mmask64 upper) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
    return _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), codes, _mm512_load_si512(table + 192)));
}

/* The levels of the lower and of the upper codes of 32 words. */
INLINE void levels_of_bytes(const struct fused *f, __m512i codes, __m512i *w) {
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const __m512i low = half_of(f->halves[0], codes, upper), high = half_of(f->halves[1], codes, upper), byte = _mm512_set1_epi16(255);
    w[0] = _mm512_ternarylogic_epi32(byte, low, _mm512_slli_epi16(high, 8), 0xca);
    w[1] = _mm512_ternarylogic_epi32(byte, _mm512_srli_epi16(low, 8), high, 0xca);
}

/* Fills all that lies behind `groups`, for which there is room. */
void packed_avx512_arrange(struct fused *);

#endif
