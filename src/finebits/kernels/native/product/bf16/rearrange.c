/* x as x @ W^T takes it: pairs of columns of 16 tokens in a vector, columns in the order of a group where W has groups. Once a pass: two or
 * three shuffles for each 32 numbers, and the transposition. */
#include "product/bf16/tokens.h"

/* 32 * per words in the order of a group. */
INLINE void reorder(const uint16_t *from, int64_t left, int per, uint16_t *to) {
    __m512i a[8], b[8];
    UNROLL
    for (int i = 0; i < per; i++) {
        const int64_t rest = left - 32 * i;
        a[i] = rest >= 32 ? _mm512_loadu_si512(from + 32 * i) : _mm512_maskz_loadu_epi16(rest > 0 ? (1u << rest) - 1 : 0, from + 32 * i);
    }
    if (per == 4) {
        uint16_t index[2][32] __attribute__((aligned(64)));
        for (int k = 0; k < 2; k++)
            for (int w = 0; w < 32; w++)
                index[k][w] = (uint16_t)(4 * (w % 16) + 2 * k + w / 16);
        UNROLL
        for (int k = 0; k < 2; k++) {
            const __m512i at = _mm512_load_si512(index[k]), low = _mm512_permutex2var_epi16(a[0], at, a[1]), high = _mm512_permutex2var_epi16(a[2], at, a[3]);
            _mm512_store_si512(to + 64 * k, _mm512_shuffle_i64x2(low, high, 0x44));
            _mm512_store_si512(to + 64 * k + 32, _mm512_shuffle_i64x2(low, high, 0xee));
        }
        return;
    }
    for (int k = 0; k < 2; k++) {
        uint16_t index[32] __attribute__((aligned(64)));
        for (int w = 0; w < 32; w++)
            index[w] = (uint16_t)(8 * (w % 8) + 4 * k + w / 8);
        const __m512i at = _mm512_load_si512(index);
        UNROLL
        for (int i = 0; i < 4; i++)
            b[i] = _mm512_permutex2var_epi16(a[2 * i], at, a[2 * i + 1]);
        UNROLL
        for (int i = 0; i < 2; i++) {
            b[4 + i] = _mm512_shuffle_i64x2(b[2 * i], b[2 * i + 1], 0x44);
            b[6 + i] = _mm512_shuffle_i64x2(b[2 * i], b[2 * i + 1], 0xee);
        }
        UNROLL
        for (int i = 0; i < 2; i++) {
            _mm512_store_si512(to + 128 * k + 64 * i, _mm512_shuffle_i64x2(b[4 + 2 * i], b[5 + 2 * i], 0x88));
            _mm512_store_si512(to + 128 * k + 64 * i + 32, _mm512_shuffle_i64x2(b[4 + 2 * i], b[5 + 2 * i], 0xdd));
        }
    }
}

/* Every token twice, in two vectors of eight, the 16 pairs in the order in which `store_two` interleaves those of two rows. */
INLINE void store_doubled(uint16_t *out, const __m512i *v) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    UNROLL
    for (int i = 0; i < 16; i++) {
        uint16_t *at = out + (i / 4 * 2 + i % 2 + i % 4 / 2 * 8) * 64;
        _mm512_store_si512(at, _mm512_permutexvar_epi32(low, v[i]));
        _mm512_store_si512(at + 32, _mm512_permutexvar_epi32(high, v[i]));
    }
}

/* x (block, pair, vector of the block, 16 tokens, 2); items are (vector, DEPTH columns). */
static int rearrange_items(void *p, int64_t first, int64_t last) {
    const struct product *q = p;
    const struct table *t = &q->job->t;
    const int64_t n = t->n, depth = depth_of(t), depths = (depth + DEPTH - 1) / DEPTH, pairs = depth / 2;
    const int per = is_grouped(t) ? per_word(t->bits) : 1;
    const struct split s = split_tokens(q->tokens);
    uint16_t row[16][DEPTH] __attribute__((aligned(64)));
    for (int64_t item = first; item < last; item++) {
        const int64_t vector = item / depths, from = item % depths * DEPTH, to = least(from + DEPTH, depth);
        int64_t block = 0;
        while (block_start(s, block + 1) <= vector)
            block++;
        const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start;
        uint16_t *out = q->x + (start * pairs + vector - start) * 32;
        for (int i = 0; i < 16; i++) {
            const int64_t token = vector * 16 + i;
            const uint16_t *x = (const uint16_t *)q->job->x + (q->first + token) * n;
            if (token >= q->tokens)
                memset(row[i], 0, sizeof row[i]);
            else if (per == 4)
                for (int64_t j = from; j < to; j += 128)
                    reorder(x + j, n - j, 4, row[i] + j - from);
            else if (per == 8)
                reorder(x + from, n - from, 8, row[i]);
            else {
                memcpy(row[i], x + from, sizeof *x * (size_t)least(DEPTH, n - from));
                memset(row[i] + least(DEPTH, n - from), 0, sizeof *x * (size_t)(DEPTH - least(DEPTH, n - from)));
            }
        }
        for (int64_t j = from; j < to; j += 32) {
            __m512i v[16];
            UNROLL
            for (int i = 0; i < 16; i++)
                v[i] = _mm512_load_si512(row[i] + j - from);
            transpose(v);
            if (q->doubled)
                store_doubled(q->x + j * 32, v);
            else
                for (int i = 0; i < 16 && j / 2 + i < pairs; i++)
                    _mm512_store_si512(out + (j / 2 + i) * lanes * 32, v[i]);
        }
    }
    return 0;
}

int bf16_rearrange(struct product *q, int threads) {
    const int64_t depths = (depth_of(&q->job->t) + DEPTH - 1) / DEPTH;
    return parallel(rearrange_items, q, (q->tokens + 15) / 16 * depths, 1, threads);
}
