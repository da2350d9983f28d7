/* x @ W for many tokens: the panel is DEPTH rows of a group's columns, or of 64, decoded two rows at a time into pairs, and serves up to PASS
 * tokens; x lies in spans. Two interleavings for 64 weights beside their decoding. y comes out in the order of groups, and is put right as it
 * is stored. */
#include "product/bf16/groups.h"

TILE(6, 4)
TILE(5, 4)
TILE(4, 4)
TILE(3, 4)
TILE(2, 4)
TILE(1, 4)
static const tile_fn by_rows[] = {NULL, tile_1_4, tile_2_4, tile_3_4, tile_4_4, tile_5_4, tile_6_4};

/* x (SPAN columns, token, PITCH); items are (SPAN columns, 16 tokens). */
static int slice_items(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const int64_t m = q->job->t.rows, groups = (q->tokens + 15) / 16;
    for (int64_t item = first; item < last; item++) {
        const int64_t from = item / groups * SPAN, count = least(SPAN, m - from);
        for (int64_t i = item % groups * 16; i < least(item % groups * 16 + 16, q->tokens); i++) {
            uint16_t *out = q->x + (item / groups * q->tokens + i) * PITCH;
            memcpy(out, (const uint16_t *)q->job->x + (q->first + i) * m + from, sizeof *out * (size_t)count);
            if (count % 2)
                out[count] = 0;
        }
    }
    return 0;
}

/* Two rows of 32 columns in pairs, in the order that store_columns undoes. */
INLINE void store_pairs(uint16_t *out, __m512i a, __m512i b) {
    _mm512_store_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(out + 32, _mm512_unpackhi_epi16(a, b));
}

/* Rows row, row + 1, ... row + count - 1 of 64 columns from `column` on, in pairs, `pairs` of them with the last ones filled up. */
INLINE void decode_pairs(const struct decoder *d, int64_t row, int64_t count, int64_t column, uint16_t *out) {
    const int64_t stop = least(column + 64, d->t.n);
    uint16_t w[2][64] __attribute__((aligned(64)));
    memset(w, 0, sizeof w);
    for (int64_t r = 0; r < count; r += 2) {
        decode_product(d, row + r, column, stop, w[0]);
        if (r + 1 < count)
            decode_product(d, row + r + 1, column, stop, w[1]);
        else
            memset(w[1], 0, sizeof w[1]);
        for (int i = 0; i < 64; i += 32)
            store_pairs(out + r * 64 + 2 * i, _mm512_load_si512(w[0] + i), _mm512_load_si512(w[1] + i));
    }
}

/* As decode_pairs, a whole group: vector k of both rows in pairs, for all k. */
INLINE void decode_group_pairs(const struct product *q, int64_t row, int64_t count, int64_t index, int bits, float *copy, uint16_t *out) {
    const struct table *t = &q->job->t;
    const int per = per_word(bits);
    const __m512 levels = levels_of(&q->d, bits);
    struct group group = q->groups[index];
    struct scales by = {(const float *)t->scale + row * t->blocks, t->shift ? t->shift + row * t->blocks : NULL, t->blocks};
    if (t->store != FP32) { /* those of this group alone */
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < __builtin_popcount(group.blocks); i++) {
                const int64_t from = (row + r) * t->blocks + group.base + i;
                copy[4 * r + i] = load_as(t->scale, from, t->store);
                copy[4 * (DEPTH + r) + i] = t->shift ? t->shift[from] : 0.0f;
            }
        by = (struct scales){copy, t->shift ? copy + 4 * DEPTH : NULL, 4};
        group.base = 0;
    }
    struct cursor at = cursor_at(q, &by, row, 1, index, index + AHEAD + 1);
    at.group = &group, at.ahead = 16 * t->row_bytes, at.ahead_scale = 4 * (16 * by.pitch + group.base);
    for (int64_t r = 0; r < count; r += 2) {
        struct coded w[2];
        load_next(&at, levels, bits, 1, w);
        if (r + 1 == count)
            w[1].entries = _mm512_setzero_si512();
        UNROLL
        for (int k = 0; k < per; k++)
            store_pairs(out + k / 2 * DEPTH * 64 + r * 64 + k % 2 * 64, look_up(&w[0], bits, k), look_up(&w[1], bits, k));
    }
}

