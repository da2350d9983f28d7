/* Groups of columns, decoded in registers in the order in which shifts give them.
 *
 * A group is the columns that 64 bytes of the first plane hold, 128 of 4 bits, 256 of 2 and 3. Where blocks allow it, its columns are
 * summed in the order in which shifts and one vpermw decode them: first the first codes of all words, then the second ones, and so on.
 * The table that vpermw looks up holds the scaled levels of every 64 columns of the group, told apart by the upper bits of its index.
 *
 * A row's group of 4 bits, 128 weights, is one load, two multiplications, one rounding, and for each 32 a shift, a mask and one vpermw; of 3 bits
 * its planes are joined first (decode/planes.h).
 */
#ifndef FINEBITS_BF16_GROUPS_H
#define FINEBITS_BF16_GROUPS_H

#include "decode/planes.h"
#include "product/bf16/tile.h"

INLINE int per_word(int bits) { return bits == 4 ? 4 : 8; }

INLINE int is_grouped(const struct table *t) { return t->bits >= 2 && t->bits <= 4 && t->block % 64 == 0 && t->n % 64 == 0; }

/* One group of a row: which bytes it has, and which block each part of its table takes its scale from. */
struct group {
    int64_t base;           /* block of the first column */
    int32_t second;         /* block of column 64, counted from there */
    __mmask8 blocks;        /* blocks of the group */
    __mmask32 entries, third; /* entries of columns there are; bytes of the plane of single bits */
    __mmask64 codes;        /* bytes of the first plane */
    __m512i block[2];       /* for every entry of the table, counted from `base` */
};

static void describe(const struct table *t, struct group *all) {
    const int bits = t->bits, shift = bits == 4 ? 4 : bits;
    const int64_t columns = 32 * per_word(bits);
    for (int64_t from = 0; from < t->n; from += columns) {
        struct group *g = all + from / columns;
        int32_t block[32];
        const int64_t count = least(columns, t->n - from), bytes = count * (bits == 3 ? 2 : bits) / 8;
        g->base = from / t->block;
        g->entries = 0;
        for (int i = 0; i < 32; i++) {
            const int64_t part = (i >> shift) % (columns / 64);
            block[i] = 64 * part < count ? (int32_t)((from + 64 * part) / t->block - g->base) : 0;
            g->entries |= (uint32_t)(64 * part < count) << i;
        }
        g->second = count > 64 ? (int32_t)((from + 64) / t->block - g->base) : 0;
        g->blocks = (__mmask8)((2 << ((from + count - 1) / t->block - g->base)) - 1);
        g->codes = bytes == 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
        g->third = count == 256 ? ~0u : (1u << count / 8) - 1;
        memcpy(g->block, block, sizeof block);
    }
}

/* Scales of some rows in float32, rows `pitch` apart. */
struct scales {
    const float *scale, *shift;
    int64_t pitch;
};

/* Of rows row, row + 1, ... row + rows - 1; `copy` has room for them. */
INLINE struct scales scales_of(const struct table *t, int64_t row, int64_t rows, float *copy) {
    const int64_t at = row * t->blocks;
    if (t->store != FP32)
        load_row(copy, t->scale, at, rows * t->blocks, t->store);
    return (struct scales){t->store == FP32 ? (const float *)t->scale + at : copy, t->shift ? t->shift + at : NULL, t->blocks};
}

/* A row's group: codes, and the table to look them up in. */
struct coded {
    __m512i c, odd, entries;
};

INLINE __m512 scaled(__m512 levels, __m512i block, __mmask8 mask, const float *scale, const float *shift) {
    const __m512 v = _mm512_mul_ps(levels, _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, scale))));
    return shift ? _mm512_add_ps(v, _mm512_permutexvar_ps(block, _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, shift)))) : v;
}

