#include "os/process.h"

#include <fcntl.h>
#include <sys/sysinfo.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "os/raw.h"
#include "os/uapi.h"

namespace ksmu::os {
namespace {

struct Dirent64 {
  std::uint64_t inode;
  std::int64_t offset;
  std::uint16_t record_bytes;
  std::uint8_t type;
  char name[1];
};

}  // namespace

int UnshareDescriptors() {
  if (long error = raw::Repeat([] { return syscall(SYS_close_range, 3u, ~0u, uapi::kCloseRangeUnshare); }); error < 0) {
    return static_cast<int>(error);
  }
  int idle = raw::Repeat([] { return open("/dev/null", O_RDWR | O_CLOEXEC); });
  // Without /dev (a bare chroot): anything that refuses to be read and written.
  if (idle < 0) idle = raw::Repeat([] { return epoll_create1(EPOLL_CLOEXEC); });
  if (idle < 0) return idle;
  for (int standard = 0; standard <= 2; ++standard) {
    if (standard == idle) continue;
    if (int error = raw::Repeat([&] { return dup3(idle, standard, O_CLOEXEC); }); error < 0) return error;
  }
  if (idle > 2) close(idle);
  return 0;
}

int SystemCallFilters() {
  char text[4096];
  const std::int64_t n = ReadSmallFile(AT_FDCWD, "/proc/thread-self/status", text, sizeof text);
  if (n <= 0) return -1;
  std::string_view rest(text, static_cast<std::size_t>(n));
  constexpr std::string_view kField = "\nSeccomp_filters:";  // since 5.9
  const std::size_t at = rest.find(kField);
  if (at == rest.npos) return -1;
  rest.remove_prefix(at + kField.size());
  while (!rest.empty() && rest.front() == '\t') rest.remove_prefix(1);
  std::uint64_t count;
  return TakeDecimal(&rest, &count) ? static_cast<int>(count) : -1;
}

int CurrentThread() { return static_cast<int>(syscall(SYS_gettid)); }

bool OwnThreads::Add(int thread) {
  for (auto& slot : threads_) {
    int empty = 0;
    if (slot.compare_exchange_strong(empty, thread)) return true;
  }
  return false;
}

void OwnThreads::Remove(int thread) {
  for (auto& slot : threads_) {
    int expected = thread;
    if (slot.compare_exchange_strong(expected, 0)) return;
  }
}

bool OwnThreads::Contains(int thread) const {
  return std::any_of(std::begin(threads_), std::end(threads_), [&](const auto& slot) { return slot.load() == thread; });
}

int ForEachNumber(int directory, bool (*each)(void* cookie, int number), void* cookie) {
  alignas(Dirent64) char buffer[4096];
  for (;;) {
    long bytes = raw::Repeat([&] { return syscall(SYS_getdents64, directory, buffer, sizeof buffer); });
    if (bytes <= 0) return static_cast<int>(bytes);
    for (long at = 0; at < bytes;) {
      auto* entry = reinterpret_cast<Dirent64*>(buffer + at);
      at += entry->record_bytes;
      std::string_view name(entry->name);
      std::uint64_t number;
      if (TakeDecimal(&name, &number) && name.empty() && !each(cookie, static_cast<int>(number))) return 0;
    }
  }
}

int ForEachThread(bool (*each)(void* cookie, int thread), void* cookie) {
  int directory = raw::Repeat([] { return open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (directory < 0) return directory;
  int error = ForEachNumber(directory, each, cookie);
  close(directory);
  return error;
}

namespace {

// The kernel's struct robust_list_head.
struct RobustHead {
  Address next;
  long futex_offset;
  Address pending;
};

struct WordVisit {
  System& system;
  const OwnThreads& own;
  bool (*each)(void*, Address);
  void* cookie;
  bool stopped = false;

  bool Visit(Address address) {
    if (!stopped && !each(cookie, address)) stopped = true;
    return !stopped;
  }
  bool VisitEntry(Address entry, long offset) { return Visit(entry) && Visit(entry + static_cast<Address>(offset)); }
  bool VisitThread(int thread) {
    if (own.Contains(thread)) return true;
    Address head = 0;
    std::size_t bytes = 0;
    // ESRCH: it has exited meanwhile. No other reason is to be expected among the threads of one process.
    if (syscall(SYS_get_robust_list, thread, &head, &bytes) != 0 || head == 0) return true;
    // The head lies in the C library's thread descriptor, and so does, close by, the word that the kernel clears when
    // the thread exits (glibc: 16 bytes before; musl: within 200), which no call tells of another thread.
    constexpr Address kNear = 256;
    if (!Visit(head - kNear) || !Visit(head) || !Visit(head + kNear)) return false;
    RobustHead list;
    if (ReadProgram(head, &list, sizeof list) != sizeof list) return true;
    // The kernel itself gives up after 2048 entries. Bit 0 of an entry says that it is a priority-inheriting futex.
    constexpr int kMostEntries = 2048;
    if (list.pending && !VisitEntry(list.pending & ~Address{1}, list.futex_offset)) return false;
    Address entry = list.next & ~Address{1};
    for (int i = 0; i < kMostEntries && entry != 0 && entry != head; ++i) {
      if (!VisitEntry(entry, list.futex_offset)) return false;
      if (ReadProgram(entry, &entry, sizeof entry) != sizeof entry) return true;
      entry &= ~Address{1};
    }
    return true;
  }
  std::size_t ReadProgram(Address from, void* to, std::size_t bytes) { return system.ReadProgram(from, to, bytes); }
};

}  // namespace

void VisitUnwaitableWords(System& system, const OwnThreads& own, bool (*each)(void* cookie, Address), void* cookie) {
  WordVisit visit{system, own, each, cookie};
  ForEachThread([](void* v, int thread) { return static_cast<WordVisit*>(v)->VisitThread(thread); }, &visit);
}

// --- memory --------------------------------------------------------------------------------------------------------

namespace {

constexpr std::uint64_t kUnbounded = ~std::uint64_t{0};

// "max", or a number of bytes. Version 1 writes its "unlimited" as a number near 2^63.
std::uint64_t ReadBytes(const PathBuffer& directory, std::string_view file) {
  PathBuffer path = directory;
  path.Add(file);
  char buffer[64];
  std::int64_t size = path.ok() ? ReadSmallFile(AT_FDCWD, path.c_str(), buffer, sizeof buffer) : -1;
  std::string_view text(buffer, size > 0 ? static_cast<std::size_t>(size) : 0);
  std::uint64_t value;
  if (!TakeDecimal(&text, &value)) return kUnbounded;
  return value >= (std::uint64_t{1} << 62) ? kUnbounded : value;
}

// The value of the line "name value" of memory.stat or /proc/meminfo ("name: value kB").
std::uint64_t FindValue(std::string_view text, std::string_view name) {
  while (!text.empty()) {
    std::size_t newline = text.find('\n');
    std::string_view line = text.substr(0, newline);
    text.remove_prefix(newline == std::string_view::npos ? text.size() : newline + 1);
    std::uint64_t value;
    if (!TakePrefix(&line, name) || (!TakePrefix(&line, ":") && line.substr(0, 1) != " ")) continue;
    SkipSpaces(&line);
    if (TakeDecimal(&line, &value)) return value;
  }
  return 0;
}

}  // namespace

void MemoryBudget::Open() {
  // /proc/self/cgroup: "0::/path" (version 2), "4:memory:/path" (version 1). Where version 1 holds the memory
  // controller, version 2 does not.
  char buffer[4096];
  PathBuffer group;
  bool found1 = false, found2 = false;
  int fd = raw::Repeat([] { return open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC); });
  if (fd < 0) return;
  std::string_view line;
  {
    LineReader lines(fd, buffer, sizeof buffer);
    while (lines.Next(&line)) {
      std::uint64_t hierarchy;
      if (!TakeDecimal(&line, &hierarchy) || !TakePrefix(&line, ":")) continue;
      std::size_t colon = line.find(':');
      if (colon == std::string_view::npos) continue;
      std::string_view controllers = line.substr(0, colon);
      bool memory1 = false;
      for (std::string_view rest = controllers; !rest.empty();) {
        std::size_t comma = rest.find(',');
        memory1 |= rest.substr(0, comma) == "memory";
        rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
      }
      bool unified = hierarchy == 0 && controllers.empty();
      if (memory1 || (unified && !found1)) {
        group = PathBuffer{};
        group.Add(line.substr(colon + 1));
        found1 |= memory1;
        found2 |= unified;
      }
    }
  }
  close(fd);
  if (!found1 && !found2) return;
  version2_ = !found1;

  // /proc/self/mountinfo: id parent major:minor root mount-point options ... - type source super-options
  fd = raw::Repeat([] { return open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC); });
  if (fd < 0) return;
  LineReader lines(fd, buffer, sizeof buffer);
  while (lines.Next(&line)) {
    std::size_t dash = line.find(" - ");
    if (dash == std::string_view::npos) continue;
    std::string_view tail = line.substr(dash + 3);
    std::string_view type = TakeWord(&tail);
    TakeWord(&tail);  // source
    if (version2_ ? type != "cgroup2" : type != "cgroup" || tail.find("memory") == std::string_view::npos) continue;
    for (int skip = 0; skip < 3; ++skip) TakeWord(&line);
    std::string_view root = TakeWord(&line);
    std::string_view mount = TakeWord(&line);
    // In a container the mount shows a part of the tree only, the one below `root`.
    std::string_view path = group.view();
    if (root != "/" && !TakePrefix(&path, root)) path = "/";
    directory_ = PathBuffer{};
    directory_.Add(mount);
    mount_length_ = directory_.view().size();
    if (path != "/") directory_.Add(path);
    if (!directory_.ok()) directory_ = PathBuffer{};
    break;
  }
  close(fd);
}

std::uint64_t MemoryBudget::Headroom(const PathBuffer& directory, bool version2, std::uint64_t free_swap) {
  std::uint64_t limit = ReadBytes(directory, version2 ? "/memory.max" : "/memory.limit_in_bytes");
  std::uint64_t used = ReadBytes(directory, version2 ? "/memory.current" : "/memory.usage_in_bytes");
  if (limit == kUnbounded || used == kUnbounded) return kUnbounded;
  // File pages are counted as used, but give way; half of the active ones, as MemAvailable reckons it.
  char stat[4096];
  PathBuffer path = directory;
  path.Add("/memory.stat");
  std::int64_t size = path.ok() ? ReadSmallFile(AT_FDCWD, path.c_str(), stat, sizeof stat) : -1;
  std::string_view text(stat, size > 0 ? static_cast<std::size_t>(size) : 0);
  std::uint64_t cache = version2 ? FindValue(text, "inactive_file") + FindValue(text, "active_file") / 2
                                 : FindValue(text, "total_inactive_file") + FindValue(text, "total_active_file") / 2;
  std::uint64_t headroom = limit > used ? limit - used : 0;
  headroom += std::min(cache, used);
  if (version2) {  // version 1 accounts memory and swap in one figure that says nothing of the room left in memory
                   // alone
    std::uint64_t swap_limit = ReadBytes(directory, "/memory.swap.max");
    std::uint64_t swap_used = ReadBytes(directory, "/memory.swap.current");
    std::uint64_t swap = free_swap;
    if (swap_limit != kUnbounded && swap_used != kUnbounded) {
      swap = std::min(swap, swap_limit > swap_used ? swap_limit - swap_used : 0);
    }
    headroom += swap;
  }
  return headroom;
}

std::uint64_t MemoryBudget::Available() const {
  char buffer[4096];
  std::int64_t size = ReadSmallFile(AT_FDCWD, "/proc/meminfo", buffer, sizeof buffer);
  std::string_view text(buffer, size > 0 ? static_cast<std::size_t>(size) : 0);
  std::uint64_t free_swap = FindValue(text, "SwapFree") * 1024;
  std::uint64_t available = FindValue(text, "MemAvailable") * 1024 + free_swap;
  if (size <= 0) {
    // No descriptor to be had (RLIMIT_NOFILE): what the kernel tells without one. Less than MemAvailable.
    struct sysinfo info {};
    if (sysinfo(&info) == 0) available = (static_cast<std::uint64_t>(info.freeram) + info.bufferram + info.freeswap) * info.mem_unit;
  }
  if (directory_.view().empty()) return available;
  for (PathBuffer directory = directory_;;) {
    available = std::min(available, Headroom(directory, version2_, free_swap));
    std::string_view path = directory.view();
    if (path.size() <= mount_length_) break;
    directory.Truncate(std::max(path.rfind('/'), mount_length_));
  }
  return available;
}

}  // namespace ksmu::os
