/* Keys and queries turned to their positions, and keys and values put where attention reads them. Compiled once for each instruction set. */
#include "jobs.h"
#include "lanes/lanes.h"

/* Two halves of a head are the two coordinates: x_i cos_i - x_(i+h) sin_i and x_(i+h) cos_(i+h) + x_i sin_(i+h). */
int FOR_ISA(rotate)(const struct rotate_job *job, int threads) {
    (void)threads; /* shorter than waking one */
    const int64_t half = job->turned / 2;
    for (int64_t r = 0; r < job->requests; r++) {
        const float *cos = job->cos + (job->length[r] - 1) * job->turned, *sin = job->sin + (job->length[r] - 1) * job->turned;
        for (int64_t h = 0; h < job->heads; h++) {
            float *x = job->x + (r * job->heads + h) * job->width;
            int64_t i = 0;
            for (; i + VL <= half; i += VL) {
                const vf a = vload(x + i), b = vload(x + half + i);
                vstore(x + i, vsub(vmul(a, vload(cos + i)), vmul(b, vload(sin + i))));
                vstore(x + half + i, vfma(a, vload(sin + half + i), vmul(b, vload(cos + half + i))));
            }
            for (; i < half; i++) {
                const float a = x[i], b = x[half + i];
                x[i] = a * cos[i] - b * sin[i];
                x[half + i] = b * cos[half + i] + a * sin[half + i];
            }
        }
    }
    return 0;
}

int FOR_ISA(keep)(const struct keep_job *job, int threads) {
    (void)threads;
    const struct paged_job *to = job->to;
    const int64_t size = to->kv * to->width;
    for (int64_t r = 0; r < to->requests; r++) {
        const int64_t at = to->length[r] - 1, page = to->table[r * to->blocks + at / to->tokens];
        float *place = (float *)to->store + page * to->page + at % to->tokens * size;
        memcpy(place, job->k + r * size, sizeof(float) * (size_t)size);
        memcpy(place + to->tokens * size, job->v + r * size, sizeof(float) * (size_t)size);
    }
    return 0;
}
