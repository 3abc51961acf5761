// The sparse codecs: choose what is kept, write positions and values, read them back.
//
// Encoding has two steps, because the payload's size may depend on the values: `sparse_select` finds what is kept and
// remembers its total and its old residual; `sparse_write` turns the residual into x + residual and, while that is still
// in cache, codes the kept values and takes off what they send. Where one pass can do both steps' work over the tensor
// it does: the blocks' choice is left to `sparse_write`, the threshold's residual is updated by `sparse_select`. The
// bytes are those of fedq/kernels/reference/sparse.py.
namespace sparse {

static constexpr int64_t kGroup = 4096;    // elements that share a scale
static constexpr int64_t kChunk = 1 << 15;  // elements a task: they and their residual stay in the second-level cache
static constexpr int kLanes = 16;
static constexpr uint32_t kAllLanes = 0xFFFF;
static constexpr uint32_t kInfinity = 0x7F800000;
static constexpr int64_t kNoLimit = INT64_MAX;

FEDQ_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FEDQ_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(begin, end) for the ranges of `grain` that make up [0, num).
template <class Function>
static void for_ranges(int64_t num, int64_t grain, int64_t num_threads, const Function& f) {
  struct Context {
    const Function& f;
    int64_t num, grain;
  } context{f, num, grain};
  parallel(
      ceil_div(num, grain), (int)num_threads,
      [](void* given, int64_t i) {
        const Context& c = *(const Context*)given;
        c.f(i * c.grain, least(c.num, (i + 1) * c.grain));
      },
      &context);
}

// The first i in [0, num) where a condition holds that stays true once it is, num if nowhere.
template <class Function>
static int64_t first_where(int64_t num, const Function& holds) {
  int64_t first = 0;
  for (int64_t span = num; span > 0;) {
    const int64_t half = span / 2;
    if (holds(first + half)) {
      span = half;
    } else {
      first += half + 1;
      span -= half + 1;
    }
  }
  return first;
}

// Memory of a function's own, freed at its end.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t num) : data((T*)malloc((size_t)(num > 0 ? num : 1) * sizeof(T))) {}
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) const { return data[i]; }
};

// ---- reading -------------------------------------------------------------------------------------------------------

FEDQ_INLINE float float_of(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}

FEDQ_INLINE uint32_t word_of(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}

FEDQ_INLINE float absolute(float value) { return float_of(word_of(value) & 0x7FFFFFFF); }

// Magnitudes by which elements are chosen: a NaN counts as infinite. Their words are in the same order.
FEDQ_INLINE uint32_t magnitude_of(float value) {
  const uint32_t word = word_of(value) & 0x7FFFFFFF;
  return word < kInfinity ? word : kInfinity;
}
FEDQ_INLINE F magnitudes(F values) { return smaller(magnitude(values), splat(float_of(kInfinity))); }
FEDQ_INLINE uint32_t where_at_least(F a, F b) { return kAllLanes & ~mask_bits(less(a, b)); }
FEDQ_INLINE float largest_lane(F magnitudes) { return float_of((uint32_t)max_lanes(bits_of(magnitudes))); }
FEDQ_INLINE uint32_t where_equal(F a, F b) { return where_at_least(a, b) & where_at_least(b, a); }

struct Float32 {
  using Stored = float;
  static F load_lanes(const float* p) { return load(p); }
  static float value(float stored) { return stored; }
};
struct BFloat16 {
  using Stored = uint16_t;
  static F load_lanes(const uint16_t* p) { return load_bf16(p); }
  static float value(uint16_t stored) { return float_of((uint32_t)stored << 16); }
};
struct Float16 {
  using Stored = uint16_t;
  static F load_lanes(const uint16_t* p) { return load_fp16(p); }
  static float value(uint16_t stored) {
    alignas(64) float lane[kLanes];
    const uint16_t padded[kLanes] = {stored};
    store(lane, load_fp16(padded));
    return lane[0];
  }
};

// Calls f(type) with the type of the input's values.
template <class Function>
FEDQ_INLINE auto with_type(const SparseInput& in, const Function& f) {
  if (in.dtype == 0) return f(Float32());
  return in.dtype == 1 ? f(BFloat16()) : f(Float16());
}

// Totals of the whole vector of elements i .. i + 15.
template <class Type>
FEDQ_INLINE F whole_totals(const SparseInput& in, int64_t i) {
  const F values = Type::load_lanes((const typename Type::Stored*)in.x + i);
  return in.residual == nullptr ? values : add(values, load(in.residual + i));
}

template <class Type>
FEDQ_INLINE float total_at(const SparseInput& in, int64_t i) {
  const float value = Type::value(((const typename Type::Stored*)in.x)[i]);
  return in.residual == nullptr ? value : value + in.residual[i];
}

FEDQ_INLINE float total_at(const SparseInput& in, int64_t i) {
  return with_type(in, [&](auto type) { return total_at<decltype(type)>(in, i); });
}

// Totals of elements i .. i + 15; from `end` on zeros.
template <class Type>
FEDQ_INLINE F totals(const SparseInput& in, int64_t i, int64_t end) {
  if (end - i >= kLanes) return whole_totals<Type>(in, i);
  alignas(64) float padded[kLanes] = {};
  for (int64_t j = i; j < end; ++j) padded[j - i] = total_at<Type>(in, j);
  return load(padded);
}

FEDQ_INLINE F totals(const SparseInput& in, int64_t i, int64_t end) {
  if (in.dtype == 0) return totals<Float32>(in, i, end);
  return in.dtype == 1 ? totals<BFloat16>(in, i, end) : totals<Float16>(in, i, end);
}

FEDQ_INLINE uint32_t real_lanes(int64_t i, int64_t end) {
  return end - i < kLanes ? kAllLanes >> (kLanes - (end - i)) : kAllLanes;
}

