// Binary convolutions: signs in words of 64, products by exclusive or, sums by counting bits.
//
// Of n products of signs, n - 2 * popcount(a ^ b) is the sum (XNOR-Net, Rastegari et al. 2016, section 3.2). Eight
// outputs stand side by side in a register, and a block of eight pixels shares each load of their weights.

constexpr int64_t kOutputs = 8;  // lanes of Counts
constexpr int64_t kPixels = 8;
constexpr int64_t kSignPixels = 32;

static int64_t words_of(const XnorPlan& plan) { return (plan.channels + 63) / 64; }

#if !defined(FEDQ_VPOPCNT)

// ---- signs ---------------------------------------------------------------------------------------------------------

// The signs of up to 64 channels at kCount (0: count) neighbouring pixels.
template <int64_t kCount>
FEDQ_INLINE void pack_signs(const float* x, int64_t plane, const float* thresholds, int64_t channels, int64_t count,
                            uint64_t* words) {
  const int64_t num = kCount ? kCount : count;
  for (int64_t i = 0; i < num; ++i) words[i] = 0;
  for (int64_t c = 0; c < channels; ++c, x += plane) {
    const float threshold = thresholds[c];
    const uint64_t bit = uint64_t{1} << c;
    for (int64_t i = 0; i < num; ++i) words[i] |= x[i] >= threshold ? bit : 0;
  }
}

struct SignsJob {
  const XnorPlan* plan;
  const float *x, *thresholds;
  uint64_t* signs;
};

// One row of one image.
static void signs_row(void* context, int64_t index) {
  const SignsJob& job = *static_cast<SignsJob*>(context);
  const XnorPlan& plan = *job.plan;
  const int64_t image = index / plan.height, y = index % plan.height, words = words_of(plan);
  const int64_t plane = plan.height * plan.width, width = plan.width + 2 * plan.pad_width;
  const int64_t row = image * (plan.height + 2 * plan.pad_height) + y + plan.pad_height;
  uint64_t packed[kSignPixels];
  for (int64_t word = 0; word < words; ++word) {
    const int64_t left = plan.channels - 64 * word, channels = left < 64 ? left : 64;
    const float* x = job.x + (image * plan.channels + 64 * word) * plane + y * plan.width;
    for (int64_t i = 0; i < plan.width; i += kSignPixels) {
      const int64_t rest = plan.width - i, count = rest < kSignPixels ? rest : kSignPixels;
      if (count == kSignPixels)
        pack_signs<kSignPixels>(x + i, plane, job.thresholds + 64 * word, channels, count, packed);
      else
        pack_signs<0>(x + i, plane, job.thresholds + 64 * word, channels, count, packed);
      uint64_t* out = job.signs + (row * width + plan.pad_width + i) * words + word;
      for (int64_t j = 0; j < count; ++j) out[j * words] = packed[j];
    }
  }
}

static int64_t xnor_signs(const XnorPlan* plan, const float* x, const float* thresholds, uint64_t* signs,
                          int64_t num_threads) {
  SignsJob job{plan, x, thresholds, signs};
  parallel(plan->num * plan->height, static_cast<int>(num_threads), signs_row, &job);
  return 0;
}

#endif

// ---- sums ----------------------------------------------------------------------------------------------------------

struct ConvJob {
  const XnorPlan* plan;
  const uint64_t *signs, *weights;
  const int32_t* sums;
  const float *scales, *bias;
  float* out;
  int64_t out_height, out_width;
};

// Where a block of pixels begins in the signs, and which places of the kernel lie in the padding there.
struct Pixels {
  const uint64_t* signs[kPixels];
  uint64_t padding[kPixels];
};

FEDQ_INLINE Pixels find_pixels(const ConvJob& job, int64_t image, int64_t first) {
  const XnorPlan& plan = *job.plan;
  const int64_t height = plan.height + 2 * plan.pad_height, width = plan.width + 2 * plan.pad_width;
  const int64_t last = job.out_height * job.out_width - 1;
  Pixels found;
  for (int64_t p = 0; p < kPixels; ++p) {
    const int64_t pixel = first + p < last ? first + p : last;  // beyond the end the last one again, never stored
    const int64_t y = pixel / job.out_width * plan.stride_height, x = pixel % job.out_width * plan.stride_width;
    found.signs[p] = job.signs + ((image * height + y) * width + x) * words_of(plan);
    uint64_t padding = 0;
    for (int64_t i = 0; i < plan.kernel_height; ++i)
      for (int64_t j = 0; j < plan.kernel_width; ++j) {
        const int64_t row = y + i - plan.pad_height, column = x + j - plan.pad_width;
        const bool inside = row >= 0 && row < plan.height && column >= 0 && column < plan.width;
        padding |= static_cast<uint64_t>(!inside) << (i * plan.kernel_width + j);
      }
    found.padding[p] = padding;
  }
  return found;
}

