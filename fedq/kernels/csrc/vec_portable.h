// Sixteen float lanes as four vectors of GNU extensions, for any processor (SSE2 and NEON have registers of this
// width); see vec_avx512.h for what the names mean.

using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));

struct F {
  Floats a, b, c, d;
};
struct I {
  Ints a, b, c, d;
};
using M = I;  // all ones or all zeros

template <class R, class Op>
FEDQ_INLINE R each(Op op) {
  return {op(0), op(1), op(2), op(3)};
}
template <class R, class T, class Op>
FEDQ_INLINE R each(T x, Op op) {
  return {op(x.a), op(x.b), op(x.c), op(x.d)};
}
template <class R, class T, class Op>
FEDQ_INLINE R each(T x, T y, Op op) {
  return {op(x.a, y.a), op(x.b, y.b), op(x.c, y.c), op(x.d, y.d)};
}

FEDQ_INLINE F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
FEDQ_INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }
FEDQ_INLINE F splat(float x) {
  const Floats v = {x, x, x, x};
  return {v, v, v, v};
}
FEDQ_INLINE I splat_int(int32_t x) {
  const Ints v = {x, x, x, x};
  return {v, v, v, v};
}
FEDQ_INLINE I lane_numbers() { return {Ints{0, 1, 2, 3}, Ints{4, 5, 6, 7}, Ints{8, 9, 10, 11}, Ints{12, 13, 14, 15}}; }

FEDQ_INLINE I bits_of(F v) {
  return each<I>(v, [](Floats x) { return reinterpret_cast<Ints>(x); });
}
FEDQ_INLINE F float_of_bits(I v) {
  return each<F>(v, [](Ints x) { return reinterpret_cast<Floats>(x); });
}
FEDQ_INLINE Ints wrapped_sum(Ints x, Ints y) {
  return reinterpret_cast<Ints>(reinterpret_cast<Words>(x) + reinterpret_cast<Words>(y));
}
FEDQ_INLINE I add_int(I a, I b) { return each<I>(a, b, wrapped_sum); }
FEDQ_INLINE I mul_int(I a, I b) {
  return each<I>(a, b, [](Ints x, Ints y) {
    return reinterpret_cast<Ints>(reinterpret_cast<Words>(x) * reinterpret_cast<Words>(y));
  });
}
FEDQ_INLINE I xor_int(I a, I b) {
  return each<I>(a, b, [](Ints x, Ints y) { return x ^ y; });
}
FEDQ_INLINE I and_int(I a, I b) {
  return each<I>(a, b, [](Ints x, Ints y) { return x & y; });
}
FEDQ_INLINE I or_int(I a, I b) {
  return each<I>(a, b, [](Ints x, Ints y) { return x | y; });
}
FEDQ_INLINE I larger_int(I a, I b) {
  return each<I>(a, b, [](Ints x, Ints y) {
    const Ints m = x > y;
    return (x & m) | (y & ~m);
  });
}
template <int kBits>
FEDQ_INLINE I shift_left(I v) {
  return each<I>(v, [](Ints x) { return reinterpret_cast<Ints>(reinterpret_cast<Words>(x) << kBits); });
}
template <int kBits>
FEDQ_INLINE I shift_right(I v) {
  return each<I>(v, [](Ints x) { return reinterpret_cast<Ints>(reinterpret_cast<Words>(x) >> kBits); });
}

FEDQ_INLINE M less(F a, F b) {
  return each<M>(a, b, [](Floats x, Floats y) -> Ints { return x < y; });
}
FEDQ_INLINE M less_int(I a, I b) {
  return each<M>(a, b, [](Ints x, Ints y) -> Ints { return x < y; });
}
FEDQ_INLINE M is_nan(F v) {
  return each<M>(v, [](Floats x) -> Ints { return x != x; });
}
FEDQ_INLINE M first_lanes(int64_t num) {
  return less_int(lane_numbers(), splat_int(static_cast<int32_t>(num > 16 ? 16 : num)));
}
FEDQ_INLINE uint32_t mask_bits(M m) {
  const Ints ones = (m.a & Ints{1, 2, 4, 8}) | (m.b & Ints{16, 32, 64, 128}) | (m.c & Ints{256, 512, 1024, 2048}) |
                    (m.d & Ints{4096, 8192, 16384, 32768});
  return static_cast<uint32_t>((ones[0] | ones[1]) | (ones[2] | ones[3]));
}
FEDQ_INLINE M mask_from(uint32_t bits) {
  const I ones = {Ints{1, 2, 4, 8}, Ints{16, 32, 64, 128}, Ints{256, 512, 1024, 2048}, Ints{4096, 8192, 16384, 32768}};
  return each<M>(splat_int(static_cast<int32_t>(bits)), ones, [](Ints x, Ints y) -> Ints { return (x & y) == y; });
}
FEDQ_INLINE M either(M a, M b) { return or_int(a, b); }
FEDQ_INLINE M both(M a, M b) { return and_int(a, b); }
FEDQ_INLINE M inverted(M a) {
  return each<M>(a, [](Ints x) { return ~x; });
}
FEDQ_INLINE I select_int(M m, I yes, I no) { return or_int(and_int(yes, m), and_int(no, inverted(m))); }
FEDQ_INLINE F select(M m, F yes, F no) { return float_of_bits(select_int(m, bits_of(yes), bits_of(no))); }
FEDQ_INLINE F zero_unless(M m, F v) { return float_of_bits(and_int(m, bits_of(v))); }

