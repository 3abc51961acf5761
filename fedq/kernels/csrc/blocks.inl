// The block codecs: for every block a scale and packed codes, and back. Each step is that of
// fedq/kernels/reference/blocks.py, operation by operation, so that the bytes are the same.
//
// A batch of blocks is read once into `total` (x + residual), rotated if the plan says so, coded, and its residual is
// written back while it is still in the first-level cache. Vectors hold 16 values; blocks are filled up with zeros.

constexpr int64_t kRun = 256;  // width of the rotation
constexpr int64_t kUnit = 256;  // codes that are packed at a time
constexpr int64_t kTaskElements = 1 << 16;
constexpr float kSmallestScale = 0x1p-126f;
constexpr float kLarge = 0x1p96f;    // see LARGE and SHRINK of fedq/kernels/plan.py
constexpr float kShrink = 0x1p-64f;
constexpr float kGrow = 0x1p64f;

// ---- scalars --------------------------------------------------------------------------------------------------------

FEDQ_INLINE uint32_t word_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FEDQ_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

FEDQ_INLINE uint32_t bf16_bits(float x) {
  const uint32_t bits = word_of(x);
  return x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// A finite scale becomes at most `largest`.
FEDQ_INLINE float rounded_scale(float scale, bool up, float largest) {
  uint32_t half = bf16_bits(scale);
  if (up && float_of(half << 16) < scale) ++half;
  const float rounded = float_of(half << 16);
  if (rounded > largest && scale < kInfinity) return largest;
  return rounded < kSmallestScale ? 0.0f : rounded;
}

FEDQ_INLINE float safe_inverse(float scale) { return scale < kSmallestScale ? 0.0f : 1.0f / scale; }

FEDQ_INLINE int64_t padded(int64_t num, int64_t to) { return (num + to - 1) / to * to; }

// ---- randomness -----------------------------------------------------------------------------------------------------

constexpr uint32_t kGolden = 0x9E3779B9;

FEDQ_INLINE uint32_t mix_word(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352D;
  x = (x ^ x >> 15) * 0x846CA68B;
  return x ^ x >> 16;
}

FEDQ_INLINE I mix(I x) {
  x = mul_int(xor_int(x, shift_right<16>(x)), splat_int(0x7FEB352D));
  x = mul_int(xor_int(x, shift_right<15>(x)), splat_int(static_cast<int32_t>(0x846CA68B)));
  return xor_int(x, shift_right<16>(x));
}

// The hashes of 16 counters from `first` on. They may cross a multiple of 2^32 in the upper eight lanes only if those
// are not used (`first` is a multiple of 8, and of 16 where all lanes count).
FEDQ_INLINE I hash(int64_t first, uint32_t key) {
  const I low = add_int(lane_numbers(), splat_int(static_cast<int32_t>(first)));
  const I mixed = mix(xor_int(low, splat_int(static_cast<int32_t>(key))));
  return mix(add_int(mixed, splat_int(static_cast<int32_t>(static_cast<uint32_t>(first >> 32) + kGolden))));
}

struct Keys {
  uint32_t shared, noise;
};

FEDQ_INLINE Keys keys_of(uint64_t seed) {
  const uint32_t shared = mix_word(static_cast<uint32_t>(seed) + kGolden);
  return {shared, mix_word(shared ^ mix_word(static_cast<uint32_t>(seed >> 32) + 0x85EBCA6B))};
}

// Uniform in [0, 1): the top 24 bits of the hash.
FEDQ_INLINE F noise(int64_t first, uint32_t key) {
  return mul(to_float(shift_right<8>(hash(first, key))), splat(0x1p-24f));
}

// Random signs of num elements from `first` on (both multiples of 256), one bit each.
static void draw_flips(int64_t first, int64_t num, uint32_t key, uint16_t* flips) {
  for (int64_t word = 0; word < num / 32; word += 16) {
    const I hashed = hash(first / 32 + word, key);
    memcpy(flips + 2 * word, &hashed, 64);
  }
}

// ---- sums as halving trees ------------------------------------------------------------------------------------------

struct Pair {
  F a, b;
};

FEDQ_INLINE F plus(F x, F y) { return add(x, y); }
FEDQ_INLINE Pair plus(Pair x, Pair y) { return {add(x.a, y.a), add(x.b, y.b)}; }

// The sum of leaf(first + k·step), k < num, num a power of two. Halving x[:n/2] + x[n/2:] pairs the highest bit of k
// first, so the last sum is that of the even and the odd ones.
template <class Leaf>
static auto tree(const Leaf& leaf, int64_t first, int64_t step, int64_t num) -> decltype(leaf(first)) {
  if (num > 8) return plus(tree(leaf, first, 2 * step, num / 2), tree(leaf, first + step, 2 * step, num / 2));
  if (num == 8) {
    const auto even = plus(plus(leaf(first), leaf(first + 4 * step)),
                           plus(leaf(first + 2 * step), leaf(first + 6 * step)));
    const auto odd = plus(plus(leaf(first + step), leaf(first + 5 * step)),
                          plus(leaf(first + 3 * step), leaf(first + 7 * step)));
    return plus(even, odd);
  }
  if (num == 4)
    return plus(plus(leaf(first), leaf(first + 2 * step)), plus(leaf(first + step), leaf(first + 3 * step)));
  if (num == 2) return plus(leaf(first), leaf(first + step));
  return leaf(first);
}

// leaf(i) is for vector i of `width` elements.
template <class Leaf>
FEDQ_INLINE float tree_sum(const Leaf& leaf, int64_t width) {
  return sum_lanes(tree(leaf, 0, 1, width / 16));
}

// ---- rotation -------------------------------------------------------------------------------------------------------

FEDQ_INLINE void hadamard(F v[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v[i]))));
#pragma GCC unroll 4
  for (int stride = 1; stride < 16; stride *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & stride) continue;
      const F sum = add(v[i], v[i + stride]), difference = sub(v[i], v[i + stride]);
      v[i] = sum;
      v[i + stride] = difference;
    }
  }
}

