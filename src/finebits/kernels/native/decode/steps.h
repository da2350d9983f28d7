/* A packed row of 2, 3 or 4 bits -> bfloat16 where blocks and columns are multiples of 64 (AVX-512).
 *
 * The scaled levels of a block, rounded, are one register (of 3 bits two): one multiplication and one rounding a block. 32 columns are one
 * load that widens, one multishift and one vpermw, which looks at the low 5 bits of a word only; of 3 bits, a second vpermw under the mask of bit 2.
 */
#ifndef FINEBITS_STEPS_H
#define FINEBITS_STEPS_H

#include "decode/levels.h"
#include "lanes/round_bf16.h"

/* 32 codes of 4 bits (2 bits), each in the low bits of a word and other codes above it. */
INLINE __m512i words4(const uint8_t *p) {
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x3e0c3e083e043e00), _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)p)));
}

INLINE __m512i words2(const uint8_t *p) {
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x3e063e043e023e00), _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p)));
}

/* The table of one block, twice (2 bits: eight times), rounded. */
INLINE __m512i block_entries(__m512 levels, const float *scale, const float *shift, int exact) {
    __m512 v = _mm512_mul_ps(levels, _mm512_set1_ps(*scale));
    if (shift)
        v = _mm512_add_ps(v, _mm512_set1_ps(*shift));
    return exact ? _mm512_broadcast_i64x4(round_bf16(v)) : (__m512i)_mm512_cvtne2ps_pbh(v, v);
}

/* `count` blocks of `steps` times 64 columns, 2, 3 or 4 bits. Subnormal numbers become zero unless `exact`. */
INLINE void decode_blocks(const float *all, const uint8_t *p, const uint8_t *third, const float *scale, const float *shift, int64_t count,
                          int64_t steps, int bits, int exact, uint16_t *out) {
    const int width = bits == 3 ? 2 : bits;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), low = _mm512_set1_epi32((1 << width) - 1);
    const __m512 levels = _mm512_permutexvar_ps(_mm512_and_si512(lane, low), _mm512_load_ps(all));
    const __m512 upper = _mm512_permutexvar_ps(_mm512_or_si512(_mm512_and_si512(lane, low), _mm512_set1_epi32(4)), _mm512_load_ps(all));
    __m512i entries = _mm512_setzero_si512(), entries4 = entries;
    /* One flat loop: the counters of two nested ones would be a longer chain than all the rest. */
    for (int64_t i = 0, left = 0; i < count * steps; i++, left--, out += 64, p += 8 * width, third += 8) {
        if (left == 0) {
            entries = block_entries(levels, scale, shift, exact);
            if (bits == 3)
                entries4 = block_entries(upper, scale, shift, exact);
            left = steps;
            scale++;
            shift += shift != NULL;
        }
        _mm_prefetch((const char *)p + 256, _MM_HINT_T0);
        const __m512i c0 = width == 4 ? words4(p) : words2(p), c1 = width == 4 ? words4(p + 16) : words2(p + 8);
        __m512i v0 = _mm512_permutexvar_epi16(c0, entries), v1 = _mm512_permutexvar_epi16(c1, entries);
        if (bits == 3) {
            uint32_t mask[2];
            memcpy(mask, third, 8);
            v0 = _mm512_mask_permutexvar_epi16(v0, mask[0], c0, entries4);
            v1 = _mm512_mask_permutexvar_epi16(v1, mask[1], c1, entries4);
        }
        _mm512_storeu_si512(out, v0);
        _mm512_storeu_si512(out + 32, v1);
    }
}

/* Columns [start, stop), both multiples of 64, of blocks that are: the pieces of blocks at both ends, and the whole ones between. */
INLINE void decode_steps(const struct decoder *d, int64_t row, int64_t start, int64_t stop, int bits, int exact, uint16_t *out) {
    const struct table *t = &d->t;
    const int width = bits == 3 ? 2 : bits;
    const uint8_t *codes = t->codes + row * t->row_bytes, *third = codes + t->n / 4;
    float some[64];
    while (start < stop) {
        const int64_t k = start / t->block, at = row * t->blocks + k;
        int64_t whole = start % t->block ? 0 : least((stop - start) / t->block, 64);
        const int64_t columns = whole ? whole * t->block : least((k + 1) * t->block, stop) - start;
        const float *scale = some;
        if (t->store == FP32)
            scale = (const float *)t->scale + at;
        else
            for (int64_t i = 0; i < (whole ? whole : 1); i++)
                some[i] = load_as(t->scale, at + i, t->store);
        const int64_t count = whole ? whole : 1, steps = columns / 64 / count;
        if (t->shift)
            decode_blocks(d->levels, codes + start * width / 8, third + start / 8, scale, t->shift + at, count, steps, bits, exact, out);
        else
            decode_blocks(d->levels, codes + start * width / 8, third + start / 8, scale, NULL, count, steps, bits, exact, out);
        start += columns;
        out += columns;
    }
}

static void decode_steps2(const struct decoder *d, int64_t row, int64_t start, int64_t stop, int exact, uint16_t *out) {
    exact ? decode_steps(d, row, start, stop, 2, 1, out) : decode_steps(d, row, start, stop, 2, 0, out);
}
static void decode_steps3(const struct decoder *d, int64_t row, int64_t start, int64_t stop, int exact, uint16_t *out) {
    exact ? decode_steps(d, row, start, stop, 3, 1, out) : decode_steps(d, row, start, stop, 3, 0, out);
}
static void decode_steps4(const struct decoder *d, int64_t row, int64_t start, int64_t stop, int exact, uint16_t *out) {
    exact ? decode_steps(d, row, start, stop, 4, 1, out) : decode_steps(d, row, start, stop, 4, 0, out);
}
static void (*const steps_of[])(const struct decoder *, int64_t, int64_t, int64_t, int, uint16_t *) = {decode_steps2, decode_steps3, decode_steps4};

INLINE int has_steps(const struct table *t, int64_t start, int64_t stop) {
    return t->bits >= 2 && t->bits <= 4 && t->block % 64 == 0 && start % 64 == 0 && stop % 64 == 0 && t->n % 8 == 0;
}

#endif
