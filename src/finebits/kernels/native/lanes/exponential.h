/* e^a, for the instruction set a file is compiled for. */
#ifndef FINEBITS_EXPONENTIAL_H
#define FINEBITS_EXPONENTIAL_H

#include "lanes/lanes.h"

/* 2^n e^r with |r| <= ln 2 / 2, and of e^r the terms up to r^6: some 2e-7 of it off. Below e^-87 it stays e^-87, above e^88 e^88; NaN stays NaN. */
INLINE vf vexp(vf a) {
#if ISA == 0
    return expf(a);
#else
    a = vmax(vset(-87.0f), vmin(vset(88.0f), a)); /* the second operand where it is NaN */
    const vf n = vround(vmul(a, vset(1.44269504f)));
    const vf r = vfma(n, vset(-1.42860682e-6f), vfma(n, vset(-0.693145752f), a));
    vf p = vfma(r, vset(1.0f / 720), vset(1.0f / 120));
    p = vfma(p, r, vset(1.0f / 24));
    p = vfma(p, r, vset(1.0f / 6));
    p = vfma(p, r, vset(0.5f));
    p = vfma(p, r, vset(1.0f));
    p = vfma(p, r, vset(1.0f));
#if ISA == 2
    return _mm512_scalef_ps(p, n);
#else
    return vmul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
#endif
#endif
}

#endif
