// What is measured: nothing (the program alone), the kernel's KSM, or the library; and the heap that it works on.
#ifndef KSMU_BENCH_VS_KSM_SUBJECT_H_
#define KSMU_BENCH_VS_KSM_SUBJECT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "measure.h"
#include "vmheap_heap.h"

namespace bench {

enum class Side { kPlain, kKsm, kLibrary };

enum class Pace {
  kOff,      // nothing is scanned; what is merged stays so
  kDefault,  // KSM: pages_to_scan 100, sleep 20 ms; the library: as it comes
  kFlatOut,  // KSM: all pages in a batch, no sleep; the library: no sleep, cpu_limit_percent 100
};

class Subject {
 public:
  virtual ~Subject() = default;
  virtual void Start() {}                      // throws if it cannot
  virtual void Advise(void*, size_t) {}        // throws
  virtual void SetPace(Pace) {}                // with Advise, in any order
  virtual uint64_t CpuNs() { return 0; }       // used so far
  virtual uint64_t SavedPages() { return 0; }  // now, zero pages included
  virtual uint64_t FullScans() { return 0; }
  virtual void ReportCounters(Metrics*) {}
  virtual unsigned PollMs() const { return 5; }  // reading the counters costs nothing to speak of at that pace
};

// `pages`: how many there are to be scanned. `flags` of ksmu_advise.
std::unique_ptr<Subject> MakeSubject(Side side, uint64_t pages, int flags);

// The heap of examples/vmheap, advised to a subject.
class BenchHeap {
 public:
  BenchHeap(const examples::HeapOptions& options, Subject* subject);
  void Fill() { heap_.Fill(); }
  void Advise();  // to the subject
  // Checks every byte by the seed; sets wrong_pages.
  void Check(Metrics* metrics);
  unsigned char* memory() const { return memory_; }
  size_t bytes() const { return bytes_; }
  uint64_t attainable() const { return attainable_.total(); }
  uint64_t pages() const { return attainable_.pages; }

 private:
  examples::Heap heap_;
  Subject* subject_;
  unsigned char* memory_ = nullptr;
  size_t bytes_ = 0;
  examples::Attainable attainable_;
};

// How merging went on until nothing was left to be saved, or no more came.
struct Converged {
  double seconds = 0;         // until `complete`, or the last growth
  double cpu_seconds = 0;     // the same
  double seconds_to_90 = -1;  // -1: never
  uint64_t saved = 0;
  bool complete = false;  // 99.5 % of what can be saved, or more
  void Report(const BenchHeap& heap, Metrics* metrics) const;
};
// From now on; counts CPU time since `cpu_before`, time since `begun_ns`.
Converged Converge(Subject* subject, const BenchHeap& heap, uint64_t begun_ns, uint64_t cpu_before, double max_seconds,
                   double enough = 0.995);

// ksmu_merge over the heap; CPU time of the library's threads and of this one.
Converged MergeNow(Subject* subject, const BenchHeap& heap);

}  // namespace bench

#endif  // KSMU_BENCH_VS_KSM_SUBJECT_H_