static void rotate_run(const float* x, const uint16_t* flips, float* y) {
  F v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = flip(load(x + 16 * i), flips[i]);
  hadamard(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(y + 16 * i, mul(v[i], splat(1.0f / 16.0f)));
}

// ---- packing --------------------------------------------------------------------------------------------------------

// Eight codes, a byte each, side by side in the low 8·kBits bits; and back.
template <int kBits>
FEDQ_INLINE uint64_t squeeze(uint64_t x) {
  constexpr uint64_t one = (1u << kBits) - 1, two = (1u << 2 * kBits) - 1, four = (1ull << 4 * kBits) - 1;
  constexpr uint64_t ones = one * 0x0001000100010001, twos = two * 0x0000000100000001;
  x = (x & ones) | ((x >> (8 - kBits)) & (ones << kBits));
  x = (x & twos) | ((x >> (16 - 2 * kBits)) & (twos << 2 * kBits));
  return (x & four) | ((x >> (32 - 4 * kBits)) & (four << 4 * kBits));
}

template <int kBits>
FEDQ_INLINE uint64_t spread(uint64_t x) {
  constexpr uint64_t one = (1u << kBits) - 1, two = (1u << 2 * kBits) - 1, four = (1ull << 4 * kBits) - 1;
  constexpr uint64_t ones = one * 0x0001000100010001, twos = two * 0x0000000100000001;
  x = (x & four) | ((x << (32 - 4 * kBits)) & (four << 32));
  x = (x & twos) | ((x << (16 - 2 * kBits)) & (twos << 16));
  return (x & ones) | ((x << (8 - kBits)) & (ones << 8));
}

template <int kBits>
static void pack_bits(const uint8_t* codes, int64_t num, uint8_t* out) {
  uint64_t words[kUnit / 8];
  uint8_t bytes[kBits * kUnit / 8 + 8];
  for (; num >= kUnit; num -= kUnit, codes += kUnit, out += kBits * kUnit / 8) {
    memcpy(words, codes, kUnit);
    for (uint64_t& word : words) word = squeeze<kBits>(word);
    for (int i = 0; i < kUnit / 8; ++i) memcpy(bytes + kBits * i, words + i, 8);
    memcpy(out, bytes, kBits * kUnit / 8);
  }
  if (num == 0) return;
  memset(words, 0, sizeof words);
  memcpy(words, codes, static_cast<size_t>(num));
  for (uint64_t& word : words) word = squeeze<kBits>(word);
  for (int i = 0; i < kUnit / 8; ++i) memcpy(bytes + kBits * i, words + i, 8);
  memcpy(out, bytes, static_cast<size_t>((num * kBits + 7) / 8));
}

// Writes codes up to a multiple of 256.
template <int kBits>
static void unpack_bits(const uint8_t* data, int64_t num, uint8_t* codes) {
  uint64_t words[kUnit / 8];
  uint8_t bytes[kBits * kUnit / 8 + 8] = {};
  for (; num > 0; num -= kUnit, codes += kUnit, data += kBits * kUnit / 8) {
    if (num >= kUnit) memcpy(bytes, data, kBits * kUnit / 8);
    else memcpy(bytes, data, static_cast<size_t>((num * kBits + 7) / 8));
    for (int i = 0; i < kUnit / 8; ++i) memcpy(words + i, bytes + kBits * i, 8);
    for (uint64_t& word : words) word = spread<kBits>(word);
    memcpy(codes, words, kUnit);
  }
}

// Signs are bits already, and eight bits are bytes.
static void pack(const BlockPlan& plan, const uint8_t* codes, int64_t num, uint8_t* out) {
  if (plan.kind == kSign) num = (num + 7) / 8;
  switch (plan.kind == kSign ? 8 : plan.bits) {
    case 1: return pack_bits<1>(codes, num, out);
    case 2: return pack_bits<2>(codes, num, out);
    case 3: return pack_bits<3>(codes, num, out);
    case 4: return pack_bits<4>(codes, num, out);
    case 5: return pack_bits<5>(codes, num, out);
    case 6: return pack_bits<6>(codes, num, out);
    case 7: return pack_bits<7>(codes, num, out);
    default: memcpy(out, codes, static_cast<size_t>(num));
  }
}

static void unpack(const BlockPlan& plan, const uint8_t* data, int64_t num, uint8_t* codes) {
  if (plan.kind == kSign) num = (num + 7) / 8;
  switch (plan.kind == kSign ? 8 : plan.bits) {
    case 1: return unpack_bits<1>(data, num, codes);
    case 2: return unpack_bits<2>(data, num, codes);
    case 3: return unpack_bits<3>(data, num, codes);
    case 4: return unpack_bits<4>(data, num, codes);
    case 5: return unpack_bits<5>(data, num, codes);
    case 6: return unpack_bits<6>(data, num, codes);
    case 7: return unpack_bits<7>(data, num, codes);
    default: memcpy(codes, data, static_cast<size_t>(num));
  }
}

// Codes 0, 1, 2 five to a byte, sum of t_j·3^j, across the ends of blocks.
class TritWriter {
 public:
  explicit TritWriter(uint8_t* out) : out_(out) {}

  void write(const uint8_t* codes, int64_t num) {
    while (num_held_ > 0 && num > 0) {
      hold(*codes++);
      --num;
    }
    for (; num >= 8; num -= 5, codes += 5) {
      // Byte 4 of the product is the sum; no lower byte of it exceeds 240, so nothing is carried.
      uint64_t word;
      memcpy(&word, codes, 8);
      *out_++ = static_cast<uint8_t>(word * (81 | 27 << 8 | 9 << 16 | 3 << 24 | 1ull << 32) >> 32);
    }
    for (; num > 0; --num) hold(*codes++);
  }

  void finish() {
    while (num_held_ > 0) hold(0);
  }

 private:
  void hold(uint32_t trit) {
    held_ += trit * power_;
    power_ *= 3;
    if (++num_held_ < 5) return;
    *out_++ = static_cast<uint8_t>(held_);
    held_ = 0, power_ = 1, num_held_ = 0;
  }

  uint8_t* out_;
  uint32_t held_ = 0, power_ = 1;
  int num_held_ = 0;
};

// A byte to its five trits, a byte each; the last place is taken modulo 3.
struct TritTable {
  uint64_t trits[256];
  constexpr TritTable() : trits() {
    for (uint64_t byte = 0; byte < 256; ++byte)
      trits[byte] = byte % 3 | byte / 3 % 3 << 8 | byte / 9 % 3 << 16 | byte / 27 % 3 << 24 | byte / 81 % 3 << 32;
  }
};
constexpr TritTable kTrits;

class TritReader {
 public:
  explicit TritReader(const uint8_t* data) : data_(data) {}

  // Writes up to seven bytes more than num.
  void read(uint8_t* codes, int64_t num) {
    memcpy(codes, &held_, 8);
    int64_t at = num_held_;
    for (; at < num; at += 5) {
      held_ = kTrits.trits[*data_++];
      memcpy(codes + at, &held_, 8);
    }
    // What the last byte has beyond num is held for the next block.
    const int64_t used = num - (at - 5);
    held_ = at == num_held_ ? held_ >> 8 * num : used >= 5 ? 0 : held_ >> 8 * used;
    num_held_ = at - num;
  }

 private:
  const uint8_t* data_;
  uint64_t held_ = 0;
  int64_t num_held_ = 0;
};

// ---- from values to codes -------------------------------------------------------------------------------------------

// One block as the rules see it.
struct Block {
  const float* y;  // `width` values, zeros after `num`
  int64_t num, width;
  int64_t first;       // index of y[0] in the tensor
  uint32_t noise_key;
  uint8_t* codes;  // out: a byte each; for signs a bit each
  const char* ahead;  // what will be read after this block: fetched while this one is computed
  float largest;  // the largest scale that there may be
};

static float abs_sum(const Block& b) {
  const auto leaf = [&b](int64_t i) __attribute__((always_inline)) {
    __builtin_prefetch(b.ahead + 64 * i);
    return magnitude(load(b.y + 16 * i));
  };
  return tree_sum(leaf, b.width);
}

// The largest magnitude, NaN if there is one: as integers NaNs lie above infinity.
static float absmax(const Block& b) {
  I top = splat_int(0);
  for (int64_t i = 0; i < b.width; i += 16) {
    __builtin_prefetch(b.ahead + 4 * i);
    top = larger_int(top, bits_of(magnitude(load(b.y + i))));
  }
  return float_of(static_cast<uint32_t>(max_lanes(top)));
}

FEDQ_INLINE void store_codes(const Block& b, int64_t i, I cells, int32_t half) {
  store_bytes(b.codes + i, add_int(cells, splat_int(half)));
}

// What a rule must know of a block before it can code: the largest magnitude, or the sum of all. Blocks of a batch are
// measured one after another, so that the processor overlaps what would be one long chain from sum to scale.
static float measure(const BlockPlan& plan, const Block& b) {
  const bool by_absmax = plan.stochastic || (plan.kind == kInteger && !plan.rotate && plan.bits > 1);
  return by_absmax ? absmax(b) : abs_sum(b);
}

// Mid-tread grid up to the largest magnitude. A cell can only leave the grid as a NaN, which becomes the lowest code.
static float code_absmax(const BlockPlan& plan, const Block& b, float largest) {
  const int32_t half = 1 << (plan.bits - 1);
  const float scale = rounded_scale(largest / static_cast<float>(half - 1), false, b.largest);
  const F inverse = splat(safe_inverse(scale));
  const I lowest = splat_int(-half);
  for (int64_t i = 0; i < b.width; i += 16)
    store_codes(b, i, larger_int(nearest(mul(load(b.y + i), inverse)), lowest), half);
  return scale;
}

static float code_stochastic(const BlockPlan& plan, const Block& b, float largest) {
  const int32_t half = 1 << (plan.bits - 1);
  const float offset = plan.rotate || plan.bits == 1 ? 0.5f : 0.0f;
  const float top = static_cast<float>(half - 1) + offset;
  const float scale = rounded_scale(largest / top, true, b.largest);
  const F inverse = splat(safe_inverse(scale)), low = splat(-top - offset), high = splat(top - offset);
  const I lowest = splat_int(-half);
  for (int64_t i = 0; i < b.width; i += 16) {
    const F q = add(sub(mul(load(b.y + i), inverse), splat(offset)), noise(b.first + i, b.noise_key));
    store_codes(b, i, larger_int(floor_int(smaller(high, larger(low, q))), lowest), half);
  }
  return scale;
}

template <bool kRagged>
static float code_gaussian_cells(const Block& b, float inverse, int32_t half) {
  const F inverses = splat(inverse), high = splat(static_cast<float>(half - 1));
  const I lowest = splat_int(-half);
  const auto leaf = [&](int64_t i) __attribute__((always_inline)) {
    const F y = load(b.y + 16 * i);
    const I cell = larger_int(floor_int(smaller(high, mul(y, inverses))), lowest);
    store_codes(b, 16 * i, cell, half);
    F level = add(to_float(cell), splat(0.5f));
    if constexpr (kRagged) level = zero_unless(first_lanes(b.num - 16 * i), level);
    return Pair{mul(y, level), mul(level, level)};
  };
  const Pair sums = tree(leaf, 0, 1, b.width / 16);
  return sum_lanes(sums.a) / sum_lanes(sums.b);
}

// Mid-rise grid: codes by the best Gaussian step, then the least-squares scale of the chosen levels.
static float code_gaussian(const BlockPlan& plan, const Block& b, float sum) {
  const int32_t half = 1 << (plan.bits - 1);
  const float mean = sum / static_cast<float>(b.num);
  const float inverse = safe_inverse(mean * plan.step);
  float scale = b.num == b.width ? code_gaussian_cells<false>(b, inverse, half)
                                 : code_gaussian_cells<true>(b, inverse, half);
  // A cell of an infinity is a NaN, and so is the scale.
  if (!(mean < __builtin_inff()) && !(absmax(b) < __builtin_inff())) scale = __builtin_nanf("");
  return rounded_scale(scale, false, b.largest);
}

static float code_integer(const BlockPlan& plan, const Block& b, float measured) {
  if (plan.stochastic) return code_stochastic(plan, b, measured);
  return plan.rotate || plan.bits == 1 ? code_gaussian(plan, b, measured) : code_absmax(plan, b, measured);
}

FEDQ_INLINE void store_trits(const Block& b, int64_t i, F y, M keep) {
  const I sign = select_int(less(y, splat(0.0f)), splat_int(0), splat_int(2));
  store_bytes(b.codes + i, select_int(keep, sign, splat_int(1)));
}

static float code_ternary(const BlockPlan& plan, const Block& b, float measured) {
  if (plan.stochastic) {
    const float scale = rounded_scale(measured, true, b.largest);
    const F inverse = splat(safe_inverse(scale));
    for (int64_t i = 0; i < b.width; i += 16) {
      const F y = load(b.y + i);
      store_trits(b, i, y, less(noise(b.first + i, b.noise_key), mul(magnitude(y), inverse)));
    }
    return scale;
  }
  const F threshold = splat(0.75f * (measured / static_cast<float>(b.num)));
  const F infinity = splat(__builtin_inff());
  int64_t num_kept = 0;
  const auto leaf = [&](int64_t i) __attribute__((always_inline)) {
    const F y = load(b.y + 16 * i), size = magnitude(y);
    const M keep = less(threshold, size);
    store_trits(b, 16 * i, y, keep);
    num_kept += __builtin_popcount(mask_bits(keep));
    return zero_unless(either(keep, inverted(less(size, infinity))), size);
  };
  const float total = tree_sum(leaf, b.width);
  return rounded_scale(total / static_cast<float>(num_kept > 0 ? num_kept : 1), false, b.largest);
}

FEDQ_INLINE void store_signs(const Block& b, int64_t i, M negative) {
  const uint16_t bits = static_cast<uint16_t>(mask_bits(negative));
  memcpy(b.codes + i / 8, &bits, 2);
}

static float code_sign(const BlockPlan& plan, const Block& b, float measured) {
  const F zero = splat(0.0f);
  if (plan.stochastic) {
    const float scale = rounded_scale(measured, true, b.largest);
    const F inverse = splat(safe_inverse(scale));
    for (int64_t i = 0; i < b.width; i += 16) {
      const F limit = sub(mul(splat(2.0f), noise(b.first + i, b.noise_key)), splat(1.0f));
      const M positive = less(limit, mul(load(b.y + i), inverse));
      store_signs(b, i, both(inverted(positive), first_lanes(b.num - i)));
    }
    return scale;
  }
  float scale = measured / static_cast<float>(b.num);
  if (plan.unbiased) {
    const F inverse = splat(safe_inverse(measured));
    const auto leaf = [&](int64_t i) __attribute__((always_inline)) {
      const F y = load(b.y + 16 * i);
      return mul(y, mul(y, inverse));
    };
    scale = tree_sum(leaf, b.width);
  }
  for (int64_t i = 0; i < b.width; i += 16) store_signs(b, i, less(load(b.y + i), zero));
  return rounded_scale(scale, false, b.largest);
}

// ---- from codes to values -------------------------------------------------------------------------------------------

// Where decoded values go. `apply` is for 16 of them at `at`, which is out + i or a copy of it; `from` moves element 0.
struct Set {
  float* out;
  Set from(int64_t i) const { return {out + i}; }
  FEDQ_INLINE_MEMBER void apply(float* at, int64_t, F v) const { store(at, v); }
};
struct Add {
  float* out;
  float weight;
  Add from(int64_t i) const { return {out + i, weight}; }
  FEDQ_INLINE_MEMBER void apply(float* at, int64_t, F v) const { store(at, add(load(at), mul(v, splat(weight)))); }
};
struct Keep {
  float* out;
  const float* total;
  int64_t ahead;  // elements to the residual of the next batch: fetched while this one is computed
  Keep from(int64_t i) const { return {out + i, total + i, ahead}; }
  FEDQ_INLINE_MEMBER void apply(float* at, int64_t i, F v) const {
    __builtin_prefetch(at + ahead);
    store_finite(at, sub(load(total + i), v));
  }
};

template <class Sink>
struct Values {
  Sink sink;
  FEDQ_INLINE_MEMBER void put(int64_t i, F v) const { sink.apply(sink.out + i, i, v); }
  FEDQ_INLINE_MEMBER void put_first(int64_t i, int64_t num, F v) const {
    float copy[16] = {};
    memcpy(copy, sink.out + i, static_cast<size_t>(num) * 4);
    sink.apply(copy, i, v);
    memcpy(sink.out + i, copy, static_cast<size_t>(num) * 4);
  }
};

// Levels at scale 1 of the codes that the rules store.
struct IntegerLevels {
  const uint8_t* codes;
  F zero;  // the code of the value 0
  FEDQ_INLINE_MEMBER F operator()(int64_t i) const { return sub(to_float(load_bytes(codes + i)), zero); }
};
struct SignLevels {
  const uint8_t* codes;
  FEDQ_INLINE_MEMBER F operator()(int64_t i) const {
    uint16_t bits;
    memcpy(&bits, codes + i / 8, 2);
    return flip(splat(1.0f), bits);
  }
};

template <class Levels, class Sink>
static void emit_plain(const Levels& levels, float scale, int64_t num, const Values<Sink>& values) {
  const F scales = splat(scale);
  int64_t i = 0;
  for (; i + 16 <= num; i += 16) values.put(i, mul(levels(i), scales));
  if (i < num) values.put_first(i, num - i, mul(levels(i), scales));
}

// The norm of the rotation is taken from the scale beforehand, which is exact, so that sums stay as small as they can.
// kIsLarge: they are computed times kShrink, and what is beyond float32 in the end is the largest number there.
template <bool kIsLarge, class Levels, class Sink>
static void emit_runs(const Levels& levels, float scale, int64_t num, const uint16_t* flips,
                      const Values<Sink>& values) {
  const F scales = splat(scale * (kIsLarge ? kShrink / 16.0f : 1.0f / 16.0f));
  for (int64_t run = 0; run < num; run += kRun) {
    F v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __builtin_prefetch(values.sink.out + run + kRun + 16 * i);
      v[i] = mul(levels(run + 16 * i), scales);
    }
    hadamard(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if constexpr (kIsLarge) {
        const F end = splat(kLargest * kShrink);
        v[i] = mul(smaller(end, larger(sub(splat(0.0f), end), v[i])), splat(kGrow));
      }
      v[i] = flip(v[i], flips[run / 16 + i]);
    }
    if (run + kRun <= num) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) values.put(run + 16 * i, v[i]);
    } else {
      for (int i = 0; i < 16 && run + 16 * i < num; ++i) {
        const int64_t rest = num - run - 16 * i;
        values.put_first(run + 16 * i, rest < 16 ? rest : 16, v[i]);
      }
    }
  }
}

