/* The functions that Python calls, and which of the ways (jobs.h) each call takes. */
#include "export.h"
#include "jobs.h"

#if defined(__x86_64__)
#define BY_LEVEL(name) {name##_scalar, name##_avx2, name##_avx512}
#else
#define BY_LEVEL(name) {name##_scalar}
#endif

#define JOB(name)                                                                                      \
    EXPORT int finebits_##name(const struct name##_job *job, int level, int threads) {                 \
        static int (*const by_level[])(const struct name##_job *, int) = BY_LEVEL(name);               \
        return by_level[level](job, threads);                                                          \
    }
JOB(quantize)
JOB(dequantize)
JOB(successive)
JOB(search)
JOB(grouped)
JOB(paged)

static int linear(const struct linear_job *job, int level, int threads) {
    static int (*const plain[])(const struct linear_job *, int) = BY_LEVEL(plain);
#if defined(__x86_64__)
    const int bf16 = level == AVX512 && job->dtype == BF16; /* with dot products of them */
    if (bf16 && packed_avx512_supports(job))
        return packed_avx512_linear(job, threads);
    if (bf16 && bf16_supports(job))
        return bf16_linear(job, threads);
    if (bf16 && wide_supports(job))
        return wide_linear(job, threads);
    if (level > SCALAR && packed_avx2_supports(job))
        return packed_avx2_linear(job, threads);
    if (level > SCALAR && (job->transposed || job->tokens > FEW_TOKENS))
        return (level == AVX2 ? float32_avx2 : float32_avx512)(job, threads);
#endif
    return plain[level](job, threads);
}

/* Its arguments one by one: filling a structure from Python takes as long as a small product. */
EXPORT int finebits_product(const struct table *t, const void *x, void *y, int64_t tokens, int dtype, int transposed, int level, int threads) {
    const struct linear_job job = {*t, x, y, tokens, dtype, transposed};
    return linear(&job, level, threads);
}
