/* Threads, dispatch between instruction sets, and the functions that Python calls. */
#define _GNU_SOURCE
#include "finebits.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORT __attribute__((visibility("default")))
EXPORT void finebits_large_pages(void *p, size_t bytes);
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

void *scratch(size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes + 64) ? NULL : p;
}

/* One buffer is kept for the process; a second caller at the same time gets one of its own. Its size stands before it. */
static _Atomic(void *) kept;

void *borrow(size_t bytes) {
    size_t *p = atomic_exchange(&kept, NULL);
    if (p && p[0] >= bytes)
        return p + 8;
    free(p);
    const size_t page = (size_t)1 << 21, size = bytes + 128 < page ? bytes + 128 : (bytes + 128 + page - 1) / page * page;
    if (posix_memalign((void **)&p, size < page ? 64 : page, size))
        return NULL;
    finebits_large_pages(p, size);
    p[0] = size - 128;
    return p + 8;
}

void give_back(void *p) { free(atomic_exchange(&kept, p ? (size_t *)p - 8 : NULL)); }

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

EXPORT int finebits_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("gfni"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return SCALAR;
}

/* Whether this processor has a unit for products of bfloat16 matrices (AMX), which torch uses. */
EXPORT int finebits_matrix_unit(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1;
#else
    return 0;
#endif
}

static const struct body *bodies[LEVELS] = {
    &body_scalar,
#if defined(__x86_64__)
    &body_avx2,
    &body_avx512,
#endif
};

EXPORT int finebits_quantize(const struct quantize_job *job, int level, int threads) { return bodies[level]->quantize(job, threads); }

EXPORT int finebits_dequantize(const struct dequantize_job *job, int level, int threads) {
    return bodies[level]->dequantize(job, threads);
}

static int linear(const struct linear_job *job, int level, int threads) {
#if defined(__x86_64__)
    if (level == AVX512 && fused_supports(job))
        return fused_linear(job, threads);
    if (level == AVX512 && product_supports(job))
        return product_linear(job, threads);
    if ((level == AVX2 || (level == AVX512 && job->dtype != BF16)) && few_supports(job))
        return few_linear(job, threads);
    const int dots = level == AVX512 && job->dtype == BF16 && !job->transposed; /* body.c has bfloat16 tiles for them */
    if (level > SCALAR && !dots && product32_supports(job))
        return (level == AVX2 ? product32_avx2 : product32_avx512)(job, threads);
#endif
    return bodies[level]->linear(job, threads);
}

/* Its arguments one by one: filling a structure from Python takes as long as a small product. */
EXPORT int finebits_product(const struct table *t, const void *x, void *y, int64_t tokens, int dtype, int transposed, int level, int threads) {
    const struct linear_job job = {*t, x, y, tokens, dtype, transposed};
    return linear(&job, level, threads);
}

EXPORT int finebits_successive(const struct successive_job *job, int level, int threads) {
#if defined(__x86_64__)
    if (level == AVX512)
        return successive_avx512(job, threads);
    if (level == AVX2)
        return successive_avx2(job, threads);
#endif
    (void)level;
    return successive_scalar(job, threads);
}

EXPORT int finebits_search(const struct search_job *job, int level, int threads) {
#if defined(__x86_64__)
    if (level == AVX512)
        return search_avx512(job, threads);
    if (level == AVX2)
        return search_avx2(job, threads);
#endif
    (void)level;
    return search_scalar(job, threads);
}

/* Asks for large pages under a fresh output: first touch of small ones costs more than writing it. */
EXPORT void finebits_large_pages(void *p, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = (uintptr_t)1 << 21;
    uintptr_t start = ((uintptr_t)p + page - 1) & ~(page - 1), stop = ((uintptr_t)p + bytes) & ~(page - 1);
    if (start < stop)
        madvise((void *)start, stop - start, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}
