/* Columns rounded one after the other, each one's loss fed to those after it. Compiled once for each instruction set.
 *
 * Sixteen rows of the weight go together, one a lane; a lane does what the torch body does, operation for operation. w (columns, 16) is a copy,
 * 64 bytes a column, which stays in the second cache up to a few thousand columns; a weight costs a multiplication and a subtraction for
 * every later column. */
#include "lanes/lanes.h"
#include "runtime/runtime.h"

#include <stdlib.h>

enum { LANES = 16 };

struct grid {
    int uniform, count; /* levels, lowest first */
    float first, top, level[256], mid[256];
    uint8_t order[256];
};

static void prepare(struct grid *g, const struct successive_job *job) {
    g->uniform = job->r.uniform;
    g->count = job->r.uniform ? 1 << job->r.bits : job->r.n_order;
    g->first = job->r.first;
    g->top = (float)(g->count - 1);
    memcpy(g->order, job->r.order, (size_t)g->count);
    for (int i = 0; i < g->count; i++)
        g->level[i] = job->levels[g->order[i]];
    if (!g->uniform)
        memcpy(g->mid, job->r.mids, sizeof(float) * (size_t)(g->count - 1));
}

/* rank and level at scale 1 of sixteen values */
INLINE void nearest(const struct grid *g, const float *u, float *rank, float *level) {
    if (g->uniform) {
        for (int l = 0; l < LANES; l++) {
            float r = rintf(u[l]) - g->first;
            r = r > 0 ? r : 0;
            rank[l] = r < g->top ? r : g->top;
        }
        for (int l = 0; l < LANES; l++)
            level[l] = g->level[(int)rank[l]];
        return;
    }
    for (int l = 0; l < LANES; l++)
        rank[l] = 0, level[l] = g->level[0];
    for (int i = 0; i + 1 < g->count; i++) {
        const float mid = g->mid[i], next = g->level[i + 1];
        for (int l = 0; l < LANES; l++) {
            int above = u[l] > mid;
            rank[l] += above ? 1.0f : 0.0f;
            level[l] = above ? next : level[l];
        }
    }
}

struct work {
    const struct successive_job *job;
    struct grid grid;
};

/* Groups [first, last) of sixteen rows; the last group of all may be short. */
static int groups(void *arg, int64_t first, int64_t last) {
    const struct work *work = arg;
    const struct successive_job *job = work->job;
    const int64_t c = job->columns, m = job->rows;
    float(*w)[LANES] = scratch(sizeof *w * (size_t)c);
    if (!w)
        return 1;
    for (int64_t group = first; group < last; group++) {
        const int64_t at = group * LANES;
        const int count = (int)least(LANES, m - at);
        for (int64_t k = 0; k < c; k++) {
            memset(w[k], 0, sizeof w[k]);
            memcpy(w[k], job->w + k * m + at, sizeof(float) * (size_t)count);
        }
        float scale[LANES] = {0}, inverse[LANES], shift[LANES] = {0};
        int64_t entered = -1;
        for (int64_t k = 0; k < c; k++) {
            if (job->block[k] != entered) {
                entered = job->block[k];
                memcpy(scale, job->scale + entered * m + at, sizeof(float) * (size_t)count);
                if (job->shift)
                    memcpy(shift, job->shift + entered * m + at, sizeof(float) * (size_t)count);
                for (int l = 0; l < LANES; l++)
                    inverse[l] = scale[l] >= 0x1p-126f ? 1.0f / scale[l] : 0.0f;
            }
            float u[LANES], rank[LANES], level[LANES], error[LANES];
            if (job->shift)
                for (int l = 0; l < LANES; l++)
                    u[l] = (w[k][l] - shift[l]) * inverse[l];
            else
                for (int l = 0; l < LANES; l++)
                    u[l] = w[k][l] * inverse[l];
            nearest(&work->grid, u, rank, level);
            const float pivot = job->u[k * c + k];
            if (job->shift)
                for (int l = 0; l < LANES; l++)
                    error[l] = (w[k][l] - (level[l] * scale[l] + shift[l])) / pivot;
            else
                for (int l = 0; l < LANES; l++)
                    error[l] = (w[k][l] - level[l] * scale[l]) / pivot;
            uint8_t *codes = job->codes + k * m + at;
            for (int l = 0; l < count; l++)
                codes[l] = work->grid.order[(int)rank[l]];
            memcpy(job->error + k * m + at, error, sizeof(float) * (size_t)count);
            for (int64_t j = k + 1; j < c; j++) {
                const float factor = job->u[k * c + j];
                for (int l = 0; l < LANES; l++)
                    w[j][l] -= factor * error[l];
            }
        }
    }
    free(w);
    return 0;
}

int FOR_ISA(successive)(const struct successive_job *job, int threads) {
    struct work work = {.job = job};
    prepare(&work.grid, job);
    const int64_t count = (job->rows + LANES - 1) / LANES;
    return parallel(groups, &work, count, piece_rows(count, 1, threads), threads);
}
