/* The functions that Python calls, and which of the ways (jobs.h) each call takes. */
#include "export.h"
#include "jobs.h"
#include "lanes/numbers.h"
#include "runtime/runtime.h"

#include <stdlib.h>

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
JOB(norm)
JOB(rotate)
JOB(keep)
JOB(gate)
JOB(add)
JOB(dense)

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
    const struct linear_job job = {*t, x, y, tokens, dtype, transposed, 0};
    return linear(&job, level, threads);
}

/* Of float32 x that need not be exact: with dot products of bfloat16 by these, else by integers of 15 bits (product/packed/avx2.c). */
static int product(const struct linear_job *job, int level, int threads) {
    if (!job->near || job->dtype != FP32 || level != AVX512)
        return linear(job, level, threads);
    const int64_t inputs = job->tokens * (job->transposed ? job->t.rows : job->t.n), outputs = job->tokens * (job->transposed ? job->t.n : job->t.rows);
    uint16_t *x = scratch(2 * (size_t)(inputs + outputs)), *y = x + inputs;
    if (!x)
        return 1;
    store_row(x, 0, job->x, inputs, BF16);
    struct linear_job rounded = *job;
    rounded.x = x, rounded.y = y, rounded.dtype = BF16;
    const int failed = linear(&rounded, level, threads);
    load_row(job->y, y, 0, outputs, BF16);
    free(x);
    return failed;
}

EXPORT int finebits_program(const struct part *parts, int64_t count, int level, int threads) {
#define OF(name) finebits_##name(parts[i].job, level, threads)
    int failed = 0;
    for (int64_t i = 0; i < count && !failed; i++)
        switch (parts[i].kind) {
        case PRODUCT: failed = product(parts[i].job, level, threads); break;
        case LOW_RANK: failed = OF(grouped); break;
        case DENSE: failed = OF(dense); break;
        case NORM: failed = OF(norm); break;
        case ROTATE: failed = OF(rotate); break;
        case KEEP: failed = OF(keep); break;
        case ATTEND: failed = OF(paged); break;
        case GATE: failed = OF(gate); break;
        case ADD: failed = OF(add); break;
        default: failed = 1;
        }
    return failed;
}