FEDQ_INLINE F add(F a, F b) {
  return each<F>(a, b, [](Floats x, Floats y) { return x + y; });
}
FEDQ_INLINE F sub(F a, F b) {
  return each<F>(a, b, [](Floats x, Floats y) { return x - y; });
}
FEDQ_INLINE F mul(F a, F b) {
  return each<F>(a, b, [](Floats x, Floats y) { return x * y; });
}
FEDQ_INLINE F magnitude(F v) { return float_of_bits(and_int(bits_of(v), splat_int(INT32_MAX))); }
FEDQ_INLINE F smaller(F a, F b) { return select(less(a, b), a, b); }
FEDQ_INLINE F larger(F a, F b) { return select(less(b, a), a, b); }

FEDQ_INLINE F to_float(I v) {
  return each<F>(v, [](Ints x) { return __builtin_convertvector(x, Floats); });
}
// For magnitudes below 2^22, and NaN: adding 1.5·2^23 leaves the rounded integer in the low bits.
FEDQ_INLINE I nearest(F v) {
  const I shifted = add_int(bits_of(add(v, splat(12582912.0f))), splat_int(-0x4B400000));
  return select_int(is_nan(v), splat_int(INT32_MIN), shifted);
}
// For values below 2^22, and NaN; what is below -10^6 is taken as that.
FEDQ_INLINE I floor_int(F v) {
  const F bounded = larger(zero_unless(inverted(is_nan(v)), v), splat(-1e6f));
  const I truncated = each<I>(bounded, [](Floats x) { return __builtin_convertvector(x, Ints); });
  const I floored = add_int(truncated, less(bounded, to_float(truncated)));
  return select_int(is_nan(v), splat_int(INT32_MIN), floored);
}

FEDQ_INLINE void store_bytes(uint8_t* p, I v) {
  // The bytes of a lane are 0 to 255: four lanes of every vector fold into one word.
  const Words low = reinterpret_cast<Words>(v.a), next = reinterpret_cast<Words>(v.b);
  const Words third = reinterpret_cast<Words>(v.c), last = reinterpret_cast<Words>(v.d);
  const auto folded = [](Words x) { return x[0] | x[1] << 8 | x[2] << 16 | x[3] << 24; };
  const uint32_t words[4] = {folded(low), folded(next), folded(third), folded(last)};
  memcpy(p, words, 16);
}
FEDQ_INLINE I load_bytes(const uint8_t* p) {
  using Bytes = uint8_t __attribute__((vector_size(4)));
  return each<I>([p](int i) {
    Bytes bytes;
    memcpy(&bytes, p + 4 * i, 4);
    return __builtin_convertvector(bytes, Ints);
  });
}

