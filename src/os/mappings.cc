#include "os/mappings.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

#include <cstring>

#include "os/pool_file.h"
#include "os/raw.h"
#include "os/text.h"
#include "os/thread.h"
#include "os/uapi.h"

namespace ksmu::os {
namespace {

// One read of maps or smaps brings at most a page or two; a line with a path of full length fits twice.
constexpr std::size_t kTextBuffer = 8192;

// What the name column tells. Names in brackets are the kernel's, but for those that the program gave to its anonymous
// memory (PR_SET_VMA_ANON_NAME).
void ApplyName(std::string_view name, Mapping* out) {
  bool given = name.substr(0, 6) == "[anon:";
  out->heap = name == "[heap]";
  out->stack = name.substr(0, 6) == "[stack";
  out->special = name.substr(0, 1) == "[" && !given && !out->heap && !out->stack;
  out->anonymous = out->device == 0 && out->inode == 0 && !out->special && (name.empty() || name[0] == '[');
}

class ScopedFd {
 public:
  explicit ScopedFd(int fd) : fd_(fd) {}
  ScopedFd(const ScopedFd&) = delete;
  ScopedFd& operator=(const ScopedFd&) = delete;
  ~ScopedFd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// A descriptor for each reading: its position is its own, so that threads do not disturb each other.
int OpenText(const char* path) {
  return raw::Repeat([&] { return open(path, O_RDONLY | O_CLOEXEC); });
}

// Asks for the mapping at the address, or the next one, and for its name where there is room for one.
uapi::ProcmapQuery Covering(Address address, char* name, std::size_t room) {
  uapi::ProcmapQuery query{};
  query.size = sizeof query;
  query.query_flags = uapi::kProcmapCoveringOrNext;
  query.query_addr = address;
  query.vma_name_addr = reinterpret_cast<std::uint64_t>(name);
  query.vma_name_size = static_cast<decltype(query.vma_name_size)>(room);
  return query;
}
}  // namespace

bool ParseMapsLine(std::string_view line, Mapping* out, std::string_view* name) {
  std::uint64_t start, end, offset, major_number, minor_number, inode;
  if (!TakeHex(&line, &start) || !TakePrefix(&line, "-") || !TakeHex(&line, &end) || !TakePrefix(&line, " "))
    return false;
  std::string_view permissions = TakeWord(&line);
  if (permissions.size() != 4) return false;
  if (!TakeHex(&line, &offset) || !TakePrefix(&line, " ")) return false;
  if (!TakeHex(&line, &major_number) || !TakePrefix(&line, ":") || !TakeHex(&line, &minor_number)) return false;
  if (!TakePrefix(&line, " ") || !TakeDecimal(&line, &inode)) return false;
  SkipSpaces(&line);
  *out = Mapping{};
  out->start = start;
  out->end = end;
  out->readable = permissions[0] == 'r';
  out->writable = permissions[1] == 'w';
  out->executable = permissions[2] == 'x';
  out->shared = permissions[3] == 's';
  out->offset = offset;
  out->device = makedev(static_cast<unsigned>(major_number), static_cast<unsigned>(minor_number));
  out->inode = inode;
  ApplyName(line, out);
  *name = line;
  return true;
}

void ParseSmapsLine(std::string_view line, Attributes* attributes) {
  if (TakePrefix(&line, "ProtectionKey:")) {
    SkipSpaces(&line);
    std::uint64_t key;
    attributes->protection_key = TakeDecimal(&line, &key) && key != 0;
    return;
  }
  if (!TakePrefix(&line, "VmFlags:")) return;
  SkipSpaces(&line);
  while (!line.empty()) {
    std::string_view flag = TakeWord(&line);
    if (flag == "dc")
      attributes->dont_fork = true;
    else if (flag == "dd")
      attributes->dont_dump = true;
    else if (flag == "hg")
      attributes->huge_page = true;
    else if (flag == "nh")
      attributes->no_huge_page = true;
    else if (flag == "wf")
      attributes->wipe_on_fork = true;
    else if (flag == "lo")
      attributes->locked = true;
    else if (flag == "mg")
      attributes->mergeable = true;
    else if (flag == "sl")
      attributes->sealed = true;
    else if (flag == "ht")
      attributes->hugetlb = true;
    else if (flag == "pf" || flag == "mm" || flag == "io")
      attributes->pfn_map = true;
    else if (flag == "nr")
      attributes->no_reserve = true;
    else if (flag == "gd")
      attributes->grows_down = true;
    else if (flag == "um" || flag == "uw" || flag == "ui")
      attributes->userfault = true;
  }
}

int Mappings::Open() {
  fd_ = OpenText("/proc/self/maps");
  if (fd_ < 0) return fd_;
  Mapping any;
  int error = QueryKernel(0, &any);
  has_query_ = error == 0;
  return 0;
}

void Mappings::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

int Mappings::QueryKernel(Address address, Mapping* out) const {
  // The name tells heap, stack and the kernel's own from plain memory. An anonymous mapping's has at most 86 characters; a
  // file's path may be of any length, and one that does not fit is an error: nobody wants to know it.
  char name[128];
  uapi::ProcmapQuery query = Covering(address, name, sizeof name);
  int error = raw::Repeat([&] { return ioctl(fd_, uapi::kIocProcmapQuery, &query); });
  if (error == -ENAMETOOLONG || error == -E2BIG) {
    query.vma_name_addr = query.vma_name_size = 0;
    error = raw::Repeat([&] { return ioctl(fd_, uapi::kIocProcmapQuery, &query); });
  }
  if (error < 0) return error;
  *out = Mapping{};
  out->start = query.vma_start;
  out->end = query.vma_end;
  out->readable = query.vma_flags & uapi::kProcmapReadable;
  out->writable = query.vma_flags & uapi::kProcmapWritable;
  out->executable = query.vma_flags & uapi::kProcmapExecutable;
  out->shared = query.vma_flags & uapi::kProcmapShared;
  out->offset = query.vma_offset;
  out->device = makedev(query.dev_major, query.dev_minor);
  out->inode = query.inode;
  if (out->inode != 0 || out->device != 0) return 0;
  ApplyName(query.vma_name_size > 1 ? std::string_view(name, query.vma_name_size - 1) : std::string_view(), out);
  return 0;
}

int Mappings::QueryText(Address address, Mapping* out) const {
  ScopedFd fd(OpenText("/proc/self/maps"));
  if (fd.get() < 0) return fd.get();
  char buffer[kTextBuffer];
  LineReader lines(fd.get(), buffer, sizeof buffer);
  std::string_view line, name;
  while (lines.Next(&line)) {
    if (!ParseMapsLine(line, out, &name)) continue;
    // The vsyscall page is listed but is no mapping of the process, and PROCMAP_QUERY does not know it.
    if (out->end > address && name != "[vsyscall]") return 0;
  }
  return lines.error() ? lines.error() : -ENOENT;
}

int Mappings::QueryFrames(Address address, Mapping* out, bool* frames) const {
  *frames = false;
  if (int error = Query(address, out)) return error;
  if (out->anonymous || out->shared) return 0;
  if (!has_query_) {
    ScopedFd fd(OpenText("/proc/self/maps"));
    if (fd.get() < 0) return fd.get();
    char buffer[kTextBuffer];
    LineReader lines(fd.get(), buffer, sizeof buffer);
    std::string_view line, name;
    Mapping mapping;
    while (lines.Next(&line)) {
      if (!ParseMapsLine(line, &mapping, &name) || mapping.start != out->start) continue;
      *frames = name.substr(0, kPoolFileLinkPrefix.size()) == kPoolFileLinkPrefix;
      return 0;
    }
    return lines.error() ? lines.error() : -ENOENT;
  }
  char name[64];
  uapi::ProcmapQuery query = Covering(address, name, sizeof name);
  const int error = raw::Repeat([&] { return ioctl(fd_, uapi::kIocProcmapQuery, &query); });
  if (error == -ENAMETOOLONG || error == -E2BIG) return 0;  // ours is short
  if (error < 0) return error;
  *frames = std::string_view(name, query.vma_name_size).substr(0, kPoolFileLinkPrefix.size()) == kPoolFileLinkPrefix;
  return 0;
}

int Mappings::Query(Address address, Mapping* out) const {
  return has_query_ ? QueryKernel(address, out) : QueryText(address, out);
}

int Mappings::ReadAttributes(Span span, void (*each)(void* cookie, const AttributedMapping&), void* cookie) const {
  // Entries of smaps come in address order, and each costs a walk over its page table: stop beyond the span.
  ScopedFd fd(OpenText("/proc/self/smaps"));
  if (fd.get() < 0) return fd.get();
  char buffer[kTextBuffer];
  LineReader lines(fd.get(), buffer, sizeof buffer);
  std::string_view line, name;
  AttributedMapping current;
  bool wanted = false;
  int count = 0;
  auto finish = [&] {
    if (!wanted) return;
    each(cookie, current);
    ++count;
    wanted = false;
  };
  while (lines.Next(&line)) {
    AttributedMapping next;
    if (ParseMapsLine(line, &next.mapping, &name)) {
      finish();
      if (next.mapping.start >= span.end()) return count;
      current = next;
      wanted = next.mapping.end > span.start && name != "[vsyscall]";
    } else if (wanted) {
      ParseSmapsLine(line, &current.attributes);
    }
  }
  finish();
  return lines.error() ? lines.error() : count;
}

std::size_t Mappings::Count() const {
  // Both cost some 0.6 µs a mapping (measured at 60,000); the query holds the lock for one mapping at a time.
  std::size_t count = 0;
  if (has_query_) {
    uapi::ProcmapQuery query = Covering(0, nullptr, 0);
    while (raw::Repeat([&] { return ioctl(fd_, uapi::kIocProcmapQuery, &query); }) >= 0) {
      ++count;
      query.query_addr = query.vma_end;
    }
    return count;
  }
  ScopedFd fd(OpenText("/proc/self/maps"));
  if (fd.get() < 0) return 0;
  char buffer[kTextBuffer];
  for (;;) {
    ssize_t got = raw::Repeat([&] { return read(fd.get(), buffer, sizeof buffer); });
    if (got <= 0) return count;
    for (const char* at = buffer; (at = static_cast<const char*>(std::memchr(
                                       at, '\n', static_cast<std::size_t>(buffer + got - at)))) != nullptr;) {
      ++count;
      ++at;
    }
  }
}

std::size_t Mappings::Max() {
  char buffer[32];
  std::int64_t size = ReadSmallFile(AT_FDCWD, "/proc/sys/vm/max_map_count", buffer, sizeof buffer);
  std::uint64_t value = 0;
  std::string_view text(buffer, size > 0 ? static_cast<std::size_t>(size) : 0);
  return TakeDecimal(&text, &value) ? value : 65530;
}

HugePages Mappings::TransparentHugePages() {
  // "always [madvise] never"
  char buffer[64];
  const std::int64_t size = ReadSmallFile(AT_FDCWD, "/sys/kernel/mm/transparent_hugepage/enabled", buffer, sizeof buffer);
  const std::string_view text(buffer, size > 0 ? static_cast<std::size_t>(size) : 0);
  if (text.find("[always]") != text.npos) return HugePages::kAlways;
  return text.find("[madvise]") != text.npos ? HugePages::kAdvised : HugePages::kNever;
}

int QueryFramesOnce(Address address, Mapping* out, bool* frames) {
  int error = -EBADF;
  for (int attempt = 0; attempt < 1000 && error && error != -ENOENT; ++attempt) {
    Mappings mappings;
    if (const int unopened = mappings.Open()) return unopened == -ENOENT ? -EACCES : unopened;
    error = mappings.QueryFrames(address, out, frames);
    mappings.Close();
    if (error && attempt > 10) YieldThread();
  }
  return error;
}

}  // namespace ksmu::os
