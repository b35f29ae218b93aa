// Memory for the benchmarks to work on.
#ifndef KSMU_BENCH_PARTS_MEMORY_H_
#define KSMU_BENCH_PARTS_MEMORY_H_

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace bench {

inline size_t PageSize() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

// Different seeds, different pages.
inline void FillPage(unsigned char* page, uint64_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15 | 1;
  memcpy(page, &seed, sizeof seed);
  for (size_t i = sizeof seed; i < PageSize(); i += sizeof state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    memcpy(page + i, &state, sizeof state);
  }
}

// Private anonymous memory in small pages.
class Mapping {
 public:
  explicit Mapping(size_t bytes) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    madvise(memory, bytes, MADV_NOHUGEPAGE);
    memory_ = static_cast<unsigned char*>(memory);
  }
  ~Mapping() { munmap(memory_, bytes_); }
  Mapping(const Mapping&) = delete;
  unsigned char* memory() const { return memory_; }
  unsigned char* page(size_t i) const { return memory_ + i * PageSize(); }
  size_t bytes() const { return bytes_; }
  size_t pages() const { return bytes_ / PageSize(); }
  void FillUnique(uint64_t seed) const {
    for (size_t i = 0; i < pages(); ++i) FillPage(page(i), (seed << 32) + i);
  }
  void FillZero() const { memset(memory_, 0, bytes_); }

 private:
  unsigned char* memory_;
  size_t bytes_;
};

}  // namespace bench

#endif  // KSMU_BENCH_PARTS_MEMORY_H_
