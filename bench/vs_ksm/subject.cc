#include "subject.h"

#include <ksmu/ksmu.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "kernel_ksm.h"

// What vmheap_heap.cc takes from the examples' report.cc, which knows of no subject but the library. Here memory is
// advised to whichever subject there is, through the hook.
namespace examples {
namespace {
std::function<void(void*, size_t)>& AdviseHook() {
  static std::function<void(void*, size_t)> hook;
  return hook;
}
}  // namespace

void Advise(void* start, size_t bytes, int) { AdviseHook()(start, bytes); }
std::string Explain(const void* page) {
  ksmu_page_info info;
  return ksmu_explain(page, &info, sizeof info) == 0 ? info.state_name : "?";
}
std::string Grouped(uint64_t number) { return std::to_string(number); }
double Mebibytes(double bytes) { return bytes / (1 << 20); }
ksmu_stats ReadStats() {
  ksmu_stats stats;
  if (ksmu_read_stats(&stats, sizeof stats) != 0) throw LibraryError("ksmu_read_stats");
  return stats;
}
void LiveLine::Show(const ksmu_stats&) {}
void LiveLine::End() {}
}  // namespace examples

namespace bench {
namespace ksm = examples::ksm;
namespace {

class Ksm final : public Subject {
 public:
  explicit Ksm(uint64_t pages) : pages_(pages), thread_(ksm::Thread()) {}
  void Start() override {
    if (thread_ < 0) throw std::runtime_error("there is no thread ksmd");
    if (!ksm::Reset()) throw std::runtime_error("KSM cannot be reset");
  }
  void Advise(void* start, size_t bytes) override {
    if (madvise(start, bytes, MADV_MERGEABLE) != 0) throw std::runtime_error("madvise(MADV_MERGEABLE) failed");
  }
  void SetPace(Pace pace) override {
    // Settings are changed while it stands still: a batch under way would go on with the old ones.
    bool set = ksm::Write("run", "0");
    if (pace != Pace::kOff) set = set && (pace == Pace::kFlatOut ? ksm::SetFlatOut(pages_) : ksm::SetDefaults());
    if (pace != Pace::kOff) set = set && ksm::Write("run", "1");
    if (!set) throw std::runtime_error("KSM's settings cannot be written");
  }
  uint64_t CpuNs() override { return ThreadCpuNs(thread_); }
  uint64_t SavedPages() override { return ksm::SavedPages(); }
  uint64_t FullScans() override { return static_cast<uint64_t>(ksm::Read("full_scans")); }
  void ReportCounters(Metrics* metrics) override {
    for (const char* name : {"pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages",
                             "pages_scanned", "pages_skipped", "full_scans", "general_profit"}) {
      (*metrics)[name] = static_cast<double>(ksm::Read(name));
    }
  }

 private:
  uint64_t pages_;
  pid_t thread_;
};

class Library final : public Subject {
 public:
  explicit Library(int flags) : flags_(flags) {}
  void Start() override {
    if (ksmu_start(nullptr, sizeof(ksmu_options)) != 0) throw examples::LibraryError("ksmu_start");
    SetPace(Pace::kOff);
  }
  void Advise(void* start, size_t bytes) override {
    if (ksmu_advise(start, bytes, KSMU_MERGEABLE | flags_) != 0) throw examples::LibraryError("ksmu_advise");
  }
  void SetPace(Pace pace) override {
    Set("cpu_limit_percent", pace == Pace::kFlatOut ? 100 : 10);
    Set("sleep_millisecs", pace == Pace::kFlatOut ? 0 : 20);
    Set("run", pace == Pace::kOff ? 0 : 1);
  }
  uint64_t CpuNs() override { return LibraryCpuNs(); }
  uint64_t SavedPages() override {
    const ksmu_stats stats = examples::ReadStats();
    return static_cast<uint64_t>(stats.pages_sharing + stats.ksm_zero_pages);
  }
  uint64_t FullScans() override { return static_cast<uint64_t>(examples::ReadStats().full_scans); }
  void ReportCounters(Metrics* metrics) override {
    const ksmu_stats stats = examples::ReadStats();
#define KSMU_BENCH_FIELD(field) (*metrics)[#field] = static_cast<double>(stats.field);
    KSMU_FOR_EACH_COUNTER(KSMU_BENCH_FIELD)
#undef KSMU_BENCH_FIELD
  }
  unsigned PollMs() const override { return 20; }

