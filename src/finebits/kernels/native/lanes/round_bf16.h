/* float32 vectors to bfloat16, as to_bf16 does: six instructions a vector with AVX2, eight with AVX-512. */
#ifndef FINEBITS_ROUND_BF16_H
#define FINEBITS_ROUND_BF16_H

#include "lanes/lanes.h"

#if ISA == 1
/* The upper halves are the rounded numbers. */
INLINE __m256i round_bf16(__m256 a) {
    const __m256i u = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}

#elif ISA == 2
INLINE __m256i round_bf16(__m512 a) {
    const __m512i u = _mm512_castps_si512(a), half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    /* vcvtneps2bf16 would flush subnormal numbers. */
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, half), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
#endif

#endif