// Replaces the residual of elements i .. i + 15 by their totals; where those are not finite it stays.
FEDQ_INLINE void store_totals(const SparseInput& in, int64_t i, int64_t end, F values) {
  if (end - i >= kLanes) {
    store_finite(in.residual + i, values);
    return;
  }
  alignas(64) float lane[kLanes];
  store(lane, values);
  for (int64_t j = i; j < end; ++j)
    if (magnitude_of(lane[j - i]) != kInfinity) in.residual[j] = lane[j - i];
}

static void update_residual(const SparseInput& in, int64_t begin, int64_t end) {
  with_type(in, [&](auto type) {
    for (int64_t i = begin; i < end; i += kLanes) store_totals(in, i, end, totals<decltype(type)>(in, i, end));
  });
}

// ---- what is kept --------------------------------------------------------------------------------------------------

struct Selection {
  int64_t num;
  int64_t* index;  // sorted; padding of the last block lies at or beyond the number of elements
  float* total;
  float* old;  // the residual before, 0 without one

  void set(int64_t at, const SparseInput& in, int64_t i) const {
    const bool inside = i < in.num;
    index[at] = i;
    total[at] = inside ? total_at(in, i) : 0.0f;
    old[at] = inside && in.residual != nullptr ? in.residual[i] : 0.0f;
  }

  // The first entry at or beyond an index.
  int64_t first_from(int64_t wanted) const {
    return first_where(num, [&](int64_t i) { return index[i] >= wanted; });
  }
};

static void free_selection(Selection* selection) {
  if (selection == nullptr) return;
  free(selection->index);
  free(selection->total);
  free(selection->old);
  free(selection);
}

static Selection* new_selection(int64_t num) {
  Selection* selection = (Selection*)malloc(sizeof(Selection));
  if (selection == nullptr) return nullptr;
  const size_t room = (size_t)(num > 0 ? num : 1);
  *selection = {num, (int64_t*)malloc(room * sizeof(int64_t)), (float*)malloc(room * sizeof(float)),
                (float*)malloc(room * sizeof(float))};
  if (selection->index != nullptr && selection->total != nullptr && selection->old != nullptr) return selection;
  free_selection(selection);
  return nullptr;
}

// ---- exact selection by rank: three digits of 11, 11 and 9 bits ----------------------------------------------------

static constexpr int kDigits = 3;
static constexpr int kShift[kDigits] = {20, 9, 0};
static constexpr int kBins[kDigits] = {2048, 2048, 512};

// The k-th largest magnitude while its digits become known.
struct Rank {
  uint32_t value = 0;  // the digits known so far
  uint32_t known = 0;  // mask of their bits
  int64_t left;        // its rank among those that agree in these digits
  int64_t ties = 0;    // once all are known: how many are equal to it

  explicit Rank(int64_t k) : left(k) {}

  void take(int digit, const int64_t* counts) {
    int bin = kBins[digit] - 1;
    while (counts[bin] < left) left -= counts[bin--];
    value |= (uint32_t)bin << kShift[digit];
    known |= (uint32_t)(kBins[digit] - 1) << kShift[digit];
    ties = counts[bin];
  }
};

template <class Count>
FEDQ_INLINE void count_digit(const Rank& rank, int digit, uint32_t magnitude, Count* counts) {
  if ((magnitude & rank.known) == rank.value) ++counts[magnitude >> kShift[digit] & (kBins[digit] - 1)];
}

// The k-th largest of num magnitudes in memory.
static Rank rank_of(const float* magnitude, int64_t num, int64_t k) {
  Rank rank(k);
  for (int digit = 0; digit < kDigits; ++digit) {
    int64_t counts[2048] = {};
    for (int64_t i = 0; i < num; ++i) count_digit(rank, digit, word_of(magnitude[i]), counts);
    rank.take(digit, counts);
  }
  return rank;
}

// The k-th largest of all totals: three passes over the tensor.
static Rank rank_of(const SparseInput& in, int64_t k, int64_t num_threads) {
  Rank rank(k);
  for (int digit = 0; digit < kDigits; ++digit) {
    int64_t counts[2048] = {};
    for_ranges(in.num, 4 * kChunk, num_threads, [&](int64_t begin, int64_t end) {
      uint32_t own[2048] = {};
      alignas(64) float lane[kLanes];
      for (int64_t i = begin; i < end; i += kLanes) {
        store(lane, magnitudes(totals(in, i, end)));
        for (int j = 0; j < least(kLanes, end - i); ++j) count_digit(rank, digit, word_of(lane[j]), own);
      }
      for (int bin = 0; bin < kBins[digit]; ++bin)
        if (own[bin] != 0) __atomic_fetch_add(&counts[bin], own[bin], __ATOMIC_RELAXED);
    });
    rank.take(digit, counts);
  }
  return rank;
}

// ---- collecting all above a threshold ------------------------------------------------------------------------------

// What a chunk has at or above a threshold.
struct Run {
  int64_t num = 0, room = 0;
  uint32_t* local = nullptr;  // positions in the chunk
  float* total = nullptr;
  float* old = nullptr;

  bool grow(int64_t wanted) {
    uint32_t* new_local = (uint32_t*)realloc(local, (size_t)wanted * sizeof(uint32_t));
    if (new_local != nullptr) local = new_local;
    float* new_total = (float*)realloc(total, (size_t)wanted * sizeof(float));
    if (new_total != nullptr) total = new_total;
    float* new_old = (float*)realloc(old, (size_t)wanted * sizeof(float));
    if (new_old != nullptr) old = new_old;
    if (new_local == nullptr || new_total == nullptr || new_old == nullptr) return false;
    room = wanted;
    return true;
  }
};

