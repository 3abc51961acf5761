// Convolutions of binary weights with binary inputs: their plan and the list of their kernels.
#pragma once
#include <stdint.h>

namespace fedq {

// Sizes of images, kernel and strides; padding on each side, with zeros (which are neither -1 nor +1). There are
// `words` = ceil(channels / 64) words of 64 signs a place; a sign of +1 is a set bit, bits beyond the channels are 0.
struct XnorPlan {
  int64_t num, channels, height, width;
  int64_t outputs;  // rounded up to a multiple of 8
  int64_t real_outputs;
  int64_t kernel_height, kernel_width;  // at most 64 places together
  int64_t stride_height, stride_width;
  int64_t pad_height, pad_width;
};

}  // namespace fedq

// xnor_signs packs x >= thresholds[channel] of float images [num, channels, height, width] into words
// [num, height + 2 pad_height, width + 2 pad_width, words], of which it leaves the padding alone.
//
// xnor_conv writes float [num, real_outputs, out_height, out_width]: dot * scale + bias (null: none). weights are words
// [outputs / 8][kernel_height, kernel_width, words][8]; sums are int32 [kernel_height * kernel_width, outputs], the sum
// of a place's weights as -1 and +1. dot is exact.
//
// Both return 0.
#define FEDQ_XNOR_KERNELS(X)                                                                                       \
  X(xnor_signs, (const XnorPlan* plan, const float* x, const float* thresholds, uint64_t* signs, int64_t num_threads), \
    (plan, x, thresholds, signs, num_threads))                                                                     \
  X(xnor_conv,                                                                                                     \
    (const XnorPlan* plan, const uint64_t* signs, const uint64_t* weights, const int32_t* sums, const float* scales,   \
     const float* bias, float* out, int64_t num_threads),                                                          \
    (plan, signs, weights, sums, scales, bias, out, num_threads))
