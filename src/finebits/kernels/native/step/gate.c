/* What stands between the matrices of a feed-forward sublayer: act(g) u. Compiled once for each instruction set. */
#include "jobs.h"
#include "lanes/exponential.h"
#include "runtime/runtime.h"


/* g / (1 + e^-z): SiLU with z = g; GELU by tanh with z = 2 sqrt(2 / pi) (g + 0.044715 g^3). */
INLINE vf swished(vf g, vf z) { return vdiv(g, vadd(vset(1.0f), vexp(vsub(vset(0.0f), z)))); }

INLINE vf inner(vf g) {
    const vf square = vmul(g, g);
    return vmul(vmul(vset(1.59576912f), g), vfma(vset(0.044715f), square, vset(1.0f)));
}

static float one(float g, int act) {
    const float z = act == SILU ? g : 1.59576912f * g * (1.0f + 0.044715f * g * g);
    return act == RELU ? (g > 0 ? g : g != g ? g : 0.0f) : act == GELU ? 0.5f * g * (1.0f + erff(g * 0.707106781f)) : g / (1.0f + expf(-z));
}

static int some(void *p, int64_t first, int64_t last) {
    const struct gate_job *job = p;
    for (int64_t i = first, high; i < last; i = high) {
        const int64_t row = i / job->n, begin = i - row * job->n;
        high = least(last, (row + 1) * job->n);
        const float *g = job->g + row * job->pitch, *u = job->u ? job->u + row * job->pitch : NULL;
        float *y = job->y + row * job->n;
        int64_t j = begin, end = high - row * job->n;
        for (; (job->act == SILU || job->act == GELU_TANH) && j + VL <= end; j += VL) {
            const vf v = vload(g + j), a = swished(v, job->act == SILU ? v : inner(v));
            vstore(y + j, u ? vmul(a, vload(u + j)) : a);
        }
        for (; j < end; j++)
            y[j] = u ? one(g[j], job->act) * u[j] : one(g[j], job->act);
    }
    return 0;
}

int FOR_ISA(gate)(const struct gate_job *job, int threads) { return parallel(some, (void *)job, job->rows * job->n, 2048, threads); }
