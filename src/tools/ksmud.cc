// ksmud: the broker. Merges the pages of processes that have joined the same domain (docs/broker.md).
//
//   ksmud [--socket PATH] [--domain NAME]... [--mode OCTAL] [--max-frames N] [--merge-across-nodes 0|1] [--no-tuner]
//         [--no-io-uring] [--log LEVEL]
#include <fcntl.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "broker/loop.h"
#include "broker/nodes.h"
#include "broker/tuner.h"
#include "os/users.h"
#include "tools/notify.h"

namespace {
constexpr int kNice = -10;

using ksmu::broker::Fd;
using ksmu::broker::Level;
using ksmu::broker::Loop;
using ksmu::broker::Server;

constexpr int kFailed = 1, kUsageError = 2, kRunningAlready = 3;
constexpr int kPatience = 100, kPatienceMicroseconds = 20'000;  // with a broker that is just ending

constexpr const char* kUsage =
    "usage: ksmud [option...]\n"
    "The broker of ksmu: lets processes that have joined it share their equal pages. Each user has a domain of its own;\n"
    "pages of different domains never meet.\n"
    "\n"
    "  --socket PATH    where it listens: $XDG_RUNTIME_DIR/ksmu/default.sock unless told otherwise, or\n"
    "                   /run/ksmu/default.sock for root without such a directory of its own\n"
    "  --domain NAME    one more domain, shared by all who may connect to NAME.sock beside that; can be repeated\n"
    "  --mode OCTAL     who may connect to those: 660 by default if it runs as root, else 600\n"
    "  --max-frames N   no more shared pages than that, in all domains together: half of the memory by default\n"
    "  --merge-across-nodes 0|1\n"
    "                   0: pages are merged with pages of their own NUMA node only, in memory of that node; 1 by default\n"
    "  --no-tuner       leave it to members and operators how fast is merged (docs/tuner.md)\n"
    "  --no-io-uring    wait by poll(2)\n"
    "  --log LEVEL      quiet, warning, info or debug; warning by default, to stderr\n"
    "  --help, --version\n"
    "\n"
    "Sockets that a service manager hands over (LISTEN_FDS) take the place of the default one; their names (LISTEN_FDNAMES) are\n"
    "names of domains, but for \"default\", \"unknown\" and what ends in \".socket\". It says READY=1 where NOTIFY_SOCKET is set.\n"
    "Beside such sockets the seed of its hashes is kept in RUNTIME_DIRECTORY, if that is set.\n"
    "SIGUSR1: what is in each domain, to stderr. SIGTERM, SIGINT: it ends; its members go on, each alone.\n"
    "\n"
    "exit status: 0 ended by a signal; 1 it cannot start; 2 usage; 3 a broker is running there already.\n";

// --- log -------------------------------------------------------------------------------------------------------------

int g_level = static_cast<int>(Level::kWarning);

void Say(const std::string& line) {
  const std::string text = "ksmud: " + line + "\n";
  // One write, so that lines of several writers do not mix. Where it cannot be written there is nobody to be told.
  [[maybe_unused]] const ssize_t n = write(STDERR_FILENO, text.data(), text.size());
}

// A member that is dropped for what it does can do it again at once: so many lines a second, and then their number. Who asks
// for more than warnings loses none of those by it.
void Log(Level level, const std::string& line) {
  struct Allowance {
    double left = 200;
    double since = 0;
    unsigned long held_back = 0;
  };
  constexpr double kMost = 200, kPerSecond = 20;
  static Allowance allowances[2];
  if (static_cast<int>(level) > g_level) return;
  Allowance& allowance = allowances[level != Level::kWarning];
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  const double now = static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
  allowance.left = std::min(kMost, allowance.left + (now - allowance.since) * kPerSecond);
  allowance.since = now;
  if (allowance.left < 1) {
    ++allowance.held_back;
    return;
  }
  allowance.left -= 1;
  if (allowance.held_back) Say("... and " + std::to_string(std::exchange(allowance.held_back, 0)) + " lines more");
  Say(line);
}

[[noreturn]] void Usage(const std::string& what) {
  std::fprintf(stderr, "ksmud: %s\n%s", what.c_str(), kUsage);
  std::exit(kUsageError);
}

struct Failure {
  int status;
  std::string what;
};
[[noreturn]] void Fail(const std::string& what, int status = kFailed) { throw Failure{status, what}; }
[[noreturn]] void FailWithErrno(const std::string& what) { Fail(what + ": " + std::strerror(errno)); }

// --- service manager -------------------------------------------------------------------------------------------------

void Notify(const std::string& state) {
  if (const int error = ksmu::tools::Notify(state)) Log(Level::kWarning, std::string("the service manager cannot be told anything: ") + std::strerror(error));
}

struct Passed {
  Fd fd;
  std::string name;
};

// sd_listen_fds_with_names(3).
std::vector<Passed> TakeListenFds() {
  constexpr int kFirst = 3;
  std::vector<Passed> passed;
  const char* const pid = std::getenv("LISTEN_PID");
  const char* const count = std::getenv("LISTEN_FDS");
  const char* const names = std::getenv("LISTEN_FDNAMES");
  if (!pid || !count || std::strtol(pid, nullptr, 10) != getpid()) return passed;
  std::string_view rest = names ? names : "";
  const long n = std::strtol(count, nullptr, 10);
  for (int i = 0; i < n; ++i) {
    const std::size_t colon = rest.find(':');
    Passed one{Fd(kFirst + i), std::string(rest.substr(0, colon))};
    rest = colon == std::string_view::npos ? "" : rest.substr(colon + 1);
    const auto ask = [&](int option) {
      int value = -1;
      socklen_t size = sizeof value;
      return getsockopt(one.fd.get(), SOL_SOCKET, option, &value, &size) == 0 ? value : -1;
    };
    if (ask(SO_DOMAIN) != AF_UNIX || ask(SO_TYPE) != SOCK_SEQPACKET || ask(SO_ACCEPTCONN) != 1) {
      one.fd.Release();
      Fail("descriptor " + std::to_string(kFirst + i) + " of LISTEN_FDS is no listening SOCK_SEQPACKET Unix socket (ListenSequentialPacket=)");
    }
    if (fcntl(one.fd.get(), F_SETFD, FD_CLOEXEC) != 0 || fcntl(one.fd.get(), F_SETFL, O_NONBLOCK) != 0) FailWithErrno("LISTEN_FDS");
    passed.push_back(std::move(one));
  }
  unsetenv("LISTEN_PID");
  unsetenv("LISTEN_FDS");
  unsetenv("LISTEN_FDNAMES");
  return passed;
}

// --- sockets ---------------------------------------------------------------------------------------------------------

std::string DirectoryOf(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// A file of our own that is held locked for as long as we run: whoever has it owns the socket.
class Lock {
 public:
  explicit Lock(const std::string& socket) : path_(socket + ".lock") {
    for (int wait = 0;;) {
      fd_.Reset(open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
      if (!fd_) FailWithErrno(path_);
      if (flock(fd_.get(), LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK && wait++ < kPatience) {
          usleep(kPatienceMicroseconds);
          continue;
        }
        if (errno == EWOULDBLOCK) Fail("a broker is running there already: " + socket, kRunningAlready);
        FailWithErrno(path_);
      }
      // Removed by the one before us, after we had opened it: another one may hold another file of that name.
      struct stat ours {}, there {};
      if (fstat(fd_.get(), &ours) != 0 || stat(path_.c_str(), &there) != 0) continue;
      if (ours.st_dev == there.st_dev && ours.st_ino == there.st_ino) return;
    }
  }
  Lock(const Lock&) = delete;
  ~Lock() {
    unlink(path_.c_str());
    // Not only by the end of the process, which a file of a stranger's can hold up.
    flock(fd_.get(), LOCK_UN);
  }

 private:
  std::string path_;
  Fd fd_;
};

// A socket that listens under a path, which is ours for as long as this object exists.
class BoundSocket {
 public:
  BoundSocket(const std::string& path, mode_t mode) : path_(path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) {
      Fail("the path of the socket is longer than " + std::to_string(sizeof address.sun_path - 1) +
           " bytes, which is the most that a socket's can be: " + path);
    }
    std::memcpy(address.sun_path, path.data(), path.size());
    const auto* const name = reinterpret_cast<const sockaddr*>(&address);
    lock_ = std::make_unique<Lock>(path);
    MakeWay(name, sizeof address);
    fd_.Reset(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd_) FailWithErrno("socket");
    // Never open to more than it is to be, not even for a moment.
    const mode_t before = umask(~mode & 0777);
    const int bound = bind(fd_.get(), name, sizeof address);
    umask(before);
    if (bound != 0) FailWithErrno(path);
    if (lstat(path.c_str(), &about_) != 0) FailWithErrno(path);
    if (listen(fd_.get(), 256) != 0) FailWithErrno(path);
  }
  BoundSocket(const BoundSocket&) = delete;
  ~BoundSocket() {
    struct stat there {};
    if (!about_.st_ino || lstat(path_.c_str(), &there) != 0) return;
    if (there.st_dev == about_.st_dev && there.st_ino == about_.st_ino) unlink(path_.c_str());
  }
  Fd Take() { return std::move(fd_); }

 private:
  // What lies under the name: nothing; a socket that nobody listens on, which goes; or something that is left alone.
  void MakeWay(const sockaddr* name, socklen_t size) {
    struct stat there {};
    if (lstat(path_.c_str(), &there) != 0) {
      if (errno == ENOENT) return;
      FailWithErrno(path_);
    }
    if (!S_ISSOCK(there.st_mode)) Fail(path_ + " is there, and is no socket: it is left alone");
    // EAGAIN: somebody listens, and has many to let in. That can be a broker that was killed a moment ago: io_uring keeps its
    // socket open until the kernel has taken the ring apart, which comes after the end of the process (6.18).
    for (int wait = 0;; ++wait) {
      const Fd again(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
      if (!again) FailWithErrno("socket");
      if (connect(again.get(), name, size) != 0 && errno != EAGAIN) break;
      if (wait == kPatience) Fail("a broker is running there already: " + path_, kRunningAlready);
      usleep(kPatienceMicroseconds);
    }
    if (errno == EPROTOTYPE) Fail(path_ + " is another program's socket: it is left alone");
    if (errno != ECONNREFUSED) FailWithErrno(path_);
    if (unlink(path_.c_str()) != 0) FailWithErrno(path_);
  }

  std::string path_;
  std::unique_ptr<Lock> lock_;
  Fd fd_;
  struct stat about_ {};
};

// The default place. Its directory is made, if it is not there.
std::string DefaultSocket() {
  const char* const own = ksmu::os::OwnRuntimeDirectory(std::getenv("XDG_RUNTIME_DIR"));
  if (!own && geteuid() != 0) Fail("XDG_RUNTIME_DIR is not set, or is no directory of this user: say where to listen by --socket");
  const std::string directory = std::string(own ? own : "/run") + "/ksmu";
  const mode_t before = umask(0);
  const int made = mkdir(directory.c_str(), own ? 0700 : 0755);
  const int error = errno;
  umask(before);
  if (made != 0 && error != EEXIST) Fail(directory + ": " + std::strerror(error));
  struct stat about {};
  if (lstat(directory.c_str(), &about) != 0) FailWithErrno(directory);
  // Who could write into it could put another socket in the place of ours.
  if (!S_ISDIR(about.st_mode) || (about.st_uid != geteuid() && about.st_uid != 0) || (about.st_mode & 0022)) {
    Fail(directory + " is no directory that only its owner can write to, or is another user's");
  }
  return directory + "/default.sock";
}

// --- seed ------------------------------------------------------------------------------------------------------------

std::uint64_t RandomSeed() {
  std::uint64_t seed = 0;
  if (getrandom(&seed, sizeof seed, 0) != sizeof seed) FailWithErrno("getrandom");
  return seed;
}

// Sixteen hexadecimal digits and a new line, in a file of our own. False: it is not there, or is no such file.
bool ReadSeed(const std::string& path, std::uint64_t* seed) {
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat about {};
  char text[18] = {};
  if (!fd || fstat(fd.get(), &about) != 0 || !S_ISREG(about.st_mode) || about.st_uid != geteuid()) return false;
  if (read(fd.get(), text, sizeof text - 1) != 17 || text[16] != '\n' || std::strspn(text, "0123456789abcdef") != 16) return false;
  *seed = std::strtoull(text, nullptr, 16);
  return true;
}

// The same one after a restart: hashes that members have kept stay what they are.
std::uint64_t KeptSeed(const std::string& directory) {
  const std::string path = directory + "/seed", fresh = path + "." + std::to_string(getpid());
  std::uint64_t seed = 0;
  if (ReadSeed(path, &seed)) return seed;
  seed = RandomSeed();
  char text[18];
  std::snprintf(text, sizeof text, "%016llx\n", static_cast<unsigned long long>(seed));
  unlink(fresh.c_str());
  Fd fd(open(fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  // Under its name only when it is whole; if another has been quicker, that one's holds.
  bool kept = fd && write(fd.get(), text, 17) == 17 && fsync(fd.get()) == 0 && link(fresh.c_str(), path.c_str()) == 0;
  const int error = errno;
  if (fd) unlink(fresh.c_str());
  if (!kept && error == EEXIST) kept = ReadSeed(path, &seed);
  if (!kept) {
    Log(Level::kWarning, path + " cannot be written, or is no seed: after a restart another one is used (" + std::strerror(error) + ")");
  }
  return seed;
}

// --- options ---------------------------------------------------------------------------------------------------------

struct Options {
  std::size_t most_frames = 0;  // 0: the default
  std::string socket;
  std::vector<std::string> domains;
  int mode = -1;
  bool io_uring = true;
  bool by_node = false;
  bool tuner = true;
};

// As members take it (broker/door.cc).
bool IsDomainName(const std::string& name) {
  if (name.empty() || name.size() > 64 || name[0] == '.') return false;
  return name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == std::string::npos;
}

Options Parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) Usage(option + " wants a value");
      return argv[++i];
    };
    if (option == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (option == "--version") {
      std::puts("ksmud " KSMU_VERSION);
      std::exit(0);
    } else if (option == "--socket") {
      options.socket = value();
      if (options.socket.empty()) Usage("--socket wants a path");
    } else if (option == "--domain") {
      const std::string name = value();
      if (!IsDomainName(name)) {
        Usage("a domain's name consists of letters, digits, '-', '_' and '.', 64 at the most, and does not begin with '.': " + name);
      }
      if (name == "default") Usage("the domain 'default' is each user's own: it is there without --domain");
      options.domains.push_back(name);
    } else if (option == "--mode") {
      const std::string text = value();
      char* end = nullptr;
      const long mode = std::strtol(text.c_str(), &end, 8);
      if (text.empty() || *end || mode < 0 || mode > 0777) Usage("--mode wants an octal number up to 777, not " + text);
      options.mode = static_cast<int>(mode);
    } else if (option == "--max-frames") {
      const std::string text = value();
      char* end = nullptr;
      const long long frames = std::strtoll(text.c_str(), &end, 10);
      if (text.empty() || *end || frames < 1) Usage("--max-frames wants a number of pages, not " + text);
      options.most_frames = static_cast<std::size_t>(frames);
    } else if (option == "--merge-across-nodes") {
      const std::string text = value();
      if (text != "0" && text != "1") Usage("--merge-across-nodes wants 0 or 1, not " + text);
      options.by_node = text == "0";
    } else if (option == "--no-tuner") {
      options.tuner = false;
    } else if (option == "--no-io-uring") {
      options.io_uring = false;
    } else if (option == "--log") {
      const std::string level = value();
      const char* const kLevels[] = {"quiet", "warning", "info", "debug"};
      g_level = -1;
      for (int l = 0; l < 4; ++l) {
        if (level == kLevels[l]) g_level = l;
      }
      if (g_level < 0) Usage("--log wants quiet, warning, info or debug, not " + level);
    } else {
      Usage("unknown option " + option);
    }
  }
  return options;
}

// --- running ---------------------------------------------------------------------------------------------------------

void SayStatus(Loop& loop) {
  std::size_t frames = 0, members = 0;
  const auto all = loop.server().Status();
  for (const auto& domain : all) {
    const auto mib = [](std::size_t pages) { return std::to_string(pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) >> 20); };
    Say("domain " + domain.name + ": members " + std::to_string(domain.members) + ", frames " + std::to_string(domain.frames) + ", left " +
        std::to_string(domain.left) + ", places " + std::to_string(domain.places) + ", advised " + mib(domain.reports.advised) +
        " MiB, merged " + mib(domain.reports.merged) + " MiB, bookkeeping " + std::to_string(domain.metadata_bytes >> 10) +
        " KiB, wanted lost " + std::to_string(domain.wanted_lost));
    frames += domain.frames;
    members += domain.members;
  }
  const std::string sum = std::to_string(all.size()) + " domains, " + std::to_string(members) + " members, " + std::to_string(frames) +
                          " frames, " + std::to_string(loop.server().connections()) + " connections, by " + loop.poller();
  Say(sum);
  Notify("STATUS=" + sum);
}

Fd BlockSignals() {
  sigset_t wanted;
  sigemptyset(&wanted);
  for (const int number : {SIGTERM, SIGINT, SIGUSR1}) sigaddset(&wanted, number);
  sigprocmask(SIG_BLOCK, &wanted, nullptr);
  // What is inherited as blocked, or as ignored, is no wish of anybody's.
  for (const int number : {SIGTERM, SIGINT, SIGUSR1}) std::signal(number, SIG_DFL);
  // A member that has gone, a terminal that has gone, a limit to a file's size: seen by the calls' errors.
  // SIGIO: somebody opens a canary for writing, of which we have just asked whether it is in use (storage.cc).
  for (const int number : {SIGPIPE, SIGHUP, SIGXFSZ, SIGIO}) std::signal(number, SIG_IGN);
  Fd fd(signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd) FailWithErrno("signalfd");
  return fd;
}

void Prepare() {
  // Members wait some milliseconds for an answer and then go on without: where all of them are busy, the one who answers must not
  // stand in line with them. What it does between two answers is bounded. Where it is not permitted it stays as it is.
  if (getpriority(PRIO_PROCESS, 0) > kNice) setpriority(PRIO_PROCESS, 0, kNice);
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  // Members' pages are not to get into a core file, nor into a debugger that is not root's. A process may open its own
  // /proc/self/fd all the same, whatever its user (measured on 6.18), which the read-only descriptors are made by.
  prctl(PR_SET_DUMPABLE, 0);
}

int Run(const Options& options) {
  if (const char* const why = options.by_node ? ksmu::broker::nodes::WhyNot() : nullptr) Fail(std::string("--merge-across-nodes 0: ") + why);
  const Fd signals = BlockSignals();
  Prepare();
  std::vector<Passed> passed = TakeListenFds();
  const bool is_root = geteuid() == 0;
  // Before the loop, so that they are unlinked after it.
  std::vector<std::unique_ptr<BoundSocket>> sockets;
  std::string directory;
  std::string first = options.socket;
  if (first.empty() && (passed.empty() || !options.domains.empty())) first = DefaultSocket();
  if (!first.empty()) directory = DirectoryOf(first);
  if (!options.socket.empty() || passed.empty()) sockets.push_back(std::make_unique<BoundSocket>(first, is_root ? 0666 : 0600));
  const std::size_t defaults = sockets.size();
  for (const std::string& name : options.domains) {
    const mode_t mode = options.mode >= 0 ? static_cast<mode_t>(options.mode) : is_root ? 0660 : 0600;
    sockets.push_back(std::make_unique<BoundSocket>(directory + "/" + name + ".sock", mode));
  }
  if (directory.empty()) {
    sockaddr_un address{};
    socklen_t size = sizeof address;
    const bool known = getsockname(passed[0].fd.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0;
    if (known && address.sun_path[0] == '/') directory = DirectoryOf(address.sun_path);
  }
  // The directory of sockets that are handed over is the manager's; the seed goes into one that it has made for us (RuntimeDirectory=).
  if (const char* const own = std::getenv("RUNTIME_DIRECTORY"); own && !passed.empty() && own[0] == '/' && !std::strchr(own, ':')) directory = own;

  Server::Config config;
  config.page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  config.most_frames = options.most_frames ? options.most_frames : static_cast<std::size_t>(std::max(sysconf(_SC_PHYS_PAGES) / 2, 1l));
  config.seed = directory.empty() ? RandomSeed() : KeptSeed(directory);
  if (ksmu::os::SeesUnknownUsers()) config.unknown_user = ksmu::os::kUnknownUser;
  config.log = Log;
  config.owner = std::int64_t{geteuid()};
  config.by_node = options.by_node;
  if (options.tuner) config.pressure = ksmu::broker::ReadPressure;
  config.cpus = static_cast<int>(std::max(sysconf(_SC_NPROCESSORS_ONLN), 1l));
  Loop loop(std::move(config), options.io_uring);
  const std::uint32_t everyone = loop.server().AddListener("");
  std::vector<std::pair<std::string, std::uint32_t>> named;
  const auto listener_of = [&](const std::string& name) {
    for (const auto& [known, number] : named) {
      if (known == name) return number;
    }
    named.emplace_back(name, loop.server().AddListener(name));
    return named.back().second;
  };
  for (std::size_t i = 0; i < sockets.size(); ++i) {
    loop.Listen(sockets[i]->Take(), i < defaults ? everyone : listener_of(options.domains[i - defaults]));
  }
  for (Passed& one : passed) {
    const bool is_default = one.name.empty() || one.name == "default" || one.name == "unknown" || one.name.ends_with(".socket");
    if (!is_default && !IsDomainName(one.name)) Fail("the name of a descriptor of LISTEN_FDS is no domain's: " + one.name);
    loop.Listen(std::move(one.fd), is_default ? everyone : listener_of(one.name));
  }
  loop.Watch(signals.get(), [&] {
    signalfd_siginfo info{};
    while (read(signals.get(), &info, sizeof info) == sizeof info) {
      if (info.ssi_signo == SIGUSR1) SayStatus(loop);
      else loop.Stop();
    }
  });
  Log(Level::kInfo, "listens" + (first.empty() ? std::string(" on what it was handed") : ": " + first));
  Notify("READY=1\nSTATUS=listens");
  const int error = loop.Run();
  Notify("STOPPING=1");
  if (error) Fail(std::string("waiting for members: ") + std::strerror(-error));
  Log(Level::kInfo, "ended by a signal");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = Parse(argc, argv);
  try {
    return Run(options);
  } catch (const Failure& failure) {
    Say(failure.what);
    return failure.status;
  }
}