template <class Levels, class Sink>
static void emit_rotated(const Levels& levels, float scale, int64_t num, const uint16_t* flips,
                         const Values<Sink>& values) {
  const float size = __builtin_fabsf(scale);  // nobody encodes a negative one, but it may come in a message
  const bool is_large = size >= kLarge && size < kInfinity;
  return __builtin_expect(is_large, 0) ? emit_runs<true>(levels, scale, num, flips, values)
                  : emit_runs<false>(levels, scale, num, flips, values);
}

template <class Sink>
static void emit(const BlockPlan& plan, const uint8_t* codes, float scale, int64_t num, const uint16_t* flips,
                 const Sink& sink) {
  const Values<Sink> values{sink};
  if (plan.kind == kSign) {
    const SignLevels levels{codes};
    return plan.rotate ? emit_rotated(levels, scale, num, flips, values) : emit_plain(levels, scale, num, values);
  }
  const float half = plan.kind == kTernary ? 1.0f : static_cast<float>(1 << (plan.bits - 1));
  const float zero = plan.kind != kTernary && (plan.rotate || plan.bits == 1) ? half - 0.5f : half;
  const IntegerLevels levels{codes, splat(zero)};
  return plan.rotate ? emit_rotated(levels, scale, num, flips, values) : emit_plain(levels, scale, num, values);
}

