/* Shared by the bodies of every instruction set. */
#ifndef FINEBITS_H
#define FINEBITS_H

#include <stddef.h>
#include <stdint.h>

enum { FP32, FP16, BF16, E4M3 };      /* dtypes of inputs, outputs and scales; E4M3 of scales that are searched for */
enum { SCALAR, AVX2, AVX512, LEVELS }; /* instruction sets, slowest first */

/* A packed matrix: kernels/table.py says what the fields mean, blocks.py how codes are packed. */
struct table {
    const uint8_t *codes;
    const void *scale;
    const float *shift; /* NULL without one */
    const float *levels;
    int64_t rows, n, row_bytes, blocks, block;
    int32_t bits, store;
};

/* kernels/table.py: Rounding. */
struct rounding {
    const float *mids;
    const uint8_t *order;
    float peak, first;
    int32_t minmax, store, uniform, n_mids, n_order, bits;
    int64_t block;
};

struct quantize_job {
    const void *w;
    uint8_t *codes;
    void *scale, *shift;
    int64_t rows, n, row_bytes, blocks;
    int32_t dtype;
    struct rounding r;
};

/* Columns [start, stop) of every row; start is a multiple of 8, out rows are `stride` values apart. */
struct dequantize_job {
    struct table t;
    void *out;
    int64_t start, stop, stride;
    int32_t dtype;
};

/* y (tokens, rows) = x (tokens, n) @ W^T, or with `transposed` y (tokens, n) = x (tokens, rows) @ W. */
struct linear_job {
    struct table t;
    const void *x;
    void *y;
    int64_t tokens;
    int32_t dtype, transposed;
};

/* kernels/reference.py: successive. A column is a row here: w, codes and error are (columns, rows), u (columns, columns). */
struct successive_job {
    const float *w, *u;
    const float *scale, *shift; /* (blocks, rows); shift NULL without one */
    const int64_t *block;       /* of every column */
    const float *levels;        /* by code */
    uint8_t *codes;
    float *error;
    int64_t columns, rows;
    struct rounding r;
};

int successive_scalar(const struct successive_job *, int threads);
int successive_avx2(const struct successive_job *, int threads);
int successive_avx512(const struct successive_job *, int threads);

/* quantizers/_family.py: searched. A column is a row here: w is (columns, rows). */
struct search_job {
    const float *w, *d;      /* d (columns,): what an error in a column weighs */
    float *scale, *shift;    /* (blocks, rows), the format's own, then the best; shift NULL without one */
    const float *levels;     /* by code */
    const float *factors, *rests; /* of the format's own scale, and 1 - factor */
    int64_t columns, rows;
    float middle; /* between the lowest and the highest level */
    int32_t n_factors, refits, zero; /* zero: a shift is held as the whole number of scales, 0 to 2^bits - 1, that it takes off */
    struct rounding r; /* block 0: a row is one block */
};

int search_scalar(const struct search_job *, int threads);
int search_avx2(const struct search_job *, int threads);
int search_avx512(const struct search_job *, int threads);

struct body {
    int (*quantize)(const struct quantize_job *, int threads);
    int (*dequantize)(const struct dequantize_job *, int threads);
    int (*linear)(const struct linear_job *, int threads);
};

extern const struct body body_scalar, body_avx2, body_avx512;

/* Bfloat16 dot products on the packed codes; returns 0 when the layout is not one of its own, and then nothing is written. */
int fused_supports(const struct linear_job *);
int fused_linear(const struct linear_job *, int threads);

/* Bfloat16 dot products of many tokens against decoded panels. */
int product_supports(const struct linear_job *);
int product_linear(const struct linear_job *, int threads);

/* Products of few tokens on the packed codes with AVX2. */
enum { FEW_TOKENS = 4 };
int few_supports(const struct linear_job *);
int few_linear(const struct linear_job *, int threads);

/* Products of many tokens in float32 against decoded panels. */
static inline int product32_supports(const struct linear_job *job) { return job->transposed || job->tokens > FEW_TOKENS; }
int product32_avx2(const struct linear_job *, int threads);
int product32_avx512(const struct linear_job *, int threads);

/* Calls work(arg, first, last) on pieces of [0, count), `step` items each, from up to `threads` threads. Nonzero if a call failed. */
int parallel(int (*work)(void *arg, int64_t first, int64_t last), void *arg, int64_t count, int64_t step, int threads);

/* 64-byte aligned; free() releases it. NULL when memory is out. */
void *scratch(size_t bytes);

/* As scratch, for what a call needs once: large pages, kept for the next call; give_back() returns it. */
void *borrow(size_t bytes);
void give_back(void *);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Rows of a piece, a multiple of `unit`: long, since what a thread has fetched ahead at its end is lost, but some for every thread. */
static inline int64_t piece_rows(int64_t rows, int64_t unit, int threads) {
    int64_t units = rows / unit / (4 * threads);
    return (units < 1 ? 1 : units) * unit;
}

static inline int dtype_bytes(int dtype) { return dtype == FP32 ? 4 : 2; }

#endif
