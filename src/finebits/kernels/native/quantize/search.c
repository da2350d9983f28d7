/* The scale of every block, searched for. Compiled once for each instruction set.
 *
 * VL rows of the weight go together, one a lane, and all sums run over the columns in order: the results are the same whatever VL is. A block's
 * columns are copied, 4 VL bytes each, and read from the first cache once a candidate. A weight takes eleven operations a candidate, 14 with a
 * shift, and its lookup: three where levels are uniform, two a midpoint where they are at most LINEAR, else a bisection by gathers.
 */
#include "lanes/lanes.h"
#include "runtime/runtime.h"

#include <stdlib.h>

#if ISA == 2
#define vpick(u, mid, above, below) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(u, mid, _CMP_GT_OQ), below, above)
#define vlook(table, at) _mm512_i32gather_ps(_mm512_cvttps_epi32(at), table, 4)
#elif ISA == 1
#define vpick(u, mid, above, below) _mm256_blendv_ps(below, above, _mm256_cmp_ps(u, mid, _CMP_GT_OQ))
#define vlook(table, at) _mm256_i32gather_ps(table, _mm256_cvttps_epi32(at), 4)
#else
#define vpick(u, mid, above, below) ((u) > (mid) ? (above) : (below))
#define vlook(table, at) ((table)[(int)(at)])
#endif

enum { TILE = 4, RUN = 64, LINEAR = 32 }; /* columns at once, of a partial sum; levels up to which all midpoints are compared */

struct grid {
    int uniform, count, half; /* levels, lowest first; the first step of a bisection */
    float level[256], mid[256]; /* filled up with infinity, which no number exceeds */
};

static void prepare(struct grid *g, const struct search_job *job) {
    g->uniform = job->r.uniform;
    g->count = job->r.uniform ? 1 << job->r.bits : job->r.n_order;
    for (int i = 0; i < 256; i++) {
        g->level[i] = i < g->count ? job->levels[job->r.order[i]] : INFINITY;
        g->mid[i] = i < job->r.n_mids ? job->r.mids[i] : INFINITY;
    }
    for (g->half = 1; g->half * 2 < g->count;)
        g->half *= 2;
}

/* The levels at scale 1 nearest to TILE vectors. */
INLINE void nearest(const struct grid *g, const vf *u, vf *level) {
    if (g->uniform) {
        const vf low = vset(g->level[0]), high = vset(g->level[g->count - 1]);
        for (int t = 0; t < TILE; t++)
            level[t] = vmin(vmax(vround(u[t]), low), high);
    } else if (VL > 1 && g->count <= LINEAR) {
        for (int t = 0; t < TILE; t++)
            level[t] = vset(g->level[0]);
        for (int i = 0; i + 1 < g->count; i++) {
            const vf mid = vset(g->mid[i]), next = vset(g->level[i + 1]);
            for (int t = 0; t < TILE; t++)
                level[t] = vpick(u[t], mid, next, level[t]);
        }
    } else {
        for (int t = 0; t < TILE; t++) {
            vf rank = vset(0.0f);
            for (int step = g->half; step; step /= 2) {
                vf next = vadd(rank, vset((float)step));
                rank = vpick(u[t], vlook(g->mid, vsub(next, vset(1.0f))), next, rank);
            }
            level[t] = vlook(g->level, rank);
        }
    }
}

/* Sums over the columns of a block, by lane; l is the level of a weight. */
enum { LOSS, LL, LW, L, SUMS };
struct sums {
    float of[SUMS][VL];
};

struct scales {
    float scale[VL], shift[VL];
};

struct work {
    const struct search_job *job;
    struct grid grid;
};

/* To three bits of mantissa, or to multiples of 2^-9 below 2^-6; at most 448. Ties go to even. */
INLINE float e4m3(float a) {
    uint32_t u;
    if (a < 0x1p-6f)
        return rintf(a * 0x1p9f) * 0x1p-9f;
    memcpy(&u, &a, sizeof u);
    u = (u + 0x7ffff + (u >> 20 & 1)) & ~0xfffffu;
    memcpy(&a, &u, sizeof a);
    return a < 448.0f ? a : 448.0f;
}

