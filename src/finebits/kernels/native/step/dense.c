/* Few rows times a dense matrix, of float32 or of 16 bits, in float32. Compiled once for each instruction set.
 *
 * From memory it takes what reading takes: LINES rows of it are read at once, those of 16 bits a piece that lies in the first cache at a time.
 */
#include "jobs.h"
#include "lanes/lanes.h"
#include "runtime/runtime.h"

enum { LINES = 4, PIECE = 512 };

static int some(void *p, int64_t first, int64_t last) {
    const struct dense_job *job = p;
    const int64_t n = job->n;
    float piece[LINES][PIECE];
    for (int64_t row = first; row < last; row += LINES)
        for (int64_t token = 0; token < job->tokens; token++) {
            const float *x = job->x + token * n;
            vf acc[LINES];
            float sum[LINES];
            for (int r = 0; r < LINES; r++)
                acc[r] = vset(0.0f), sum[r] = 0.0f;
            for (int64_t start = 0; start < n; start += PIECE) {
                const int64_t count = least(PIECE, n - start);
                const float *w[LINES];
                for (int r = 0; r < LINES; r++) {
                    const int64_t at = least(row + r, last - 1) * n + start;
                    w[r] = job->dtype == FP32 ? (const float *)job->w + at : piece[r];
                    if (job->dtype != FP32)
                        load_row(piece[r], job->w, at, count, job->dtype);
                }
                int64_t j = 0;
                for (; j + VL <= count; j += VL) {
                    const vf v = vload(x + start + j);
                    for (int r = 0; r < LINES; r++)
                        acc[r] = vfma(v, vload(w[r] + j), acc[r]);
                }
                for (; j < count; j++)
                    for (int r = 0; r < LINES; r++)
                        sum[r] += x[start + j] * w[r][j];
            }
            for (int r = 0; r < LINES && row + r < last; r++)
                job->y[token * job->m + row + r] = sum[r] + vsum(acc[r]);
        }
    return 0;
}

int FOR_ISA(dense)(const struct dense_job *job, int threads) {
    return parallel(some, (void *)job, job->m, piece_rows(job->m, 16 * LINES, threads), threads);
}
