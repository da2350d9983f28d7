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
