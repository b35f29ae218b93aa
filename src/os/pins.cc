#include "os/pins.h"

#include <fcntl.h>
#include <linux/major.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <array>

#include "os/mappings.h"
#include "os/raw.h"
#include "os/text.h"
#include "os/uapi.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

namespace ksmu::os {
namespace {

constexpr unsigned kMiscMajor = 10;
constexpr unsigned kTunMinor = 200, kKvmMinor = 232;
constexpr unsigned kFirstPtyMajor = 136, kLastPtyMajor = 143;

template <std::size_t N>
bool IsOneOf(std::string_view name, const std::string_view (&names)[N]) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

// anon_inode files without a device behind them. Not here, on purpose: bpf maps (values may be pinned user memory since
// 6.13), dma-buf, io_uring (looked at apart), vfio, kvm devices (kvm-vfio).
bool HarmlessAnonInode(std::string_view name) {
  static constexpr std::string_view kHarmless[] = {
      "[eventfd]", "[timerfd]",  "[signalfd]",   "inotify", "[inotify]", "[eventpoll]",  "[userfaultfd]",
      "[pidfd]",   "[fanotify]", "[perf_event]", "kvm-vm",  "[kvm-vm]",  "kvm-vm-stats", "kvm-vcpu-stats",
  };
  return IsOneOf(name, kHarmless) || name.substr(0, 9) == "kvm-vcpu:";
}

// A nested guest's control pages stay mapped by the kernel for as long as that guest runs (kvm_vcpu_map).
bool IsGuest(std::string_view name) { return name.find("kvm-v") != std::string_view::npos; }

// What a file system does with pages of the program's that it reads into.
enum class Reading : std::uint8_t {
  kCopied,    // read(2) copies; with O_DIRECT the pages are pinned for the time of a request
  kPinned,    // the same, but also without O_DIRECT
  kUnlisted,  // perhaps so; and with O_DIRECT there may be no pin, only a reference, which UFFDIO_MOVE does not see
  kNfs,       // with O_DIRECT there is only a reference. Even the type of a file may be asked of the server
  k9p,        // the same at every read, if the mount has no cache
  kUnknown,   // no mount that can be seen from here
};

Reading ReadingOf(std::string_view type) {
  static constexpr std::string_view kCopying[] = {"ext2", "ext3",  "ext4",      "xfs",  "btrfs", "tmpfs",
                                                  "proc", "ramfs", "hugetlbfs", "sysfs", "cgroup2", "devtmpfs"};
  // FUSE pins since 6.9, CIFS since 6.3.
  static constexpr std::string_view kPinning[] = {"fuse", "fuseblk", "virtiofs", "cifs", "smb3", "f2fs", "bcachefs"};
  if (IsOneOf(type, kCopying)) return Reading::kCopied;
  if (IsOneOf(type, kPinning) || type.substr(0, 5) == "fuse.") return Reading::kPinned;
  if (type == "nfs" || type == "nfs4") return Reading::kNfs;
  return type == "9p" ? Reading::k9p : Reading::kUnlisted;
}

// The file systems of mounts that descriptors lie on. By mountinfo, which asks nobody: statfs(2) waits for the server of a network
// file system, or of FUSE, and with it would whoever waits for the scanner.
class Mounts {
 public:
  Reading At(std::uint64_t mount) {
    for (std::size_t i = 0; i < count_; ++i) {
      if (known_[i].mount == mount) return known_[i].reading;
    }
    const Reading reading = Find(mount);
    if (count_ < known_.size()) known_[count_++] = {mount, reading};
    return reading;
  }

