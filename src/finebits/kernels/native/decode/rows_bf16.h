/* A packed row -> bfloat16 (AVX2 and AVX-512), for at most 16 levels: the table of a block is rounded instead of every weight.
 *
 * Writes 2 bytes a column. The table takes 28 instructions a block with AVX2, ten with AVX-512; then 32 columns are two byte shuffles and two
 * interleavings with AVX2, one vpermw with AVX-512, beside unpacking their codes (planes.h); steps.h has a shorter way for blocks of 64.
 */
#ifndef FINEBITS_ROWS_BF16_H
#define FINEBITS_ROWS_BF16_H

#include "decode/rows.h"
#include "lanes/round_bf16.h"
#if ISA == 2
#include "decode/steps.h"
#endif

#if ISA == 1
/* As decode, to bfloat16, for at most 16 levels: the table of a block is rounded instead of every weight. */
static void decode_bf16(const struct decoder *d, int64_t row, int64_t start, int64_t stop, uint16_t *out) {
    const struct table *t = &d->t;
    const __m128i byte = _mm_set1_epi16(255);
    uint8_t codes[CHUNK + PAD] __attribute__((aligned(64)));
    unpack(t->codes + row * t->row_bytes, t->n, t->bits, start, stop - start, codes);
    for (int64_t k = start / t->block, j = start; j < stop; k++) {
        int64_t end = least((k + 1) * t->block, stop), at = row * t->blocks + k;
        const __m256 scale = _mm256_set1_ps(load_as(t->scale, at, t->store));
        __m256 a = _mm256_mul_ps(_mm256_load_ps(d->levels), scale), b = _mm256_mul_ps(_mm256_load_ps(d->levels + 8), scale);
        if (t->shift)
            a = _mm256_add_ps(a, _mm256_set1_ps(t->shift[at])), b = _mm256_add_ps(b, _mm256_set1_ps(t->shift[at]));
        __m256i words = _mm256_packus_epi32(_mm256_srli_epi32(round_bf16(a), 16), _mm256_srli_epi32(round_bf16(b), 16));
        words = _mm256_permute4x64_epi64(words, 0xd8);
        const __m128i w0 = _mm256_castsi256_si128(words), w1 = _mm256_extracti128_si256(words, 1);
        const __m256i low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(w0, byte), _mm_and_si128(w1, byte)));
        const __m256i high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(w0, 8), _mm_srli_epi16(w1, 8)));
        for (; j < end; j += 32, out += 32) {
            const __m256i c = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)(codes + (j - start))), 0xd8);
            const __m256i l = _mm256_shuffle_epi8(low, c), h = _mm256_shuffle_epi8(high, c);
            const __m256i v[2] = {_mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h)};
            if (end - j >= 32) {
                _mm256_storeu_si256((__m256i *)out, v[0]);
                _mm256_storeu_si256((__m256i *)(out + 16), v[1]);
            } else {
                memcpy(out, v, sizeof(uint16_t) * (size_t)(end - j));
                out += end - j;
                j = end;
                break;
            }
        }
    }
}
#endif

#if ISA == 2
/* As decode, to bfloat16, for at most 16 levels: the table of a block is rounded instead of every weight. */
static void decode_bf16(const struct decoder *d, int64_t row, int64_t start, int64_t stop, uint16_t *out) {
    const struct table *t = &d->t;
    if (has_steps(t, start, stop)) {
        steps_of[t->bits - 2](d, row, start, stop, 1, out);
        return;
    }
    uint8_t codes[CHUNK + PAD] __attribute__((aligned(64)));
    unpack(t->codes + row * t->row_bytes, t->n, t->bits, start, stop - start, codes);
    for (int64_t k = start / t->block, j = start; j < stop; k++) {
        int64_t end = least((k + 1) * t->block, stop), at = row * t->blocks + k;
        __m512 v = entries16(d->levels, load_as(t->scale, at, t->store), t->shift ? t->shift + at : NULL);
        const __m512i entries = _mm512_castsi256_si512(round_bf16(v));
        for (; j + 32 <= end; j += 32) {
            __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + (j - start))));
            _mm512_storeu_si512(out + (j - start), _mm512_permutexvar_epi16(code, entries));
        }
        if (j < end) {
            __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + (j - start))));
            _mm512_mask_storeu_epi16(out + (j - start), (__mmask32)((1u << (end - j)) - 1), _mm512_permutexvar_epi16(code, entries));
            j = end;
        }
    }
}

/* As decode_bf16 for a product, which takes subnormal numbers for zero anyway. */
INLINE void decode_product(const struct decoder *d, int64_t row, int64_t start, int64_t stop, uint16_t *out) {
    if (has_steps(&d->t, start, stop)) {
        steps_of[d->t.bits - 2](d, row, start, stop, 0, out);
    } else if (d->small) {
        for (int64_t end; start < stop; out += end - start, start = end)
            decode_bf16(d, row, start, end = least(start + CHUNK, stop), out);
    } else {
        float value[CHUNK + 16] __attribute__((aligned(64)));
        for (int64_t end; start < stop; out += end - start, start = end) {
            end = least(start + CHUNK, stop);
            decode(d, row, start, end, value);
            for (int64_t i = 0; i < end - start; i += 16)
                _mm256_storeu_si256((__m256i *)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(value + i)));
        }
    }
}
#endif

#endif