INLINE float stored(float a, int store) {
    return store == FP32 ? a : store == BF16 ? from_bf16(to_bf16(a)) : store == FP16 ? from_fp16(to_fp16(a)) : e4m3(a);
}

/* What decoding will use. */
INLINE void hold(const struct search_job *job, const struct scales *candidate, struct scales *held) {
    for (int l = 0; l < VL; l++) {
        float s = stored(candidate->scale[l], job->r.store), z = 0.0f;
        if (job->zero) {
            const float top = (float)((1 << job->r.bits) - 1);
            float zero = s > 0 ? rintf(-candidate->shift[l] / s) : 0.0f;
            z = -s * (zero > 0 ? zero < top ? zero : top : 0.0f);
        } else if (job->shift) {
            z = stored(candidate->shift[l], job->r.store);
        }
        held->scale[l] = s, held->shift[l] = z;
    }
}

/* Codes to nearest under held scales: w holds `count` columns, filled up to a multiple of TILE by some that weigh nothing in d. */
INLINE void code(const struct grid *g, int shifted, const float (*w)[VL], const float *d, int64_t count, const struct scales *held,
                 struct sums *sums) {
    float inverse[VL];
    for (int l = 0; l < VL; l++)
        inverse[l] = held->scale[l] >= 0x1p-126f ? 1.0f / held->scale[l] : 0.0f;
    const vf scale = vload(held->scale), shift = vload(held->shift), by = vload(inverse);
    vf total[SUMS];
    for (int i = 0; i < SUMS; i++)
        total[i] = vset(0.0f);
    for (int64_t run = 0; run < count; run += RUN) {
        const int64_t stop = least(run + RUN, count);
        vf part[SUMS];
        for (int i = 0; i < SUMS; i++)
            part[i] = vset(0.0f);
        for (int64_t k = run; k < stop; k += TILE) {
            vf x[TILE], u[TILE], level[TILE];
            for (int t = 0; t < TILE; t++) {
                x[t] = vload(w[k + t]);
                u[t] = vmul(shifted ? vsub(x[t], shift) : x[t], by);
            }
            nearest(g, u, level);
            for (int t = 0; t < TILE; t++) {
                const vf weight = vset(d[k + t]), made = vmul(level[t], scale);
                const vf lost = vsub(shifted ? vadd(made, shift) : made, x[t]), dl = vmul(weight, level[t]);
                part[LOSS] = vadd(part[LOSS], vmul(vmul(lost, lost), weight));
                part[LL] = vadd(part[LL], vmul(dl, level[t]));
                part[LW] = vadd(part[LW], vmul(dl, x[t]));
                if (shifted)
                    part[L] = vadd(part[L], dl);
            }
        }
        for (int i = 0; i < SUMS; i++)
            total[i] = vadd(total[i], part[i]);
    }
    for (int i = 0; i < SUMS; i++)
        vstore(sums->of[i], total[i]);
}

/* Takes a candidate where it loses less than the best that was met; whether a lane took it. */
INLINE int meet(const struct work *work, const float (*w)[VL], const float *d, int64_t count, const struct scales *candidate,
                struct scales *chosen, struct sums *best) {
    struct scales held;
    struct sums sums;
    hold(work->job, candidate, &held);
    if (work->job->shift)
        code(&work->grid, 1, w, d, count, &held, &sums);
    else
        code(&work->grid, 0, w, d, count, &held, &sums);
    int taken = 0;
    for (int l = 0; l < VL; l++) {
        if (!(sums.of[LOSS][l] < best->of[LOSS][l]))
            continue;
        taken = 1;
        for (int i = 0; i < SUMS; i++)
            best->of[i][l] = sums.of[i][l];
        chosen->scale[l] = candidate->scale[l], chosen->shift[l] = candidate->shift[l];
    }
    return taken;
}

