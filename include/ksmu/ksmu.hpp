// ksmu for C++20: header-only, over the C interface of ksmu.h, which is the manual: its three rules, units, errors and
// safety hold here too. What differs:
//   - Failures are std::system_error with the errno of the C call and the sentence of ksmu_last_error(); only
//     memory_resource turns ENOMEM into std::bad_alloc, as containers expect.
//   - Destructors cannot report; each class says what then happens, and has a member function that can.
// Objects of these classes are like other objects: one thread at a time each. The memory behind them is free to use.
#pragma once

#if __cplusplus < 202002L
#error "ksmu.hpp needs C++20: compile with -std=c++20 (CMake: target_compile_features(... cxx_std_20)), or include ksmu.h"
#endif

#include <ksmu/ksmu.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>

namespace ksmu {

namespace detail {

// Call with the failed call's errno still in place.
inline std::system_error Failure(const char* what) {
  const int error = errno;
  const char* const sentence = ksmu_last_error();
  return {error, std::generic_category(), *sentence == '\0' ? std::string(what) : std::string(what) + ": " + sentence};
}
[[noreturn]] inline void Throw(const char* what) { throw Failure(what); }

inline void Check(int result, const char* what) {
  if (result != 0) Throw(what);
}

inline std::size_t RoundUp(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace detail

// --- The C interface with exceptions ---------------------------------------------------------------------------------

// Starts the library; stop() takes it back. Optional, see ksmu_start.
inline void start(const ksmu_options& options = {}) {
  detail::Check(ksmu_start(&options, sizeof options), "ksmu_start");
}
inline void stop() { detail::Check(ksmu_stop(), "ksmu_stop"); }

inline ksmu_stats stats() {
  ksmu_stats result{};
  detail::Check(ksmu_read_stats(&result, sizeof result), "ksmu_read_stats");
  return result;
}

inline ksmu_page_info explain(const void* address) {
  ksmu_page_info result{};
  detail::Check(ksmu_explain(address, &result, sizeof result), "ksmu_explain");
  return result;
}

inline std::int64_t get(const char* name) {
  std::int64_t value = 0;
  detail::Check(ksmu_get(name, &value), "ksmu_get");
  return value;
}
inline void set(const char* name, std::int64_t value) { detail::Check(ksmu_set(name, value), "ksmu_set"); }

// Pages that came to share a frame or were dropped as zero. A signal does not end it: it goes on where it was.
inline std::size_t merge(std::span<std::byte> memory) {
  std::size_t total = 0;
  for (;;) {
    const ssize_t merged = ksmu_merge(memory.data(), memory.size());
    if (merged >= 0) return total + static_cast<std::size_t>(merged);
    if (errno != EINTR) detail::Throw("ksmu_merge");
  }
}

// The range reads as zeros afterwards; see KSMU_DISCARD.
inline void discard(std::span<std::byte> memory) {
  detail::Check(ksmu_advise(memory.data(), memory.size(), KSMU_DISCARD), "ksmu_advise(KSMU_DISCARD)");
}

// --- Region ----------------------------------------------------------------------------------------------------------

// Zeroed memory that is merged from birth (ksmu_map), unmapped by the destructor. Discard it through discard() only.
class Region {
 public:
  Region() noexcept = default;
  // `size` bytes, not 0; the mapping is rounded up to whole pages. `flags`: KSMU_F_*.
  explicit Region(std::size_t size, unsigned flags = 0) : size_(size) {
    void* const memory = ksmu_map(size, flags);
    if (memory == MAP_FAILED) detail::Throw("ksmu_map");
    data_ = static_cast<std::byte*>(memory);
  }
  Region(Region&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Region& operator=(Region&& other) noexcept {
    Region(std::move(other)).swap(*this);
    return *this;
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  // If munmap fails (the map limit), the memory stays mapped for good; unmap() would have told.
  ~Region() {
    if (data_ == nullptr) return;
    const int saved = errno;
    ksmu_unmap(data_, size_);
    errno = saved;
  }

  void unmap() {
    if (data_ == nullptr) return;
    detail::Check(ksmu_unmap(data_, size_), "ksmu_unmap");
    data_ = nullptr;
    size_ = 0;
  }

  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  std::span<std::byte> bytes() const noexcept { return {data_, size_}; }
  operator std::span<std::byte>() const noexcept { return bytes(); }
  // The memory as objects of T: as many as fit. For types that may begin their life as zeroed bytes.
  template <typename T>
  std::span<T> as() const noexcept {
    static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);
    return {reinterpret_cast<T*>(data_), size_ / sizeof(T)};
  }

  std::size_t merge() const { return ksmu::merge(bytes()); }
  void discard() const { ksmu::discard(bytes()); }

  void swap(Region& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// --- Advice ----------------------------------------------------------------------------------------------------------

// Memory of the program's own that is mergeable as long as this object lives. The memory must be page-aligned and must
// outlive the object; IT MUST NOT COME FROM malloc OR new (rule 1 of ksmu.h). Before it is unmapped, replaced or moved:
// release(), or destroy the object.
class Advice {
 public:
  Advice() noexcept = default;
  // All or nothing: with holes in the range it throws ENOMEM and takes the advice back. `flags`: KSMU_F_*.
  explicit Advice(std::span<std::byte> memory, unsigned flags = 0) : memory_(memory) {
    if (ksmu_advise(memory.data(), memory.size(), KSMU_MERGEABLE | static_cast<int>(flags)) == 0) return;
    const std::system_error error = detail::Failure("ksmu_advise(KSMU_MERGEABLE)");
    ksmu_advise(memory.data(), memory.size(), KSMU_UNMERGEABLE);
    throw error;
  }
  Advice(void* address, std::size_t length, unsigned flags = 0)
      : Advice(std::span(static_cast<std::byte*>(address), length), flags) {}
  Advice(Advice&& other) noexcept : memory_(std::exchange(other.memory_, {})) {}
  Advice& operator=(Advice&& other) noexcept {
    Advice(std::move(other)).swap(*this);
    return *this;
  }
  Advice(const Advice&) = delete;
  Advice& operator=(const Advice&) = delete;
  // KSMU_UNMERGEABLE. If the copies do not fit into memory, the rest stays merged, as valid as ever, and goes on being
  // a region: unmerge() would have told. Do not unmap the memory then but by ksmu_unmap.
  ~Advice() {
    if (memory_.empty()) return;
    const int saved = errno;
    ksmu_advise(memory_.data(), memory_.size(), KSMU_UNMERGEABLE);
    errno = saved;
  }

  // Takes the advice back: every page gets a copy of its own. On failure the advice stands; one may try again.
  void unmerge() {
    if (memory_.empty()) return;
    detail::Check(ksmu_advise(memory_.data(), memory_.size(), KSMU_UNMERGEABLE), "ksmu_advise(KSMU_UNMERGEABLE)");
    memory_ = {};
  }
  // The memory is about to be unmapped, replaced or moved: nothing is copied. See KSMU_RELEASE.
  void release() {
    if (memory_.empty()) return;
    detail::Check(ksmu_advise(memory_.data(), memory_.size(), KSMU_RELEASE), "ksmu_advise(KSMU_RELEASE)");
    memory_ = {};
  }

  std::span<std::byte> bytes() const noexcept { return memory_; }
  std::size_t merge() const { return ksmu::merge(memory_); }
  void swap(Advice& other) noexcept { std::swap(memory_, other.memory_); }

 private:
  std::span<std::byte> memory_;
};

// --- memory_resource -------------------------------------------------------------------------------------------------

// Mergeable memory in large pieces, for pools and big blocks: takes arenas from ksmu_map and cuts them up, so that
// neither a mapping nor a whole page is spent on each piece. What is given back is joined with its neighbours; of large
// pieces the whole pages are discarded; an empty arena is unmapped (one is kept, against flutter).
// Thread-safe. Its own bookkeeping is on the ordinary heap.
class arena_resource : public std::pmr::memory_resource {
 public:
  static constexpr std::size_t kArenaBytes = std::size_t{64} << 20;  // the kernel populates only what is touched
  static constexpr std::size_t kGrain = 64;                         // a cache line: pieces never share one
  // Discarding costs a call; less than this is left for the next user of the place.
  static constexpr std::size_t kDiscardBytes = std::size_t{256} << 10;

  explicit arena_resource(unsigned flags = 0)
      : flags_(flags), page_bytes_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {}
  arena_resource(const arena_resource&) = delete;
  arena_resource& operator=(const arena_resource&) = delete;
  // All memory goes, given back or not.
  ~arena_resource() override {
    const int saved = errno;
    for (const auto& [start, bytes] : arenas_) ksmu_unmap(Pointer(start), bytes);
    errno = saved;
  }

 protected:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (bytes > SIZE_MAX / 2 || alignment > SIZE_MAX / 4) throw std::bad_alloc();
    bytes = detail::RoundUp(std::max<std::size_t>(bytes, 1), kGrain);
    alignment = std::max(alignment, kGrain);
    const std::lock_guard lock(mutex_);
    for (auto gap = free_.begin(); gap != free_.end(); ++gap) {
      if (void* const piece = Cut(gap, bytes, alignment)) return piece;
    }
    const auto gap = AddArena(bytes + (alignment > page_bytes_ ? alignment : 0));
    return Cut(gap, bytes, alignment);
  }

  void do_deallocate(void* piece, std::size_t bytes, std::size_t) override {
    bytes = detail::RoundUp(std::max<std::size_t>(bytes, 1), kGrain);
    const int saved = errno;
    const std::lock_guard lock(mutex_);
    try {
      Give(reinterpret_cast<std::uintptr_t>(piece), bytes);
    } catch (const std::bad_alloc&) {
      // No memory to note the gap, and containers free in destructors: the place is lost until this object goes.
    }
    errno = saved;
  }

  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

 private:
  using Map = std::map<std::uintptr_t, std::size_t>;  // start → bytes

  static std::byte* Pointer(std::uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

  // Takes a piece out of a gap, from its front; nullptr if it does not fit. Changes nothing if it throws.
  void* Cut(Map::iterator gap, std::size_t bytes, std::size_t alignment) {
    const std::uintptr_t start = gap->first, end = start + gap->second;
    const std::uintptr_t piece = detail::RoundUp(start, alignment);
    if (piece > end || end - piece < bytes) return nullptr;
    const bool rest_in_front = piece != start, rest_behind = piece + bytes != end;
    if (rest_behind) free_.emplace_hint(std::next(gap), piece + bytes, end - piece - bytes);
    if (rest_in_front) gap->second = piece - start;
    if (!rest_in_front) free_.erase(gap);
    return Pointer(piece);
  }

  Map::iterator AddArena(std::size_t bytes) {
    bytes = detail::RoundUp(std::max(bytes, kArenaBytes), page_bytes_);
    void* const memory = ksmu_map(bytes, flags_);
    if (memory == MAP_FAILED) {
      if (errno == ENOMEM) throw std::bad_alloc();
      detail::Throw("ksmu_map");
    }
    const auto start = reinterpret_cast<std::uintptr_t>(memory);
    try {
      const auto arena = arenas_.emplace(start, bytes).first;
      try {
        return free_.emplace(start, bytes).first;
      } catch (...) {
        arenas_.erase(arena);
        throw;
      }
    } catch (...) {
      ksmu_unmap(memory, bytes);
      throw;
    }
  }

  void Give(std::uintptr_t start, std::size_t bytes) {
    // Two arenas that happen to be neighbours must not become one gap: each is unmapped by itself.
    const auto arena = std::prev(arenas_.upper_bound(start));
    const std::uintptr_t arena_end = arena->first + arena->second;
    const auto next = free_.upper_bound(start);
    auto gap = free_.end();
    if (next != free_.begin() && start != arena->first) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) gap = before;
    }
    if (gap != free_.end()) {
      gap->second += bytes;
    } else {
      gap = free_.emplace_hint(next, start, bytes);
    }
    if (start + bytes != arena_end && next != free_.end() && next->first == start + bytes) {
      gap->second += next->second;
      free_.erase(next);
    }
    if (gap->second == arena->second) {
      if (empty_arena_ != 0 && empty_arena_ != gap->first && IsEmpty(empty_arena_)) {
        if (ksmu_unmap(Pointer(arena->first), arena->second) == 0) {
          free_.erase(gap);
          arenas_.erase(arena);
          return;
        }
      } else {
        empty_arena_ = gap->first;
      }
    }
    Discard(start, start + bytes, gap->first, gap->first + gap->second);
  }

  bool IsEmpty(std::uintptr_t start) const {
    const auto arena = arenas_.find(start);
    const auto gap = free_.find(start);
    return arena != arenas_.end() && gap != free_.end() && arena->second == gap->second;
  }

  // Whole pages that became free with [start, end), inside the gap that it joined.
  void Discard(std::uintptr_t start, std::uintptr_t end, std::uintptr_t gap_start, std::uintptr_t gap_end) {
    if (end - start < kDiscardBytes) return;
    const std::uintptr_t first = std::max(start / page_bytes_ * page_bytes_, detail::RoundUp(gap_start, page_bytes_));
    const std::uintptr_t last = std::min(detail::RoundUp(end, page_bytes_), gap_end / page_bytes_ * page_bytes_);
    // A failure costs memory only: the contents of a free piece are nobody's.
    if (first < last) ksmu_advise(Pointer(first), last - first, KSMU_DISCARD);
  }

  const unsigned flags_;
  const std::size_t page_bytes_;
  std::mutex mutex_;
  Map arenas_;  // what ksmu_map gave
  Map free_;    // gaps in arenas, joined where they touch
  std::uintptr_t empty_arena_ = 0;
};

// A pool over arenas: small allocations by size class, big ones straight from the arenas. Pool is one of
// std::pmr::synchronized_pool_resource and unsynchronized_pool_resource.
//   ksmu::memory_resource mergeable;
//   std::pmr::vector<std::pmr::string> names(&mergeable);
template <typename Pool>
class basic_memory_resource : public std::pmr::memory_resource {
 public:
  // `flags`: KSMU_F_*. Nothing is mapped, and the library not started, before the first allocation.
  explicit basic_memory_resource(unsigned flags = 0, const std::pmr::pool_options& options = {})
      : arenas_(flags), pool_(options, &arenas_) {}
  basic_memory_resource(const basic_memory_resource&) = delete;
  basic_memory_resource& operator=(const basic_memory_resource&) = delete;

  // Gives everything back at once, as of std::pmr's pools.
  void release() { pool_.release(); }

 protected:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    if (bytes > SIZE_MAX / 2 || alignment > SIZE_MAX / 4) throw std::bad_alloc();
    return pool_.allocate(PoolBytes(bytes, alignment), alignment);
  }
  void do_deallocate(void* piece, std::size_t bytes, std::size_t alignment) override {
    pool_.deallocate(piece, PoolBytes(bytes, alignment), alignment);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

 private:
  // libstdc++'s pools (seen with g++ 12) misalign a block whose size is not a multiple of its alignment: 24 bytes
  // aligned to 16 come from the size class of 24.
  static std::size_t PoolBytes(std::size_t bytes, std::size_t alignment) {
    return detail::RoundUp(std::max<std::size_t>(bytes, 1), alignment);
  }

  arena_resource arenas_;
  Pool pool_;
};

using memory_resource = basic_memory_resource<std::pmr::synchronized_pool_resource>;
using unsynchronized_memory_resource = basic_memory_resource<std::pmr::unsynchronized_pool_resource>;

}  // namespace ksmu
