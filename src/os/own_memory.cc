#include "base/own_memory.h"

#include <sys/mman.h>

#include <atomic>

namespace ksmu::base {
namespace {
std::atomic<std::size_t> g_mapped{0};
constexpr std::size_t kUnit = 64 * 1024;  // the largest page size that Linux runs user space with
constexpr std::size_t RoundUp(std::size_t n) { return (n + kUnit - 1) / kUnit * kUnit; }
}  // namespace

void* MapOwnPages(std::size_t bytes) {
  bytes = RoundUp(bytes);
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  madvise(pages, bytes, MADV_DONTFORK);
  madvise(pages, bytes, MADV_DONTDUMP);
  madvise(pages, bytes, MADV_NOHUGEPAGE);
  g_mapped.fetch_add(bytes, std::memory_order_relaxed);
  return pages;
}

void* MapOwnHugePages(std::size_t bytes) {
  constexpr std::size_t kHuge = std::size_t{2} << 20;
  bytes = (bytes + kHuge - 1) & ~(kHuge - 1);
  auto* whole = static_cast<char*>(MapOwnPages(bytes + kHuge));
  if (!whole) return nullptr;
  const std::size_t before = (kHuge - reinterpret_cast<std::uintptr_t>(whole)) & (kHuge - 1);
  // To the byte, not rounded as UnmapOwnPages does: mmap's result is aligned to pages and no further, and what follows it
  // is somebody else's.
  if (before) munmap(whole, before);
  if (before < kHuge) munmap(whole + before + bytes, kHuge - before);
  g_mapped.fetch_sub(kHuge, std::memory_order_relaxed);
  madvise(whole + before, bytes, MADV_HUGEPAGE);
  return whole + before;
}

void ForgetOwnPages(void* pages, std::size_t bytes) { madvise(pages, RoundUp(bytes), MADV_DONTNEED); }

void UnmapOwnPages(void* pages, std::size_t bytes) {
  bytes = RoundUp(bytes);
  munmap(pages, bytes);
  g_mapped.fetch_sub(bytes, std::memory_order_relaxed);
}

std::size_t OwnBytesMapped() { return g_mapped.load(std::memory_order_relaxed); }

}  // namespace ksmu::base
