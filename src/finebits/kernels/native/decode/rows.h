/* A packed row -> float32. Reads bits / 8 bytes and 1 / block scales a column, writes 4 bytes.
 *
 * With AVX2 and blocks of whole 32 columns, 2, 3 and 4 bits go from the packed row to their levels in registers: 9 to 10 cycles for 32 columns,
 * of which the shuffles alone take 7. All else goes by CHUNK columns of codes in the first cache.
 */
#ifndef FINEBITS_ROWS_H
#define FINEBITS_ROWS_H

#include "decode/levels.h"

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
