/* Products in float32 for any layout, x @ W^T and x @ W. Compiled once for each instruction set; the others (jobs.h) are faster where they work.
 *
 * CHUNK columns of ROWS rows are decoded into the first cache (decode/rows.h), for every call anew. x @ W^T: a tile of up to TOKENS x ROWS sums, one
 * multiply-add for VL columns of a token and row, added up across lanes at the end. x @ W: VL columns in the lanes, four rows at a time.
 */
#include "decode/rows.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum { ROWS = 4, TOKENS = 4 };

struct linear_arg {
    const struct linear_job *job;
    struct decoder d;
    float *x;      /* (tokens, width), rows filled up with zeros */
    int64_t width;
};

/* sum[t][r] += x[t] . W[r] */
INLINE void dot_tile(const float *x, int64_t width, const float *W, int64_t count, int tokens, float *sum) {
    vf acc[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++)
            acc[t][r] = vset(0.0f);
    for (int64_t j = 0; j < count; j += VL) {
        vf w[ROWS];
        for (int r = 0; r < ROWS; r++)
            w[r] = vload(W + r * (CHUNK + PAD) + j);
        for (int t = 0; t < tokens; t++) {
            vf v = vload(x + t * width + j);
            for (int r = 0; r < ROWS; r++)
                acc[t][r] = vfma(v, w[r], acc[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++)
            sum[t * ROWS + r] += vsum(acc[t][r]);
}

static int forward_rows(void *p, int64_t first, int64_t last) {
    const struct linear_arg *arg = p;
    const struct linear_job *job = arg->job;
    const struct table *t = &job->t;
    float *sum = scratch(sizeof(float) * (size_t)(job->tokens * ROWS));
    float W[ROWS * (CHUNK + PAD)] __attribute__((aligned(64)));
    if (!sum)
        return 1;
    memset(W, 0, sizeof W);
    for (int64_t row = first; row < last; row += ROWS) {
        int64_t rows = least(ROWS, last - row);
        memset(sum, 0, sizeof(float) * (size_t)(job->tokens * ROWS));
        for (int64_t start = 0; start < t->n; start += CHUNK) {
            int64_t stop = least(start + CHUNK, t->n), count = stop - start;
            for (int64_t r = 0; r < rows; r++) {
                decode(&arg->d, row + r, start, stop, W + r * (CHUNK + PAD));
                memset(W + r * (CHUNK + PAD) + count, 0, sizeof(float) * PAD);
            }
            int64_t i = 0;
            for (; i + TOKENS <= job->tokens; i += TOKENS)
                dot_tile(arg->x + i * arg->width + start, arg->width, W, count, TOKENS, sum + i * ROWS);
            for (; i < job->tokens; i++)
                dot_tile(arg->x + i * arg->width + start, arg->width, W, count, 1, sum + i * ROWS);
        }
        for (int64_t i = 0; i < job->tokens; i++)
            for (int64_t r = 0; r < rows; r++)
                store_as(job->y, i * t->rows + row + r, sum[i * ROWS + r], job->dtype);
    }
    free(sum);
    return 0;
}

static int transposed_columns(void *p, int64_t first, int64_t last) {
    const struct linear_arg *arg = p;
    const struct linear_job *job = arg->job;
    const struct table *t = &job->t;
    int64_t start = first * 8, stop = least(last * 8, t->n), width = (stop - start + PAD - 1) / PAD * PAD;
    float *sum = scratch(sizeof(float) * (size_t)(job->tokens * width));
    float W[ROWS * (CHUNK + PAD)] __attribute__((aligned(64)));
    if (!sum)
        return 1;
    memset(W, 0, sizeof W);
    memset(sum, 0, sizeof(float) * (size_t)(job->tokens * width));
    for (int64_t row = 0; row < t->rows; row += ROWS) {
        int64_t rows = least(ROWS, t->rows - row);
        for (int64_t r = 0; r < rows; r++)
            decode(&arg->d, row + r, start, stop, W + r * (CHUNK + PAD));
        for (int64_t i = 0; i < job->tokens; i++) {
            const float *x = arg->x + i * arg->width + row;
            float *y = sum + i * width;
            const vf x0 = vset(x[0]), x1 = vset(x[1]), x2 = vset(x[2]), x3 = vset(x[3]);
            if (rows == ROWS)
                for (int64_t j = 0; j < width; j += VL) {
                    vf a = vfma(x0, vload(W + j), vload(y + j));
                    a = vfma(x1, vload(W + (CHUNK + PAD) + j), a);
                    a = vfma(x2, vload(W + 2 * (CHUNK + PAD) + j), a);
                    vstore(y + j, vfma(x3, vload(W + 3 * (CHUNK + PAD) + j), a));
                }
            else
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t j = 0; j < width; j += VL)
                        vstore(y + j, vfma(vset(x[r]), vload(W + r * (CHUNK + PAD) + j), vload(y + j)));
        }
    }
    for (int64_t i = 0; i < job->tokens; i++)
        store_row(job->y, i * t->n + start, sum + i * width, stop - start, job->dtype);
    free(sum);
    return 0;
}

int FOR_ISA(plain)(const struct linear_job *job, int threads) {
    struct linear_arg arg = {.job = job};
    const struct table *t = &job->t;
    int64_t inputs = job->transposed ? t->rows : t->n;
    arg.width = (inputs + PAD - 1) / PAD * PAD;
    arg.x = scratch(sizeof(float) * (size_t)(job->tokens * arg.width));
    if (!arg.x)
        return 1;
    for (int64_t i = 0; i < job->tokens; i++) {
        load_row(arg.x + i * arg.width, job->x, i * inputs, inputs, job->dtype);
        memset(arg.x + i * arg.width + inputs, 0, sizeof(float) * (size_t)(arg.width - inputs));
    }
    prepare(&arg.d, t);
    int failed;
    if (job->transposed) {
        int64_t eighths = (t->n + 7) / 8, step = eighths / (2 * threads) / 8 * 8 + 8;
        failed = parallel(transposed_columns, &arg, eighths, least(step, CHUNK / 8), threads);
    } else {
        failed = parallel(forward_rows, &arg, t->rows, 4 * ROWS, threads);
    }
    free(arg.x);
    return failed;
}
