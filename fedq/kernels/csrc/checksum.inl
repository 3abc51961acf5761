// CRC32C: the remainder of a polynomial over GF(2) by 0x1EDC6F41, bits reflected, so that bit 31 of a word is the
// coefficient of x^0 and a zero byte appended multiplies by x^8.
//
// With the processor's instruction (FEDQ_CRC32_INSTRUCTION), whose result is three cycles away, three streams run side
// by side and are joined by a shift of the first two; without it one stream takes eight bytes a step from eight tables.
namespace checksum {

static constexpr uint32_t kPolynomial = 0x82F63B78u;

constexpr uint32_t times_x(uint32_t a) { return a >> 1 ^ (a & 1 ? kPolynomial : 0); }

#if defined(FEDQ_CRC32_INSTRUCTION)

static constexpr int64_t kStream = 4096;  // bytes of each of the three streams

constexpr uint32_t times(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a != 0; a <<= 1, b = times_x(b))
    if (a >> 31) product ^= b;
  return product;
}

// What each byte of a state becomes after kStream zero bytes.
struct ShiftTable {
  uint32_t of[4][256];
  constexpr ShiftTable() : of() {
    uint32_t power = 1u << 23;  // x^8, squared until it is x^(8 kStream)
    for (int64_t n = kStream; n > 1; n /= 2) power = times(power, power);
    for (int place = 0; place < 4; ++place)
      for (uint32_t byte = 1; byte < 256; ++byte) {
        const uint32_t lower = byte & (byte - 1);  // without its lowest bit
        of[place][byte] = lower != 0 ? of[place][lower] ^ of[place][byte ^ lower] : times(byte << 8 * place, power);
      }
  }
};
static constexpr ShiftTable kShift;

FEDQ_INLINE uint32_t shifted(uint32_t state) {
  return kShift.of[0][state & 255] ^ kShift.of[1][state >> 8 & 255] ^ kShift.of[2][state >> 16 & 255] ^
         kShift.of[3][state >> 24];
}

FEDQ_INLINE uint64_t step(uint64_t state, const uint8_t* data) {
  uint64_t word;
  memcpy(&word, data, 8);
  return _mm_crc32_u64(state, word);
}

static uint32_t remainder_of(const uint8_t* data, int64_t num, uint32_t state) {
  for (; num >= 3 * kStream; num -= 3 * kStream, data += 3 * kStream) {
    uint64_t first = state, second = 0, third = 0;
    for (int64_t i = 0; i < kStream; i += 8) {
      first = step(first, data + i);
      second = step(second, data + kStream + i);
      third = step(third, data + 2 * kStream + i);
    }
    state = shifted(shifted((uint32_t)first) ^ (uint32_t)second) ^ (uint32_t)third;
  }
  uint64_t wide = state;
  for (; num >= 8; num -= 8, data += 8) wide = step(wide, data);
  state = (uint32_t)wide;
  for (; num > 0; --num, ++data) state = _mm_crc32_u8(state, *data);
  return state;
}

#else

// Place j holds the remainders of a byte with j zero bytes behind it.
struct ByteTables {
  uint32_t of[8][256];
  constexpr ByteTables() : of() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t state = byte;
      for (int bit = 0; bit < 8; ++bit) state = times_x(state);
      of[0][byte] = state;
    }
    for (int place = 1; place < 8; ++place)
      for (uint32_t byte = 0; byte < 256; ++byte)
        of[place][byte] = of[place - 1][byte] >> 8 ^ of[0][of[place - 1][byte] & 255];
  }
};
static constexpr ByteTables kTables;

static uint32_t remainder_of(const uint8_t* data, int64_t num, uint32_t state) {
  for (; num >= 8; num -= 8, data += 8) {
    const uint32_t low = state ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 |
                                  (uint32_t)data[3] << 24);
    state = kTables.of[7][low & 255] ^ kTables.of[6][low >> 8 & 255] ^ kTables.of[5][low >> 16 & 255] ^
            kTables.of[4][low >> 24] ^ kTables.of[3][data[4]] ^ kTables.of[2][data[5]] ^ kTables.of[1][data[6]] ^
            kTables.of[0][data[7]];
  }
  for (; num > 0; --num, ++data) state = state >> 8 ^ kTables.of[0][(state ^ *data) & 255];
  return state;
}

#endif

static int64_t crc32c(const uint8_t* data, int64_t num_bytes, int64_t value) {
  return (int64_t)(uint32_t)~remainder_of(data, num_bytes, ~(uint32_t)value);
}

}  // namespace checksum

using checksum::crc32c;