// How many signs differ, for kPixels pixels and eight outputs; kAtOnce pixels fit into the registers.
FEDQ_INLINE void count_different(const XnorPlan& plan, const Pixels& pixels, const uint64_t* weights,
                                 int32_t (*counts)[kOutputs]) {
  const int64_t words = words_of(plan), run = plan.kernel_width * words;
  const int64_t row = (plan.width + 2 * plan.pad_width) * words;
  for (int64_t begin = 0; begin < kPixels; begin += kAtOnce) {
    Counts total[kAtOnce];
    for (int64_t p = 0; p < kAtOnce; ++p) total[p] = no_counts();
    const uint64_t* w = weights;
    for (int64_t i = 0; i < plan.kernel_height; ++i)
      for (int64_t j = 0; j < run; ++j, w += kOutputs) {
        const Counts lanes = load_words(w);
        for (int64_t p = 0; p < kAtOnce; ++p)
          total[p] = add_different(total[p], lanes, pixels.signs[begin + p][i * row + j]);
      }
    for (int64_t p = 0; p < kAtOnce; ++p) store_counts(counts[begin + p], total[p]);
  }
}

// One block of pixels of one image, all outputs.
static void conv_pixels(void* context, int64_t index) {
  const ConvJob& job = *static_cast<ConvJob*>(context);
  const XnorPlan& plan = *job.plan;
  const int64_t places = plan.kernel_height * plan.kernel_width, size = places * words_of(plan);
  const int64_t plane = job.out_height * job.out_width, blocks = (plane + kPixels - 1) / kPixels;
  const int64_t image = index / blocks, first = index % blocks * kPixels;
  const int64_t num_pixels = plane - first < kPixels ? plane - first : kPixels;
  const Pixels pixels = find_pixels(job, image, first);
  const int32_t all = static_cast<int32_t>(plan.channels * places);
  int32_t dots[kPixels][kOutputs];
  for (int64_t output = 0; output < plan.outputs; output += kOutputs) {
    count_different(plan, pixels, job.weights + output * size, dots);
    for (int64_t p = 0; p < kPixels; ++p) {
      for (int64_t o = 0; o < kOutputs; ++o) dots[p][o] = all - 2 * dots[p][o];
      // Padding's bits are 0, which counted as -1: those products are added back.
      for (uint64_t left = pixels.padding[p]; left; left &= left - 1) {
        const int32_t* sums = job.sums + __builtin_ctzll(left) * plan.outputs + output;
        for (int64_t o = 0; o < kOutputs; ++o) dots[p][o] += sums[o];
      }
    }
    const int64_t rest = plan.real_outputs - output, num_outputs = rest < kOutputs ? rest : kOutputs;
    float* out = job.out + (image * plan.real_outputs + output) * plane + first;
    for (int64_t o = 0; o < num_outputs; ++o, out += plane) {
      const float scale = job.scales[output + o], bias = job.bias ? job.bias[output + o] : 0.0f;
      float values[kPixels];
      for (int64_t p = 0; p < kPixels; ++p) values[p] = static_cast<float>(dots[p][o]) * scale + bias;
      memcpy(out, values, static_cast<size_t>(num_pixels) * sizeof(float));
    }
  }
}

static int64_t xnor_conv_here(const XnorPlan* plan, const uint64_t* signs, const uint64_t* weights,
                              const int32_t* sums, const float* scales, const float* bias, float* out,
                              int64_t num_threads) {
  const int64_t height = (plan->height + 2 * plan->pad_height - plan->kernel_height) / plan->stride_height + 1;
  const int64_t width = (plan->width + 2 * plan->pad_width - plan->kernel_width) / plan->stride_width + 1;
  ConvJob job{plan, signs, weights, sums, scales, bias, out, height, width};
  const int64_t blocks = (height * width + kPixels - 1) / kPixels;
  parallel(plan->num * blocks, static_cast<int>(num_threads), conv_pixels, &job);
  return 0;
}

#if !defined(FEDQ_VPOPCNT)
static int64_t xnor_conv(const XnorPlan* plan, const uint64_t* signs, const uint64_t* weights, const int32_t* sums,
                         const float* scales, const float* bias, float* out, int64_t num_threads) {
#if defined(FEDQ_ASKS_FOR_VPOPCNT)
  if (__builtin_cpu_supports("avx512vpopcntdq"))
    return xnor_conv_vpopcnt(plan, signs, weights, sums, scales, bias, out, num_threads);
#endif
  return xnor_conv_here(plan, signs, weights, sums, scales, bias, out, num_threads);
}
#endif
