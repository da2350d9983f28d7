/* What Python hands over, and every way of doing it. A job is a structure that kernels/cpu/binding.py fills, field by field. */
#ifndef FINEBITS_JOBS_H
#define FINEBITS_JOBS_H

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
    int32_t near; /* of float32 x: it may be rounded as far as x of 16 bits would be, where that is faster */
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

/* serve/grouped.py: the factors of an adapter over one matrix, vectors of A (n,) and then of B^T (m,), in pieces that lie together. */
struct piece {
    const float *at;
    int64_t rows;
};
struct laid {
    int64_t a, b; /* pieces of each */
    double scale;
    struct piece pieces[];
};
struct rows_of {
    int64_t start, stop; /* rows */
    const struct laid *laid;
};

/* y (rows, m) += scale (x A^T) B^T, x (rows, n), of the rows of every group; `rank` is the largest. */
struct grouped_job {
    const float *x;
    float *y;
    const struct rows_of *group;
    int64_t groups, rows, n, m, rank;
};

/* serve/attention.py: out, as q (requests, heads, width), over pages of `page` numbers: keys (tokens, kv, width), then as many values. */
struct paged_job {
    const float *q, *store;
    const int64_t *table, *length; /* (requests, blocks), (requests,) */
    float *out;
    int64_t requests, heads, kv, width, tokens, blocks, page;
    int64_t window; /* tokens that are seen; 0: all */
    float scale;
};

/* The parts of a step (step/): float32, rows that lie together where no pitch is said. */

/* y (rows, n) = weight x / sqrt(mean(x^2) + eps); y may be x. */
struct norm_job {
    const float *x;
    float *y;
    const float *weight;
    int64_t rows, n;
    float eps;
};

/* The first `turned` numbers of every head of x (requests, heads, width), in place, by the row length - 1 of cos and sin (tokens, turned). */
struct rotate_job {
    float *x;
    const float *cos, *sin;
    const int64_t *length; /* (requests,) */
    int64_t requests, heads, width, turned;
};

/* k and v (requests, kv, width) go where the last token of every request is in pages. */
struct keep_job {
    const float *k, *v;
    const struct paged_job *to;
};

/* y (rows, n) = act(g) u; without u (NULL) act(g). Rows of g and u are `pitch` apart. */
struct gate_job {
    const float *g, *u;
    float *y;
    int64_t rows, n, pitch;
    int32_t act;
};
enum { SILU, GELU, GELU_TANH, RELU };

/* y (rows, n) += x, whose rows are `pitch` apart: 0 for a bias. */
struct add_job {
    const float *x;
    float *y;
    int64_t rows, n, pitch;
};

/* y (tokens, m) = x (tokens, n) @ w^T, w (m, n) of `dtype`. */
struct dense_job {
    const void *w;
    const float *x;
    float *y;
    int64_t tokens, m, n;
    int32_t dtype;
};

/* kernels/cpu/program.py: one part after the other. */
struct part {
    int64_t kind;
    const void *job;
};
enum { PRODUCT, LOW_RANK, DENSE, NORM, ROTATE, KEEP, ATTEND, GATE, ADD };

static inline int dtype_bytes(int dtype) { return dtype == FP32 ? 4 : 2; }

/* These are compiled once for each instruction set. Nonzero: no memory for the working buffers. */
#define EACH(name, job) int name##_scalar(const struct job *, int threads), name##_avx2(const struct job *, int threads), name##_avx512(const struct job *, int threads);
EACH(quantize, quantize_job)
EACH(dequantize, dequantize_job)
EACH(successive, successive_job)
EACH(search, search_job)
EACH(grouped, grouped_job)
EACH(paged, paged_job)
EACH(norm, norm_job)
EACH(rotate, rotate_job)
EACH(keep, keep_job)
EACH(gate, gate_job)
EACH(add, add_job)
EACH(dense, dense_job)
EACH(plain, linear_job)   /* product/plain.c: any layout, any number of tokens */
EACH(float32, linear_job) /* product/float32: panels in float32; not for scalar */
#undef EACH

/* These are for one instruction set, and say which products are theirs. */
#define WAY(name) int name##_supports(const struct linear_job *); int name##_linear(const struct linear_job *, int threads);
WAY(packed_avx512) /* product/packed: few tokens on the codes as they are */
WAY(packed_avx2)
WAY(bf16)          /* product/bf16: panels in bfloat16 */
WAY(wide)          /* product/wide.c: the same for few tokens, and for layouts that the others have no way for */
#undef WAY

enum { FEW_TOKENS = 4 };

#endif