struct Runs {
  const int64_t num;
  Buffer<Run> run;
  explicit Runs(int64_t num_elements) : num(ceil_div(num_elements, kChunk)), run(num) {
    if (run.data != nullptr)
      for (int64_t i = 0; i < num; ++i) run[i] = Run();
  }
  ~Runs() {
    if (run.data == nullptr) return;
    for (int64_t i = 0; i < num; ++i) {
      free(run[i].local);
      free(run[i].total);
      free(run[i].old);
    }
  }
  int64_t total() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < num; ++i) sum += run[i].num;
    return sum;
  }
};

// Collects one chunk: all above the threshold, and the first `ties` equal to it.
template <class Type>
static bool collect_chunk(const SparseInput& in, int64_t begin, int64_t end, uint32_t threshold, int64_t ties,
                          bool updates, Run& run) {
  const F limit = splat(float_of(threshold));
  alignas(64) float lane[kLanes];
  for (int64_t i = begin; i < end; i += kLanes) {
    const F values = totals<Type>(in, i, end);
    uint32_t found = where_at_least(magnitudes(values), limit) & real_lanes(i, end);
    if (found != 0) {
      if (run.room - run.num < kLanes && !run.grow(2 * run.room + 256)) return false;
      store(lane, values);
      for (; found != 0; found &= found - 1) {
        const int j = __builtin_ctz(found);
        if (magnitude_of(lane[j]) == threshold && ties-- <= 0) continue;
        run.local[run.num] = (uint32_t)(i - begin + j);
        run.total[run.num] = lane[j];
        run.old[run.num] = in.residual == nullptr ? 0.0f : in.residual[i + j];
        ++run.num;
      }
    }
    if (updates) store_totals(in, i, end, values);
  }
  return true;
}

// Collects all chunks; `ties` has a number for each, or is null for no limit.
static bool collect(const SparseInput& in, uint32_t threshold, const int64_t* ties, bool updates, int64_t num_threads,
                    const Runs& runs) {
  int failed = 0;
  for_ranges(in.num, kChunk, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t i = begin / kChunk, limit = ties == nullptr ? kNoLimit : ties[i];
    const bool done = with_type(in, [&](auto type) {
      return collect_chunk<decltype(type)>(in, begin, end, threshold, limit, updates, runs.run[i]);
    });
    if (!done) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed == 0;
}

static Selection* join(const Runs& runs, int64_t num_threads) {
  Buffer<int64_t> first(runs.num);
  Selection* selection = first.data == nullptr ? nullptr : new_selection(runs.total());
  if (selection == nullptr) return nullptr;
  int64_t sum = 0;
  for (int64_t i = 0; i < runs.num; ++i) {
    first[i] = sum;
    sum += runs.run[i].num;
  }
  for_ranges(runs.num, 1, num_threads, [&](int64_t i, int64_t) {
    const Run& run = runs.run[i];
    if (run.num == 0) return;
    for (int64_t j = 0; j < run.num; ++j) selection->index[first[i] + j] = i * kChunk + run.local[j];
    memcpy(selection->total + first[i], run.total, (size_t)run.num * sizeof(float));
    memcpy(selection->old + first[i], run.old, (size_t)run.num * sizeof(float));
  });
  return selection;
}

// ---- threshold -----------------------------------------------------------------------------------------------------

static Selection* select_threshold(const SparsePlan& plan, const SparseInput& in, int64_t num_threads) {
  const Runs runs(in.num);
  if (runs.run.data == nullptr) return nullptr;
  if (!collect(in, word_of(plan.value), nullptr, in.residual != nullptr, num_threads, runs)) return nullptr;
  return join(runs, num_threads);
}

// ---- global top-k --------------------------------------------------------------------------------------------------

FEDQ_INLINE uint32_t mix32(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

FEDQ_INLINE uint32_t hash32(uint64_t counter, uint32_t key) {
  return mix32(mix32((uint32_t)counter ^ key) + (uint32_t)(counter >> 32) + 0x9E3779B9u);
}

// A magnitude that the k-th largest very likely reaches and not many others, from a sample of 131,072 totals; 0 where
// a sample is no help: few elements, a large share kept, or crowds of equal magnitudes.
static uint32_t guess_threshold(const SparseInput& in, int64_t k) {
  constexpr int64_t num_lines = 8192, num_sampled = num_lines * kLanes;
  if (in.num < 4 * num_sampled || k > in.num / 8) return 0;
  Buffer<float> sample(num_sampled);
  if (sample.data == nullptr) return 0;
  const int64_t stride = in.num / kLanes / num_lines;
  for (int64_t line = 0; line < num_lines; ++line) {
    const int64_t i = (line * stride + hash32((uint64_t)line, 0) % stride) * kLanes;
    store(&sample[line * kLanes], magnitudes(totals(in, i, in.num)));
  }
  // Neighbours are alike, so the deviation of the share above a magnitude is taken as twice that of independent draws.
  const float expected = (float)num_sampled * ((float)k / (float)in.num);
  const int64_t wanted = (int64_t)(expected + 8.0f * __builtin_sqrtf(expected) + 16.0f);
  const Rank rank = rank_of(sample.data, num_sampled, wanted);
  return rank.ties > wanted ? 0 : rank.value;
}

// Keeps those above the k-th largest magnitude of a selection and the first of its ties, in place.
static void shrink(Selection& selection, const Rank& rank) {
  int64_t num = 0, ties = rank.left;
  for (int64_t i = 0; i < selection.num; ++i) {
    const uint32_t magnitude = magnitude_of(selection.total[i]);
    if (magnitude < rank.value || (magnitude == rank.value && ties-- <= 0)) continue;
    selection.index[num] = selection.index[i];
    selection.total[num] = selection.total[i];
    selection.old[num] = selection.old[i];
    ++num;
  }
  selection.num = num;
}

static Selection* select_strongest_by_guess(const SparseInput& in, int64_t k, uint32_t guess, int64_t num_threads) {
  const Runs runs(in.num);
  if (runs.run.data == nullptr || !collect(in, guess, nullptr, false, num_threads, runs)) return nullptr;
  if (runs.total() < k) return nullptr;
  Selection* selection = join(runs, num_threads);
  if (selection == nullptr) return nullptr;
  Buffer<float> chosen(selection->num);
  if (chosen.data == nullptr) {
    free_selection(selection);
    return nullptr;
  }
  for (int64_t i = 0; i < selection->num; ++i) chosen[i] = float_of(magnitude_of(selection->total[i]));
  shrink(*selection, rank_of(chosen.data, selection->num, k));
  return selection;
}

static Selection* select_strongest_by_rank(const SparseInput& in, int64_t k, int64_t num_threads) {
  const Rank rank = rank_of(in, k, num_threads);
  const Runs runs(in.num);
  Buffer<int64_t> ties(runs.num);
  if (runs.run.data == nullptr || ties.data == nullptr) return nullptr;
  for_ranges(in.num, kChunk, num_threads, [&](int64_t begin, int64_t end) {
    int64_t num = 0;
    for (int64_t i = begin; i < end; i += kLanes)
      num += __builtin_popcount(where_equal(magnitudes(totals(in, i, end)), splat(float_of(rank.value))) & real_lanes(i, end));
    ties[begin / kChunk] = num;
  });
  int64_t left = rank.left;
  for (int64_t i = 0; i < runs.num; ++i) left -= ties[i] = least(ties[i], left);
  return collect(in, rank.value, ties.data, false, num_threads, runs) ? join(runs, num_threads) : nullptr;
}

static Selection* select_strongest(const SparseInput& in, int64_t k, int64_t num_threads) {
  const uint32_t guess = guess_threshold(in, k);
  Selection* selection = guess == 0 ? nullptr : select_strongest_by_guess(in, k, guess, num_threads);
  return selection != nullptr ? selection : select_strongest_by_rank(in, k, num_threads);
}

// ---- top-k of each block -------------------------------------------------------------------------------------------

// The first of the largest magnitudes of a block.
static int64_t strongest_of(const SparseInput& in, int64_t begin, int64_t end) {
  F best = splat(0.0f);
  for (int64_t i = begin; i < end; i += kLanes) best = larger(best, magnitudes(totals(in, i, end)));
  const F limit = splat(largest_lane(best));
  for (int64_t i = begin;; i += kLanes) {
    const uint32_t found = where_at_least(magnitudes(totals(in, i, end)), limit);
    if (found != 0) return i + __builtin_ctz(found);
  }
}

// The same for whole blocks of kVectors vectors, which stay in registers, with the update of the residual.
template <class Type, int kVectors>
static void strongest_of_blocks(const SparseInput& in, int64_t first, int64_t last, const Selection& selection) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kVectors * kLanes;
    F values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = whole_totals<Type>(in, begin + v * kLanes);
    F best = magnitudes(values[0]);
    for (int v = 1; v < kVectors; ++v) best = larger(best, magnitudes(values[v]));
    const F limit = splat(largest_lane(best));
    int64_t at = begin;
    for (int v = kVectors - 1; v >= 0; --v) {
      const uint32_t found = where_at_least(magnitudes(values[v]), limit);
      at = found != 0 ? begin + v * kLanes + __builtin_ctz(found) : at;
    }
    selection.index[block] = at;
    selection.total[block] = total_at<Type>(in, at);
    if (in.residual == nullptr) continue;
    selection.old[block] = in.residual[at];
    for (int v = 0; v < kVectors; ++v) store_finite(in.residual + begin + v * kLanes, values[v]);
  }
}