 private:
  // id parent major:minor root mount-point options ... - type source super-options
  static Reading Find(std::uint64_t mount) {
    const int fd = raw::Repeat([] { return open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC); });
    if (fd < 0) return Reading::kUnknown;
    char buffer[8192];
    LineReader lines(fd, buffer, sizeof buffer);
    std::string_view line;
    Reading reading = Reading::kUnknown;
    while (lines.Next(&line)) {
      std::uint64_t id;
      if (!TakeDecimal(&line, &id) || id != mount) continue;
      const std::size_t at = line.find(" - ");
      if (at != std::string_view::npos) line.remove_prefix(at + 3), reading = ReadingOf(TakeWord(&line));
      break;
    }
    close(fd);
    return reading;
  }

  struct Known {
    std::uint64_t mount;
    Reading reading;
  };
  std::array<Known, 16> known_{};
  std::size_t count_ = 0;
};

bool HarmlessCharacterDevice(dev_t device, std::string_view path) {
  unsigned number = major(device), part = minor(device);
  switch (number) {
    case MEM_MAJOR:  // null, zero, full, random, urandom, kmsg; not mem and port
      return part == 3 || part == 5 || part == 7 || part == 8 || part == 9 || part == 11;
    case TTY_MAJOR:
    case TTYAUX_MAJOR:
      return true;
    case kMiscMajor:
      // The number of userfaultfd's device is given out as modules come.
      return part == kTunMinor || part == kKvmMinor || path == "/dev/userfaultfd";
    default:
      return number >= kFirstPtyMajor && number <= kLastPtyMajor;
  }
}

// A dma-buf looks like a file in some kernels.
bool IsDmaBuf(std::string_view path) { return path.substr(0, 7) == "/dmabuf"; }

// By what stat says of it: O_DIRECT on files and block devices pins for the time of one request only.
bool HarmlessFile(mode_t mode, dev_t device, std::string_view path) {
  if (IsDmaBuf(path)) return false;
  switch (mode & S_IFMT) {
    case S_IFREG:
    case S_IFDIR:
    case S_IFLNK:
    case S_IFIFO:
    case S_IFBLK:
      return true;
    case S_IFCHR:
      return HarmlessCharacterDevice(device, path);
    default:
      return false;
  }
}

bool HarmlessSocketFamily(int family) {
  // Not AF_XDP, AF_RDS, AF_SMC: registered memory. Not AF_ALG and what else there is: nobody has looked.
  return family == AF_UNIX || family == AF_INET || family == AF_INET6 || family == AF_NETLINK || family == AF_PACKET ||
         family == uapi::kAfVsock;
}

// mm->pinned_vm: registered buffers of every io_uring that this process created, also where its descriptor has been
// closed or is in other hands, and RDMA's memory regions.
bool NothingAccountedAsPinned() {
  char buffer[4096];
  std::int64_t size = ReadSmallFile(AT_FDCWD, "/proc/self/status", buffer, sizeof buffer);
  std::string_view text(buffer, size > 0 ? static_cast<std::size_t>(size) : 0);
  std::size_t at = text.find("\nVmPin:");
  if (at == std::string_view::npos) return false;
  text.remove_prefix(at + 7);
  SkipSpaces(&text);
  std::uint64_t value;
  return TakeDecimal(&text, &value) && value == 0;
}

// One thread's descriptor table.
class TableCheck {
 public:
  TableCheck(int thread, const PinPolicy& policy, Mounts* mounts) : thread_(thread), policy_(policy), mounts_(mounts) {}
  ~TableCheck() {
    if (pidfd_ >= 0) close(pidfd_);
  }

  bool requests() const { return requests_; }

  bool Harmless() { return All(&TableCheck::HarmlessDescriptor); }
  // No request can be under way through it whose pages UFFDIO_MOVE would take.
  bool Pinning() { return All(&TableCheck::PinningDescriptor); }