// ---- spans of whole blocks ------------------------------------------------------------------------------------------

constexpr int64_t kBatch = 1024;  // most elements of a batch of small blocks
constexpr int64_t kBatchBlocks = kBatch / 16;

// Elements that are worked on at a time: several small blocks, or one large one. A rotated block has the longer chain
// of operations to hide; otherwise small batches spread the traffic of memory better. Blocks of 8 do not fill a vector.
FEDQ_INLINE int64_t batch_elements(const BlockPlan& plan) {
  const int64_t batch = plan.rotate ? kBatch : kRun;
  return plan.block < 16 || plan.block > batch ? plan.block : batch;
}

// Working memory for one batch: on the stack if it is small.
class Scratch {
 public:
  explicit Scratch(const BlockPlan& plan) {
    const int64_t width = padded(batch_elements(plan), kRun);
    const size_t size = static_cast<size_t>(2 * width * 4 + width + 64 + width / 8 + 64);
    uint8_t* at = small_;
    if (size > kSmall) at = heap_ = static_cast<uint8_t*>(malloc(size + 64));
    if (at == nullptr) return;
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64;
    total = reinterpret_cast<float*>(at);
    rotated = total + width;
    codes = reinterpret_cast<uint8_t*>(rotated + width);
    flips = reinterpret_cast<uint16_t*>(codes + width + 64);
  }
  ~Scratch() { free(heap_); }
  Scratch(const Scratch&) = delete;

