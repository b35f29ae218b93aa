#include "os/own_place.h"

#include <sys/auxv.h>

#include <atomic>
#include <cstring>

namespace ksmu::os {
namespace {

// In the middle of 47 bits: above what allocators, collectors and interpreters ask for by address (up to 32 TiB), below what
// the kernel gives out from the top. With fewer bits of addresses the hint is out of reach, and ignored.
#ifdef KSMU_PRELOAD
constexpr std::uintptr_t kBase = std::uintptr_t{0x3400'0000'0000};  // the shim counts for itself what it has mapped
#else
constexpr std::uintptr_t kBase = std::uintptr_t{0x3000'0000'0000};
#endif
constexpr std::uintptr_t kPassingBytes = std::uintptr_t{16} << 20;  // more than a run with what lies around it
constexpr std::uint32_t kPassingPlaces = 64;
constexpr std::uintptr_t kUnit = std::uintptr_t{64} << 10;  // side by side: they share page tables, and mappings
std::atomic<std::uintptr_t> g_lasting{0};
std::atomic<std::uint32_t> g_passing{0};

// Not the same in every process.
[[maybe_unused]] std::uintptr_t Base() {
  std::uintptr_t random = 0;
  if (const unsigned long bytes = getauxval(AT_RANDOM)) {
    std::memcpy(&random, reinterpret_cast<const void*>(bytes), sizeof random);
  }
  return kBase + (random & 0xffffff) * (kUnit << 1);  // within 2 TiB
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
std::uintptr_t LastingPlace(std::size_t) { return 0; }
std::uintptr_t PassingPlace() { return 0; }
#else
std::uintptr_t LastingPlace(std::size_t bytes) {
  const std::uintptr_t room = (bytes + kUnit - 1) & ~(kUnit - 1);
  return Base() + kPassingPlaces * kPassingBytes + g_lasting.fetch_add(room, std::memory_order_relaxed);
}
std::uintptr_t PassingPlace() { return Base() + g_passing.fetch_add(1, std::memory_order_relaxed) % kPassingPlaces * kPassingBytes; }
#endif

}  // namespace ksmu::os