 private:
  static void Set(const char* name, int64_t value) {
    if (ksmu_set(name, value) != 0) throw examples::LibraryError(std::string("ksmu_set ") + name);
  }
  int flags_;
};

}  // namespace

std::unique_ptr<Subject> MakeSubject(Side side, uint64_t pages, int flags) {
  switch (side) {
    case Side::kKsm:
      return std::make_unique<Ksm>(pages);
    case Side::kLibrary:
      return std::make_unique<Library>(flags);
    case Side::kPlain:
      break;
  }
  return std::make_unique<Subject>();
}

BenchHeap::BenchHeap(const examples::HeapOptions& options, Subject* subject)
    : heap_(options), subject_(subject), attainable_(heap_.CountAttainable(256)) {
  examples::AdviseHook() = [this](void* start, size_t bytes) {
    memory_ = static_cast<unsigned char*>(start);
    bytes_ = bytes;
  };
  heap_.Advise(0);  // only to learn where it is
}

void BenchHeap::Advise() { subject_->Advise(memory_, bytes_); }

void BenchHeap::Check(Metrics* metrics) {
  heap_.CheckAll("at the end");
  (*metrics)["wrong_pages"] += static_cast<double>(heap_.wrong());
}

void Converged::Report(const BenchHeap& heap, Metrics* metrics) const {
  (*metrics)["seconds"] = seconds;
  (*metrics)["cpu_seconds"] = cpu_seconds;
  (*metrics)["seconds_to_90"] = seconds_to_90;
  (*metrics)["saved_pages"] = static_cast<double>(saved);
  (*metrics)["attainable_pages"] = static_cast<double>(heap.attainable());
  (*metrics)["saved_share"] =
      heap.attainable() != 0 ? static_cast<double>(saved) / static_cast<double>(heap.attainable()) : 0;
  (*metrics)["complete"] = complete;
}

Converged Converge(Subject* subject, const BenchHeap& heap, uint64_t begun_ns, uint64_t cpu_before, double max_seconds,
                   double enough) {
  constexpr uint64_t kQuietScans = 4;
  constexpr double kQuietSeconds = 2;
  Converged result;
  uint64_t grown_at_scan = subject->FullScans(), grown_to = 0;
  double grown_at = 0;
  for (;;) {
    const uint64_t saved = subject->SavedPages();
    const double seconds = static_cast<double>(NowNs() - begun_ns) * 1e-9;
    if (result.seconds_to_90 < 0 && saved != 0 && saved * 10 >= heap.attainable() * 9) result.seconds_to_90 = seconds;
    if (saved > result.saved || result.seconds == 0) {
      result.cpu_seconds = static_cast<double>(subject->CpuNs() - cpu_before) * 1e-9;
      result.seconds = seconds;
      result.saved = saved;
    }
    if (saved > grown_to + grown_to / 1000) {
      grown_to = saved;
      grown_at = seconds;
      grown_at_scan = subject->FullScans();
    }
    if (saved != 0 && static_cast<double>(saved) >= enough * static_cast<double>(heap.attainable())) {
      result.complete = true;
      return result;
    }
    const bool over =
        seconds - grown_at >= kQuietSeconds && saved != 0 && subject->FullScans() >= grown_at_scan + kQuietScans;
    if (over || seconds >= max_seconds) return result;
    usleep(subject->PollMs() * 1000);
  }
}

Converged MergeNow(Subject* subject, const BenchHeap& heap) {
  Converged result;
  const uint64_t cpu = subject->CpuNs() + OwnThreadCpuNs(), begun = NowNs();
  while (ksmu_merge(heap.memory(), heap.bytes()) < 0) {
    if (errno != EINTR) throw examples::LibraryError("ksmu_merge");
  }
  result.seconds = static_cast<double>(NowNs() - begun) * 1e-9;
  result.cpu_seconds = static_cast<double>(subject->CpuNs() + OwnThreadCpuNs() - cpu) * 1e-9;
  result.saved = subject->SavedPages();
  result.complete = static_cast<double>(result.saved) >= 0.995 * static_cast<double>(heap.attainable());
  return result;
}

}  // namespace bench