  bool ok() const { return total != nullptr; }

  float* total = nullptr;
  float* rotated = nullptr;
  uint8_t* codes = nullptr;
  uint16_t* flips = nullptr;

 private:
  static constexpr size_t kSmall = 2 * kBatch * 4 + kBatch + 64 + kBatch / 8 + 64;
  uint8_t* heap_ = nullptr;
  uint8_t small_[kSmall + 64];
};

FEDQ_INLINE bool is_cast(const BlockPlan& plan) { return plan.kind >= kFp32; }

// Elements that the work may be cut at: whole blocks and whole bytes of codes.
FEDQ_INLINE int64_t grain(const BlockPlan& plan) {
  return is_cast(plan) ? kRun : plan.kind == kTernary ? 5 * plan.block : plan.block;
}

FEDQ_INLINE int64_t num_codes(const BlockPlan& plan, int64_t num) { return plan.rotate ? padded(num, kRun) : num; }

FEDQ_INLINE int64_t codes_nbytes(const BlockPlan& plan, int64_t num) {
  if (is_cast(plan)) return num * item_nbytes(plan.kind);
  const int64_t codes = num_codes(plan, num);
  return plan.kind == kTernary ? (codes + 4) / 5 : (codes * plan.bits + 7) / 8;
}

// Where the codes of element i of a batch are in the scratch.
FEDQ_INLINE uint8_t* codes_at(const BlockPlan& plan, uint8_t* codes, int64_t i) {
  return codes + (plan.kind == kSign ? i / 8 : i);
}

