/* What the parts of the AVX2 product on packed codes share (avx2.c): groups, and their codes in registers.
 *
 * A group is the columns that 32 bytes of the first plane hold, 64 of 4 bits and 128 of 2 and 3; of 8 bits, 64 as well. A byte shuffle looks 32
 * codes up at once, one byte of their levels; interleaving the bytes gives the levels. Codes of 8 bits are widened and one number is added,
 * which is all that levels need that lie one apart. All this works inside lanes of 128 bits, so a lane of every vector holds columns of one
 * half of the group; x is rearranged once a call into the order that this gives.
 */
#ifndef FINEBITS_PACKED_AVX2_H
#define FINEBITS_PACKED_AVX2_H

#include "lanes/lanes.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum { ROWS = 4, FEW = FEW_TOKENS };

struct few {
    const struct linear_job *job;
    int64_t groups, units;
    void *x;      /* (groups, tokens, columns) in the order of a group: float, or int16_t if `narrow` */
    float *by;    /* (tokens, units): what one of these integers stands for, or 1 */
    float *x_sum; /* (tokens, blocks), for the shift */
    int narrow, halves; /* units of a group */
    int last;   /* of 8 bits: the level of code c is first + least(c, last) */
    float first;
    uint8_t plane[4][4][16] __attribute__((aligned(64))); /* by code of a half-byte: byte of its level */
};

#define UNROLL _Pragma("GCC unroll 16")

INLINE int group_columns(int bits) { return bits >= 4 ? 64 : 128; }

/* Of its first plane. */
INLINE int group_bytes(int bits) { return bits == 8 ? 64 : 32; }

/* The codes of a group as they are in memory; those of 3 bits joined in half-bytes, 0 and 2 of every byte in c[0], 1 and 3 in c[1]; those of 8
 * bits with the first half of the group in the lower lanes. */
INLINE void load_codes(const uint8_t *p, const uint8_t *third, int bits, __m256i *c) {
    if (bits == 8) {
        c[0] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p)), _mm_loadu_si128((const __m128i *)(p + 32)), 1);
        c[1] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(p + 16))), _mm_loadu_si128((const __m128i *)(p + 48)), 1);
        return;
    }
    c[0] = _mm256_loadu_si256((const __m256i *)p);
    if (bits != 3)
        return;
    const __m256i even = _mm256_set1_epi8(0x33), b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)third));
    const __m256i four = _mm256_and_si256(_mm256_or_si256(b, _mm256_slli_epi16(b, 4)), _mm256_set1_epi8(15)); /* single bits of a byte's four codes */
    /* Single bits 0 and 2 (1 and 3) go to bits 2 and 6. */
    const __m256i t0 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 0, 4, 64, 68, 64, 68, 0, 4, 0, 4, 64, 68, 64, 68));
    const __m256i t1 = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 64, 64, 68, 68, 64, 64, 68, 68));
    c[1] = _mm256_or_si256(_mm256_and_si256(even, _mm256_srli_epi16(c[0], 2)), _mm256_shuffle_epi8(t1, four));
    c[0] = _mm256_or_si256(_mm256_and_si256(even, c[0]), _mm256_shuffle_epi8(t0, four));
}

/* The codes of a group in half-bytes (of 8 bits, in bytes): vector k has the codes k, k + per, k + 2 * per, ... in the low bits of its bytes, `per` a byte. What
 * is above them (of 2 bits in bits 2 and 3 already, for which the tables repeat) a shuffle does not look at, but bit 7, which is zero. */
INLINE void half_bytes(const __m256i *c, int bits, __m256i *v) {
    const __m256i low = _mm256_set1_epi8(15), upper = _mm256_srli_epi16(c[0], 4);
    if (bits == 8) {
        v[0] = c[0], v[1] = c[1];
        return;
    }
    if (bits == 3) {
        v[0] = c[0], v[1] = c[1], v[2] = upper, v[3] = _mm256_srli_epi16(c[1], 4);
        return;
    }
    const __m256i first = _mm256_and_si256(c[0], low), second = _mm256_and_si256(upper, low);
    if (bits == 4)
        v[0] = first, v[1] = second;
    else
        v[0] = v[1] = first, v[2] = v[3] = second;
}

/* Which of its tables vector k looks its codes up in: of 2 bits, the lower or the upper ones of a half-byte. */
INLINE int table_of(int bits, int k) { return bits == 2 ? k % 2 : 0; }

INLINE __m256i look_up(const struct few *f, int which, int byte, __m256i v) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)f->plane[which][byte])), v);
}

/* Fills x, by and x_sum; `row` has room for one of x, zeros behind it. Nonzero if there are infinities or NaN, which integers do not hold. */
int packed_avx2_arrange(const struct few *, float *row);

/* Fills the tables of levels: gives what integers of them are to be multiplied by. */
float packed_avx2_levels(struct few *);

#endif
