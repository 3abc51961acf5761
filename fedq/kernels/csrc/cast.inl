// Reading values of any input type with their residual, and the casts.

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

// ---- casts --------------------------------------------------------------------------------------------------------

FEDQ_INLINE I bf16_of(F v) {
  const I bits = bits_of(v), odd = and_int(shift_right<16>(bits), splat_int(1));
  const I rounded = shift_right<16>(add_int(bits, add_int(odd, splat_int(0x7FFF))));
  return select_int(is_nan(v), splat_int(0x7FC0), rounded);
}

// Stores 16 values as the type and returns what they became.
template <int32_t kKind>
FEDQ_INLINE F store_cast(uint8_t* out, F v) {
  if constexpr (kKind == kBf16) {
    const I half = bf16_of(v);
    store_halves(reinterpret_cast<uint16_t*>(out), half);
    return float_of_bits(shift_left<16>(half));
  } else if constexpr (kKind == kFp16) {
    const F bounded = larger(splat(-65504.0f), smaller(splat(65504.0f), v));
    const F kept = select(less(magnitude(v), splat(__builtin_inff())), bounded, v);
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
    F total = load_input<kDtype>(x, i);
    if (residual) total = add(total, load(residual + i));
    const F decoded = store_cast<kKind>(out + i * item_nbytes(kKind), total);
    if (residual) store_finite(residual + i, sub(total, decoded));
  }
  if (i == num) return;
  const size_t rest = static_cast<size_t>(num - i);
  float total[16], kept[16] = {};
  uint8_t bytes[64];
  stage_typed<kDtype>(input_at(x, kDtype, i), residual ? residual + i : nullptr, num - i, 16, total);
  const F decoded = store_cast<kKind>(bytes, load(total));
  memcpy(out + i * item_nbytes(kKind), bytes, rest * item_nbytes(kKind));
  if (!residual) return;
  memcpy(kept, residual + i, rest * 4);
  store_finite(kept, sub(load(total), decoded));
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
