// Sixteen float lanes as two AVX2 registers; see vec_avx512.h for what the names mean.


struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
struct M {
  __m256 lo, hi;  // all ones or all zeros
};

FEDQ_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FEDQ_INLINE void store(float* p, F v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
FEDQ_INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FEDQ_INLINE I splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FEDQ_INLINE I lane_numbers() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

FEDQ_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FEDQ_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FEDQ_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FEDQ_INLINE F magnitude(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
FEDQ_INLINE F smaller(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
FEDQ_INLINE F larger(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }

FEDQ_INLINE M less(F a, F b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
FEDQ_INLINE M is_nan(F a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
FEDQ_INLINE M first_lanes(int64_t num) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(num > 16 ? 16 : num));
  const I lanes = lane_numbers();
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, lanes.lo)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, lanes.hi))};
}
FEDQ_INLINE uint32_t mask_bits(M m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
// Bit i of a word to the sign bit of lane i; the other bits of a lane are left over.
FEDQ_INLINE I signs_from(uint32_t bits) {
  const __m256i word = _mm256_set1_epi32(static_cast<int32_t>(bits));
  return {_mm256_sllv_epi32(word, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24)),
          _mm256_sllv_epi32(word, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16))};
}
FEDQ_INLINE M mask_from(uint32_t bits) {
  const I signs = signs_from(bits);
  return {_mm256_castsi256_ps(_mm256_srai_epi32(signs.lo, 31)), _mm256_castsi256_ps(_mm256_srai_epi32(signs.hi, 31))};
}
FEDQ_INLINE M either(M a, M b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
FEDQ_INLINE M both(M a, M b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
FEDQ_INLINE M inverted(M a) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(a.lo, ones), _mm256_xor_ps(a.hi, ones)};
}
FEDQ_INLINE F select(M m, F yes, F no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
FEDQ_INLINE F zero_unless(M m, F v) { return {_mm256_and_ps(m.lo, v.lo), _mm256_and_ps(m.hi, v.hi)}; }

FEDQ_INLINE I bits_of(F v) { return {_mm256_castps_si256(v.lo), _mm256_castps_si256(v.hi)}; }
FEDQ_INLINE F float_of_bits(I v) { return {_mm256_castsi256_ps(v.lo), _mm256_castsi256_ps(v.hi)}; }
FEDQ_INLINE I select_int(M m, I yes, I no) { return bits_of(select(m, float_of_bits(yes), float_of_bits(no))); }
FEDQ_INLINE I add_int(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
FEDQ_INLINE I mul_int(I a, I b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
FEDQ_INLINE I xor_int(I a, I b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
FEDQ_INLINE I and_int(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
FEDQ_INLINE I larger_int(I a, I b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
template <int kBits>
FEDQ_INLINE I shift_left(I v) { return {_mm256_slli_epi32(v.lo, kBits), _mm256_slli_epi32(v.hi, kBits)}; }
template <int kBits>
FEDQ_INLINE I shift_right(I v) { return {_mm256_srli_epi32(v.lo, kBits), _mm256_srli_epi32(v.hi, kBits)}; }

FEDQ_INLINE I nearest(F v) { return {_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)}; }
FEDQ_INLINE I floor_int(F v) {
  return {_mm256_cvttps_epi32(_mm256_floor_ps(v.lo)), _mm256_cvttps_epi32(_mm256_floor_ps(v.hi))};
}
FEDQ_INLINE F to_float(I v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }

FEDQ_INLINE __m256i low_halves(I v) {
  const __m256i mask = _mm256_set1_epi32(0xFFFF);
  const __m256i mixed = _mm256_packus_epi32(_mm256_and_si256(v.lo, mask), _mm256_and_si256(v.hi, mask));
  return _mm256_permute4x64_epi64(mixed, 0xD8);
}
FEDQ_INLINE void store_bytes(uint8_t* p, I v) {
  const __m256i halves = _mm256_packs_epi32(v.lo, v.hi);  // lanes 0-3, 8-11 | 4-7, 12-15
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi32(bytes, 0xD8));
}
FEDQ_INLINE I load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}

FEDQ_INLINE __m128i load_128(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
FEDQ_INLINE F load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p + 8)), 16))};
}
FEDQ_INLINE F load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}
FEDQ_INLINE void store_halves(uint16_t* p, I v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), low_halves(v));
}
FEDQ_INLINE void store_fp16(uint16_t* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}

FEDQ_INLINE F flip(F v, uint32_t bits) {
  const I signs = signs_from(bits);
  const __m256 top = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(v.lo, _mm256_and_ps(_mm256_castsi256_ps(signs.lo), top)),
          _mm256_xor_ps(v.hi, _mm256_and_ps(_mm256_castsi256_ps(signs.hi), top))};
}

FEDQ_INLINE void store_finite(float* p, F v) {
  store(p, select(less(magnitude(v), splat(__builtin_inff())), v, load(p)));
}

FEDQ_INLINE float sum_lanes(F v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
FEDQ_INLINE int32_t max_lanes(I v) {
  const __m256i eight = _mm256_max_epi32(v.lo, v.hi);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

template <int kStride>
FEDQ_INLINE __m256 butterfly_half(__m256 v) {
  __m256 other, sign;
  if constexpr (kStride == 1) {
    other = _mm256_permute_ps(v, 0xB1);
    sign = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
  } else if constexpr (kStride == 2) {
    other = _mm256_permute_ps(v, 0x4E);
    sign = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
  } else {
    other = _mm256_permute2f128_ps(v, v, 0x01);
    sign = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
  }
  return _mm256_add_ps(_mm256_xor_ps(v, sign), other);
}
template <int kStride>
FEDQ_INLINE F butterfly(F v) {
  if constexpr (kStride == 8) return {_mm256_add_ps(v.lo, v.hi), _mm256_sub_ps(v.lo, v.hi)};
  else return {butterfly_half<kStride>(v.lo), butterfly_half<kStride>(v.hi)};
}

// Eight counts of bits, and eight words of 64 bits; see vec_avx512.h.
struct Counts {
  __m256i a, b;
};
constexpr int64_t kAtOnce = 4;

FEDQ_INLINE Counts no_counts() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FEDQ_INLINE Counts load_words(const uint64_t* p) {
  const __m256i* at = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
FEDQ_INLINE void store_counts(int32_t* p, Counts v) {
  int64_t wide[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide + 4), v.b);
  for (int i = 0; i < 8; ++i) p[i] = static_cast<int32_t>(wide[i]);
}
FEDQ_INLINE __m256i count_bits(__m256i v) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
  return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
}
FEDQ_INLINE Counts add_different(Counts total, Counts words, uint64_t x) {
  const __m256i splat = _mm256_set1_epi64x(static_cast<int64_t>(x));
  return {_mm256_add_epi64(total.a, count_bits(_mm256_xor_si256(words.a, splat))),
          _mm256_add_epi64(total.b, count_bits(_mm256_xor_si256(words.b, splat)))};
}
