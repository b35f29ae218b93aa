// Stress test: what its threads share.
//
// Every page belongs to one worker, or (in shared regions) every word; so whoever reads knows each byte that has to be
// there. A page's content is one of a few patterns, with one word of the owner's that is usually the pattern's own: most
// pages have twins, in runs, and stop having them all the time.
#pragma once

#include <ksmu/ksmu.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ksmu::stress {

struct Options {
  double seconds = 30;
  std::uint64_t seed = 1;
  int threads = 4;
  std::size_t pages = 2048;  // of each region
  std::string phases = "ABC";
  bool zram = false;
  bool keep_going = false;
  std::string directory = "/var/tmp";
  // To narrow a failure down: names of operations, of helper threads ("merger", "signals" ...) or kinds of regions.
  std::string without, regions;
  bool Without(const char* name) const { return ("," + without + ",").find("," + std::string(name) + ",") != std::string::npos; }
};

enum class Kind { kExact, kPromise, kSync, kMap, kHuge };
constexpr Kind kKinds[] = {Kind::kExact, Kind::kPromise, Kind::kSync, Kind::kMap, Kind::kHuge};
const char* KindName(Kind kind);

enum class Op : std::uint8_t {
  kNone, kCheck, kWord, kFill, kSame, kDiscard, kSeenDiscard, kPipe, kDirect, kVmWrite, kProcMem, kProtect, kRing, kRingSubmit,
  kRingComplete, kRemap, kUnadvise, kExplain, kPageOut, kFork, kClone, kCount
};
const char* OpName(Op op);

constexpr std::size_t kPatterns = 25;    // 0: zeros
constexpr std::size_t kBlock = 8;        // consecutive pages of one owner
constexpr std::size_t kHistory = 12;

struct Page {
  std::uint8_t pattern = 0;
  std::uint8_t value = 0;      // of the owner's word; 0: the pattern's own
  std::uint8_t pinned = 0;     // a registered buffer covers it: a discard would orphan it
  std::uint8_t busy = 0;       // a read into it is under way: old or new
  std::uint8_t next = 0;
  struct {
    Op op;
    double when;
    std::uint16_t first, count;  // the pages that the operation was about
  } history[kHistory] = {};
};

struct Region {
  Kind kind;
  unsigned char* base = nullptr;
  std::vector<Page> pages;
  bool raw_discards() const { return kind == Kind::kExact || kind == Kind::kSync || kind == Kind::kHuge; }
};

struct alignas(64) Progress {
  std::atomic<std::uint64_t> steps{0};
  std::atomic<const char*> name{nullptr};  // null: no such thread now
  std::atomic<int> op{0};
};
constexpr int kMaxThreads = 64;

// Counted and printed: what the test did, and what it met that is a documented limit.
struct Tally {
  std::atomic<std::uint64_t> ops[static_cast<int>(Op::kCount)] = {};
  std::atomic<std::uint64_t> children{0}, signals{0}, closed{0}, merge_calls{0}, merge_results{0}, ring_registers{0};
  std::atomic<std::uint64_t> huge{0}, huge_split{0}, budget_changes{0}, budget_met{0};
  std::atomic<std::uint64_t> robust{0}, priority{0}, exit_words{0}, swapped_out{0};
  std::atomic<std::uint64_t> proc_mem_refused{0}, priority_refused{0}, unmarked_exit_words_lost{0};
  std::atomic<std::int64_t> longest_exit_ms{0};
};

struct Phase {
  char name;
  double seconds;
  std::int64_t remerge_seconds;
  bool pins;         // O_DIRECT, io_uring, process_vm_writev: with them remerge_seconds must exceed every write's time
  bool descriptors;  // the program's descriptors survive; else all are closed in a loop
  std::int64_t thp_min_duplicates;
};

struct State {
  Options options;
  Phase phase{};
  double phase_start = 0;
  std::vector<Region> regions;
  std::atomic<bool> stop{false};      // this phase is over
  std::atomic<bool> failed{false};
  std::atomic<bool> library_on{false};  // calls must succeed
  std::atomic<int> reports{0};
  Progress progress[kMaxThreads];
  Tally tally;
  std::size_t page_size = 4096;
  unsigned char* patterns = nullptr;
  int direct_file = -1;               // pattern p at offset p * page_size; -1: none
  std::string why_no_direct, why_no_ring;
  std::atomic<bool> ring_works{true};

  const unsigned char* pattern(std::size_t p) const { return patterns + p * page_size; }
};
extern State g;

double Now();
// Random numbers of one thread (xorshift); seeded from --seed.
class Random {
 public:
  explicit Random(std::uint64_t seed) : x_(seed * 0x9e3779b97f4a7c15u + 0x1234567) {
    for (int i = 0; i < 8; ++i) Next();
  }
  std::uint64_t Next() {
    x_ ^= x_ << 13, x_ ^= x_ >> 7, x_ ^= x_ << 17;
    return x_ * 0x2545f4914f6cdd1du;
  }
  std::size_t Below(std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>((Next() >> 33) % n); }
  bool OneIn(std::size_t n) { return Below(n) == 0; }

 private:
  std::uint64_t x_;
};

// What the library did lately: the named points that it passed (src/base/test_point.h), for the report of a wrong page.
void RecordPoints();
std::string PointsOf(const void* page);

void SetUpPatterns();
void SetUpRegions();
void Advise(Region& region, std::size_t first, std::size_t pages);

inline int OwnerOf(std::size_t page) { return static_cast<int>(page / kBlock) % g.options.threads; }
inline std::size_t WordOffset(int owner) { return g.page_size / 2 + 8 * static_cast<std::size_t>(owner); }
inline unsigned char* PageAt(const Region& r, std::size_t i) { return r.base + i * g.page_size; }

// Sets what page i has to be; Note adds to its history.
void Note(Region& region, std::size_t i, Op op, std::size_t first, std::size_t count);
// True if the page is what it has to be; else reports it (once a page), with the page's history.
bool Check(Region& region, std::size_t i, const char* when);
// For children: reports nothing.
bool IsRight(const Region& region, std::size_t i);

// Notes a failure, ends the phase unless --keep-going. Any thread.
void Fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void Step(int slot, Op op = Op::kNone);

// The threads. Each gets its slot in g.progress.
void Worker(int slot, int owner);
void Merger(int slot);
void Observer(int slot);
void Signaller(int slot, std::vector<unsigned long> targets);
void Closer(int slot);
void MapBudget(int slot);
void HugePages(int slot);
unsigned char* HugeAligned(void* p);  // the first huge page's start from p on
// Shared words: several writers on one page.
void SharedWords(int slot, int index);
void SetUpShared();
void AdviseShared();
void CheckShared(const char* when);
// Robust mutexes, priority-inheriting futexes, exit words.
void SetUpLocks();
void AdviseLocks();
void RobustOwners(int slot);
void PriorityFutexes(int slot, int index);
void ExitWords(int slot);
void CheckLocks(const char* when);

}  // namespace ksmu::stress
