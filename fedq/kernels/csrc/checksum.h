// Checksums: the list of their kernels.
#pragma once
#include <stdint.h>

// crc32c returns the CRC32C (Castagnoli) of bytes that follow bytes whose checksum is `value`.
#define FEDQ_CHECKSUM_KERNELS(X) \
  X(crc32c, (const uint8_t* data, int64_t num_bytes, int64_t value), (data, num_bytes, value))