static int64_t count_at_least(const float* values, int64_t num, uint32_t threshold) {
  const F limit = splat(float_of(threshold));
  int64_t count = 0;
  for (int64_t i = 0; i < num; i += kLanes) count += __builtin_popcount(where_at_least(load(values + i), limit));
  return count;
}

// The k-th largest magnitude of a block, by bisection of its bits where that is cheaper than counting digits. `left`
// is then only a bound: any number of ties up to it may be taken.
static Rank rank_in_block(const float* values, int64_t num, int64_t k) {
  if (num > kGroup || num % kLanes != 0) return rank_of(values, num, k);
  Rank rank(k);
  for (uint32_t bit = 1u << 30; bit != 0; bit >>= 1) {
    if ((rank.value | bit) > kInfinity) continue;
    const int64_t count = count_at_least(values, num, rank.value | bit);
    if (count < k) continue;
    rank.value |= bit;
    if (count == k) return rank;  // all of them, whatever the lower bits are
  }
  rank.left = rank.value == kInfinity ? k : k - count_at_least(values, num, rank.value + 1);
  return rank;
}

static void select_in_block(const SparseInput& in, int64_t begin, int64_t block, int64_t k, float* values, int64_t at,
                            const Selection& selection) {
  const int64_t end = least(in.num, begin + block);
  for (int64_t i = begin; i < begin + block; i += kLanes)
    store(values + (i - begin), i < end ? magnitudes(totals(in, i, end)) : splat(0.0f));
  const Rank rank = rank_in_block(values, block, k);
  const F limit = splat(float_of(rank.value));
  int64_t ties = rank.left;
  for (int64_t i = 0; i < block; i += kLanes) {
    uint32_t found = where_at_least(load(values + i), limit) & real_lanes(i, block);
    for (; found != 0; found &= found - 1) {
      const int64_t j = i + __builtin_ctz(found);
      if (word_of(values[j]) == rank.value && ties-- <= 0) continue;
      selection.set(at++, in, begin + j);
    }
  }
}

