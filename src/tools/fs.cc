// ksmu-fs: the files of /sys/kernel/mm/ksm for what a broker's members merge (docs/ksmu-fs.md).
//
//   ksmu-fs [DIRECTORY] [--run-as USER] [--socket PATH] [--domain NAME] [--user UID]
//
// Two processes. This one mounts, waits, and unmounts; it keeps what rights it has. The other answers (fs_serve.h), as another user if that is
// wished. When that one ends, or goes round no more, another takes its place, on the same mount: whoever has bound the tree
// elsewhere, or has a file of it open, goes on.
#define FUSE_USE_VERSION 314
#include <fuse3/fuse_lowlevel.h>
#include <grp.h>
#include <linux/magic.h>
#include <pwd.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "os/channel.h"
#include "os/users.h"
#include "tools/fs_serve.h"
#include "tools/notify.h"
#include "tools/operator.h"

namespace {

using ksmu::tools::Failed;
using ksmu::tools::Notify;
using ksmu::tools::OperatorOptions;
using ksmu::tools::ServeState;

constexpr int kFailed = 1, kUsageError = 2, kMountedAlready = 3;
constexpr unsigned long kNoLinks = 256;     // MS_NOSYMFOLLOW
constexpr std::uint64_t kStuckMs = 20'000;  // it waits ten seconds for a broker
constexpr std::uint64_t kSoonMs = 1000;     // one that ends so soon is not replaced at once

constexpr const char* kUsage =
    "usage: ksmu-fs [DIRECTORY] [option...]\n"
    "Shows the domains of a broker as the kernel shows KSM: DIRECTORY/kernel/mm/ksm has every file of /sys/kernel/mm/ksm, and a\n"
    "directory for each member. DIRECTORY is /run/ksmu/sys unless told otherwise, or $XDG_RUNTIME_DIR/ksmu/sys for others than root.\n"
    "\n"
    "  --run-as USER   whoever answers is this user (root alone may wish so): the broker's own, for others may not set anything\n"
    "  --socket PATH   the broker's socket, as ksmuctl has it\n"
    "  --domain NAME   this domain alone; all of the broker's unless told otherwise\n"
    "  --user UID      likewise, the one of this user\n"
    "  --help, --version\n"
    "\n"
    "SIGTERM, SIGINT: it unmounts and ends. exit status: 0 ended by a signal, or unmounted; 1 it cannot start; 2 usage; 3 there is one\n"
    "already.\n";

struct Options {
  std::string directory, run_as;
  OperatorOptions broker;
};

void Say(const std::string& what) { std::fprintf(stderr, "ksmu-fs: %s\n", what.c_str()); }

[[noreturn]] void Usage(const std::string& what) {
  std::fprintf(stderr, "ksmu-fs: %s\n%s", what.c_str(), kUsage);
  std::exit(kUsageError);
}

[[noreturn]] void Fail(const std::string& what, int status = kFailed) { throw Failed{status, what}; }
[[noreturn]] void FailWithErrno(const std::string& what) { Fail(what + ": " + std::strerror(errno)); }

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc || !*argv[i + 1]) Usage(option + " wants a value");
      return argv[++i];
    };
    if (option == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (option == "--version") {
      std::puts("ksmu-fs " KSMU_VERSION);
      std::exit(0);
    } else if (option == "--run-as") {
      options.run_as = value();
    } else if (option == "--socket") {
      options.broker.socket = value();
    } else if (option == "--domain") {
      options.broker.domain = value();
    } else if (option == "--user") {
      const std::string text = value();
      if (!ksmu::tools::ParseNumber(text, &options.broker.user) || options.broker.user > ~std::uint32_t{0}) Usage("--user wants a user's number, not " + text);
    } else if (option.empty() || option[0] == '-') {
      Usage("unknown option " + option);
    } else if (options.directory.empty()) {
      options.directory = option;
    } else {
      Usage("one directory is wanted");
    }
  }
  if (options.broker.user >= 0 && !options.broker.domain.empty()) Usage("--user and --domain name one domain each");
  // What chooses the socket chooses the domain: or what is written would be set in all that this broker has.
  const char* const domain = std::getenv("KSMU_DOMAIN");
  if (options.broker.user < 0 && options.broker.domain.empty() && domain && std::strcmp(domain, "default") != 0) options.broker.domain = domain;
  return options;
}

