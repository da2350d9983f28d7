/* RMSNorm of rows, and what is added to them. Compiled once for each instruction set. */
#include "jobs.h"
#include "lanes/lanes.h"

int FOR_ISA(norm)(const struct norm_job *job, int threads) {
    (void)threads; /* shorter than waking one */
    const int64_t n = job->n;
    for (int64_t row = 0; row < job->rows; row++) {
        const float *x = job->x + row * n;
        float *y = job->y + row * n;
        vf squares = vset(0.0f);
        int64_t j = 0;
        for (; j + VL <= n; j += VL) {
            const vf v = vload(x + j);
            squares = vfma(v, v, squares);
        }
        float sum = vsum(squares);
        for (int64_t t = j; t < n; t++)
            sum += x[t] * x[t];
        const float by = 1.0f / sqrtf(sum / (float)n + job->eps);
        for (j = 0; j + VL <= n; j += VL)
            vstore(y + j, vmul(vload(job->weight + j), vmul(vload(x + j), vset(by))));
        for (; j < n; j++)
            y[j] = job->weight[j] * (x[j] * by);
    }
    return 0;
}

int FOR_ISA(add)(const struct add_job *job, int threads) {
    (void)threads;
    for (int64_t row = 0; row < job->rows; row++) {
        const float *x = job->x + row * job->pitch;
        float *y = job->y + row * job->n;
        for (int64_t j = 0; j < job->n; j++)
            y[j] += x[j];
    }
    return 0;
}
