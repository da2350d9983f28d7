/* x, the levels and the places of blocks as the AVX-512 product on packed codes takes them (avx512.h): once a call. */
#include "product/packed/avx512.h"

/* Of the factors between 1 and 2, the one that rounds 16 levels or fewer with the least error; the last answer is kept. */
static float best_factor(const float *levels, int count) {
    static _Thread_local struct {
        float levels[16], factor;
        int count;
    } kept;
    if (count > 16)
        return 1.0f;
    if (count == kept.count && memcmp(levels, kept.levels, sizeof(float) * (size_t)count) == 0)
        return kept.factor;
    float best = 1.0f, best_error = INFINITY;
    for (int step = 0; step < 128; step++) {
        float factor = 1.0f + (float)step / 128, error = 0.0f;
        for (int i = 0; i < count; i++) {
            float a = levels[i] * factor, d = (from_bf16(to_bf16(a)) - a) / factor;
            error += d * d;
        }
        if (error < best_error)
            best = factor, best_error = error;
        if (error == 0.0f)
            break;
    }
    memcpy(kept.levels, levels, sizeof(float) * (size_t)count);
    kept.count = count, kept.factor = best;
    return best;
}

/* 32 words of `per` columns each: the first column of every word, then the second ones and so on. */
INLINE void rearrange(const uint16_t *from, int per, uint16_t *to) {
    for (int k = 0; k < per; k++)
        for (int w = 0; w < 32; w++)
            to[k * 32 + w] = from[w * per + k];
}

void packed_avx512_arrange(struct fused *f) {
    const struct linear_job *job = f->job;
    const struct table *t = &job->t;
    const int per = per_word(t->bits), count = 1 << t->bits;
    const int64_t group = 32 * per, n = t->n, tokens = job->tokens;
    for (int64_t i = 0; i < tokens; i++) {
        const uint16_t *from = (const uint16_t *)job->x + i * n;
        for (int64_t g = 0; g < f->groups; g++) {
            uint16_t *to = f->x + (g * tokens + i) * group;
            if ((g + 1) * group <= n) {
                switch (per) {
                case 2: rearrange(from + g * group, 2, to); break;
                case 4: rearrange(from + g * group, 4, to); break;
                default: rearrange(from + g * group, 8, to);
                }
            } else {
                memset(to, 0, sizeof(uint16_t) * (size_t)group);
                for (int64_t j = g * group; j < n; j++)
                    to[(j % per) * 32 + (j % group) / per] = from[j];
            }
        }
        for (int64_t k = 0; t->shift && k < t->blocks; k++) {
            float sum = 0.0f;
            for (int64_t j = k * t->block; j < least((k + 1) * t->block, n); j++)
                sum += from_bf16(from[j]);
            f->x_sum[i * t->blocks + k] = sum;
        }
    }
    for (int64_t g = 0; g < f->groups; g++) {
        f->base[g] = (int32_t)(g * group / t->block);
        for (int l = 0; l < 16; l++)
            f->lane[16 * g + l] = (int32_t)(least((g * group + l * 2 * per) / t->block, t->blocks - 1) - f->base[g]);
    }
    float factor = best_factor(t->levels, count);
    f->undo = 1.0f / factor;
    for (int i = 0; i < 32; i++)
        f->levels[i] = to_bf16(t->levels[i % count] * factor);
    for (int i = 0; count == 256 && i < 256; i++)
        f->halves[0][i] = to_bf16(t->levels[i]) & 255, f->halves[1][i] = (uint8_t)(to_bf16(t->levels[i]) >> 8);
}
