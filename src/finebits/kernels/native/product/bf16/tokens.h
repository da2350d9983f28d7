/* Tokens in the lanes (x @ W^T): how they are spread, and y from the sums of a panel, 16 x 16 numbers transposed and rounded at a time. */
#ifndef FINEBITS_BF16_TOKENS_H
#define FINEBITS_BF16_TOKENS_H

#include "lanes/transpose.h"
#include "product/bf16/groups.h"

/* Vectors of 16 tokens are spread evenly over blocks of up to LANES. */
struct split {
    int64_t vectors, blocks;
};

static struct split split_tokens(int64_t tokens) {
    const int64_t vectors = (tokens + 15) / 16;
    return (struct split){vectors, (vectors + LANES - 1) / LANES};
}

INLINE int64_t block_start(struct split s, int64_t block) { return block * s.vectors / s.blocks; }

/* Columns of A: with groups, all of the last one's. */
INLINE int64_t depth_of(const struct table *t) { return is_grouped(t) ? up(t->n, 32 * per_word(t->bits)) : up(t->n, 2); }

/* Rows of y from the sums of one panel, (row, lanes, 16 tokens) in every block. */
INLINE void store_panel(const struct product *q, const float *c, int64_t row, int64_t rows) {
    const struct split s = split_tokens(q->tokens);
    const int64_t m = q->job->t.rows;
    for (int64_t block = 0; block < s.blocks; block++) {
        const int64_t start = block_start(s, block), lanes = block_start(s, block + 1) - start;
        for (int64_t v = 0; v < lanes; v++)
            for (int64_t r = 0; r < rows; r += 16) {
                const __mmask16 mask = mask16(rows - r);
                __m512i a[16];
                for (int i = 16; i < 32 && (start + v) * 16 + i < q->tokens; i++)
                    __builtin_prefetch((uint16_t *)q->job->y + (q->first + (start + v) * 16 + i) * m + row + r, 1);
                UNROLL
                for (int i = 0; i < 16; i++)
                    a[i] = _mm512_load_si512(c + (start * PANEL + (r + i) * lanes + v) * 16);
                transpose(a);
                UNROLL
                for (int i = 0; i < 16; i++) {
                    const int64_t token = (start + v) * 16 + i;
                    if (token < q->tokens)
                        _mm256_mask_storeu_epi16((uint16_t *)q->job->y + (q->first + token) * m + row + r, mask, round_bf16(_mm512_castsi512_ps(a[i])));
                }
            }
    }
}

#endif
