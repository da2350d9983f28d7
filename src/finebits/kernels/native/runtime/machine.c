/* What this processor can do. */
#include "export.h"
#include "jobs.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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
