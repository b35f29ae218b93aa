// A synthetic heap, and a model of what each of its pages is to contain.
#ifndef KSMU_EXAMPLES_VMHEAP_HEAP_H_
#define KSMU_EXAMPLES_VMHEAP_HEAP_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "pages.h"
#include "report.h"

namespace examples {

struct HeapOptions {
  uint64_t guests = 4, size_mib = 256, zero = 25, duplicate = 50, contents = 1000, run_length = 64;
  uint64_t churn = 0, churn_threads = 2, discard = 10;
  uint64_t seed = 1, seconds = 120, cpu_limit = 100;
  bool scattered = false, alike = false, promise = false, merge = false, json = false;
  bool huge = false, no_huge = false;
};

class Heap {
 public:
  explicit Heap(const HeapOptions& options);
  void Fill();
  void Advise(int advice);
  void Merge(LiveLine* line);
  Attainable CountAttainable(uint64_t max_page_sharing) const;
  uint64_t discarded_pages() const;  // and not written since

  // Writes to pages of its own (those whose number is `thread` modulo the number of threads) at its part of the rate.
  void Churn(uint64_t thread, const std::atomic<bool>* stop);
  void CheckAll(const char* when);

  uint64_t wrong() const { return wrong_; }
  uint64_t writes() const { return writes_; }
  uint64_t discards() const { return discards_; }

 private:
  uint64_t pages_per_guest() const { return (options_.size_mib << 20) / PageSize(); }
  unsigned char* page(uint64_t number) const {
    return memory_[number / pages_per_guest()] + number % pages_per_guest() * PageSize();
  }
  void Write(unsigned char* destination, uint64_t content) const;
  void Discard(unsigned char* page) const;
  bool CheckPage(uint64_t number, unsigned char* scratch);

  HeapOptions options_;
  std::vector<unsigned char*> memory_;  // of each guest
  std::vector<uint64_t> model_;         // of each page of all guests, what it is to contain
  std::atomic<uint64_t> unique_{0};     // contents given out
  std::atomic<uint64_t> writes_{0}, discards_{0}, wrong_{0};
};

}  // namespace examples

#endif  // KSMU_EXAMPLES_VMHEAP_HEAP_H_