// Chooses in the blocks of elements begin .. end (whole blocks, but for the tensor's last) and updates the residual.
// Returns false without memory.
static bool select_in_blocks(const SparsePlan& plan, const SparseInput& in, int64_t begin, int64_t end,
                             const Selection& selection) {
  const int64_t block = plan.block, k = plan.k;
  int64_t first = begin / block;
  if (k == 1)
    with_type(in, [&](auto type) {
      const int64_t last = end / block;
      if (block == 32) strongest_of_blocks<decltype(type), 2>(in, first, last, selection);
      if (block == 64) strongest_of_blocks<decltype(type), 4>(in, first, last, selection);
      if (block == 128) strongest_of_blocks<decltype(type), 8>(in, first, last, selection);
      if (block == 32 || block == 64 || block == 128) first = last;
    });
  const Buffer<float> values(k == 1 ? 0 : block + kLanes);
  if (values.data == nullptr) return false;
  for (; first * block < end; ++first) {
    const int64_t start = first * block, stop = least(end, start + block);
    if (k == 1)
      selection.set(first, in, strongest_of(in, start, stop));
    else
      select_in_block(in, start, block, k, values.data, first * k, selection);
    if (in.residual != nullptr) update_residual(in, start, stop);
  }
  return true;
}

// ---- rand-k --------------------------------------------------------------------------------------------------------

FEDQ_INLINE int64_t run_start(int64_t run, int64_t num, int64_t kept) { return run * num / kept; }

FEDQ_INLINE int64_t run_length(int64_t run, int64_t num, int64_t kept) {
  return run_start(run + 1, num, kept) - run_start(run, num, kept);
}

FEDQ_INLINE int64_t drawn_position(int64_t run, int64_t num, int64_t kept, uint32_t key) {
  return run_start(run, num, kept) + hash32((uint64_t)run, key) % run_length(run, num, kept);
}

static Selection* select_at_random(const SparsePlan& plan, const SparseInput& in, int64_t kept, int64_t num_threads) {
  Selection* selection = new_selection(kept);
  if (selection == nullptr) return nullptr;
  for_ranges(kept, kChunk / 64, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) selection->set(i, in, drawn_position(i, in.num, kept, (uint32_t)plan.key));
  });
  return selection;
}

// ---- bits ----------------------------------------------------------------------------------------------------------

// Packs value(0) .. value(num - 1), each of `bits` bits (at most 56), least significant first.
template <class Function>
static void pack(uint8_t* out, int64_t num, int64_t bits, int64_t num_threads, const Function& value) {
  if (bits == 0) return;
  for_ranges(num, 1 << 14, num_threads, [&](int64_t begin, int64_t end) {  // whole bytes: a multiple of 8 values
    uint8_t* at = out + begin / 8 * bits;
    uint64_t word = 0;
    int64_t filled = 0;
    for (int64_t i = begin; i < end; ++i) {
      word |= (uint64_t)value(i) << filled;
      for (filled += bits; filled >= 8; filled -= 8, word >>= 8) *at++ = (uint8_t)word;
    }
    if (filled > 0) *at = (uint8_t)word;
  });
}

// The i-th value of `bits` bits (at most 56) of a section.
FEDQ_INLINE uint64_t unpack(const uint8_t* data, int64_t num_bytes, int64_t i, int64_t bits) {
  if (bits == 0) return 0;
  const int64_t first = i * bits / 8, room = num_bytes - first;
  uint64_t word = 0;
  if (room >= 8)
    memcpy(&word, data + first, 8);
  else
    for (int64_t j = 0; j < room; ++j) word |= (uint64_t)data[first + j] << (8 * j);
  return word >> (i * bits % 8) & ((1ull << bits) - 1);
}

// Finite values stay finite.
FEDQ_INLINE uint16_t bfloat_of(float value) {
  const uint32_t bits = word_of(value), size = bits & 0x7FFFFFFF;
  if (size > kInfinity) return 0x7FC0;
  if (size > 0x7F7F0000 && size < kInfinity) return (uint16_t)(bits >> 16);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

FEDQ_INLINE float float_of_bfloat(const uint8_t* data) {
  return float_of((uint32_t)data[0] << 16 | (uint32_t)data[1] << 24);
}

FEDQ_INLINE void put_bfloat(uint8_t* data, uint16_t value) {
  data[0] = (uint8_t)value;
  data[1] = (uint8_t)(value >> 8);
}

// ---- positions (Elias 1974, Fano 1971) -----------------------------------------------------------------------------

struct EliasFano {
  int64_t num, low_bits, low_bytes, high_bits, high_bytes;

  EliasFano(int64_t num, int64_t universe) : num(num), low_bits(0), low_bytes(0), high_bits(0), high_bytes(0) {
    if (num == 0) return;
    for (int64_t share = universe / num; share > 1; share >>= 1) ++low_bits;
    low_bytes = ceil_div(num * low_bits, 8);
    high_bits = num + ((universe - 1) >> low_bits);
    high_bytes = ceil_div(high_bits, 8);
  }
  int64_t bytes() const { return low_bytes + high_bytes; }
};

static void write_positions(const EliasFano& code, const int64_t* index, uint8_t* out, int64_t num_threads) {
  const uint64_t mask = (1ull << code.low_bits) - 1;
  pack(out, code.num, code.low_bits, num_threads, [&](int64_t i) { return (uint64_t)index[i] & mask; });
  uint8_t* high = out + code.low_bytes;
  for_ranges(code.high_bytes, 1 << 14, num_threads, [&](int64_t begin, int64_t end) {
    memset(high + begin, 0, (size_t)(end - begin));
    // Bit i + (index[i] >> low) grows with i: find the first that falls into this range of bytes.
    int64_t i = first_where(code.num, [&](int64_t j) { return (index[j] >> code.low_bits) + j >= 8 * begin; });
    for (; i < code.num; ++i) {
      const int64_t bit = (index[i] >> code.low_bits) + i;
      if (bit >= 8 * end) break;
      high[bit / 8] = (uint8_t)(high[bit / 8] | 1 << bit % 8);
    }
  });
}

static int64_t count_ones(const uint8_t* data, int64_t num_bytes) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= num_bytes; i += 8) {
    uint64_t word;
    memcpy(&word, data + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < num_bytes; ++i) count += __builtin_popcount(data[i]);
  return count;
}

