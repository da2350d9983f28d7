/* One query of each request over its keys and values, which lie in pages of a pool. Compiled once for each instruction set.
 *
 * An item is a request and one of its heads of keys, with all queries of that head: a page is read once from memory, where it lies. Sums run in
 * an order that does not depend on what other requests there are.
 */
#include "jobs.h"
#include "lanes/exponential.h"
#include "runtime/runtime.h"

#include <math.h>
#include <stdlib.h>

enum { LINES = 4, WIDE = 8 };

/* s[i] = by (q . k[i]), of `count` keys that lie `pitch` apart. */
static void scores(const float *q, const float *k, int64_t pitch, int64_t width, int64_t count, float by, float *s) {
    for (int64_t i = 0; i < count; i += LINES) {
        const float *line[LINES];
        vf acc[LINES];
        for (int r = 0; r < LINES; r++)
            line[r] = k + least(i + r, count - 1) * pitch, acc[r] = vset(0.0f);
        int64_t j = 0;
        for (; j + VL <= width; j += VL) {
            vf v = vload(q + j);
            for (int r = 0; r < LINES; r++)
                acc[r] = vfma(v, vload(line[r] + j), acc[r]);
        }
        for (int r = 0; r < LINES && i + r < count; r++) {
            float sum = vsum(acc[r]);
            for (int64_t t = j; t < width; t++)
                sum += q[t] * line[r][t];
            s[i + r] = by * sum;
        }
    }
}

/* out += sum of p[i] v[i]. */
static void sums(const float *p, const float *v, int64_t pitch, int64_t width, int64_t count, float *out) {
    int64_t j = 0;
    for (; j + WIDE * VL <= width; j += WIDE * VL) {
        vf acc[WIDE];
        for (int w = 0; w < WIDE; w++)
            acc[w] = vload(out + j + w * VL);
        for (int64_t i = 0; i < count; i++)
            for (int w = 0; w < WIDE; w++)
                acc[w] = vfma(vset(p[i]), vload(v + i * pitch + j + w * VL), acc[w]);
        for (int w = 0; w < WIDE; w++)
            vstore(out + j + w * VL, acc[w]);
    }
    for (int64_t i = 0; i < count && j < width; i++)
        for (int64_t t = j; t < width; t++)
            out[t] += p[i] * v[i * pitch + t];
}

/* w = e^(w - largest); gives their sum. */
static float exponentials(float *w, int64_t count, float largest) {
    vf total = vset(0.0f);
    int64_t i = 0;
    for (; i + VL <= count; i += VL) {
        const vf e = vexp(vsub(vload(w + i), vset(largest)));
        vstore(w + i, e);
        total = vadd(total, e);
    }
    float sum = vsum(total);
    for (; i < count; i++)
        sum += w[i] = expf(w[i] - largest);
    return sum;
}

/* The places of block b that are seen: from *first, so many. */
INLINE int64_t seen(const struct paged_job *job, int64_t b, int64_t begin, int64_t length, int64_t *first) {
    const int64_t start = b * job->tokens;
    *first = begin > start ? begin - start : 0;
    return least(job->tokens, length - start) - *first;
}

static int some(void *p, int64_t from, int64_t to) {
    const struct paged_job *job = p;
    const int64_t group = job->heads / job->kv, pitch = job->kv * job->width, most = job->blocks * job->tokens;
    float *weights = scratch(sizeof(float) * (size_t)(group * most));
    if (!weights)
        return 1;
    for (int64_t item = from; item < to; item++) {
        const int64_t request = item / job->kv, head = item % job->kv, length = job->length[request], *table = job->table + request * job->blocks;
        const int64_t begin = job->window && length > job->window ? length - job->window : 0;
        const int64_t low = begin / job->tokens, high = (length + job->tokens - 1) / job->tokens;
        const int64_t at = (request * job->heads + head * group) * job->width;
        for (int64_t b = low; b < high; b++) {
            int64_t first, count = seen(job, b, begin, length, &first);
            const float *k = job->store + table[b] * job->page + first * pitch + head * job->width;
            for (int64_t h = 0; h < group; h++)
                scores(job->q + at + h * job->width, k, pitch, job->width, count, job->scale, weights + h * most + b * job->tokens + first);
        }
        for (int64_t h = 0; h < group; h++) {
            float *w = weights + h * most, largest = w[begin], total;
            for (int64_t i = begin; i < length; i++)
                largest = w[i] > largest || w[i] != w[i] ? w[i] : largest;
            total = exponentials(w + begin, length - begin, largest);
            for (int64_t i = begin; i < length; i++)
                w[i] /= total;
            memset(job->out + at + h * job->width, 0, sizeof(float) * (size_t)job->width);
        }
        for (int64_t b = low; b < high; b++) {
            int64_t first, count = seen(job, b, begin, length, &first);
            const float *v = job->store + table[b] * job->page + (job->tokens + first) * pitch + head * job->width;
            for (int64_t h = 0; h < group; h++)
                sums(weights + h * most + b * job->tokens + first, v, pitch, job->width, count, job->out + at + h * job->width);
        }
    }
    free(weights);
    return 0;
}

int FOR_ISA(paged)(const struct paged_job *job, int threads) { return parallel(some, (void *)job, job->requests * job->kv, 1, threads); }
