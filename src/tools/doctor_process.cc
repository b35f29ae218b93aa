// ksmuctl doctor: what this process, and so a program that is started from here, may do.
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <pwd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iterator>

#include "ksmu/ksmu.h"
#include "os/probe.h"
#include "os/process.h"
#include "os/raw.h"
#include "os/refusals.h"
#include "os/uapi.h"
#include "os/uffd.h"
#include "tools/doctor.h"
#include "tools/output.h"

namespace ksmu::tools {
namespace {

namespace raw = os::raw;

constexpr const char* kDevice = "/dev/userfaultfd";
constexpr int kPatienceMs = 20'000;
constexpr std::size_t kTrialPages = 64;
// Times at which children were forked are told apart by a locked page each (docs/limits.md).
constexpr rlim_t kForkTimes = 128;
// Five userfaultfds, /proc's files, a pool file for each 256 MiB; and a context for each forked child, of up to 1,000.
constexpr rlim_t kFewestFiles = 64, kGoodFiles = 1'024;
constexpr rlim_t kSmallestPool = rlim_t{2} << 20, kWholePool = rlim_t{256} << 20;

// What the library calls, in a form that does nothing: with arguments that the kernel refuses for themselves.
constexpr long kMinusOne = -1;
constexpr std::string_view kUserfaultfd = "userfaultfd";
struct Call {
  const char* name;
  long number;
  long arguments[6];
};
constexpr Call kCalls[] = {
    {"userfaultfd", SYS_userfaultfd, {os::uapi::kUserModeOnly | 0x10}},  // by which no right is asked for
    {"ioctl", SYS_ioctl, {kMinusOne}},
    {"mmap", SYS_mmap, {}},
    {"munmap", SYS_munmap, {}},
    {"mremap", SYS_mremap, {0, 0, 0, 0x7000}},
    {"mprotect", SYS_mprotect, {}},
    {"madvise", SYS_madvise, {0, 0, kMinusOne}},
    {"mincore", SYS_mincore, {1}},
    {"mlock", SYS_mlock, {}},
    {"memfd_create", SYS_memfd_create, {0, 0x8000}},
    {"ftruncate", SYS_ftruncate, {kMinusOne}},
    {"fallocate", SYS_fallocate, {kMinusOne}},
    {"pread64", SYS_pread64, {kMinusOne}},
    {"pwrite64", SYS_pwrite64, {kMinusOne}},
    {"fcntl", SYS_fcntl, {kMinusOne}},
    {"dup3", SYS_dup3, {kMinusOne, kMinusOne}},
    {"openat", SYS_openat, {kMinusOne}},
    {"getdents64", SYS_getdents64, {kMinusOne}},
    {"readlinkat", SYS_readlinkat, {kMinusOne}},
    {"process_vm_readv", SYS_process_vm_readv, {0, 0, 0, 0, 0, 1}},
    {"process_vm_writev", SYS_process_vm_writev, {0, 0, 0, 0, 0, 1}},
    {"close_range", SYS_close_range, {0xffff'ffff, 0xffff'ffff, 0}},
    {"signalfd4", SYS_signalfd4, {kMinusOne}},
    {"rt_sigprocmask", SYS_rt_sigprocmask, {0, 0, 0, 8}},
    {"ppoll", SYS_ppoll, {0, 0, 1}},  // no such address as 1
    {"futex", SYS_futex, {1}},
    {"socket", SYS_socket, {kMinusOne}},
    {"sendmsg", SYS_sendmsg, {kMinusOne}},
    {"recvmsg", SYS_recvmsg, {kMinusOne}},
};

bool IsRefused(long result) { return result == -EPERM || result == -EACCES || result == -ENOSYS; }

// A filter answers before the kernel has looked at the arguments.
bool FilterRefuses(const Call& call) {
  const auto& a = call.arguments;
  return IsRefused(raw::Direct(call.number, a[0], a[1], a[2], a[3], a[4], a[5]));
}

// What a body does in a child of its own: there are filters that end who calls, and a trial that hangs is to end.
enum class End { kDone, kSignal, kTime, kNoChild };
template <typename Result>
struct Outcome {
  End end;
  int signal;
  Result result;
};
template <typename Result, typename Body>
Outcome<Result> InChild(const Result& before, Body body) {
  Outcome<Result> outcome{End::kNoChild, 0, before};
  void* const memory = mmap(nullptr, sizeof(Result), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  int pipe[2];
  if (memory == MAP_FAILED) return outcome;
  auto* const result = new (memory) Result(before);
  // Its other end is the child's alone: it closes when that has ended.
  if (pipe2(pipe, O_CLOEXEC) == 0) {
    const pid_t child = fork();
    if (child == 0) {
      const rlimit none{0, 0};
      setrlimit(RLIMIT_CORE, &none);
      body(result);
      _exit(0);
    }
    close(pipe[1]);
    pollfd ended{pipe[0], POLLIN, 0};
    const bool in_time = child < 0 || poll(&ended, 1, kPatienceMs) != 0;
    if (!in_time) kill(child, SIGKILL);
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    close(pipe[0]);
    outcome.end = child < 0 ? End::kNoChild : !in_time ? End::kTime : status ? End::kSignal : End::kDone;
    outcome.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  }
  outcome.result = *result;
  munmap(memory, sizeof(Result));
  return outcome;
}

std::vector<const char*> RefusedCalls() {
  struct Refused {
    std::size_t at;
    bool is[std::size(kCalls)];
  };
  std::vector<const char*> names;
  Refused refused{};
  while (refused.at < std::size(kCalls)) {
    const auto outcome = InChild(refused, [](Refused* result) {
      for (; result->at < std::size(kCalls); ++result->at) result->is[result->at] = FilterRefuses(kCalls[result->at]);
    });
    refused = outcome.result;
    if (outcome.end == End::kNoChild) return {"clone"};
    if (refused.at < std::size(kCalls)) refused.is[refused.at++] = true;  // it has ended the child
  }
  for (std::size_t i = 0; i < std::size(kCalls); ++i) {
    if (refused.is[i]) names.push_back(kCalls[i].name);
  }
  return names;
}

bool Names(const std::vector<const char*>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

struct Opened {
  int error;  // of opening; -EPERM where the child was ended by it
  os::uffd::Door door;
  std::uint64_t features;
};
Opened OpenUserfaultfd() {
  const Opened before{-EPERM, os::uffd::Door::kSystemCall, 0};
  return InChild(before, [](Opened* opened) {
    const int fd = os::uffd::Open(false, false, &opened->door);
    opened->error = std::min(fd, 0);
    if (fd >= 0) os::uffd::QueryFeatures(fd, &opened->features);
  }).result;
}

std::string Joined(const std::vector<const char*>& names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

std::string UserName() {
  const passwd* const user = getpwuid(geteuid());
  return user ? user->pw_name : std::to_string(geteuid());
}

std::string HowToGiveDevice() { return "as root: setfacl -m u:" + UserName() + ":rw " + kDevice; }

void CheckDevice(bool needed, Findings* findings) {
  struct stat about {};
  const Level level = needed ? Level::kWarning : Level::kOk;
  if (stat(kDevice, &about) != 0) {
    findings->push_back(
        {"device", level, std::string("there is no ") + kDevice + (needed ? "" : ": the system call serves here"),
         needed ? "in a container, docker run --device /dev/userfaultfd; on the machine itself, boot a kernel of 6.1 or newer"
                : ""});
  } else if (access(kDevice, R_OK | W_OK) != 0) {
    findings->push_back({"device", level, UserName() + " may not open " + kDevice + (needed ? "" : ": the system call serves here"),
                         needed ? HowToGiveDevice() : ""});
  } else {
    findings->push_back({"device", Level::kOk, UserName() + " may open " + kDevice, ""});
  }
}

// The mend for a limit: in a shell as far as the hard limit goes, and for a service.
std::string Raise(const char* shell, const char* unit) {
  return std::string("ulimit ") + shell + " (as root where the hard limit is lower), or " + unit + " in the service's unit";
}

rlim_t SoftLimit(int which) {
  rlimit limit{};
  return getrlimit(static_cast<__rlimit_resource_t>(which), &limit) == 0 ? limit.rlim_cur : RLIM_INFINITY;
}

std::string Shown(rlim_t limit) { return limit == RLIM_INFINITY ? "unlimited" : Grouped(limit); }

struct TrialResult {
  int error;
  std::int64_t merged;
  bool differs;
  char text[400];
};

// On memory of the child's own, in no broker's domain.
void RunTrial(TrialResult* result) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const auto fail = [&](const char* why) {
    result->error = errno;
    std::snprintf(result->text, sizeof result->text, "%s", why);
  };
  ksmu_options options{};
  options.broker = "none";
  options.log = [](int level, const char* message, void* cookie) {
    if (level <= KSMU_LOG_WARNING) std::snprintf(static_cast<TrialResult*>(cookie)->text, sizeof result->text, "%s", message);
  };
  options.log_cookie = result;
  if (ksmu_start(&options, sizeof options) != 0) return fail(ksmu_last_error());
  auto* const memory =
      static_cast<unsigned char*>(mmap(nullptr, kTrialPages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) return fail("no memory");
  madvise(memory, kTrialPages * page, MADV_NOHUGEPAGE);
  std::memset(memory, 0x5a, kTrialPages * page);
  if (ksmu_advise(memory, kTrialPages * page, KSMU_MERGEABLE) != 0) return fail(ksmu_last_error());
  result->merged = ksmu_merge(memory, kTrialPages * page);
  if (result->merged < 0) return fail(ksmu_last_error());
  memory[page] = 1;
  for (std::size_t i = 0; i < kTrialPages * page; ++i) result->differs |= memory[i] != (i == page ? 1 : 0x5a);
}

std::string HowToMendTrial(int error) {
  switch (error) {
    case EPERM: return "what is said above about rights and calls";
    case ENOSYS: return "boot Linux 6.8 or newer";
    case EMFILE:
    case ENFILE: return Raise("-n 1024", "LimitNOFILE=1024");
    case EINVAL: return "unset the variable, or correct it: env | grep KSMU_";
    default: return "what is said above; or free memory: systemctl show -p MemoryMax,TasksMax tells a service's limits";
  }
}

}  // namespace

void CheckRights(const Tree& tree, Findings* findings) {
  const auto everybody = tree.ReadNumber("/proc/sys/vm/unprivileged_userfaultfd");
  const std::string mend_all = "as root: sysctl -w vm.unprivileged_userfaultfd=1 (to keep it: a line in /etc/sysctl.d/ksmu.conf)";
  if (tree.is_copy()) {
    if (everybody && *everybody == 1) {
      findings->push_back({"rights", Level::kOk, "vm.unprivileged_userfaultfd is 1: everybody may use userfaultfd", ""});
    } else {
      findings->push_back({"rights", Level::kWarning,
                           everybody ? "vm.unprivileged_userfaultfd is 0: only root, CAP_SYS_PTRACE and who may open "
                                       "/dev/userfaultfd may use it"
                                     : "there is no /proc/sys/vm/unprivileged_userfaultfd",
                           mend_all});
    }
    return;
  }
  auto refused = RefusedCalls();
  const Opened opened = OpenUserfaultfd();
  if (opened.error == 0) {
    os::ErrorText lacks;
    const char* const by = opened.door == os::uffd::Door::kDevice ? "by /dev/userfaultfd"
                           : everybody && *everybody == 1         ? "by vm.unprivileged_userfaultfd=1"
                                                                  : "by CAP_SYS_PTRACE";
    if (os::CheckFeatures(opened.features, &lacks) != 0) {
      findings->push_back({"rights", Level::kProblem, lacks.text, "boot Linux 6.8 or newer, for x86-64 or arm64"});
    } else {
      findings->push_back({"rights", Level::kOk, UserName() + " may use userfaultfd, " + by, ""});
    }
  } else if (Names(refused, kUserfaultfd)) {
    const bool everybody_is = os::SystemCallFilters() == 0;
    findings->push_back(
        {"rights", Level::kProblem,
         everybody_is ? std::string("userfaultfd is refused to everybody (") + os::ErrorName(opened.error) +
                            "): a kernel without CONFIG_USERFAULTFD, or a security module"
                      : "a filter of system calls (seccomp), as containers have it, refuses userfaultfd, and /dev/userfaultfd "
                        "cannot be opened",
         everybody_is ? "boot a kernel with CONFIG_USERFAULTFD"
                      : "docker run --device /dev/userfaultfd, or a profile that allows userfaultfd (docker run --security-opt "
                        "seccomp=PROFILE); in a service's unit, SystemCallFilter=userfaultfd"});
  } else if (opened.error == -EPERM) {
    findings->push_back({"rights", Level::kProblem,
                         UserName() + " has no right to userfaultfd: no access to /dev/userfaultfd, no CAP_SYS_PTRACE, and "
                                      "vm.unprivileged_userfaultfd is 0",
                         HowToGiveDevice() + "; or for all users, " + mend_all});
  } else {
    findings->push_back({"rights", Level::kProblem, std::string("a userfaultfd cannot be had: ") + os::ErrorName(opened.error),
                         Raise("-n 1024", "LimitNOFILE=1024")});
  }
  CheckDevice(opened.error != 0, findings);

  // Who comes in by the device does not need the call.
  if (opened.error == 0 && opened.door == os::uffd::Door::kDevice)
    refused.erase(std::remove(refused.begin(), refused.end(), kUserfaultfd), refused.end());
  const int filters = os::SystemCallFilters();
  const std::string upon =
      filters > 0 ? "of the filters of system calls (seccomp) upon this process, " + std::to_string(filters) + ", " : "";
  if (refused.empty()) {
    findings->push_back(
        {"calls", Level::kOk,
         filters > 0 ? upon + "none refuses what the library calls" : "no filter of system calls (seccomp) is upon this process",
         ""});
    return;
  }
  const std::string names = Joined(refused);
  findings->push_back(
      {"calls", Level::kProblem,
       filters > 0 ? "a filter of system calls (seccomp) refuses " + names : "the kernel, or a security module, refuses " + names,
       "allow " + names +
           " in the container's profile (docker run --security-opt seccomp=PROFILE); in a service's unit, SystemCallFilter=" +
           names});
}

void CheckLimits(const Tree& tree, Findings* findings) {
  const rlim_t page = static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
  const rlim_t locked = SoftLimit(RLIMIT_MEMLOCK), files = SoftLimit(RLIMIT_NOFILE), size = SoftLimit(RLIMIT_FSIZE);
  const std::string mend_locked = Raise("-l 512", "LimitMEMLOCK=512K");
  if (ReadCapabilities(tree).Has(CAP_IPC_LOCK)) {
    findings->push_back({"memlock", Level::kOk, "RLIMIT_MEMLOCK does not hold for " + UserName() + " (CAP_IPC_LOCK)", ""});
  } else if (locked < page) {
    findings->push_back({"memlock", Level::kProblem,
                         "RLIMIT_MEMLOCK is " + Shown(locked) + " bytes: no page can be locked, so no frame is ever given back",
                         mend_locked});
  } else if (locked < kForkTimes * page) {
    findings->push_back({"memlock", Level::kWarning,
                         "RLIMIT_MEMLOCK is " + Shown(locked) +
                             " bytes: frames wait for forked children of other times, since fewer than " +
                             std::to_string(kForkTimes - 1) + " are told apart",
                         mend_locked});
  } else {
    findings->push_back({"memlock", Level::kOk, "RLIMIT_MEMLOCK is " + Shown(locked) + " bytes", ""});
  }
  const std::string mend_files = Raise("-n 1024", "LimitNOFILE=1024");
  if (files < kFewestFiles) {
    findings->push_back({"nofile", Level::kProblem,
                         "RLIMIT_NOFILE is " + Shown(files) + ": too few descriptors for the library beside the program's",
                         mend_files});
  } else if (files < kGoodFiles) {
    findings->push_back(
        {"nofile", Level::kWarning,
         "RLIMIT_NOFILE is " + Shown(files) + ": few for a program that forks, or shares many GiB (a pool file for each 256 MiB)",
         mend_files});
  } else {
    findings->push_back({"nofile", Level::kOk, "RLIMIT_NOFILE is " + Shown(files), ""});
  }
  const std::string mend_size = Raise("-f unlimited", "LimitFSIZE=infinity");
  if (size < kSmallestPool) {
    findings->push_back(
        {"fsize", Level::kProblem,
         "RLIMIT_FSIZE is " + Shown(size) + " bytes: below 2 MiB there is no pool, and nothing but zero pages is merged",
         mend_size});
  } else if (size < kWholePool) {
    findings->push_back(
        {"fsize", Level::kWarning,
         "RLIMIT_FSIZE is " + Shown(size) + " bytes: pool files are no larger than that, so there can be fewer frames",
         mend_size});
  } else {
    findings->push_back({"fsize", Level::kOk, "RLIMIT_FSIZE is " + Shown(size), ""});
  }
}

void CheckTrial(Findings* findings) {
  const auto outcome = InChild(TrialResult{}, RunTrial);
  const TrialResult& result = outcome.result;
  const std::string trial = std::to_string(kTrialPages) + " equal pages of a trial ";
  const auto problem = [&](const std::string& cause, const std::string& mend) {
    findings->push_back({"trial", Level::kProblem, cause, mend});
  };
  if (outcome.end == End::kNoChild) {
    problem("there is no process, no descriptor or no memory to be had for a trial",
            "ulimit -u, ulimit -n, or TasksMax= in the service's unit tell the limits");
  } else if (outcome.end == End::kTime) {
    problem(trial + "were not merged within " + std::to_string(kPatienceMs / 1'000) + " s",
            "ksmuctl exec --log stderr PROGRAM tells more");
  } else if (outcome.end == End::kSignal) {
    const char* const name = sigabbrev_np(outcome.signal);
    problem(std::string("the trial was ended by SIG") + (name ? name : "?") +
                (outcome.signal == SIGSYS ? ": a filter of system calls (seccomp)" : ""),
            "what is said above about calls");
  } else if (result.error) {
    problem(std::string("the library says (") + os::ErrorName(result.error) + "): " + result.text, HowToMendTrial(result.error));
  } else if (result.differs) {
    problem(trial + "did not keep their bytes: do not use ksmu here", "boot another kernel");
  } else if (result.merged < static_cast<std::int64_t>(kTrialPages)) {
    problem(std::to_string(result.merged) + " of " + trial + "were merged" +
                (*result.text ? std::string(": ") + result.text : std::string()),
            "what is said above about limits and calls");
  } else {
    findings->push_back({"trial", Level::kOk, trial + "were merged, and one of them was written again", ""});
  }
}

}  // namespace ksmu::tools
