/* Both products of many tokens for bfloat16 x: which way a call goes (tile.h), and its buffers: x once more, and what is to be known of every group. */
#include "product/bf16/tokens.h"

/* Fewer tokens are faster in the tiles of product/wide.c (measured). */
int bf16_supports(const struct linear_job *job) { return job->transposed || job->tokens > (is_grouped(&job->t) ? 8 : 64); }

int bf16_linear(const struct linear_job *job, int threads) {
    struct product q = {.job = job};
    const struct table *t = &job->t;
    const int64_t inputs = job->transposed ? t->rows : depth_of(t), most = least(job->tokens, PASS);
    const int64_t spans = (inputs + SPAN - 1) / SPAN, columns = 32 * per_word(t->bits);
    /* Whole groups only, where the columns of y are cut by them; enough for all threads. */
    const int grouped = is_grouped(t) && (!job->transposed || (t->n % columns == 0 && t->n / columns >= 4 * threads));
    const int stream = grouped && !job->transposed && 2 * inputs * up(job->tokens, 16) <= STREAM_BYTES && job->tokens <= 16 * LANES;
    q.doubled = stream && job->tokens <= 16;
    q.x = borrow(sizeof(uint16_t) * (size_t)(job->transposed ? spans * PITCH * most : inputs * up(most, q.doubled ? 32 : 16)));
    q.groups = grouped ? scratch(sizeof(struct group) * (size_t)((t->n + columns - 1) / columns)) : NULL;
    int failed = !q.x || (grouped && !q.groups);
    prepare(&q.d, t);
    if (!failed && grouped)
        describe(t, q.groups);
    for (; q.first < job->tokens && !failed; q.first += PASS) {
        q.tokens = least(PASS, job->tokens - q.first);
        if (job->transposed)
            failed = bf16_transposed(&q, threads);
        else
            failed = bf16_rearrange(&q, threads) || (stream ? bf16_stream : bf16_forward)(&q, threads);
    }
    free(q.groups);
    if (q.x)
        give_back(q.x);
    return failed;
}