// --- the mount -------------------------------------------------------------------------------------------------------

std::string DefaultDirectory() {
  if (geteuid() == 0) return "/run/ksmu/sys";
  const char* const runtime = ksmu::os::OwnRuntimeDirectory(std::getenv("XDG_RUNTIME_DIR"));
  if (!runtime) Fail("XDG_RUNTIME_DIR is not set, or is no directory of this user: say where to mount");
  return std::string(runtime) + "/ksmu/sys";
}

void MakeDirectory(const std::string& path) {
  for (std::size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
    const std::string part = path.substr(0, slash);
    if (mkdir(part.c_str(), 0755) != 0 && errno != EEXIST && errno != EROFS && errno != EACCES) FailWithErrno(part);
    if (slash == std::string::npos) return;
  }
}

void Unmount(const std::string& directory) {
  if (geteuid() == 0) {
    umount2(directory.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW);
    return;
  }
  const char* const arguments[] = {"fusermount3", "-u", "-z", "-q", "--", directory.c_str(), nullptr};
  pid_t child = 0;
  if (posix_spawnp(&child, arguments[0], nullptr, nullptr, const_cast<char* const*>(arguments), environ) == 0) waitpid(child, nullptr, 0);
}

// What one that was killed has left goes; one that lives is left alone.
void MakeWay(const std::string& directory) {
  struct stat about {};
  if (stat(directory.c_str(), &about) != 0) {
    if (errno == ENOTCONN || errno == ECONNABORTED) Unmount(directory);
    else if (errno == ENOENT) MakeDirectory(directory);
    else FailWithErrno(directory);
    if (stat(directory.c_str(), &about) != 0) FailWithErrno(directory);
  }
  if (!S_ISDIR(about.st_mode)) Fail(directory + " is no directory");
  struct statfs there {};
  struct stat above {};
  // A directory of another file system of that kind, someone's home, say, is good enough.
  const bool is_mounted = stat((directory + "/..").c_str(), &above) == 0 && above.st_dev != about.st_dev;
  if (is_mounted && statfs(directory.c_str(), &there) == 0 && there.f_type == FUSE_SUPER_MAGIC) {
    Fail(directory + ": something is mounted there already", kMountedAlready);
  }
}

// By libfuse, which is helped by fusermount3 where this is not root. The descriptor.
int Mount(const std::string& directory) {
  std::string settings = "fsname=ksmu,subtype=ksmu,default_permissions,nosuid,nodev,noexec";
  if (geteuid() == 0) settings += ",allow_other";
  std::string name = "ksmu-fs", option = "-o";
  char* arguments[] = {name.data(), option.data(), settings.data(), nullptr};
  fuse_args args = FUSE_ARGS_INIT(3, arguments);
  const fuse_lowlevel_ops none{};
  fuse_session* const session = fuse_session_new(&args, &none, sizeof none, nullptr);
  fuse_opt_free_args(&args);
  if (!session) Fail("no memory");
  // It says why not itself.
  if (fuse_session_mount(session, directory.c_str()) != 0) Fail(directory + ": it cannot be mounted (is there /dev/fuse? who is not root needs the package fuse3)");
  // Whoever answers is less than root, and root writes here: not into what a link leads to. (Linux 5.10)
  if (geteuid() == 0) mount(nullptr, directory.c_str(), nullptr, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | MS_NOEXEC | kNoLinks, nullptr);
  return fuse_session_fd(session);  // the session is for the mount alone, and stays for as long
}

// --- who answers -----------------------------------------------------------------------------------------------------

struct Identity {
  bool other = false;
  uid_t uid = 0;
  gid_t gid = 0;
};

Identity Find(const std::string& user) {
  if (user.empty()) return {};
  const passwd* const entry = getpwnam(user.c_str());
  if (!entry) Fail("--run-as: there is no user " + user);
  if (geteuid() != 0 && entry->pw_uid != geteuid()) Fail("--run-as: only root can answer as another user");
  return {entry->pw_uid != geteuid(), entry->pw_uid, entry->pw_gid};
}

