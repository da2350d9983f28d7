/* parallel(): pieces of a range, from PyTorch's own threads.
 *
 * Every thread takes the next piece until none is left, so that a slow one holds nobody up; which thread takes which changes no result.
 * A call costs one wake-up of the team.
 */
#define _GNU_SOURCE
#include "runtime/runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>

enum { MAX_THREADS = 256 };

typedef void (*gomp_parallel_fn)(void (*)(void *), void *, unsigned, unsigned);
static gomp_parallel_fn gomp_parallel;
static _Atomic int forked;

static void after_fork(void) { forked = 1; }

__attribute__((constructor)) static void load(void) {
    /* PyTorch's own OpenMP team: a second pool would fight its threads, which spin for a while after each of its operators. */
    gomp_parallel = (gomp_parallel_fn)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    pthread_atfork(NULL, NULL, after_fork);
}

struct team {
    int (*work)(void *, int64_t, int64_t);
    void *arg;
    int64_t count, step;
    _Atomic int64_t next;
    _Atomic int failed;
};

static void run(void *p) {
    struct team *team = p;
    for (;;) {
        int64_t first = atomic_fetch_add(&team->next, team->step);
        if (first >= team->count)
            return;
        if (team->work(team->arg, first, least(first + team->step, team->count)))
            team->failed = 1;
    }
}

static void *run_thread(void *p) {
    run(p);
    return NULL;
}

int parallel(int (*work)(void *, int64_t, int64_t), void *arg, int64_t count, int64_t step, int threads) {
    struct team team = {work, arg, count, step < 1 ? 1 : step, 0, 0};
    int64_t pieces = (count + team.step - 1) / team.step;
    threads = (int)least(least(threads, MAX_THREADS), pieces);
    if (threads <= 1) {
        run(&team);
    } else if (gomp_parallel && !forked) {
        gomp_parallel(run, &team, (unsigned)threads, 0);
    } else {
        /* A forked child inherits the OpenMP team without its threads, and would wait for them for ever. */
        pthread_t id[MAX_THREADS];
        int started = 0;
        while (started < threads - 1 && pthread_create(&id[started], NULL, run_thread, &team) == 0)
            started++;
        run(&team);
        while (started--)
            pthread_join(id[started], NULL);
    }
    return team.failed;
}
