#include "tools/foreign.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <utility>

#include "os/mappings.h"
#include "os/pool_file.h"
#include "os/raw.h"
#include "os/uapi.h"

namespace ksmu::tools {
namespace {

using os::raw::Repeat;

constexpr std::uint32_t kThere = os::kPresent | os::kSwapped;
constexpr std::size_t kRuns = 512, kEntries = 4096;

std::string Process(int pid) { return "process " + std::to_string(pid); }

}  // namespace

bool ParsePid(const char* text, int* pid, std::string* why) {
  const char* const end = text + std::strlen(text);
  const auto parsed = std::from_chars(text, end, *pid);
  if (parsed.ec == std::errc() && parsed.ptr == end && *pid > 0) return true;
  *why = std::string(text) + " is no process's number";
  return false;
}

Foreign::Foreign(Foreign&& other) noexcept
    : pid_(other.pid_),
      pidfd_(std::exchange(other.pidfd_, -1)),
      entries_fd_(std::exchange(other.entries_fd_, -1)),
      scans_(std::exchange(other.scans_, false)),
      pagemap_(std::exchange(other.pagemap_, os::Pagemap())),
      page_bytes_(other.page_bytes_) {}

Foreign::~Foreign() {
  if (pidfd_ >= 0) close(pidfd_);
  if (entries_fd_ >= 0) close(entries_fd_);
  pagemap_.Close();
}

bool Foreign::Open(int pid, std::string* why) {
  pid_ = pid;
  page_bytes_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // First, so that all that follows is about this process, and not about a later one of its number.
  pidfd_ = static_cast<int>(Repeat([&] { return syscall(SYS_pidfd_open, pid, 0); }));
  if (pidfd_ < 0) {
    *why = pidfd_ == -EINVAL || pidfd_ == -ENOENT ? std::to_string(pid) + " is a thread, not a process" : WhyNot(pidfd_);
    return false;
  }
  const std::string path = "/proc/" + std::to_string(pid) + "/pagemap";
  entries_fd_ = Repeat([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC); });
  if (entries_fd_ < 0) {
    // Of a process that has ended, and is still waited for, and of the kernel's own.
    if (!HasEnded(why)) *why = entries_fd_ == -ESRCH ? WhyNoMemory() : WhyNot(entries_fd_);
    return false;
  }
  scans_ = pagemap_.Open(page_bytes_, path.c_str()) == 0;
  return true;
}

bool Foreign::HasEnded(std::string* why) const {
  pollfd ended{pidfd_, POLLIN, 0};
  if (Repeat([&] { return poll(&ended, 1, 0); }) <= 0) return false;
  *why = Process(pid_) + " has ended";
  return true;
}

bool Foreign::ReadMappings(std::vector<ForeignMapping>* mappings, std::string* why) const {
  errno = 0;
  std::ifstream file("/proc/" + std::to_string(pid_) + "/maps");
  if (!file) {
    *why = WhyNot(errno ? -errno : -EIO);
    return false;
  }
  for (std::string line; std::getline(file, line);) {
    ForeignMapping one{};
    std::string_view name;
    // The vsyscall page is listed, and is the kernel's.
    if (!os::ParseMapsLine(line, &one.mapping, &name) || name == "[vsyscall]") continue;
    one.name = name;
    one.frames = !one.mapping.shared && one.name.compare(0, os::kPoolFileLinkPrefix.size(), os::kPoolFileLinkPrefix) == 0;
    mappings->push_back(std::move(one));
  }
  if (HasEnded(why)) return false;
  if (mappings->empty()) {
    *why = WhyNoMemory();
    return false;
  }
  return true;
}

void Foreign::NextRuns(os::Address* at, os::Address end, std::vector<os::PageRun>* runs) const {
  runs->clear();
  if (scans_) {
    os::ScanRequest request;
    request.any_of = kThere;
    request.returned = kThere | os::kFile | os::kPfnZero | os::kHuge;
    runs->resize(kRuns);
    const os::ScanResult result = pagemap_.Scan({*at, end - *at}, request, runs->data(), kRuns);
    runs->resize(result.runs);
    if (result.error == 0 && result.walked_to > *at) {
      *at = result.walked_to;
      return;
    }
    runs->clear();
  }
  std::uint64_t entries[kEntries];
  while (*at < end && runs->size() < kRuns) {
    const std::size_t pages = std::min<std::size_t>(kEntries, (end - *at) / page_bytes_);
    ReadEntries(*at, entries, pages);
    for (std::size_t i = 0; i < pages; ++i, *at += page_bytes_) {
      const std::uint32_t categories = (entries[i] & os::uapi::kPagemapPresent ? os::kPresent : 0u) |
                                       (entries[i] & os::uapi::kPagemapSwapped ? os::kSwapped : 0u) |
                                       (entries[i] & os::uapi::kPagemapFile ? os::kFile : 0u);
      if (!(categories & kThere)) continue;
      if (!runs->empty() && runs->back().end == *at && runs->back().categories == categories) {
        runs->back().end += page_bytes_;
      } else {
        runs->push_back({*at, *at + page_bytes_, categories});
      }
    }
  }
}

void Foreign::ReadEntries(os::Address start, std::uint64_t* entries, std::size_t pages) const {
  const auto offset = static_cast<off_t>(start / page_bytes_ * sizeof *entries);
  const auto got = Repeat([&] { return pread(entries_fd_, entries, pages * sizeof *entries, offset); });
  const std::size_t whole = got > 0 ? static_cast<std::size_t>(got) / sizeof *entries : 0;
  std::fill(entries + whole, entries + pages, 0);
}

std::ptrdiff_t Foreign::Read(os::Address from, void* to, std::size_t bytes) const {
  const iovec here{to, bytes}, there{reinterpret_cast<void*>(from), bytes};
  return Repeat([&] { return process_vm_readv(pid_, &here, 1, &there, 1, 0); });
}

std::string Foreign::WhyNoMemory() const { return Process(pid_) + " has no memory of its own: it is the kernel's"; }

std::string Foreign::WhyNot(int error) const {
  if (error == -ENOENT || error == -ESRCH) return "there is no " + Process(pid_);
  if (error == -EACCES || error == -EPERM) {
    return Process(pid_) +
           " may not be looked at: run ksmuctl as its user (who may need kernel.yama.ptrace_scope=0) or as root (CAP_SYS_PTRACE)";
  }
  return Process(pid_) + " cannot be looked at: " + std::strerror(-error);
}

}  // namespace ksmu::tools
