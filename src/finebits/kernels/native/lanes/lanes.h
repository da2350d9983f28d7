/* One float vector type, vf of VL lanes, and the few operations that the kernels need, for the instruction set a file is compiled for
 * (ISA = 0, portable; 1, AVX2 and FMA; 2, AVX-512). Each is one instruction where no comment says otherwise. */
#ifndef FINEBITS_LANES_H
#define FINEBITS_LANES_H

#include "lanes/numbers.h"

#if ISA > 0
#include <immintrin.h>
#endif

#if ISA == 2
#define FOR_ISA(name) name##_avx512
typedef __m512 vf;
#define VL 16
#define vload _mm512_loadu_ps
#define vstore _mm512_storeu_ps
#define vset _mm512_set1_ps
#define vadd _mm512_add_ps
#define vsub _mm512_sub_ps
#define vmul _mm512_mul_ps
#define vdiv _mm512_div_ps
#define vfma _mm512_fmadd_ps
#define vsum _mm512_reduce_add_ps
#define vabs _mm512_abs_ps
/* The second operand where the first is NaN. */
#define vmax _mm512_max_ps
#define vmin _mm512_min_ps
#define vload_bf16(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define vround(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE __mmask16 mask16(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

INLINE void vstore_bytes(uint8_t *to, vf a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a))); }

#elif ISA == 1
#define FOR_ISA(name) name##_avx2
typedef __m256 vf;
#define VL 8
#define vload _mm256_loadu_ps
#define vstore _mm256_storeu_ps
#define vset _mm256_set1_ps
#define vadd _mm256_add_ps
#define vsub _mm256_sub_ps
#define vmul _mm256_mul_ps
#define vdiv _mm256_div_ps
#define vfma _mm256_fmadd_ps
#define vabs(a) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a)
#define vmax _mm256_max_ps
#define vmin _mm256_min_ps
#define vload_bf16(p) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define vround(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

INLINE float vsum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE void vstore_int_bytes(uint8_t *to, __m256i a) {
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1,
                                         -1, -1, -1, -1, -1);
    a = _mm256_shuffle_epi8(a, low);
    _mm_storel_epi64((__m128i *)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

INLINE void vstore_bytes(uint8_t *to, vf a) { vstore_int_bytes(to, _mm256_cvttps_epi32(a)); }

#else
#define FOR_ISA(name) name##_scalar
typedef float vf;
#define VL 1
#define vset(a) (a)
#define vadd(a, b) ((a) + (b))
#define vsub(a, b) ((a) - (b))
#define vmul(a, b) ((a) * (b))
#define vdiv(a, b) ((a) / (b))
#define vfma(a, b, c) ((a) * (b) + (c))
#define vsum(a) (a)
#define vabs fabsf
#define vload_bf16(p) from_bf16(*(p))
#define vround rintf

INLINE vf vload(const float *p) { return *p; }
INLINE void vstore(float *p, vf a) { *p = a; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
INLINE void vstore_bytes(uint8_t *to, vf a) { *to = a > 0 ? (uint8_t)a : 0; }
#endif

#endif