 private:
  bool All(bool (TableCheck::*each)(int)) {
    PathBuffer path;
    path.Add("/proc/self/task/").Add(static_cast<std::uint64_t>(thread_)).Add("/fd");
    directory_ = raw::Repeat([&] { return open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
    if (directory_ < 0) return directory_ == -ENOENT || directory_ == -ESRCH;  // the thread has gone
    struct Visit {
      TableCheck* self;
      bool (TableCheck::*each)(int);
      bool all = true;
    } visit{this, each};
    int error = ForEachNumber(
        directory_,
        [](void* v, int number) {
          auto* at = static_cast<Visit*>(v);
          return at->all = (at->self->*at->each)(number);
        },
        &visit);
    close(directory_);
    // ENOENT: the thread has exited, and its table, if it was nobody else's, with it.
    return visit.all && (error == 0 || error == -ENOENT);
  }

  bool HarmlessDescriptor(int number) {
    PathBuffer name;
    name.Add(static_cast<std::uint64_t>(number));
    char target[256];
    ssize_t size = raw::Repeat([&] { return readlinkat(directory_, name.c_str(), target, sizeof target); });
    if (size == -ENOENT) return true;  // closed meanwhile
    if (size < 0) return false;
    std::string_view text(target, static_cast<std::size_t>(size));
    if (TakePrefix(&text, "anon_inode:")) {
      const bool ring = text == "[io_uring]";
      requests_ |= ring || IsGuest(text);
      return ring ? policy_.trust_ring_without_buffers && RingShowsNoBuffers(number) : HarmlessAnonInode(text);
    }
    if (text.substr(0, 8) == "socket:[") return HarmlessSocket(number);
    if (text.substr(0, 6) == "pipe:[" || text.substr(0, 7) == "pidfd:[" || text.substr(0, 5) == "net:[") return true;
    Info info;
    if (!Read(number, &info)) return info.closed;
    const Reading reading = ReadingOn(info, text);
    // Devices are not opened there, but under /dev.
    if ((reading == Reading::kNfs || reading == Reading::k9p) && text.substr(0, 5) != "/dev/") return requests_ = true;
    struct statx status {};
    int error = raw::Repeat([&] { return statx(directory_, name.c_str(), AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, STATX_TYPE, &status); });
    if (error == -ENOENT) return true;
    if (error != 0 || !HarmlessFile(status.stx_mode, makedev(status.stx_rdev_major, status.stx_rdev_minor), text)) return false;
    requests_ |= S_ISBLK(status.stx_mode) ||  // SG_IO needs no O_DIRECT
                 (S_ISREG(status.stx_mode) && (info.direct || reading != Reading::kCopied));
    return true;
  }

  bool PinningDescriptor(int number) {
    Info info;
    if (!Read(number, &info)) return info.closed;
    Reading reading = mounts_->At(info.mount);
    if (!info.direct || (reading != Reading::kUnlisted && reading != Reading::kUnknown)) {
      return reading != Reading::k9p && !(info.direct && reading == Reading::kNfs);
    }
    // Not a pipe, nor a file in memory; and block devices pin.
    PathBuffer name;
    name.Add(static_cast<std::uint64_t>(number));
    char target[256];
    const ssize_t size = raw::Repeat([&] { return readlinkat(directory_, name.c_str(), target, sizeof target); });
    if (size < 0) return size == -ENOENT;
    const std::string_view text(target, static_cast<std::size_t>(size));
    return text.substr(0, 1) != "/" || text.substr(0, 5) == "/dev/" || ReadingOn(info, text) == Reading::kCopied;
  }

  struct Info {
    bool closed = false, direct = false;
    std::uint64_t mount = 0;
  };

  // False: it has been closed meanwhile, or cannot be read.
  bool Read(int number, Info* info) {
    PathBuffer path;
    path.Add("/proc/self/task/").Add(static_cast<std::uint64_t>(thread_)).Add("/fdinfo/");
    path.Add(static_cast<std::uint64_t>(number));
    char buffer[512];
    const std::int64_t size = ReadSmallFile(AT_FDCWD, path.c_str(), buffer, sizeof buffer);
    info->closed = size == -ENOENT;
    if (size < 0) return false;
    const std::string_view all(buffer, static_cast<std::size_t>(size));
    const auto value_of = [&](std::string_view begin) {
      const std::size_t at = all.find(begin);
      std::string_view rest = at == std::string_view::npos ? std::string_view() : all.substr(at + begin.size());
      SkipSpaces(&rest);
      return rest;
    };
    unsigned long flags = 0;
    std::string_view octal = value_of("flags:"), mount = value_of("mnt_id:");
    if (octal.empty() || !TakeDecimal(&mount, &info->mount)) return false;
    for (; !octal.empty() && octal.front() >= '0' && octal.front() <= '7'; octal.remove_prefix(1)) {
      flags = flags * 8 + static_cast<unsigned long>(octal.front() - '0');
    }
    info->direct = flags & O_DIRECT;
    return true;
  }

  // Files in memory lie on a mount that is nowhere to be seen.
  Reading ReadingOn(const Info& info, std::string_view link) {
    const Reading reading = mounts_->At(info.mount);
    return reading == Reading::kUnknown && link.substr(0, 7) == "/memfd:" ? Reading::kCopied : reading;
  }

  // What take(rest of the line) says of the line of the descriptor's fdinfo that begins so. False where there is no such line: a ring
  // that is busy prints nothing. True of a descriptor that has been closed meanwhile.
  template <class Take>
  bool FdInfo(int number, std::string_view begin, Take take) {
    PathBuffer path;
    path.Add("/proc/self/task/").Add(static_cast<std::uint64_t>(thread_)).Add("/fdinfo/");
    path.Add(static_cast<std::uint64_t>(number));
    int fd = raw::Repeat([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC); });
    if (fd < 0) return fd == -ENOENT;
    char buffer[1024];
    LineReader lines(fd, buffer, sizeof buffer);
    std::string_view line;
    bool result = false;
    while (lines.Next(&line)) {
      if (!TakePrefix(&line, begin)) continue;
      SkipSpaces(&line);
      result = take(line);
      break;
    }
    close(fd);
    return result;
  }

  bool RingShowsNoBuffers(int number) {
    return FdInfo(number, "UserBufs:", [](std::string_view text) {
      std::uint64_t count;
      return TakeDecimal(&text, &count) && count == 0;
    });
  }

  // The link does not tell the family: fetch a copy of the descriptor and ask it.
  bool HarmlessSocket(int number) {
    if (pidfd_ < 0) {
      bool leader = thread_ == getpid();
      pidfd_ = static_cast<int>(
          raw::Repeat([&] { return syscall(SYS_pidfd_open, thread_, leader ? 0u : uapi::kPidfdThread); }));
      if (pidfd_ < 0) return false;  // 6.9 for a thread that is not the leader
    }
    int copy = static_cast<int>(raw::Repeat([&] { return syscall(SYS_pidfd_getfd, pidfd_, number, 0); }));
    if (copy < 0) return copy == -EBADF;  // closed meanwhile
    int family = -1;
    socklen_t bytes = sizeof family;
    int error = getsockopt(copy, SOL_SOCKET, SO_DOMAIN, &family, &bytes);
    close(copy);
    return error == 0 && HarmlessSocketFamily(family);
  }

  int thread_;
  const PinPolicy& policy_;
  Mounts* mounts_;
  bool requests_ = false;  // a device may be carrying one out, on pages of the program's
  int directory_ = -1;
  int pidfd_ = -1;
};

// Threads that share a table are looked at once, where kcmp(2) is to be had; else each of them.
struct TablesCheck {
  static constexpr std::size_t kMostTables = 16;
  const OwnThreads& own;
  const PinPolicy& policy;
  bool (TableCheck::*check)() = &TableCheck::Harmless;
  Mounts mounts{};
  int self = CurrentThread();
  // Where the caller has a table of its own, whoever shares that is ours: also the workers that the kernel starts for a
  // ring of ours. Where it has not, the program's table is the one to look at.
  bool skip_own_table = !SameTable(getpid(), self);
  int seen[kMostTables] = {};
  std::size_t count = 0;
  bool harmless = true, requests = false;

