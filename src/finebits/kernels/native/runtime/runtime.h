/* Threads and memory, for all kernels. */
#ifndef FINEBITS_RUNTIME_H
#define FINEBITS_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

/* Calls work(arg, first, last) on pieces of [0, count), `step` items each, from up to `threads` threads. Nonzero if a call failed. */
int parallel(int (*work)(void *arg, int64_t first, int64_t last), void *arg, int64_t count, int64_t step, int threads);

/* 64-byte aligned; free() releases it. NULL when memory is out. */
void *scratch(size_t bytes);

/* As scratch, for what a call needs once: large pages, kept for the next call; give_back() returns it. */
void *borrow(size_t bytes);
void give_back(void *);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

/* Rows of a piece, a multiple of `unit`: long, since what a thread has fetched ahead at its end is lost, but some for every thread. */
static inline int64_t piece_rows(int64_t rows, int64_t unit, int threads) {
    int64_t units = rows / unit / (4 * threads);
    return (units < 1 ? 1 : units) * unit;
}

#endif