// Reads all positions into `index`; returns how many there are, and reads nothing if that is not the number there
// should be.
static int64_t read_positions(const EliasFano& code, const uint8_t* data, int64_t* index, int64_t num_threads) {
  constexpr int64_t grain = 1 << 12;
  const uint8_t* high = data + code.low_bytes;
  Buffer<int64_t> first(ceil_div(code.high_bytes, grain));
  if (first.data == nullptr) return -1;
  // Bits of the last byte that lie beyond the section do not count.
  const int spare = (int)(8 * code.high_bytes - code.high_bits);
  const int64_t last = code.high_bytes - 1;
  for_ranges(code.high_bytes, grain, num_threads, [&](int64_t begin, int64_t end) {
    int64_t count = count_ones(high + begin, end - begin);
    if (end > last) count -= __builtin_popcount((uint32_t)high[last] >> (8 - spare));
    first[begin / grain] = count;
  });
  int64_t sum = 0;
  for (int64_t i = 0; i * grain < code.high_bytes; ++i) {
    const int64_t count = first[i];
    first[i] = sum;
    sum += count;
  }
  if (sum != code.num) return sum;
  for_ranges(code.high_bytes, grain, num_threads, [&](int64_t begin, int64_t end) {
    int64_t i = first[begin / grain];
    for (int64_t at = begin; at < end; ++at) {
      uint32_t byte = at < last ? high[at] : high[at] & 0xFFu >> spare;
      for (; byte != 0; byte &= byte - 1, ++i) {
        const int64_t upper = 8 * at + __builtin_ctz(byte) - i;
        index[i] = upper << code.low_bits | (int64_t)unpack(data, code.low_bytes, i, code.low_bits);
      }
    }
  });
  return sum;
}