// Reads a batch of num elements at x, rotated if the plan says so, and zeros to the end of the last block. Returns
// where the values are.
static const float* read_batch(const BlockPlan& plan, Keys keys, const void* x, int64_t dtype, const float* residual,
                               int64_t num, int64_t first, const Scratch& s) {
  const int64_t codes = num_codes(plan, num), width = padded(padded(codes, plan.block), 16);
  if (!plan.rotate && !residual && dtype == 0 && num == width) return static_cast<const float*>(x);
  stage(x, dtype, residual, num, width, s.total);
  if (!plan.rotate) return s.total;
  draw_flips(first, codes, keys.shared, s.flips);
  for (int64_t i = 0; i < codes; i += kRun) rotate_run(s.total + i, s.flips + i / 16, s.rotated + i);
  if (codes < width) memset(s.rotated + codes, 0, static_cast<size_t>(width - codes) * 4);
  return s.rotated;
}

static float code_block(const BlockPlan& plan, const Block& b, float measured) {
  if (plan.kind == kSign) return code_sign(plan, b, measured);
  return plan.kind == kTernary ? code_ternary(plan, b, measured) : code_integer(plan, b, measured);
}

// Where a batch is read from.
struct Source {
  const void* x;
  int64_t dtype;
  const float* residual;
  int64_t num;
};

// Writes the values of a block at element `at` of a batch into the scratch anew: where x and residual are finite and
// their sum is not, it is the largest number of its sign. Returns whether all of them are finite.
static bool reread(const Source& source, int64_t at, int64_t width, float* y) {
  const int64_t num = source.num - at < width ? source.num - at : width;
  stage(input_at(source.x, source.dtype, at), source.dtype, nullptr, num, width, y);
  bool all_finite = true;
  for (int64_t i = 0; i < num; ++i) {
    const float x = y[i], residual = source.residual ? source.residual[at + i] : 0.0f, total = x + residual;
    const bool overflows = __builtin_isinf(total) && __builtin_isfinite(x) && __builtin_isfinite(residual);
    y[i] = overflows ? __builtin_copysignf(kLargest, total) : total;
    all_finite &= __builtin_isfinite(y[i]);
  }
  return all_finite;
}

// A block with infinities and NaNs, or whose sums may leave float32's range: finite values are coded times kShrink.
__attribute__((noinline, cold))
static float code_large(const BlockPlan& plan, const Source& source, int64_t at, Block b, const uint16_t* flips,
                        float* y) {
  const int64_t width = b.width;
  const bool shrinks = reread(source, at, width, y);
  if (shrinks) for (int64_t i = 0; i < width; i += 16) store(y + i, mul(load(y + i), splat(kShrink)));
  if (plan.rotate) for (int64_t i = 0; i < b.num; i += kRun) rotate_run(y + i, flips + (at + i) / 16, y + i);
  b.y = y;
  if (!shrinks) return code_block(plan, b, measure(plan, b));
  b.largest *= kShrink;
  return code_block(plan, b, measure(plan, b)) * kGrow;
}

