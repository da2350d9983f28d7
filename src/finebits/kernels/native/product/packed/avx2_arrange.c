/* x and the levels as the AVX2 product on packed codes takes them (avx2.h): once a call, so their cost is that of reading x a few times. */
#include "product/packed/avx2.h"

enum { TOP = (1 << 14) - 1 }; /* the largest integer of x */

/* The column of a group that lies in place i of x. */
INLINE int column_at(int bits, int narrow, int i) {
    const int per = group_columns(bits) / 32, step = narrow ? 16 : 8, k = i / 32, vector = i % 32 / step, half = i % step / (step / 2);
    const int within = vector * (step / 2) + i % (step / 2);
    return bits == 8 ? 32 * half + 16 * k + within : (16 * half + within) * per + k;
}

/* Numbers as integers of 15 bits with sign times most / TOP, `most` the largest size; zero if there are infinities or NaN. */
INLINE int to_integers(const float *x, int count, int16_t *out, float *most) {
    const __m256i size = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    int32_t tops[8], largest = 0;
    for (int i = 0; i < count; i += 8) /* sizes compare as the integers that have their bits, and NaN is above infinity */
        top = _mm256_max_epi32(top, _mm256_and_si256(size, _mm256_loadu_si256((const __m256i *)(x + i))));
    _mm256_storeu_si256((__m256i *)tops, top);
    for (int i = 0; i < 8; i++)
        largest = tops[i] > largest ? tops[i] : largest;
    *most = float_of((uint32_t)largest);
    const __m256 inverse = _mm256_set1_ps(*most > 0x1p-100f ? TOP / *most : 0.0f);
    for (int i = 0; i < count; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }
    return largest < 0x7f800000;
}

/* x (groups, tokens, columns) in the order of a group; nonzero if there are infinities or NaN, which integers do not hold. */
int packed_avx2_arrange(const struct few *f, float *row) {
    const struct linear_job *job = f->job;
    const int bits = job->t.bits, columns = group_columns(bits);
    int16_t from[128];
    float *wide = f->x;
    int16_t *thin = f->x;
    for (int i = 0; i < columns; i++)
        from[i] = (int16_t)column_at(bits, f->narrow, i);
    for (int64_t token = 0; token < job->tokens; token++) {
        load_row(row, job->x, token * job->t.n, job->t.n, job->dtype);
        for (int64_t g = 0; g < f->groups; g++) {
            const float *x = row + g * columns;
            const int64_t at = g * job->tokens + token;
            if (!f->narrow) {
                for (int i = 0; i < columns; i++)
                    wide[at * columns + i] = x[from[i]];
                continue;
            }
            int16_t whole[128];
            const int unit = columns / f->halves;
            for (int u = 0; u < f->halves; u++) {
                float *by = f->by + token * f->units + g * f->halves + u;
                if (!to_integers(x + u * unit, unit, whole + u * unit, by))
                    return 1;
                *by = *by / TOP;
            }
            for (int i = 0; i < columns; i++)
                thin[at * columns + i] = whole[from[i]];
        }
        for (int64_t k = 0; job->t.shift && k < job->t.blocks; k++) {
            float sum = 0.0f;
            for (int64_t j = k * job->t.block; j < least((k + 1) * job->t.block, job->t.n); j++)
                sum += row[j];
            f->x_sum[token * job->t.blocks + k] = sum;
        }
    }
    return 0;
}

/* Tables of levels, or of integers next to them times a power of two, which holds the levels of whole numbers exactly; gives its inverse. */
float packed_avx2_levels(struct few *f) {
    const struct table *t = &f->job->t;
    f->first = t->levels[0];
    f->last = t->bits == 8 ? evenly(t->levels, 256) : 0;
    if (t->bits == 8)
        return 1.0f; /* whole numbers already */
    const float top = t->bits == 4 ? 1 << 14 : 1 << 13; /* a lane adds eight products of a group, or sixteen, which 31 bits hold */
    float most = 0.0f, factor = top;
    for (int i = 0; i < 1 << t->bits; i++)
        most = fabsf(t->levels[i]) > most ? fabsf(t->levels[i]) : most;
    while (most * factor > top)
        factor /= 2;
    while (most > 0x1p-60f && most * factor * 2 <= top)
        factor *= 2;
    for (int i = 0; i < 16; i++)
        for (int which = 0; which < 2; which++) {
            const float level = t->levels[(t->bits == 2 && which ? i / 4 : i) % (1 << t->bits)];
            const uint32_t value = f->narrow ? (uint32_t)(int32_t)rintf(level * factor) : bits_of(level);
            for (int b = 0; b < 4; b++)
                f->plane[which][b][i] = (uint8_t)(value >> (8 * b));
        }
    return f->narrow ? 1 / factor : 1.0f;
}
