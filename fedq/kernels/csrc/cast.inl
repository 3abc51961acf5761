// Reading values of any input type with their residual, and the casts.

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 0x1.fffffep127f;  // of float32
constexpr float kLargestBf16 = 0x1.fep127f;

FEDQ_INLINE M are_finite(F v) { return less(magnitude(v), splat(kInfinity)); }

// Finite values bounded; NaN and infinity as they are.
FEDQ_INLINE F saturated(F v, float largest) {
  return select(are_finite(v), larger(splat(-largest), smaller(splat(largest), v)), v);
}

template <int kDtype>
FEDQ_INLINE F load_input(const void* x, int64_t i) {
  if constexpr (kDtype == 1) return load_bf16(static_cast<const uint16_t*>(x) + i);
  if constexpr (kDtype == 2) return load_fp16(static_cast<const uint16_t*>(x) + i);
  return load(static_cast<const float*>(x) + i);
}

FEDQ_INLINE const void* input_at(const void* x, int64_t dtype, int64_t i) {
  return static_cast<const uint8_t*>(x) + i * (dtype == 0 ? 4 : 2);
}

// total = x + residual (null: x), and zeros up to width, a multiple of 16.
template <int kDtype>
static void stage_typed(const void* x, const float* residual, int64_t num, int64_t width, float* total) {
  int64_t i = 0;
  if (residual) {
    for (; i + 16 <= num; i += 16) store(total + i, add(load_input<kDtype>(x, i), load(residual + i)));
  } else {
    for (; i + 16 <= num; i += 16) store(total + i, load_input<kDtype>(x, i));
  }
  if (i < num) {
    float x_rest[16] = {}, residual_rest[16] = {};
    memcpy(x_rest, input_at(x, kDtype, i), static_cast<size_t>(num - i) * (kDtype == 0 ? 4 : 2));
    F v = load_input<kDtype>(x_rest, 0);
    if (residual) {
      memcpy(residual_rest, residual + i, static_cast<size_t>(num - i) * 4);
      v = add(v, load(residual_rest));
    }
    store(total + i, v);
    i += 16;
  }
  if (i < width) memset(total + i, 0, static_cast<size_t>(width - i) * 4);
}

static void stage(const void* x, int64_t dtype, const float* residual, int64_t num, int64_t width, float* total) {
  if (dtype == 1) return stage_typed<1>(x, residual, num, width, total);
  if (dtype == 2) return stage_typed<2>(x, residual, num, width, total);
  stage_typed<0>(x, residual, num, width, total);
}

// x + residual; where both are finite and their sum is not, the largest number of its sign.
FEDQ_INLINE F add_finite(F x, F residual) {
  const F total = add(x, residual);
  if (mask_bits(are_finite(total)) == 0xFFFF) return total;
  const F bounded = larger(splat(-kLargest), smaller(splat(kLargest), total));
  return select(both(are_finite(x), are_finite(residual)), bounded, total);
}

// ---- casts --------------------------------------------------------------------------------------------------------

// Nearest even; finite values stay finite.
FEDQ_INLINE I bf16_of(F v) {
  const auto rounded = [](F x) __attribute__((always_inline)) {
    const I bits = bits_of(x), odd = and_int(shift_right<16>(bits), splat_int(1));
    return shift_right<16>(add_int(bits, add_int(odd, splat_int(0x7FFF))));
  };
  // From here on magnitudes round to infinity.
  if (__builtin_expect(mask_bits(less(magnitude(v), splat(0x1.ffp127f))) == 0xFFFF, 1)) return rounded(v);
  return select_int(is_nan(v), splat_int(0x7FC0), rounded(saturated(v, kLargestBf16)));
}

// Stores 16 values as the type and returns what they became.
template <int32_t kKind>
FEDQ_INLINE F store_cast(uint8_t* out, F v) {
  if constexpr (kKind == kBf16) {
    const I half = bf16_of(v);
    store_halves(reinterpret_cast<uint16_t*>(out), half);
    return float_of_bits(shift_left<16>(half));
  } else if constexpr (kKind == kFp16) {
    const F kept = saturated(v, 65504.0f);
    store_fp16(reinterpret_cast<uint16_t*>(out), select(is_nan(v), splat(__builtin_nanf("")), kept));
    return load_fp16(reinterpret_cast<const uint16_t*>(out));
  } else {
    store(reinterpret_cast<float*>(out), v);
    return v;
  }
}

template <int32_t kKind>
FEDQ_INLINE F load_cast(const uint8_t* data) {
  if constexpr (kKind == kBf16) return load_bf16(reinterpret_cast<const uint16_t*>(data));
  if constexpr (kKind == kFp16) return load_fp16(reinterpret_cast<const uint16_t*>(data));
  return load(reinterpret_cast<const float*>(data));
}

constexpr int64_t item_nbytes(int32_t kind) { return kind == kFp32 ? 4 : 2; }

template <int32_t kKind, int kDtype>
static void encode_cast_typed(const void* x, float* residual, int64_t num, uint8_t* out) {
  int64_t i = 0;
  for (; i + 16 <= num; i += 16) {
    const F value = load_input<kDtype>(x, i);
    if (residual) {
      const F old = load(residual + i);
      const F decoded = store_cast<kKind>(out + i * item_nbytes(kKind), add_finite(value, old));
      store_finite(residual + i, sub(add(value, old), decoded));
    } else {
      store_cast<kKind>(out + i * item_nbytes(kKind), value);
    }
  }
  if (i == num) return;
  const size_t rest = static_cast<size_t>(num - i);
  float value[16], kept[16] = {};
  uint8_t bytes[64];
  stage_typed<kDtype>(input_at(x, kDtype, i), nullptr, num - i, 16, value);
  if (residual) memcpy(kept, residual + i, rest * 4);
  const F old = load(kept), decoded = store_cast<kKind>(bytes, residual ? add_finite(load(value), old) : load(value));
  memcpy(out + i * item_nbytes(kKind), bytes, rest * item_nbytes(kKind));
  if (!residual) return;
  store_finite(kept, sub(add(load(value), old), decoded));
  memcpy(residual + i, kept, rest * 4);
}

template <int32_t kKind>
static void encode_cast(const void* x, int64_t dtype, float* residual, int64_t num, uint8_t* out) {
  if (dtype == 1) return encode_cast_typed<kKind, 1>(x, residual, num, out);
  if (dtype == 2) return encode_cast_typed<kKind, 2>(x, residual, num, out);
  encode_cast_typed<kKind, 0>(x, residual, num, out);
}

template <int32_t kKind, class Sink>
static void decode_cast(const uint8_t* data, int64_t num, const Sink& sink) {
  int64_t i = 0;
  for (; i + 16 <= num; i += 16) sink.put(i, load_cast<kKind>(data + i * item_nbytes(kKind)));
  if (i == num) return;
  uint8_t bytes[64] = {};
  memcpy(bytes, data + i * item_nbytes(kKind), static_cast<size_t>((num - i) * item_nbytes(kKind)));
  sink.put_first(i, num - i, load_cast<kKind>(bytes));
}