/* y in order from the sums of a group's columns, or of 64. */
INLINE void store_columns(const struct product *q, const float *c, int64_t column, int64_t stop, int per) {
    const struct table *t = &q->job->t;
    uint16_t from[8][32] __attribute__((aligned(64)));
    __mmask32 part[4];
    for (int j = 0; j < per; j++)
        for (int i = 0; i < 32; i++) {
            const int word = (32 * j + i) / per, k = i % per, in_eight = word % 8;
            from[j][i] = (uint16_t)(k % 2 * 32 + in_eight / 4 * 16 + word / 8 * 4 + in_eight % 4);
        }
    for (int m = 0; m < 4; m++) {
        part[m] = 0;
        for (int i = 0; i < 32; i++)
            part[m] |= (uint32_t)(per == 1 || i % per / 2 == m) << i;
    }
    for (int64_t i = 0; i < q->tokens; i++) {
        __m512i v[8];
        for (int k = 0; k < per; k++) {
            const float *at = c + (k / 2 * q->tokens + i) * 64 + k % 2 * 32;
            v[k] = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(_mm512_load_ps(at))), round_bf16(_mm512_load_ps(at + 16)), 1);
        }
        uint16_t *y = (uint16_t *)q->job->y + (q->first + i) * t->n + column;
        for (int j = 0; j < per && column + 32 * j < stop; j++) {
            const __m512i index = _mm512_load_si512(from[j]);
            __m512i all = _mm512_setzero_si512();
            for (int m = 0; m < (per + 1) / 2; m++)
                all = _mm512_or_si512(all, _mm512_maskz_permutex2var_epi16(part[m], v[2 * m], index, v[per > 1 ? 2 * m + 1 : 0]));
            const int64_t left = stop - column - 32 * j;
            _mm512_mask_storeu_epi16(y + 32 * j, left >= 32 ? ~0u : (1u << left) - 1, all);
        }
    }
}

static int transposed_columns(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const int per = q->groups ? per_word(t->bits) : 2;
    const int64_t width = 32 * per, blocks = width / 64;
    const size_t count = (size_t)(blocks * q->tokens * 64), panel = (size_t)(blocks * DEPTH * 64);
    float *c = scratch(sizeof(float) * (count + 8 * DEPTH) + sizeof(uint16_t) * panel);
    if (!c)
        return 1;
    uint16_t *W = (uint16_t *)(c + count);
    float *copy = (float *)(W + panel);
    for (int64_t column = first; column < last; column += width) {
        for (int64_t from = 0; from < t->rows; from += DEPTH) {
            const int64_t depth = least(DEPTH, t->rows - from);
            switch (q->groups ? t->bits : 0) {
            case 2: decode_group_pairs(q, from, depth, column / width, 2, copy, W); break;
            case 3: decode_group_pairs(q, from, depth, column / width, 3, copy, W); break;
            case 4: decode_group_pairs(q, from, depth, column / width, 4, copy, W); break;
            default: decode_pairs(&q->d, from, depth, column, W);
            }
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t i = 0; i < q->tokens; i += 6)
                    by_rows[least(6, q->tokens - i)](q->x + (from / SPAN * q->tokens + i) * PITCH + from % SPAN, W + b * DEPTH * 64, (depth + 1) / 2,
                                                     !from, c + (b * q->tokens + i) * 64);
        }
        if (!q->groups)
            for (int64_t j = column; j < least(column + 64, t->n); j += 32)
                store_columns(q, c + (j - column), j, t->n, 1);
        else if (per == 4)
            store_columns(q, c, column, t->n, 4);
        else
            store_columns(q, c, column, t->n, 8);
    }
    free(c);
    return 0;
}

int bf16_transposed(struct product *q, int threads) {
    const struct table *t = &q->job->t;
    const int64_t spans = (t->rows + SPAN - 1) / SPAN;
    return parallel(slice_items, q, spans * ((q->tokens + 15) / 16), 1, threads) ||
           parallel(transposed_columns, q, t->n, q->groups ? 32 * per_word(t->bits) : 64, threads);
}
