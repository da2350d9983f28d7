/* Rows of different adapters: y += s (x A^T) B^T of each row's own, whose factors lie in pieces of a pool. Compiled once for each instruction set.
 *
 * A row at a time, four vectors of A or of B^T at once: few rows share an adapter (torch multiplies larger groups), so that every factor is read
 * about once, and what counts is that nothing else is.
 */
#include "jobs.h"
#include "lanes/lanes.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum { LINES = 4 };

/* h[i] = x . A[i] of `rows` vectors that lie together. */
static void dots(const float *x, const float *A, int64_t n, int64_t rows, float *h) {
    for (int64_t i = 0; i < rows; i += LINES) {
        const float *a[LINES];
        for (int k = 0; k < LINES; k++)
            a[k] = A + least(i + k, rows - 1) * n;
        vf acc[LINES];
        for (int k = 0; k < LINES; k++)
            acc[k] = vset(0.0f);
        int64_t j = 0;
        for (; j + VL <= n; j += VL) {
            vf v = vload(x + j);
            for (int k = 0; k < LINES; k++)
                acc[k] = vfma(v, vload(a[k] + j), acc[k]);
        }
        for (int k = 0; k < LINES && i + k < rows; k++) {
            float sum = vsum(acc[k]);
            for (int64_t t = j; t < n; t++)
                sum += x[t] * a[k][t];
            h[i + k] = sum;
        }
    }
}

/* y += sum of h[i] B[i]. */
static void sums(const float *h, const float *B, int64_t m, int64_t rows, float *y) {
    for (int64_t i = 0; i < rows; i += LINES) {
        const float *b[LINES];
        float c[LINES];
        for (int k = 0; k < LINES; k++) {
            b[k] = B + least(i + k, rows - 1) * m;
            c[k] = i + k < rows ? h[i + k] : 0.0f;
        }
        int64_t j = 0;
        for (; j + VL <= m; j += VL) {
            vf v = vload(y + j);
            for (int k = 0; k < LINES; k++)
                v = vfma(vset(c[k]), vload(b[k] + j), v);
            vstore(y + j, v);
        }
        for (; j < m; j++)
            for (int k = 0; k < LINES; k++)
                y[j] += c[k] * b[k][j];
    }
}

static int some(void *p, int64_t first, int64_t last) {
    const struct grouped_job *job = p;
    float *h = scratch(sizeof(float) * (size_t)job->rank);
    if (!h)
        return 1;
    for (int64_t g = 0; g < job->groups; g++) {
        const struct rows_of *group = job->group + g;
        const struct laid *laid = group->laid;
        for (int64_t row = first > group->start ? first : group->start; row < least(last, group->stop); row++) {
            float *to = h;
            const struct piece *piece = laid->pieces;
            for (int64_t i = 0; i < laid->a; i++, piece++) {
                dots(job->x + row * job->n, piece->at, job->n, piece->rows, to);
                to += piece->rows;
            }
            for (float *c = h; c < to; c++)
                *c *= (float)laid->scale;
            to = h;
            for (int64_t i = 0; i < laid->b; i++, piece++) {
                sums(to, piece->at, job->m, piece->rows, job->y + row * job->m);
                to += piece->rows;
            }
        }
    }
    free(h);
    return 0;
}

int FOR_ISA(grouped)(const struct grouped_job *job, int threads) { return parallel(some, (void *)job, job->rows, 1, threads); }
