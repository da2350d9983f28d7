/* Few rows times a dense matrix, of float32 or of 16 bits, in float32. Compiled once for each instruction set.
 *
 * From memory it takes what reading takes: LINES rows of it are read at once. Float16 is widened to a piece in the first cache.
 */
#include "jobs.h"
#include "lanes/lanes.h"
#include "runtime/runtime.h"

enum { LINES = 4, PIECE = 512, FAR = 1024 /* bytes of a row between fetching and use */ };

/* acc[r] += x . w[r] over whole vectors, sum[r] over what is left of `count` columns. */
INLINE void dots(const float *x, const void *const *w, int64_t count, int dtype, vf *acc, float *sum) {
    int64_t j = 0;
    for (; j + VL <= count; j += VL) {
        const vf v = vload(x + j);
        for (int r = 0; r < LINES; r++) {
            if (dtype == BF16) {
                __builtin_prefetch((const uint16_t *)w[r] + j + FAR / 2);
                acc[r] = vfma(v, vload_bf16((const uint16_t *)w[r] + j), acc[r]);
            } else {
                acc[r] = vfma(v, vload((const float *)w[r] + j), acc[r]);
            }
        }
    }
    for (; j < count; j++)
        for (int r = 0; r < LINES; r++)
            sum[r] += x[j] * load_as(w[r], j, dtype);
}

static int some(void *p, int64_t first, int64_t last) {
    const struct dense_job *job = p;
    const int64_t n = job->n;
    const int halves = job->dtype == FP16;
    float piece[LINES][PIECE];
    for (int64_t row = first; row < last; row += LINES)
        for (int64_t token = 0; token < job->tokens; token++) {
            const float *x = job->x + token * n;
            vf acc[LINES];
            float sum[LINES];
            for (int r = 0; r < LINES; r++)
                acc[r] = vset(0.0f), sum[r] = 0.0f;
            for (int64_t start = 0, count; start < n; start += count) {
                count = halves ? least(PIECE, n - start) : n;
                const void *w[LINES];
                for (int r = 0; r < LINES; r++) {
                    const int64_t at = least(row + r, last - 1) * n + start;
                    w[r] = (const char *)job->w + at * dtype_bytes(job->dtype);
                    if (halves)
                        load_row(piece[r], job->w, at, count, FP16), w[r] = piece[r];
                }
                if (job->dtype == BF16)
                    dots(x + start, w, count, BF16, acc, sum);
                else
                    dots(x + start, w, count, FP32, acc, sum);
            }
            for (int r = 0; r < LINES && row + r < last; r++)
                job->y[token * job->m + row + r] = sum[r] + vsum(acc[r]);
        }
    return 0;
}

int FOR_ISA(dense)(const struct dense_job *job, int threads) {
    return parallel(some, (void *)job, job->m, piece_rows(job->m, 16 * LINES, threads), threads);
}