/* One block of VL rows: `ideal` becomes the best scales that were met. */
static void block(const struct work *work, const float (*w)[VL], const float *d, int64_t count, struct scales *ideal) {
    const struct search_job *job = work->job;
    struct scales chosen = *ideal, candidate;
    struct sums best = {0};
    for (int l = 0; l < VL; l++)
        best.of[LOSS][l] = INFINITY;
    for (int i = 0; i < job->n_factors; i++) {
        for (int l = 0; l < VL; l++) {
            candidate.scale[l] = job->factors[i] * ideal->scale[l];
            candidate.shift[l] = ideal->shift[l] + job->rests[i] * ideal->scale[l] * job->middle;
        }
        meet(work, w, d, count, &candidate, &chosen, &best);
    }
    float one = 0.0f, W[VL] = {0};
    if (job->shift)
        for (int64_t run = 0; run < count; run += RUN) {
            float part = 0.0f, parts[VL] = {0};
            for (int64_t k = run; k < least(run + RUN, count); k++) {
                part += d[k];
                for (int l = 0; l < VL; l++)
                    parts[l] += d[k] * w[k][l];
            }
            one += part;
            for (int l = 0; l < VL; l++)
                W[l] += parts[l];
        }
    for (int i = 0; i < job->refits; i++) {
        for (int l = 0; l < VL; l++) {
            float s, z = 0.0f;
            if (job->shift) {
                s = (one * best.of[LW][l] - best.of[L][l] * W[l]) / (one * best.of[LL][l] - best.of[L][l] * best.of[L][l]);
                z = (W[l] - s * best.of[L][l]) / one;
            } else {
                s = best.of[LW][l] / best.of[LL][l];
            }
            const int good = s > 0 && s < INFINITY;
            candidate.scale[l] = good ? s : chosen.scale[l];
            candidate.shift[l] = good ? z : chosen.shift[l];
        }
        if (!meet(work, w, d, count, &candidate, &chosen, &best))
            break; /* the next refit would be this one again */
    }
    *ideal = chosen;
}

/* Groups [first, last) of VL rows; the last group of all may be short. */
static int groups(void *arg, int64_t first, int64_t last) {
    const struct work *work = arg;
    const struct search_job *job = work->job;
    const int64_t m = job->rows, width = (job->r.block ? least(job->r.block, job->columns) : job->columns) + TILE;
    float(*w)[VL] = scratch(sizeof *w * (size_t)width), *d = scratch(sizeof *d * (size_t)width);
    if (!w || !d) {
        free(w), free(d);
        return 1;
    }
    for (int64_t start = 0, b = 0; start < job->columns; start += width - TILE, b++) {
        const int64_t count = least(width - TILE, job->columns - start);
        memset(d + count, 0, sizeof *d * TILE);
        memcpy(d, job->d + start, sizeof *d * (size_t)count);
        for (int64_t group = first; group < last; group++) {
            const int64_t at = group * VL, rows = least(VL, m - at);
            for (int64_t k = 0; k < count; k++) {
                if (rows < VL)
                    memset(w[k], 0, sizeof *w);
                memcpy(w[k], job->w + (start + k) * m + at, sizeof(float) * (size_t)rows);
            }
            for (int t = 0; t < TILE; t++) /* what is lost there is finite where it is here */
                memcpy(w[count + t], w[count - 1], sizeof *w);
            struct scales scales = {0};
            float *scale = job->scale + b * m + at, *shift = job->shift ? job->shift + b * m + at : NULL;
            memcpy(scales.scale, scale, sizeof(float) * (size_t)rows);
            if (shift)
                memcpy(scales.shift, shift, sizeof(float) * (size_t)rows);
            block(work, (const float(*)[VL])w, d, count, &scales);
            memcpy(scale, scales.scale, sizeof(float) * (size_t)rows);
            if (shift)
                memcpy(shift, scales.shift, sizeof(float) * (size_t)rows);
        }
    }
    free(w), free(d);
    return 0;
}

int FOR_ISA(search)(const struct search_job *job, int threads) {
    struct work work = {.job = job};
    prepare(&work.grid, job);
    const int64_t count = (job->rows + VL - 1) / VL;
    return parallel(groups, &work, count, piece_rows(count, 1, threads), threads);
}
