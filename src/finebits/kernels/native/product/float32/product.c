/* Both products in float32, pass by pass (tile.h), with a buffer for x. */
#include "product/float32/tile.h"

int FOR_ISA(float32)(const struct linear_job *job, int threads) {
    struct product q = {.job = job};
    const struct table *t = &job->t;
    const int64_t most = least(job->tokens, PASS), rounds = (t->rows + DEPTH - 1) / DEPTH;
    q.x = borrow(sizeof(float) * (size_t)(job->transposed ? rounds * PITCH * up(most, HIGH) : up(most, VL) * t->n));
    if (!q.x)
        return 1;
    prepare(&q.d, t);
    int failed = 0;
    for (; q.first < job->tokens && !failed; q.first += PASS) {
        q.tokens = least(PASS, job->tokens - q.first);
        failed = (job->transposed ? FOR_ISA(float32_transposed) : FOR_ISA(float32_forward))(&q, threads);
    }
    give_back(q.x);
    return failed;
}
