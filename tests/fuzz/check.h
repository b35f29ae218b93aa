// What the fuzzers share: how a property that does not hold is said, and how an input's bytes are read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Ends the process: the fuzzer keeps the input that did it. Not assert, which an optimised build leaves out.
#define FUZZ_CHECK(condition, what)                                                             \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      std::fprintf(stderr, "%s:%d: %s: does not hold: %s\n", __FILE__, __LINE__, what, #condition); \
      std::abort();                                                                             \
    }                                                                                           \
  } while (0)

namespace ksmu::fuzz {

// An input as choices. Behind its end there are zeros, so that every beginning of an input is one, too.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t bytes) : data_(data), left_(bytes) {}
  bool Done() const { return left_ == 0; }
  std::size_t left() const { return left_; }
  std::uint8_t Byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  std::uint16_t Half() {
    const std::uint16_t low = Byte();
    return static_cast<std::uint16_t>(low | Byte() << 8);
  }
  std::uint32_t Word() {
    const std::uint32_t low = Half();
    return low | static_cast<std::uint32_t>(Half()) << 16;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

}  // namespace ksmu::fuzz
