/* Packed rows -> bfloat16, for the instruction set this file is compiled for. */
#ifndef FINEBITS_DECODE_BF16_H
#define FINEBITS_DECODE_BF16_H

#include "decode.h"

#if ISA == 1
/* The upper halves are the rounded numbers. */
INLINE __m256i round_bf16(__m256 a) {
    const __m256i u = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}

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
INLINE __m256i round_bf16(__m512 a) {
    const __m512i u = _mm512_castps_si512(a), half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    /* vcvtneps2bf16 would flush subnormal numbers. */
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, half), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

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
