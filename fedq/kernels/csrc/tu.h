// What the three translation units share: the headers that must be read before the target is set, so that no inline
// function of the standard library is compiled for a machine that may not be there, and the fence around threads.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in GCC 12's own immintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses the boundary of a library
#endif

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "pool.h"

#define FEDQ_INLINE_MEMBER inline __attribute__((always_inline))
#define FEDQ_INLINE static FEDQ_INLINE_MEMBER