// Codes a batch into the scratch and its scales into an array.
static void code_batch(const BlockPlan& plan, Keys keys, const Source& source, const float* y, int64_t num,
                       int64_t first, const char* ahead, const Scratch& s, float* scales) {
  const int64_t num_blocks = (num + plan.block - 1) / plan.block;
  const auto block = [&](int64_t j) {
    const int64_t at = j * plan.block, size = num - at < plan.block ? num - at : plan.block;
    uint8_t* into = codes_at(plan, s.codes, at);
    return Block{y + at,      size, padded(plan.block, 16), first + at, keys.noise, into, ahead + 4 * at,
                 plan.largest_scale};
  };
  for (int64_t j = 0; j < num_blocks; ++j) scales[j] = measure(plan, block(j));
  for (int64_t j = 0; j < num_blocks; ++j) {
    const Block b = block(j);
    const int64_t at = j * plan.block;
    scales[j] = __builtin_expect(scales[j] < kLarge, 1) ? code_block(plan, b, scales[j])
                                                        : code_large(plan, source, at, b, s.flips, s.rotated + at);
  }
}

template <class Sink>
static void emit_batch(const BlockPlan& plan, const Scratch& s, const float* scales, int64_t num, const Sink& sink) {
  for (int64_t at = 0, j = 0; at < num; at += plan.block, ++j) {
    const int64_t size = num - at < plan.block ? num - at : plan.block;
    emit(plan, codes_at(plan, s.codes, at), scales[j], size, s.flips + at / 16, sink.from(at));
  }
}

// Whole blocks from element `first` on (a multiple of the grain); x, residual, codes and scales point at them.
static bool encode_span(const BlockPlan& plan, Keys keys, const void* x, int64_t dtype, float* residual, int64_t num,
                        int64_t first, uint8_t* codes, uint8_t* scales) {
  if (plan.kind == kFp32) return encode_cast<kFp32>(x, dtype, residual, num, codes), true;
  if (plan.kind == kBf16) return encode_cast<kBf16>(x, dtype, residual, num, codes), true;
  if (plan.kind == kFp16) return encode_cast<kFp16>(x, dtype, residual, num, codes), true;
  const Scratch s(plan);
  if (!s.ok()) return false;
  const int64_t batch = batch_elements(plan);
  TritWriter trits(codes);
  for (int64_t at = 0; at < num; at += batch) {
    const int64_t size = num - at < batch ? num - at : batch, size_codes = num_codes(plan, size);
    float* kept = residual ? residual + at : nullptr;
    const float* y = read_batch(plan, keys, input_at(x, dtype, at), dtype, kept, size, first + at, s);
    const char* ahead = static_cast<const char*>(input_at(x, dtype, at + batch));
    float values[kBatchBlocks];
    const Source source{input_at(x, dtype, at), dtype, kept, size};
    code_batch(plan, keys, source, y, size_codes, first + at, ahead, s, values);
    for (int64_t j = 0; j * plan.block < size_codes; ++j, scales += 2) {
      const uint16_t half = static_cast<uint16_t>(bf16_bits(values[j]));
      memcpy(scales, &half, 2);
    }
    if (plan.kind == kTernary) {
      trits.write(s.codes, size_codes);
    } else {
      pack(plan, s.codes, size_codes, codes);
      codes += size_codes * plan.bits / 8;
    }
    if (kept) emit_batch(plan, s, values, size, Keep{kept, s.total, batch});
  }
  trits.finish();
  return true;
}

