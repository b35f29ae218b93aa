#include "base/own_memory.h"

#include <sys/mman.h>

#include <atomic>

#include "os/own_place.h"
#include "os/raw.h"

namespace ksmu::base {
namespace {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(mmap)
// Sanitizers have to see what is mapped and unmapped; and a test has an mmap of its own.
void* Map(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}
void Unmap(void* pages, std::size_t bytes) { munmap(pages, bytes); }
void Advise(void* pages, std::size_t bytes, int advice) { madvise(pages, bytes, advice); }
#else
void* Map(std::size_t bytes) {
  std::uintptr_t pages;
  const int error = os::raw::Mmap(os::LastingPlace(bytes), bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, &pages);
  return error ? nullptr : reinterpret_cast<void*>(pages);
}
void Unmap(void* pages, std::size_t bytes) { os::raw::Munmap(reinterpret_cast<std::uintptr_t>(pages), bytes); }
void Advise(void* pages, std::size_t bytes, int advice) {
  os::raw::Madvise(reinterpret_cast<std::uintptr_t>(pages), bytes, advice);
}
#endif
std::atomic<std::size_t> g_mapped{0};
constexpr std::size_t kUnit = 64 * 1024;  // the largest page size that Linux runs user space with
constexpr std::size_t RoundUp(std::size_t n) { return (n + kUnit - 1) / kUnit * kUnit; }
}  // namespace

void* MapOwnPages(std::size_t bytes) {
  bytes = RoundUp(bytes);
  void* pages = Map(bytes);
  if (!pages) return nullptr;
  Advise(pages, bytes, MADV_DONTFORK);
  Advise(pages, bytes, MADV_DONTDUMP);
  Advise(pages, bytes, MADV_NOHUGEPAGE);
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
  if (before) Unmap(whole, before);
  if (before < kHuge) Unmap(whole + before + bytes, kHuge - before);
  g_mapped.fetch_sub(kHuge, std::memory_order_relaxed);
  Advise(whole + before, bytes, MADV_HUGEPAGE);
  return whole + before;
}

void ForgetOwnPages(void* pages, std::size_t bytes) { Advise(pages, RoundUp(bytes), MADV_DONTNEED); }

void UnmapOwnPages(void* pages, std::size_t bytes) {
  bytes = RoundUp(bytes);
  Unmap(pages, bytes);
  g_mapped.fetch_sub(bytes, std::memory_order_relaxed);
}

void* MapInheritedPages(std::size_t bytes) {
  void* pages = Map(RoundUp(bytes));
  if (pages) Advise(pages, RoundUp(bytes), MADV_DONTDUMP);
  return pages;
}

std::size_t OwnBytesMapped() { return g_mapped.load(std::memory_order_relaxed); }

}  // namespace ksmu::base