  static bool SameTable(int a, int b) { return syscall(SYS_kcmp, a, b, uapi::kKcmpFiles, 0, 0) == 0; }

  bool Visit(int thread) {
    if (skip_own_table && (own.Contains(thread) || SameTable(thread, self))) return true;
    for (std::size_t i = 0; i < count; ++i) {
      if (SameTable(thread, seen[i])) return true;
    }
    if (count < kMostTables) seen[count++] = thread;
    TableCheck table(thread, policy, &mounts);
    harmless = (table.*check)();
    requests |= table.requests();
    return harmless;
  }
};

// `requests` is set where the mapping is a queue of direct I/O, whose files may have been closed.
bool HarmlessMapping(const Mapping& mapping, std::string_view name, const PinPolicy& policy, bool* requests) {
  if (mapping.special || mapping.heap || mapping.stack || mapping.anonymous) return true;
  if (TakePrefix(&name, "anon_inode:")) {
    // A ring that is still mapped may have been closed: then only VmPin speaks of it.
    if (name == "[io_uring]") {
      *requests = true;
      return policy.trust_ring_without_buffers;
    }
    return HarmlessAnonInode(name);
  }
  if (name.substr(0, 6) == "/[aio]") *requests = true;
  // Files; but not "socket:[...]", and not a device's registers, which sysfs shows as files.
  if (name.substr(0, 5) != "/dev/") return name.substr(0, 1) == "/" && name.substr(0, 5) != "/sys/" && !IsDmaBuf(name);
  if (name.substr(0, 9) == "/dev/shm/" || name.substr(0, 9) == "/dev/zero" || name.substr(0, 14) == "/dev/hugepages") {
    return true;
  }
  PathBuffer path;
  path.Add(name);
  struct stat status {};
  return path.ok() && raw::Repeat([&] { return stat(path.c_str(), &status); }) == 0 && HarmlessFile(status.st_mode, status.st_rdev, name);
}

bool MappingsHarmless(const PinPolicy& policy, const Span* own_rings, std::size_t own_ring_count, bool* requests) {
  int fd = raw::Repeat([] { return open("/proc/self/maps", O_RDONLY | O_CLOEXEC); });
  if (fd < 0) return false;
  char buffer[8192];
  LineReader lines(fd, buffer, sizeof buffer);
  std::string_view line, name;
  bool harmless = true;
  while (harmless && lines.Next(&line)) {
    Mapping mapping;
    if (!ParseMapsLine(line, &mapping, &name)) continue;
    bool ours =
        std::any_of(own_rings, own_rings + own_ring_count, [&](Span ring) { return ring.contains(mapping.start); });
    harmless = ours || HarmlessMapping(mapping, name, policy, requests);
  }
  harmless = harmless && lines.error() == 0;
  close(fd);
  return harmless;
}

}  // namespace

Pins PossiblePins(const OwnThreads& own, const PinPolicy& policy, const Span* own_rings, std::size_t own_ring_count) {
  if (!NothingAccountedAsPinned()) return Pins::kForLong;
  TablesCheck check{own, policy};
  if (ForEachThread([](void* v, int thread) { return static_cast<TablesCheck*>(v)->Visit(thread); }, &check) < 0)
    return Pins::kForLong;
  if (!check.harmless || !MappingsHarmless(policy, own_rings, own_ring_count, &check.requests)) return Pins::kForLong;
  return check.requests ? Pins::kRequests : Pins::kBrief;
}

bool PossibleReferences(const OwnThreads& own) {
  const PinPolicy policy;
  TablesCheck check{own, policy, &TableCheck::Pinning};
  const int error = ForEachThread([](void* v, int thread) { return static_cast<TablesCheck*>(v)->Visit(thread); }, &check);
  return error < 0 || !check.harmless;
}

}  // namespace ksmu::os