// Whether each of the numbers is above the one before it.
static bool rise(const int64_t* index, int64_t num, int64_t num_threads) {
  int failed = 0;
  for_ranges(num - 1, kChunk, num_threads, [&](int64_t begin, int64_t end) {
    int64_t falls = 0;
    for (int64_t i = begin; i < end; ++i) falls |= index[i] - index[i + 1] + 1 > 0;
    if (falls != 0) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed == 0;
}

// ---- values --------------------------------------------------------------------------------------------------------

// The halving tree over one group, x[:2048] + x[2048:] and so on, whose first step was taken when it was filled.
static float tree_sum(const float* halves) {
  alignas(64) float sum[kGroup / 4];
  for (int64_t i = 0; i < kGroup / 4; i += kLanes) store(sum + i, add(load(halves + i), load(halves + kGroup / 4 + i)));
  int64_t half = kGroup / 8;
  for (; half >= kLanes; half /= 2)
    for (int64_t i = 0; i < half; i += kLanes) store(sum + i, add(load(sum + i), load(sum + half + i)));
  return sum_lanes(load(sum));
}

FEDQ_INLINE float safe_inverse(float scale) { return scale < 0x1p-126f ? 0.0f : 1.0f / scale; }

// A bfloat16 scale, zero where it would be denormal.
FEDQ_INLINE uint16_t rounded_scale(float scale) {
  const uint16_t rounded = bfloat_of(scale);
  return float_of((uint32_t)rounded << 16) < 0x1p-126f ? 0 : rounded;
}

FEDQ_INLINE float decoded_value(uint32_t code, int64_t bits, float scale) {
  const uint32_t levels = 1u << (bits - 1);
  const float level = (float)(code & (levels - 1)) + 0.5f;
  return (code >= levels ? -level : level) * scale;
}

// Codes the values of a selection, range of elements by range, and leaves in the residual what they do not send.
struct ValueWriter {
  const SparsePlan& plan;
  const Selection& selection;
  const SparseInput& in;
  float* residual;
  int64_t num;
  uint8_t* out;     // the values
  uint8_t* codes;   // up to 8 bits: a byte each, packed later
  uint8_t* scales;  // up to 8 bits

  // Elements begin .. end, whole groups but for the tensor's last, that have the entries first .. last.
  void write(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    if (plan.bits <= 8) {
      write_codes(begin, end, first, last);
      return;
    }
    for (int64_t i = first; i < last; ++i) {
      const float value = sent(i);
      if (plan.bits == 32) {
        const uint32_t word = value != value ? 0x7FC00000u : word_of(value);
        memcpy(out + 4 * i, &word, 4);
        settle(i, value);
      } else {
        put_bfloat(out + 2 * i, bfloat_of(value));
        settle(i, float_of_bfloat(out + 2 * i));
      }
    }
  }

 private:
  // What is sent of an entry; a finite value stays finite, also where it takes a sum or a product to get it.
  float sent(int64_t i) const {
    float total = selection.total[i];
    if (__builtin_isinf(total) && residual != nullptr && __builtin_isfinite(selection.old[i]) && is_finite_at(i))
      total = __builtin_copysignf(kLargest, total);
    if (plan.unbias == 0) return total;
    const float longer = total * (float)run_length(i, num, selection.num);
    return __builtin_isinf(longer) && __builtin_isfinite(total) ? __builtin_copysignf(kLargest, total) : longer;
  }

  bool is_finite_at(int64_t i) const {
    const SparseInput alone{in.x, in.dtype, nullptr, in.num};
    return __builtin_isfinite(total_at(alone, selection.index[i]));
  }

  void settle(int64_t i, float decoded) const {
    if (residual == nullptr || selection.index[i] >= num) return;
    const float left = selection.total[i] - decoded;
    residual[selection.index[i]] = magnitude_of(left) == kInfinity ? selection.old[i] : left;
  }

  void write_codes(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    alignas(64) float products[kGroup / 2] = {}, squares[kGroup / 2] = {};
    for (int64_t start = begin; start < end; start += kGroup) {
      int64_t next = first;
      while (next < last && selection.index[next] < least(end, start + kGroup)) ++next;
      put_bfloat(scales + 2 * (start / kGroup), code_group(first, next, products, squares));
      first = next;
    }
    for (; first < last; ++first) codes[first] = 0;  // padding of the last block: zeros
  }

  // Where an entry belongs in a group that is folded in two: its other half is added to it, as the tree does first.
  float& place(float* halves, int64_t i) const { return halves[selection.index[i] % (kGroup / 2)]; }

  // Codes the entries of a group and returns its scale; both buffers are zeros before and after.
  uint16_t code_group(int64_t first, int64_t last, float* products, float* squares) const {
    const float top = (float)((1 << (plan.bits - 1)) - 1);
    float measured = measure(first, last, 1.0f, products), unit = 1.0f;
    if (__builtin_expect(!(measured < kLarge), 0) && are_large(first, last)) {  // their sums may leave float32's range
      unit = kShrink;
      measured = measure(first, last, unit, products);
    }
    const float inverse = safe_inverse(first_step(measured, last - first));
    for (int64_t i = first; i < last; ++i) {
      const float value = sent(i), size = absolute(value) * unit;
      float cell = __builtin_floorf(size * inverse);
      cell = cell > top ? top : cell;
      cell = cell >= 0.0f ? cell : 0.0f;  // NaN too
      const float level = cell + 0.5f;
      place(products, i) += size * level;
      place(squares, i) += level * level;
      codes[i] = (uint8_t)((uint32_t)cell | (uint32_t)(value < 0.0f) << (plan.bits - 1));
    }
    const uint16_t scale = scale_of(tree_sum(products) * safe_inverse(tree_sum(squares)), unit);
    for (int64_t i = first; i < last; ++i) {
      place(products, i) = place(squares, i) = 0.0f;
      settle(i, decoded_value(codes[i], plan.bits, float_of((uint32_t)scale << 16)));
    }
    return scale;
  }

  // The scale's bits, as if its values had not been multiplied.
  uint16_t scale_of(float scale, float unit) const {
    const float largest = plan.largest_scale * unit;
    const uint16_t rounded = rounded_scale(scale > largest && __builtin_isfinite(scale) ? largest : scale);
    return bfloat_of(float_of((uint32_t)rounded << 16) / unit);
  }

  // The largest magnitude of a group, NaN if there is one.
  float largest_of(int64_t first, int64_t last) const {
    float largest = 0.0f;
    for (int64_t i = first; i < last; ++i) {
      const float size = absolute(sent(i));
      if (!(size <= largest) && largest == largest) largest = size;  // a NaN stays
    }
    return largest;
  }

  bool are_large(int64_t first, int64_t last) const {
    const float largest = largest_of(first, last);
    return largest >= kLarge && __builtin_isfinite(largest);
  }

  // What the step that chooses codes follows from: the largest magnitude, or at 1 and 2 bits the sum of all.
  float measure(int64_t first, int64_t last, float unit, float* zeros) const {
    if (plan.bits > 2) return largest_of(first, last) * unit;
    for (int64_t i = first; i < last; ++i) place(zeros, i) += absolute(sent(i)) * unit;
    const float sum = tree_sum(zeros);
    for (int64_t i = first; i < last; ++i) place(zeros, i) = 0.0f;
    return sum;
  }

  float first_step(float measured, int64_t num_kept) const {
    if (plan.bits > 2) return measured / (float)(1 << (plan.bits - 1));
    return measured / (float)(num_kept > 0 ? num_kept : 1) * (float)(5.0 / 3.0);
  }
};

// ---- the functions of the table ------------------------------------------------------------------------------------

static int64_t log2_of(int64_t power) { return 63 - __builtin_clzll((uint64_t)power); }

static int64_t sparse_select(const SparsePlan* plan, const SparseInput* input, int64_t kept, int64_t num_threads,
                             void** selection) {
  Selection* made = nullptr;
  if (plan->kind == kTopK)
    made = select_strongest(*input, kept, num_threads);
  else if (plan->kind == kBlockTopK)
    made = new_selection(kept);  // sparse_write fills it
  else if (plan->kind == kRandK)
    made = select_at_random(*plan, *input, kept, num_threads);
  else
    made = select_threshold(*plan, *input, num_threads);
  *selection = made;
  return made == nullptr ? -1 : made->num;
}

// The pass over the tensor that codes the values; false without memory.
static bool write_values(const SparsePlan& plan, const SparseInput& in, const Selection& selection,
                         const ValueWriter& writer, int64_t num_threads) {
  const bool in_blocks = plan.kind == kBlockTopK;
  const int64_t grain = in_blocks && plan.block > kChunk ? plan.block : kChunk;
  int failed = 0;
  for_ranges(in.num, grain, num_threads, [&](int64_t begin, int64_t end) {
    int64_t first, last;
    if (in_blocks) {
      first = begin / plan.block * plan.k;
      last = ceil_div(end, plan.block) * plan.k;
      if (!select_in_blocks(plan, in, begin, end, selection)) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
    } else {
      first = selection.first_from(begin);
      last = selection.first_from(end);
      if (in.residual != nullptr && plan.kind != kThreshold) update_residual(in, begin, end);
    }
    writer.write(begin, end, first, last);
  });
  return failed == 0;
}

static int64_t sparse_write(const SparsePlan* plan, const SparseInput* input, void* made, uint8_t* out,
                            int64_t num_threads) {
  const Selection& selection = *(const Selection*)made;
  const int64_t kept = selection.num, num = input->num;
  uint8_t* const positions = out + (plan->kind == kThreshold ? 8 : 0);
  const EliasFano fano(plan->kind == kTopK || plan->kind == kThreshold ? kept : 0, num);
  const int64_t local_bits = plan->kind == kBlockTopK ? log2_of(plan->block) : 0;
  uint8_t* const values = positions + fano.bytes() + ceil_div(kept * local_bits, 8);
  uint8_t* const scales = values + ceil_div(kept * plan->bits, 8);
  const bool coded = plan->bits <= 8;

  const Buffer<uint8_t> codes(coded ? kept : 0);
  const ValueWriter writer{*plan, selection, *input, input->residual, num, values, codes.data, scales};
  if (codes.data == nullptr || !write_values(*plan, *input, selection, writer, num_threads)) return -1;
  if (coded) pack(values, kept, plan->bits, num_threads, [&](int64_t i) { return codes[i]; });
  if (plan->kind == kThreshold) memcpy(out, &kept, 8);
  if (plan->kind == kBlockTopK) {
    const uint64_t mask = (uint64_t)plan->block - 1;
    pack(positions, kept, local_bits, num_threads, [&](int64_t i) { return (uint64_t)selection.index[i] & mask; });
  } else {
    write_positions(fano, selection.index, positions, num_threads);
  }
  return scales + (coded ? 2 * ceil_div(num, kGroup) : 0) - out;
}

static int64_t sparse_free(void* selection) {
  free_selection((Selection*)selection);
  return 0;
}

// Where the sections of a payload begin.
struct Sections {
  const uint8_t *positions, *values, *scales;
  int64_t position_bytes, value_bytes;
  EliasFano fano;
  int64_t local_bits;  // kBlockTopK: of a position

  Sections(const SparsePlan& plan, const uint8_t* data, int64_t num, int64_t kept)
      : positions(data + (plan.kind == kThreshold ? 8 : 0)),
        fano(plan.kind == kTopK || plan.kind == kThreshold ? kept : 0, num),
        local_bits(plan.kind == kBlockTopK ? log2_of(plan.block) : 0) {
    position_bytes = fano.bytes() + ceil_div(kept * local_bits, 8);
    value_bytes = ceil_div(kept * plan.bits, 8);
    values = positions + position_bytes;
    scales = values + value_bytes;
  }
};

// Reads the positions of a payload into `index`; returns what sparse_check does.
static int64_t checked_positions(const SparsePlan& plan, const Sections& sections, int64_t num, int64_t kept,
                                 int64_t* index, int64_t num_threads) {
  if (kept == 0) return 0;
  if (plan.kind == kRandK) {
    for_ranges(kept, 1 << 12, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) index[i] = drawn_position(i, num, kept, (uint32_t)plan.key);
    });
    return kept;
  }
  if (plan.kind == kBlockTopK) {
    for_ranges(ceil_div(num, plan.block), ceil_div(kChunk, plan.block), num_threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first * plan.k, block = first; block < last; ++block)
        for (int64_t j = 0; j < plan.k; ++j, ++i)
          index[i] = block * plan.block +
                     (int64_t)unpack(sections.positions, sections.position_bytes, i, sections.local_bits);
    });
    return plan.k == 1 || rise(index, kept, num_threads) ? kept : -2;
  }
  const int64_t found = read_positions(sections.fano, sections.positions, index, num_threads);
  if (found != kept) return found;
  return rise(index, kept, num_threads) && index[kept - 1] < num ? kept : -2;
}

