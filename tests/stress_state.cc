#include "stress_state.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/test_point.h"
#include "test_support.h"

namespace ksmu::stress {

State g;

const char* KindName(Kind kind) {
  switch (kind) {
    case Kind::kExact: return "exact";
    case Kind::kPromise: return "promise";
    case Kind::kSync: return "sync";
    case Kind::kMap: return "map";
    case Kind::kHuge: return "huge";
  }
  return "?";
}

const char* OpName(Op op) {
  static const char* const names[] = {"-", "check", "word", "fill", "same", "discard", "seen_discard", "read2", "direct", "vm_write",
                                      "proc_mem", "protect", "ring", "ring_submit", "ring_complete", "remap", "unadvise",
                                      "explain", "pageout", "fork", "clone"};
  static_assert(sizeof names / sizeof *names == static_cast<std::size_t>(Op::kCount));
  return names[static_cast<int>(op)];
}

double Now() { return test::Now(); }

namespace {
struct Passed {
  const char* point;
  std::uintptr_t address;
  std::size_t bytes;
  double when;
};
constexpr std::size_t kPassed = 1 << 17;
Passed g_passed[kPassed];
std::atomic<std::size_t> g_next_passed{0};

void OnPoint(const char* point, std::uintptr_t address, std::size_t bytes) {
  g_passed[g_next_passed.fetch_add(1, std::memory_order_relaxed) % kPassed] = {point, address, bytes, Now()};
}
}  // namespace

void RecordPoints() { base::g_test_hook.store(OnPoint); }

std::string PointsOf(const void* page) {
  const std::uintptr_t a = reinterpret_cast<std::uintptr_t>(page);
  std::string text;
  const std::size_t end = g_next_passed.load();
  int found = 0;
  for (std::size_t i = end; i > 0 && end - i < kPassed && found < 40; --i) {
    const Passed& p = g_passed[(i - 1) % kPassed];
    if (p.point == nullptr || a < p.address || a >= p.address + p.bytes) continue;
    char line[96];
    snprintf(line, sizeof line, " %s(%zu)@-%.1fms", p.point, p.bytes / g.page_size, (Now() - p.when) * 1e3);
    text = line + text;
    ++found;
  }
  return text;
}

void SetUpPatterns() {
  g.page_size = test::PageSize();
  void* p = mmap(nullptr, kPatterns * g.page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) abort();
  g.patterns = static_cast<unsigned char*>(p);
  for (std::size_t i = 1; i < kPatterns; ++i) {
    Random random(7000 + i);
    for (std::size_t k = 0; k < g.page_size; k += 8) {
      const std::uint64_t word = random.Next();
      memcpy(g.patterns + i * g.page_size + k, &word, 8);
    }
    // Half of them differ from another in their last eight bytes only.
    if (i > kPatterns / 2) {
      memcpy(g.patterns + i * g.page_size, g.patterns + (i - kPatterns / 2) * g.page_size, g.page_size - 8);
    }
  }
}

void Advise(Region& region, std::size_t first, std::size_t pages) {
  int advice = KSMU_MERGEABLE;
  if (region.kind == Kind::kPromise || region.kind == Kind::kMap) advice |= KSMU_F_NO_RAW_DISCARDS;
  if (region.kind == Kind::kSync) advice |= KSMU_F_SYNC_BREAK;
  if (ksmu_advise(PageAt(region, first), pages * g.page_size, advice) != 0 && g.library_on.load()) {
    Fail("ksmu_advise(%s): %s: %s", KindName(region.kind), strerror(errno), ksmu_last_error());
  }
}

void SetUpRegions() {
  for (Kind kind : kKinds) {
    if (g.options.regions.empty() || ("," + g.options.regions + ",").find("," + std::string(KindName(kind)) + ",") != std::string::npos) {
      g.regions.emplace_back().kind = kind;
    }
  }
  for (Region& r : g.regions) {
    const std::size_t bytes = g.options.pages * g.page_size;
    const bool huge = r.kind == Kind::kHuge;
    const std::size_t mapped = huge ? bytes + (std::size_t{2} << 20) : bytes;  // a place to begin at
    void* p = r.kind == Kind::kMap ? ksmu_map(bytes, 0)
                                   : mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
      fprintf(stderr, "stress_test: region %s: %s: %s\n", KindName(r.kind), strerror(errno), ksmu_last_error());
      exit(1);
    }
    r.base = huge ? HugeAligned(p) : static_cast<unsigned char*>(p);
    madvise(r.base, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    r.pages.resize(g.options.pages);
    for (std::size_t i = 0; i < g.options.pages; ++i) {
      r.pages[i].pattern = static_cast<std::uint8_t>(1 + i % kBlock);
      memcpy(PageAt(r, i), g.pattern(r.pages[i].pattern), g.page_size);
    }
  }
}

void Note(Region& region, std::size_t i, Op op, std::size_t first, std::size_t count) {
  Page& page = region.pages[i];
  page.history[page.next % kHistory] = {op, Now(), static_cast<std::uint16_t>(first), static_cast<std::uint16_t>(count)};
  page.next = static_cast<std::uint8_t>((page.next + 1) % kHistory);
}

bool IsRight(const Region& region, std::size_t i) {
  const Page& page = region.pages[i];
  if (page.busy) return true;
  const unsigned char* have = PageAt(region, i);
  const unsigned char* want = g.pattern(page.pattern);
  if (page.value == 0) return memcmp(have, want, g.page_size) == 0;
  const std::size_t at = WordOffset(OwnerOf(i));
  std::uint64_t word, expected;
  memcpy(&word, have + at, 8);
  memcpy(&expected, want + at, 8);
  return word == (expected ^ page.value) && memcmp(have, want, at) == 0 &&
         memcmp(have + at + 8, want + at + 8, g.page_size - at - 8) == 0;
}

bool Check(Region& region, std::size_t i, const char* when) {
  if (IsRight(region, i)) return true;
  Page& page = region.pages[i];
  const unsigned char* have = PageAt(region, i);
  std::string is = "no pattern";
  for (std::size_t p = 0; p < kPatterns; ++p) {
    if (memcmp(have, g.pattern(p), g.page_size) == 0) is = "pattern " + std::to_string(p);
    else if (memcmp(have, g.pattern(p), g.page_size / 2) == 0 && is == "no pattern") is = "like pattern " + std::to_string(p);
  }
  std::string history;
  for (std::size_t k = 0; k < kHistory; ++k) {
    const auto& h = page.history[(page.next + k) % kHistory];
    if (h.op == Op::kNone) continue;
    char text[96];
    snprintf(text, sizeof text, " %s[%u,+%u]@-%.1fms", OpName(h.op), h.first, h.count, (Now() - h.when) * 1e3);
    history += text;
  }
  ksmu_page_info info = {};
  ksmu_explain(have, &info, sizeof info);
  Fail("WRONG BYTES %s: region %s page %zu (%p) is %s, has to be pattern %d value %d; owner %d, state %s %s now; right now %s; history:%s; the library:%s",
       when, KindName(region.kind), i, static_cast<const void*>(have), is.c_str(), page.pattern, page.value, OwnerOf(i),
       info.state_name != nullptr ? info.state_name : "?", info.reason_name != nullptr ? info.reason_name : "?",
       IsRight(region, i) ? "right" : "still wrong", history.c_str(),
       PointsOf(have).c_str());
  // Go on from what is there, so that one loss is one report.
  memcpy(PageAt(region, i), g.pattern(page.pattern), g.page_size);
  page.value = 0;
  return false;
}

void Fail(const char* format, ...) {
  char line[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  g.failed.store(true);
  if (g.reports.fetch_add(1) < 40) {
    fprintf(stderr, "FAILED (phase %c, %.2f s%s): %s\n", g.phase.name, Now() - g.phase_start,
            g.library_on.load() ? "" : ", the library is stopping or stopped", line);
    fflush(stderr);
  }
  if (!g.options.keep_going) g.stop.store(true);
}

void Step(int slot, Op op) {
  Progress& p = g.progress[slot];
  p.steps.store(p.steps.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  p.op.store(static_cast<int>(op), std::memory_order_relaxed);
  g.tally.ops[static_cast<int>(op)].fetch_add(1, std::memory_order_relaxed);
}

}  // namespace ksmu::stress