using Halves = uint16_t __attribute__((vector_size(8)));
FEDQ_INLINE I load_halves(const uint16_t* p) {
  return each<I>([p](int i) {
    Halves halves;
    memcpy(&halves, p + 4 * i, 8);
    return __builtin_convertvector(halves, Ints);
  });
}
FEDQ_INLINE void store_halves(uint16_t* p, I v) {
  const Halves halves[4] = {__builtin_convertvector(v.a, Halves), __builtin_convertvector(v.b, Halves),
                            __builtin_convertvector(v.c, Halves), __builtin_convertvector(v.d, Halves)};
  memcpy(p, halves, sizeof halves);
}
FEDQ_INLINE F load_bf16(const uint16_t* p) { return float_of_bits(shift_left<16>(load_halves(p))); }
FEDQ_INLINE F load_fp16(const uint16_t* p) {
  const I half = load_halves(p), rest = and_int(half, splat_int(0x7FFF));
  const I sign = shift_left<16>(and_int(half, splat_int(0x8000)));
  // The exponent's bias goes from 15 to 127 by a product with 2^112, which is exact for denormals too.
  const F scaled = mul(float_of_bits(shift_left<13>(rest)), splat(0x1p112f));
  const I infinite = or_int(shift_left<13>(rest), splat_int(0x7F800000));
  const I quiet = and_int(less_int(splat_int(0x7C00), rest), splat_int(0x400000));
  const M special = less_int(splat_int(0x7BFF), rest);
  return float_of_bits(or_int(sign, select_int(special, or_int(infinite, quiet), bits_of(scaled))));
}
// For magnitudes up to 65,504, infinity and NaN.
FEDQ_INLINE void store_fp16(uint16_t* p, F v) {
  const I bits = bits_of(v), rest = and_int(bits, splat_int(INT32_MAX));
  const I sign = and_int(shift_right<16>(bits), splat_int(0x8000));
  // Below 2^-14 the half is denormal: adding 1/2 leaves it, rounded to its last place, in the low bits.
  const I denormal = add_int(bits_of(add(float_of_bits(rest), splat(0.5f))), splat_int(-0x3F000000));
  const I odd = and_int(shift_right<13>(rest), splat_int(1));
  const I normal = shift_right<13>(add_int(add_int(rest, splat_int(0xFFF - (112 << 23))), odd));
  const I finite = select_int(less_int(rest, splat_int(0x38800000)), denormal, normal);
  const I special = select_int(is_nan(v), splat_int(0x7E00), splat_int(0x7C00));
  store_halves(p, or_int(sign, select_int(less_int(rest, splat_int(0x7F800000)), finite, special)));
}

FEDQ_INLINE F flip(F v, uint32_t bits) {
  return float_of_bits(xor_int(bits_of(v), and_int(mask_from(bits), splat_int(INT32_MIN))));
}

FEDQ_INLINE void store_finite(float* p, F v) {
  store(p, select(less(magnitude(v), splat(__builtin_inff())), v, load(p)));
}

FEDQ_INLINE float sum_lanes(F v) {
  const Floats four = (v.a + v.c) + (v.b + v.d);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
FEDQ_INLINE int32_t max_lanes(I v) {
  int32_t lanes[16];
  memcpy(lanes, &v, 64);
  int32_t largest = lanes[0];
  for (int i = 1; i < 16; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

template <int kStride>
FEDQ_INLINE Floats butterfly_inside(Floats v) {
#if defined(__clang__)
  const Floats other =
      kStride == 1 ? __builtin_shufflevector(v, v, 1, 0, 3, 2) : __builtin_shufflevector(v, v, 2, 3, 0, 1);
#else
  const Floats other = __builtin_shuffle(v, kStride == 1 ? Ints{1, 0, 3, 2} : Ints{2, 3, 0, 1});
#endif
  const Ints upper = kStride == 1 ? Ints{0, INT32_MIN, 0, INT32_MIN} : Ints{0, 0, INT32_MIN, INT32_MIN};
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(v) ^ upper) + other;
}
template <int kStride>
FEDQ_INLINE F butterfly(F v) {
  if constexpr (kStride == 8) return {v.a + v.c, v.b + v.d, v.a - v.c, v.b - v.d};
  if constexpr (kStride == 4) return {v.a + v.b, v.a - v.b, v.c + v.d, v.c - v.d};
  return each<F>(v, butterfly_inside<kStride>);
}

// Eight counts of bits, and eight words of 64 bits; see vec_avx512.h.
using Wide = uint64_t __attribute__((vector_size(16)));
struct Counts {
  Wide lanes[4];
};
constexpr int64_t kAtOnce = 2;

FEDQ_INLINE Counts no_counts() { return {}; }
FEDQ_INLINE Counts load_words(const uint64_t* p) {
  Counts v;
  memcpy(&v, p, sizeof v);
  return v;
}
FEDQ_INLINE void store_counts(int32_t* p, Counts v) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<int32_t>(v.lanes[i / 2][i % 2]);
}
// Sums of neighbouring bits, pairs, nibbles and then bytes.
FEDQ_INLINE Counts add_different(Counts total, Counts words, uint64_t x) {
  for (int i = 0; i < 4; ++i) {
    Wide v = words.lanes[i] ^ x;
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
    v += v >> 8;
    v += v >> 16;
    v += v >> 32;
    total.lanes[i] += v & 0x7Fu;
  }
  return total;
}