static int64_t sparse_check(const SparsePlan* plan, const uint8_t* data, int64_t num, int64_t kept,
                            int64_t num_threads) {
  if (plan->kind == kRandK) return kept;
  const Buffer<int64_t> index(kept);
  if (index.data == nullptr) return -1;
  return checked_positions(*plan, Sections(*plan, data, num, kept), num, kept, index.data, num_threads);
}

static int64_t sparse_decode(const SparsePlan* plan, const uint8_t* data, int64_t num, int64_t kept,
                             float* out, int64_t adds, float weight, int64_t num_threads) {
  const Sections sections(*plan, data, num, kept);
  const Buffer<int64_t> index(kept);
  if (index.data == nullptr) return -1;
  const int64_t found = checked_positions(*plan, sections, num, kept, index.data, num_threads);
  if (found != kept) return found;

  const int64_t bits = plan->bits, last_group = (num - 1) / kGroup;
  const auto value_of = [&](int64_t i) {
    float value;
    if (bits == 32) {
      memcpy(&value, sections.values + 4 * i, 4);
      return value;
    }
    if (bits == 16) return float_of_bfloat(sections.values + 2 * i);
    const uint32_t code = (uint32_t)unpack(sections.values, sections.value_bytes, i, bits);
    return decoded_value(code, bits, float_of_bfloat(sections.scales + 2 * least(index[i] / kGroup, last_group)));
  };
  if (adds == 0)
    for_ranges(num, 1 << 20, num_threads,
               [&](int64_t begin, int64_t end) { memset(out + begin, 0, (size_t)(end - begin) * sizeof(float)); });
  for_ranges(kept, 1 << 12, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] >= num) continue;  // padding of the last block
      float& at = out[index[i]];
      at = adds != 0 ? at + weight * value_of(i) : value_of(i);
    }
  });
  return kept;
}

}  // namespace sparse

using sparse::sparse_check;
using sparse::sparse_decode;
using sparse::sparse_free;
using sparse::sparse_select;
using sparse::sparse_write;
