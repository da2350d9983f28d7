/* A whole weight -> float32, float16 or bfloat16. Compiled once for each instruction set.
 *
 * Bound by memory: 4096 x 4096 of 4 bits in blocks of 64 to bfloat16 reads 9.4 MB and writes 33.5.
 */
#include "decode/rows_bf16.h"
#include "runtime/runtime.h"

struct dequantize_arg {
    const struct dequantize_job *job;
    struct decoder d;
};

static int dequantize_rows(void *p, int64_t first, int64_t last) {
    const struct dequantize_arg *arg = p;
    const struct dequantize_job *job = arg->job;
    for (int64_t row = first; row < last; row++)
        for (int64_t start = job->start; start < job->stop; start += CHUNK) {
            int64_t stop = least(start + CHUNK, job->stop), at = row * job->stride + start - job->start;
            if (job->dtype == FP32) {
                decode(&arg->d, row, start, stop, (float *)job->out + at);
                continue;
            }
#if ISA > 0
            if (job->dtype == BF16 && arg->d.small) {
                decode_bf16(&arg->d, row, start, stop, (uint16_t *)job->out + at);
                continue;
            }
#endif
            float value[CHUNK] __attribute__((aligned(64)));
            decode(&arg->d, row, start, stop, value);
            store_row(job->out, at, value, stop - start, job->dtype);
        }
    return 0;
}

int FOR_ISA(dequantize)(const struct dequantize_job *job, int threads) {
    struct dequantize_arg arg = {.job = job};
    prepare(&arg.d, &job->t);
    int64_t step = 1 + 65536 / (job->stop - job->start + 1);
    return parallel(dequantize_rows, &arg, job->t.rows, step, threads);
}