/* `codes` and `third` are those of the group in the row, `scale` and `shift` those of the row. */
INLINE struct coded load_group(const struct group *g, const uint8_t *codes, const uint8_t *third, const float *scale, const float *shift, __m512 levels,
                               int bits) {
    struct coded w = {.c = _mm512_maskz_loadu_epi8(g->codes, codes)};
    scale += g->base;
    shift = shift ? shift + g->base : NULL;
    __m512 low, high;
    if (bits == 4) {
        low = _mm512_mul_ps(levels, _mm512_set1_ps(scale[0])), high = _mm512_mul_ps(levels, _mm512_set1_ps(scale[g->second]));
        if (shift)
            low = _mm512_add_ps(low, _mm512_set1_ps(shift[0])), high = _mm512_add_ps(high, _mm512_set1_ps(shift[g->second]));
    } else {
        low = scaled(levels, g->block[0], g->blocks, scale, shift);
        high = bits == 2 ? low : scaled(levels, g->block[1], g->blocks, scale, shift);
    }
    w.entries = (__m512i)_mm512_maskz_cvtne2ps_pbh(g->entries, high, low);
    if (bits == 3)
        join_planes(w.c, _mm256_maskz_loadu_epi8(g->third, third), &w.c, &w.odd);
    return w;
}

/* Its k-th vector. Words of columns 64 i ... 64 i + 63 look up part i of the table. */
INLINE __m512i look_up(const struct coded *w, int bits, int k) {
    const __m512i word = _mm512_setr_epi64(0, 0, 0x0001000100010001, 0x0001000100010001, 0x0002000200020002, 0x0002000200020002, 0x0003000300030003,
                                           0x0003000300030003);
    const __m512i part = bits == 4 ? _mm512_slli_epi16(_mm512_srli_epi16(word, 1), 4) : _mm512_slli_epi16(word, (unsigned)bits);
    const __m512i code = _mm512_set1_epi16((short)((1 << bits) - 1));
    const __m512i v = bits == 3 ? _mm512_srli_epi16(k % 2 ? w->odd : w->c, (unsigned)(k / 2 * 4)) : _mm512_srli_epi16(w->c, (unsigned)(bits * k));
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(v, code, part, 0xea), w->entries);
}

/* The levels that every part of the table begins with. */
INLINE __m512 levels_of(const struct decoder *d, int bits) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << bits) - 1)), _mm512_load_ps(d->levels));
}

/* Where the next rows of a group are read; the last row of the table repeats. */
struct cursor {
    const struct group *group;
    const uint8_t *codes, *third, *last;
    const float *scale, *shift;
    int64_t row_bytes, pitch, ahead, ahead_scale; /* the latter in bytes, to what is fetched meanwhile */
};

/* The rows from `row` on, their group `index`; a tile has `rows`. */
INLINE struct cursor cursor_at(const struct product *q, const struct scales *by, int64_t row, int64_t rows, int64_t index, int64_t groups) {
    const struct table *t = &q->job->t;
    const uint8_t *codes = t->codes + least(row, t->rows - 1) * t->row_bytes;
    const int64_t wrap = index + AHEAD >= groups, soon = wrap ? least(index + AHEAD - groups, groups - 1) : index + AHEAD;
    return (struct cursor){
        .group = q->groups + index,
        .codes = codes + 64 * index,
        .third = codes + t->n / 4 + 32 * index,
        .last = t->codes + (t->rows - 1) * t->row_bytes + 64 * index,
        .scale = by->scale,
        .shift = by->shift,
        .row_bytes = t->row_bytes,
        .pitch = by->pitch,
        .ahead = 64 * (soon - index) + wrap * rows * t->row_bytes,
        .ahead_scale = 4 * (q->groups[soon].base + wrap * rows * t->blocks),
    };
}

/* The next row, or if `doubled` the next two. */
INLINE void load_next(struct cursor *at, __m512 levels, int bits, int doubled, struct coded *w) {
    UNROLL
    for (int h = 0; h < 1 + doubled; h++) {
        _mm_prefetch((const char *)at->codes + at->ahead, _MM_HINT_T0);
        _mm_prefetch((const char *)at->scale + at->ahead_scale, _MM_HINT_T0);
        w[h] = load_group(at->group, at->codes, at->third, at->scale, at->shift, levels, bits);
        const int64_t more = at->codes != at->last;
        at->codes += more * at->row_bytes, at->third += more * at->row_bytes, at->scale += more * at->pitch;
        at->shift = at->shift ? at->shift + more * at->pitch : NULL;
    }
}

#endif