// The counterpart: codes and scales point at the blocks, sink.out at their elements.
template <class Sink>
static bool decode_span(const BlockPlan& plan, Keys keys, const uint8_t* codes, const uint8_t* scales, int64_t num,
                        int64_t first, const Sink& sink) {
  const Values<Sink> all{sink};
  if (plan.kind == kFp32) return decode_cast<kFp32>(codes, num, all), true;
  if (plan.kind == kBf16) return decode_cast<kBf16>(codes, num, all), true;
  if (plan.kind == kFp16) return decode_cast<kFp16>(codes, num, all), true;
  const Scratch s(plan);
  if (!s.ok()) return false;
  const int64_t batch = batch_elements(plan);
  TritReader trits(codes);
  for (int64_t at = 0; at < num; at += batch) {
    const int64_t size = num - at < batch ? num - at : batch, size_codes = num_codes(plan, size);
    float values[kBatchBlocks];
    for (int64_t j = 0; j * plan.block < size_codes; ++j, scales += 2) {
      uint16_t half;
      memcpy(&half, scales, 2);
      values[j] = float_of(static_cast<uint32_t>(half) << 16);
    }
    if (plan.kind == kTernary) {
      trits.read(s.codes, size_codes);
    } else {
      unpack(plan, codes, size_codes, s.codes);
      codes += size_codes * plan.bits / 8;
    }
    if (plan.rotate) draw_flips(first + at, size_codes, keys.shared, s.flips);
    emit_batch(plan, s, values, size, sink.from(at));
  }
  return true;
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

FEDQ_INLINE int64_t task_elements(int64_t grain) { return padded(kTaskElements, grain); }

struct EncodeJob {
  const BlockPlan* plan;
  Keys keys;
  const void* x;
  int64_t dtype;
  float* residual;
  int64_t num, step;
  uint8_t* out;
  int64_t failed;
};

static void encode_task(void* context, int64_t index) {
  EncodeJob& job = *static_cast<EncodeJob*>(context);
  const int64_t first = index * job.step, num = job.num - first < job.step ? job.num - first : job.step;
  uint8_t* scales = job.out + codes_nbytes(*job.plan, job.num);
  if (!is_cast(*job.plan)) scales += first / job.plan->block * 2;
  if (!encode_span(*job.plan, job.keys, input_at(job.x, job.dtype, first), job.dtype,
                   job.residual ? job.residual + first : nullptr, num, first,
                   job.out + codes_nbytes(*job.plan, first), scales))
    __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
}

static int64_t encode_blocks(const BlockPlan* plan, const void* x, int64_t dtype, float* residual, int64_t num,
                             uint64_t seed, uint8_t* out, int64_t num_threads) {
  const int64_t step = task_elements(grain(*plan));
  EncodeJob job{plan, keys_of(seed), x, dtype, residual, num, step, out, 0};
  parallel((num + step - 1) / step, static_cast<int>(num_threads), encode_task, &job);
  return -job.failed;
}

struct DecodeJob {
  const BlockPlan* plan;
  Keys keys;
  const uint8_t* data;
  int64_t num, step;
  float* out;
  bool weighted;
  float weight;
  int64_t failed;
};

static bool decode_part(const BlockPlan& plan, Keys keys, const uint8_t* data, int64_t num_all, int64_t first,
                        int64_t num, float* out, bool weighted, float weight) {
  const uint8_t* scales = data + codes_nbytes(plan, num_all);
  if (!is_cast(plan)) scales += first / plan.block * 2;
  const uint8_t* codes = data + codes_nbytes(plan, first);
  return weighted ? decode_span(plan, keys, codes, scales, num, first, Add{out, weight})
                  : decode_span(plan, keys, codes, scales, num, first, Set{out});
}

static void decode_task(void* context, int64_t index) {
  DecodeJob& job = *static_cast<DecodeJob*>(context);
  const int64_t first = index * job.step, num = job.num - first < job.step ? job.num - first : job.step;
  if (!decode_part(*job.plan, job.keys, job.data, job.num, first, num, job.out + first, job.weighted, job.weight))
    __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
}

static int64_t decode_blocks(const BlockPlan* plan, const uint8_t* data, int64_t num, uint64_t seed, float* out,
                             int64_t weighted, float weight, int64_t num_threads) {
  const int64_t step = task_elements(grain(*plan));
  DecodeJob job{plan, keys_of(seed), data, num, step, out, weighted != 0, weight, 0};
  parallel((num + step - 1) / step, static_cast<int>(num_threads), decode_task, &job);
  return -job.failed;
}

struct ReduceJob {
  const BlockPlan* plan_in;
  const Part* parts;
  int64_t num_parts;
  const BlockPlan* plan_out;
  Keys keys;
  int64_t num, chunk, step;
  uint8_t* out;
  float* residual;
  int64_t failed;
};

// Sums a chunk that stays in cache over all payloads, then encodes it.
static bool reduce_chunk(const ReduceJob& job, int64_t first, int64_t num, float* sum) {
  memset(sum, 0, static_cast<size_t>(num) * 4);
  for (int64_t i = 0; i < job.num_parts; ++i) {
    const Part& part = job.parts[i];
    if (!decode_part(*job.plan_in, keys_of(part.seed), part.data, job.num, first, num, sum, true, part.weight))
      return false;
  }
  uint8_t* scales = job.out + codes_nbytes(*job.plan_out, job.num);
  if (!is_cast(*job.plan_out)) scales += first / job.plan_out->block * 2;
  return encode_span(*job.plan_out, job.keys, sum, 0, job.residual ? job.residual + first : nullptr, num, first,
                     job.out + codes_nbytes(*job.plan_out, first), scales);
}

static void reduce_task(void* context, int64_t index) {
  ReduceJob& job = *static_cast<ReduceJob*>(context);
  const int64_t begin = index * job.step, end = job.num - begin < job.step ? job.num : begin + job.step;
  float* sum = static_cast<float*>(malloc(static_cast<size_t>(job.chunk) * 4));
  bool good = sum != nullptr;
  for (int64_t first = begin; good && first < end; first += job.chunk)
    good = reduce_chunk(job, first, end - first < job.chunk ? end - first : job.chunk, sum);
  free(sum);
  if (!good) __atomic_store_n(&job.failed, 1, __ATOMIC_RELAXED);
}

static int64_t reduce_blocks(const BlockPlan* plan_in, const Part* parts, int64_t num_parts, const BlockPlan* plan_out,
                             int64_t num, uint64_t seed, uint8_t* out, float* residual, int64_t num_threads) {
  // Grains are powers of two, or five times one.
  const int64_t a = grain(*plan_in), b = grain(*plan_out), fives = a % 5 && b % 5 ? 1 : 5;
  const int64_t twos_a = a % 5 ? a : a / 5, twos_b = b % 5 ? b : b / 5;
  const int64_t chunk = padded(4096, fives * (twos_a > twos_b ? twos_a : twos_b)), step = padded(kTaskElements, chunk);
  ReduceJob job{plan_in, parts, num_parts, plan_out, keys_of(seed), num, chunk, step, out, residual, 0};
  parallel((num + step - 1) / step, static_cast<int>(num_threads), reduce_task, &job);
  return -job.failed;
}
