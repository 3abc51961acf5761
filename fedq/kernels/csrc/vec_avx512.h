// Sixteen float lanes on AVX-512 (F, BW, DQ, VL). The names are those of the other two vec_*.h, and so are the bits.
//
// `F` holds 16 float32, `I` 16 int32, `M` a truth for each. Comparisons with a NaN are false. `smaller` and `larger`
// return their second argument if either is a NaN, as minps does. Rounding is to nearest even, denormals count.


using F = __m512;
using I = __m512i;
using M = __mmask16;

FEDQ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FEDQ_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
FEDQ_INLINE F splat(float x) { return _mm512_set1_ps(x); }
FEDQ_INLINE I splat_int(int32_t x) { return _mm512_set1_epi32(x); }
FEDQ_INLINE I lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

FEDQ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FEDQ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FEDQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FEDQ_INLINE F magnitude(F a) { return _mm512_abs_ps(a); }
FEDQ_INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
FEDQ_INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }

FEDQ_INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FEDQ_INLINE M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
FEDQ_INLINE M first_lanes(int64_t num) { return static_cast<M>(num >= 16 ? 0xFFFF : num <= 0 ? 0 : (1 << num) - 1); }
FEDQ_INLINE uint32_t mask_bits(M m) { return m; }
FEDQ_INLINE M mask_from(uint32_t bits) { return static_cast<M>(bits); }
FEDQ_INLINE M either(M a, M b) { return a | b; }
FEDQ_INLINE M both(M a, M b) { return a & b; }
FEDQ_INLINE M inverted(M a) { return static_cast<M>(~a); }
FEDQ_INLINE F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
FEDQ_INLINE F zero_unless(M m, F v) { return _mm512_maskz_mov_ps(m, v); }
FEDQ_INLINE I select_int(M m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }

FEDQ_INLINE I bits_of(F v) { return _mm512_castps_si512(v); }
FEDQ_INLINE F float_of_bits(I v) { return _mm512_castsi512_ps(v); }
FEDQ_INLINE I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
FEDQ_INLINE I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
FEDQ_INLINE I xor_int(I a, I b) { return _mm512_xor_si512(a, b); }
FEDQ_INLINE I and_int(I a, I b) { return _mm512_and_si512(a, b); }
FEDQ_INLINE I larger_int(I a, I b) { return _mm512_max_epi32(a, b); }
template <int kBits>
FEDQ_INLINE I shift_left(I v) { return _mm512_slli_epi32(v, kBits); }
template <int kBits>
FEDQ_INLINE I shift_right(I v) { return _mm512_srli_epi32(v, kBits); }

// To integers; a NaN, and what is out of range below, becomes the lowest integer.
FEDQ_INLINE I nearest(F v) { return _mm512_cvtps_epi32(v); }
FEDQ_INLINE I floor_int(F v) { return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
FEDQ_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }

// The low byte of each lane (values 0 to 255), and back.
FEDQ_INLINE void store_bytes(uint8_t* p, I v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
FEDQ_INLINE I load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

FEDQ_INLINE F load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
FEDQ_INLINE F load_fp16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The low half of each lane.
FEDQ_INLINE void store_halves(uint16_t* p, I v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
FEDQ_INLINE void store_fp16(uint16_t* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// Negates the lanes whose bit is set.
FEDQ_INLINE F flip(F v, uint32_t bits) {
  return _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(v), static_cast<M>(bits),
                                                   _mm512_castps_si512(v), _mm512_set1_epi32(INT32_MIN)));
}

// Stores the lanes that are finite and leaves the others in memory as they are.
FEDQ_INLINE void store_finite(float* p, F v) {
  _mm512_mask_storeu_ps(p, _mm512_cmp_ps_mask(_mm512_abs_ps(v), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ), v);
}

// The sum of the lanes as a halving tree: lane i and lane i + 8, then 4, 2, 1.
FEDQ_INLINE float sum_lanes(F v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
FEDQ_INLINE int32_t max_lanes(I v) { return _mm512_reduce_max_epi32(v); }

// One stage of a Hadamard butterfly inside a vector: lane i and lane i ^ kStride become their sum and difference.
template <int kStride>
FEDQ_INLINE F butterfly(F v) {
  F other;
  if constexpr (kStride == 1) other = _mm512_permute_ps(v, 0xB1);
  if constexpr (kStride == 2) other = _mm512_permute_ps(v, 0x4E);
  if constexpr (kStride == 4) other = _mm512_shuffle_f32x4(v, v, 0xB1);
  if constexpr (kStride == 8) other = _mm512_shuffle_f32x4(v, v, 0x4E);
  constexpr M upper = kStride == 1 ? 0xAAAA : kStride == 2 ? 0xCCCC : kStride == 4 ? 0xF0F0 : 0xFF00;
  // v·(+-1) is exact, so the one rounding of the fused form is that of the sum.
  const F sign = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return _mm512_fmadd_ps(v, sign, other);
}

// Eight counts of bits, and eight words of 64 bits, for the binary convolution.
using Counts = __m512i;
constexpr int64_t kAtOnce = 8;  // counts that fit into the registers

FEDQ_INLINE Counts no_counts() { return _mm512_setzero_si512(); }
FEDQ_INLINE Counts load_words(const uint64_t* p) { return _mm512_loadu_si512(p); }
FEDQ_INLINE void store_counts(int32_t* p, Counts v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(v));
}
// Adds the number of bits in which each word differs from x.
FEDQ_INLINE Counts add_different(Counts total, Counts words, uint64_t x) {
  const __m512i differ = _mm512_xor_si512(words, _mm512_set1_epi64(static_cast<int64_t>(x)));
#if defined(FEDQ_VPOPCNT)
  return _mm512_add_epi64(total, _mm512_popcnt_epi64(differ));
#else
  const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(differ, nibble));
  const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(differ, 4), nibble));
  return _mm512_add_epi64(total, _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512()));
#endif
}