[[noreturn]] void Answer(int fuse, const Options& options, const Identity& as, std::uint32_t owner, ServeState* state, pid_t parent) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  if (as.other && (setgroups(0, nullptr) != 0 || setresgid(as.gid, as.gid, as.gid) != 0 || setresuid(as.uid, as.uid, as.uid) != 0)) {
    Say(std::string("--run-as: ") + std::strerror(errno));
    _exit(kUsageError);
  }
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  // After the user, whose change takes it back.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(kFailed);
  const int error = ksmu::tools::Serve(fuse, options.broker, owner, state);
  if (error) Say(std::strerror(error));
  _exit(error ? kFailed : 0);
}

// Before anything is mounted: a signal that ends us is to find somebody who unmounts it.
sigset_t BlockSignals() {
  sigset_t wanted;
  sigemptyset(&wanted);
  for (const int number : {SIGTERM, SIGINT, SIGCHLD}) sigaddset(&wanted, number);
  // nohup.
  struct sigaction hangup {};
  if (sigaction(SIGHUP, nullptr, &hangup) != 0 || hangup.sa_handler != SIG_IGN) sigaddset(&wanted, SIGHUP);
  sigprocmask(SIG_BLOCK, &wanted, nullptr);
  // Inherited as ignored it would be nobody's wish: children would be gone without a word, and their numbers another's.
  std::signal(SIGCHLD, SIG_DFL);
  return wanted;
}

// Until a signal, or until somebody unmounts it.
int Supervise(int fuse, const Options& options, const Identity& as, const sigset_t& wanted, ServeState* state) {
  const auto owner = static_cast<std::uint32_t>(geteuid());
  const pid_t self = getpid();
  // Mounted: whoever asks now is answered as soon as somebody answers. Only from here on a service manager looks after this process.
  Notify("READY=1\nSTATUS=mounted on " + options.directory);
  for (;;) {
    const std::uint64_t begun = ksmu::os::MonotonicMs();
    state->alive_at_ms = begun;
    const timespec second{1, 0};
    const pid_t child = fork();
    if (child == 0) Answer(fuse, options, as, owner, state, self);
    if (child < 0) {
      // Of processes or memory there may be more in a while; meanwhile whoever asks waits.
      Say(std::string("fork: ") + std::strerror(errno));
      const int number = sigtimedwait(&wanted, nullptr, &second);
      if (number > 0 && number != SIGCHLD) return 0;
      Notify("WATCHDOG=1");
      continue;
    }
    int status = 0;
    bool ended = false;
    for (;;) {
      const int number = sigtimedwait(&wanted, nullptr, &second);
      if (number > 0 && number != SIGCHLD) {
        ended = true;
        kill(child, SIGTERM);
      }
      const pid_t gone = waitpid(child, &status, WNOHANG);
      if (gone == child) break;
      const std::uint64_t now = ksmu::os::MonotonicMs();
      if (now > state->alive_at_ms + kStuckMs || (ended && number <= 0)) {
        if (!ended) Say("does not answer any more: begun anew");
        kill(child, SIGKILL);
      } else {
        Notify("WATCHDOG=1");
      }
    }
    if (ended || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) return 0;
    if (WIFEXITED(status) && WEXITSTATUS(status) == kUsageError) return kFailed;
    Say(WIFSIGNALED(status) ? "whoever answered was ended by signal " + std::to_string(WTERMSIG(status)) + ": begun anew" : "whoever answered has ended: begun anew");
    if (ksmu::os::MonotonicMs() < begun + kSoonMs) usleep(static_cast<useconds_t>(kSoonMs) * 1000);
  }
}

int Run(Options options) {
  if (options.directory.empty()) options.directory = DefaultDirectory();
  if (options.directory[0] != '/') {
    char here[4096];
    if (!getcwd(here, sizeof here)) FailWithErrno("the current directory");
    options.directory = std::string(here) + "/" + options.directory;
  }
  const Identity as = Find(options.run_as);
  MakeWay(options.directory);
  void* const shared = mmap(nullptr, sizeof(ServeState), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) FailWithErrno("memory");
  auto* const state = new (shared) ServeState;
  const sigset_t wanted = BlockSignals();
  const int fuse = Mount(options.directory);
  const int status = Supervise(fuse, options, as, wanted, state);
  Notify("STOPPING=1");
  Unmount(options.directory);
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  try {
    return Run(options);
  } catch (const Failed& failed) {
    Say(failed.what);
    return failed.status;
  }
}
