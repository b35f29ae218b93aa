// Members and brokers that are killed in the middle of every exchange, and what the others have afterwards.
//
// Whoever is to be killed is traced: all of its system calls are looked at, those that send or receive a message are known by
// the packet's header, and SIGKILL comes while it stands before or after the one that was chosen. So a point is a place in the
// protocol and not a moment. Only the traced process is slow.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "broker/wire.h"
#include "domain_support.h"

namespace ksmu::test {
namespace {

namespace wire = broker::wire;

bool Long() { return std::getenv("KSMU_TEST_LONG") != nullptr; }

// --- tracing ---------------------------------------------------------------------------------------------------------

constexpr unsigned kPidfdThread = O_EXCL;  // Linux 6.9: a thread's own descriptors, as the library's scanner has them

// What a member or a broker is about to do, or has done.
struct Point {
  std::string what;
  bool after;
  unsigned most;  // up to so many times it is passed
  std::string Name() const { return what + (after ? ", after" : ", before"); }
};

const char* KindName(wire::Kind kind) {
  switch (kind) {
    case wire::Kind::kJoin: return "join";
    case wire::Kind::kFile: return "file";
    case wire::Kind::kSettle: return "settle";
    case wire::Kind::kOffer: return "offer";
    case wire::Kind::kDrop: return "drop";
    case wire::Kind::kRelease: return "release";
    case wire::Kind::kReport: return "report";
    case wire::Kind::kJoined: return "joined";
    case wire::Kind::kRefused: return "refused";
    case wire::Kind::kFileIs: return "fileis";
    case wire::Kind::kSettled: return "settled";
    case wire::Kind::kWanted: return "wanted";
    // What operators ask is in operators_test.cc.
    case wire::Kind::kTune: case wire::Kind::kAsk: case wire::Kind::kTuned: case wire::Kind::kTold: break;
  }
  return nullptr;
}

class Tracer {
 public:
  explicit Tracer(pid_t victim) : victim_(victim) {
    // Stops are told of by SIGCHLD: taken by sigtimedwait.
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, &mask_);
  }
  ~Tracer() {
    if (seized_) Kill();
    sigprocmask(SIG_SETMASK, &mask_, nullptr);
  }
  Tracer(const Tracer&) = delete;

  // 0, or errno.
  int Seize() {
    constexpr long kOptions = PTRACE_O_TRACECLONE | PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL;
    if (ptrace(PTRACE_SEIZE, victim_, 0, kOptions) != 0) return errno;
    seized_ = true;
    ptrace(PTRACE_INTERRUPT, victim_, 0, 0);
    int status = 0;
    if (waitpid(victim_, &status, __WALL) != victim_ || !WIFSTOPPED(status)) return ECHILD;
    ptrace(PTRACE_SYSCALL, victim_, 0, 0);
    return 0;
  }

  // Lets it run until it is there for the nth time, where it stands still then. False: it was not within the time.
  bool RunTo(const Point& point, int nth, double seconds) {
    point_ = &point;
    left_ = nth;
    const double end = Now() + seconds;
    while (Now() < end) {
      siginfo_t info{};
      // Not their ends: those of all others are their own parents' to wait for.
      if (waitid(P_ALL, 0, &info, WSTOPPED | WNOHANG | __WALL) == 0 && info.si_pid != 0) {
        if (IsThere(info.si_pid, info.si_status)) return true;
        continue;
      }
      if (HasEnded()) {
        ADD_FAILURE() << "it has ended by itself on the way to " << point.Name();
        return false;
      }
      sigset_t child;
      sigemptyset(&child);
      sigaddset(&child, SIGCHLD);
      const timespec limit{0, 10'000'000};
      sigtimedwait(&child, nullptr, &limit);
    }
    return false;
  }

  // With all of its threads. The process itself is left to be waited for.
  void Kill() {
    seized_ = false;
    kill(victim_, SIGKILL);
    const auto alone = [&] {
      bool others = false;
      std::error_code error;
      for (const auto& task : std::filesystem::directory_iterator("/proc/" + std::to_string(victim_) + "/task", error)) {
        const pid_t tid = std::stoi(task.path().filename());
        if (tid != victim_ && waitpid(tid, nullptr, __WALL | WNOHANG) != tid) others = true;
      }
      return !others && HasEnded();
    };
    if (!WaitUntil(alone, 20, 0.001)) ADD_FAILURE() << "process " << victim_ << " is killed and does not end";
  }

 private:
  struct Call {
    std::uint64_t number = 0;
    std::uint64_t args[6] = {};
    std::string what;  // empty: nothing with a name; or known only by what is received
  };

  bool HasEnded() const {
    siginfo_t info{};
    const int result = waitid(P_PID, static_cast<id_t>(victim_), &info, WEXITED | WNOHANG | WNOWAIT | __WALL);
    // What is traced is reported when it stops, too, whatever is asked for.
    return result != 0 || (info.si_pid == victim_ && info.si_code != CLD_TRAPPED);
  }

  bool IsThere(pid_t tid, int status) {
    const int signal = status & 0xff, event = status >> 8;
    if (signal == (SIGTRAP | 0x80)) {
      if (LookAtCall(tid) && --left_ == 0) return true;
      ptrace(PTRACE_SYSCALL, tid, 0, 0);
    } else {
      if (!event && (signal == SIGSEGV || signal == SIGBUS || signal == SIGILL || signal == SIGABRT)) {
        ADD_FAILURE() << "thread " << tid << " of the traced process gets signal " << signal;
      }
      ptrace(PTRACE_SYSCALL, tid, 0, event ? 0 : signal);
    }
    return false;
  }

  bool LookAtCall(pid_t tid) {
    __ptrace_syscall_info info{};
    if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, sizeof info, &info) <= 0) return false;
    Call& call = calls_[tid];
    if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
      call = {};
      call.number = info.entry.nr;
      std::copy_n(info.entry.args, 6, call.args);
      call.what = NameOf(tid, call);
      return !point_->after && call.what == point_->what;
    }
    if (info.op != PTRACE_SYSCALL_INFO_EXIT) return false;
    Call done;
    std::swap(done, call);
    if (info.exit.is_error) return false;
    if (done.number == SYS_recvmsg) done.what = Received(done, info.exit.rval);
    return point_->after && done.what == point_->what;
  }

  template <typename T>
  bool Read(std::uint64_t address, T* out, std::size_t count = 1) const {
    iovec here{out, count * sizeof(T)}, there{reinterpret_cast<void*>(address), count * sizeof(T)};
    return process_vm_readv(victim_, &here, 1, &there, 1, 0) == static_cast<ssize_t>(count * sizeof(T));
  }

  static std::string MessageName(const wire::Header& header, std::size_t bytes, const char* way) {
    const char* const kind = header.bytes == bytes ? KindName(header.kind) : nullptr;
    return kind ? std::string(kind) + way : "";
  }

  std::string Sent(std::uint64_t address, std::uint64_t bytes) {
    wire::Header header;
    if (bytes < sizeof header || !Read(address, &header)) return "";
    if (header.bytes == bytes) {
      asked_ = header.kind == wire::Kind::kJoin || header.kind == wire::Kind::kFile || header.kind == wire::Kind::kSettle;
      if (header.kind == wire::Kind::kSettle) granted_ = false;
    }
    return MessageName(header, bytes, " sent");
  }

  std::string Received(const Call& call, std::int64_t bytes) {
    msghdr message;
    iovec part;
    wire::Header header;
    if (bytes < static_cast<std::int64_t>(sizeof header) || !Read(call.args[1], &message) ||
        !Read(reinterpret_cast<std::uint64_t>(message.msg_iov), &part)) {
      return "";
    }
    const auto at = reinterpret_cast<std::uint64_t>(part.iov_base);
    if (!Read(at, &header)) return "";
    const std::string what = MessageName(header, static_cast<std::size_t>(bytes), " received");
    if (what == "settled received") {
      std::vector<std::uint32_t> frames(header.count);
      granted_ = Read(at + sizeof header, frames.data(), frames.size()) &&
                 std::any_of(frames.begin(), frames.end(), [](std::uint32_t frame) { return frame != wire::kNoFrame; });
    } else if (what == "fileis received") {
      alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
      if (message.msg_controllen >= CMSG_LEN(sizeof(int)) &&
          Read(reinterpret_cast<std::uint64_t>(message.msg_control), control, CMSG_LEN(sizeof(int)))) {
        int fd;
        std::memcpy(&fd, control + CMSG_LEN(0), sizeof fd);
        files_.insert(fd);
      }
    }
    return what;
  }

  // What the call is about to receive, left where it is; an answer is waited for, or it could come between this and the call.
  // No descriptor of the socket is kept: it would outlive the victim.
  std::string Peek(pid_t tid, int fd) const {
    const int process = static_cast<int>(syscall(SYS_pidfd_open, tid, kPidfdThread));
    const int socket = static_cast<int>(syscall(SYS_pidfd_getfd, process, fd, 0));
    pollfd entry{socket, POLLIN, 0};
    poll(&entry, 1, asked_ ? 200 : 0);
    wire::Header header;
    const ssize_t bytes = recv(socket, &header, sizeof header, MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC);
    close(socket);
    close(process);
    return bytes < static_cast<ssize_t>(sizeof header) ? "" : MessageName(header, static_cast<std::size_t>(bytes), " received");
  }

  std::string NameOf(pid_t tid, const Call& call) {
    const auto& a = call.args;
    switch (call.number) {
      case SYS_connect: return "connect";
      case SYS_sendto: return Sent(a[1], a[2]);
      case SYS_sendmsg: {
        msghdr message;
        iovec part;
        if (!Read(a[1], &message) || !Read(reinterpret_cast<std::uint64_t>(message.msg_iov), &part)) return "";
        return Sent(reinterpret_cast<std::uint64_t>(part.iov_base), part.iov_len);
      }
      case SYS_recvmsg: {
        const bool matters = !point_->after && point_->what.ends_with(" received");
        return matters ? Peek(tid, static_cast<int>(a[0])) : "";
      }
      // What follows a grant.
      case SYS_mmap: return granted_ && (a[3] & MAP_PRIVATE) && files_.count(static_cast<int>(a[4])) ? "mmap of frames" : "";
      case SYS_mremap: return granted_ ? "mremap" : "";
      case SYS_ioctl: {
        static const char* const kNames[] = {"REGISTER", "UNREGISTER", "WAKE", "COPY", "ZEROPAGE", "MOVE", "WRITEPROTECT", "CONTINUE"};
        const bool ours = granted_ && _IOC_TYPE(a[1]) == UFFDIO && _IOC_NR(a[1]) < std::size(kNames);
        return ours ? std::string("UFFDIO_") + kNames[_IOC_NR(a[1])] : "";
      }
      // What a broker does between question and answer.
      case SYS_pwrite64: return "pwrite";
      case SYS_fallocate: return "fallocate";
      case SYS_memfd_create: {
        char name[12] = "";
        return Read(a[0], name, sizeof name - 1) ? std::string("memfd_create ") + name : "";
      }
      default: return "";
    }
  }

  const pid_t victim_;
  sigset_t mask_;
  bool seized_ = false;
  bool asked_ = false;    // the member waits for an answer
  bool granted_ = false;  // it has got frames by the last one
  const Point* point_ = nullptr;
  int left_ = 0;
  std::map<pid_t, Call> calls_;
  std::set<int> files_;  // descriptors of frames' files
};

std::string WhyNoTracing() {
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  std::string why;
  Tracer tracer(child);
  if (int error = tracer.Seize()) why = std::string("ptrace is not permitted here: ") + strerror(error);
  else if (const long fd = syscall(SYS_pidfd_open, child, kPidfdThread); fd >= 0) close(static_cast<int>(fd));
  else why = "a thread's descriptors cannot be looked at here (Linux 6.9)";
  tracer.Kill();
  waitpid(child, nullptr, 0);
  return why;
}

// Each call or message, once before and once after it.
std::vector<Point> Around(std::initializer_list<std::pair<const char*, unsigned>> whats) {
  std::vector<Point> points;
  for (const auto& [what, most] : whats) {
    for (const bool after : {false, true}) points.push_back({what, after, most});
  }
  return points;
}

// Which points have been hit how often.
class Hits {
 public:
  explicit Hits(std::vector<Point> points) : points_(std::move(points)), hits_(points_.size()), missed_(points_.size()) {}
  const Point& at(int round) const { return points_[static_cast<std::size_t>(round) % points_.size()]; }
  int points() const { return static_cast<int>(points_.size()); }
  int total() const { return total_; }
  bool Hit(int round) const { return hits_[static_cast<std::size_t>(round) % points_.size()] > 0; }
  void Note(int round, bool hit) {
    ++(hit ? hits_ : missed_)[static_cast<std::size_t>(round) % points_.size()];
    total_ += hit;
  }
  void Print(const char* whose, double seconds) const {
    std::printf("%s: %d kills in %.0f s\n", whose, total_, seconds);
    for (std::size_t i = 0; i < points_.size(); ++i) {
      std::printf("  %s: %d", points_[i].Name().c_str(), hits_[i]);
      if (missed_[i]) std::printf(", missed %d", missed_[i]);
      std::printf("\n");
      EXPECT_GT(hits_[i], 0) << points_[i].Name() << ": never reached";
    }
    fflush(stdout);
  }

 private:
  std::vector<Point> points_;
  std::vector<int> hits_, missed_;
  int total_ = 0;
};

// --- members ---------------------------------------------------------------------------------------------------------

// What all processes of a test see.
struct Scene {
  struct Worker {
    std::atomic<std::int64_t> merged_total, breaks, writes;
    std::atomic<std::int64_t> shared;  // pages seen merged that this process has once: another one has it, too
  };
  Worker workers[2];
  std::atomic<bool> end;
  std::atomic<int> round;
  std::atomic<int> children;  // have checked what they inherited
  static Scene* Make() {
    return new (mmap(nullptr, sizeof(Scene), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Scene();
  }
};

// Pages of which a process has each content once, as every other one has it; pages of which it has each twice; and pages
// which are never written again.
constexpr std::size_t kOnce = 96, kTwice = 96, kCalm = 64, kPages = kOnce + kTwice + kCalm;
constexpr int kGenerations = 3, kDiscarded = -1;

std::uint64_t ContentOf(std::size_t page, int generation) {
  if (generation == kDiscarded) return 0;
  const std::size_t which = page < kOnce || page >= kOnce + kTwice ? page : kOnce + (page - kOnce) / 2;
  return 1 + which * kGenerations + static_cast<std::size_t>(generation);
}

// Writes its pages over and over, and looks at each byte of them before and after.
class Mill {
 public:
  Mill(Child& self, unsigned seed) : self_(self), random_(seed), memory_(kPages), generations_(kPages) {
    FillPages(memory_, [](std::size_t i) { return ContentOf(i, 0); });
    if (ksmu_advise(memory_.data(), memory_.bytes(), KSMU_MERGEABLE) != 0) self_.Report("advise: %s\n", ksmu_last_error());
  }

  void Turn() {
    for (int k = 0; k < 2; ++k) {
      const std::size_t i = random_() % (kOnce + kTwice);
      Check(i, "before it is written");
      generations_[i] = (generations_[i] + 1) % kGenerations;
      FillPage(memory_.page(i), ContentOf(i, generations_[i]));
      Check(i, "after it was written");
    }
    Check(random_() % kPages, "between");
    // Places are released when nothing covers them any more.
    if (random_() % 8 == 0) {
      const std::size_t i = random_() % (kOnce + kTwice);
      if (ksmu_advise(memory_.page(i), PageSize(), KSMU_DISCARD) != 0) self_.Report("discard: %s\n", ksmu_last_error());
      generations_[i] = kDiscarded;
      Check(i, "after it was discarded");
    }
    SleepSeconds(0.001);
  }

  // A child that is not killed with its parent.
  void Fork(Scene* scene) {
    if (fork() != 0) return;
    SleepSeconds(static_cast<double>(random_() % 150) / 1000);
    CheckAll("in a child");
    ++scene->children;
    _exit(0);
  }

  void CheckAll(const char* when) {
    for (std::size_t i = 0; i < kPages; ++i) Check(i, when);
  }

  // A page that it has once is merged.
  bool SeesShared() {
    ksmu_page_info info{};
    std::size_t i = random_() % (kOnce + kCalm);
    if (i >= kOnce) i += kTwice;
    return ksmu_explain(memory_.page(i), &info, sizeof info) == 0 && info.state == KSMU_PAGE_MERGED;
  }
  unsigned Random() { return static_cast<unsigned>(random_()); }

 private:
  void Check(std::size_t i, const char* when) {
    const std::ptrdiff_t wrong = FindWrongByte(memory_.page(i), ContentOf(i, generations_[i]));
    if (wrong >= 0) self_.Report("page %zu, generation %d, %s: byte %td is wrong\n", i, generations_[i], when, wrong);
  }

  Child& self_;
  std::mt19937 random_;
  Memory memory_;
  std::vector<int> generations_;
};

// A member that stays.
std::unique_ptr<Child> Worker(const Broker& broker, Scene* scene, unsigned number) {
  return std::make_unique<Child>(Child::Kind::kFork, [&broker, scene, number](Child& self) {
    JoinFlatOut(broker.socket());
    ksmu_set("sleep_millisecs", 1);
    ksmu_set("remerge_seconds", 0);
    Mill mill(self, 1 + number);
    Scene::Worker& mine = scene->workers[number];
    self.Signal(1);
    for (unsigned turn = 0; !scene->end; ++turn) {
      mill.Turn();
      mine.writes += 2;
      if (turn % 16) continue;
      mine.shared += mill.SeesShared();
      ksmu_stats stats{};
      if (ksmu_read_stats(&stats, sizeof stats) != 0) self.Report("stats: %s\n", ksmu_last_error());
      mine.merged_total = stats.pages_merged_total;
      mine.breaks = stats.cow_breaks;
    }
    mill.CheckAll("at the end");
  });
}

// A member that comes and goes: begins at step 1, and goes on until the round is over.
std::unique_ptr<Child> Visitor(const Broker& broker, Scene* scene, unsigned seed, bool forks) {
  const int round = scene->round;
  return std::make_unique<Child>(Child::Kind::kFork, [&broker, scene, seed, forks, round](Child& self) {
    if (!self.Await(1)) return;
    JoinFlatOut(broker.socket());
    ksmu_set("remerge_seconds", 0);
    Mill mill(self, seed);
    while (scene->round == round) {
      mill.Turn();
      if (forks && mill.Random() % 32 == 0) mill.Fork(scene);
      while (waitpid(-1, nullptr, WNOHANG) > 0) {
      }
    }
    mill.CheckAll("at the end");
  });
}

// --- what is left ----------------------------------------------------------------------------------------------------

struct Status {
  long members = -1, frames = -1, left = 0, places = 0, connections = -1;
};

Status StatusOf(const Broker& broker) {
  const std::size_t before = broker.log().size();
  kill(broker.pid(), SIGUSR1);
  Status status;
  WaitUntil(
      [&] {
        const std::string said = broker.log().substr(before);
        const auto sum = said.find(" domains, ");
        if (sum == std::string::npos || said.find('\n', sum) == std::string::npos) return false;
        std::sscanf(said.c_str() + sum, " domains, %ld members, %ld frames, %ld connections", &status.members, &status.frames, &status.connections);
        if (const auto domain = said.find(": members "); domain != std::string::npos) {
          std::sscanf(said.c_str() + domain, ": members %*d, frames %*d, left %ld, places %ld", &status.left, &status.places);
        }
        return true;
      },
      2);
  return status;
}

struct Descriptors {
  std::size_t count = 0;
  std::int64_t frames_bytes = 0;  // that the frames' files take
};

Descriptors DescriptorsOf(pid_t process) {
  Descriptors found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/" + std::to_string(process) + "/fd", error)) {
    ++found.count;
    char name[64] = "";
    struct stat status {};
    if (readlink(entry.path().c_str(), name, sizeof name - 1) < 0 || !std::strstr(name, "ksmu-frames")) continue;
    if (stat(entry.path().c_str(), &status) == 0) found.frames_bytes += 512 * status.st_blocks;
  }
  return found;
}

// Of a broker that has just started, and was connected to to see whether it has.
std::size_t DescriptorsWithoutMembers(const Broker& broker) {
  EXPECT_TRUE(WaitUntil([&] { return StatusOf(broker).connections == 0; }, 10));
  StatusOf(broker);  // one round more: all is closed that is to be
  return DescriptorsOf(broker.pid()).count;
}

// A member that has nothing. Without one the broker forgets a domain when its last member goes, and all with it that could have
// been left.
class Keeper {
 public:
  explicit Keeper(const Broker& broker)
      : child_(Child::Kind::kFork, [&broker](Child& self) {
          JoinFlatOut(broker.socket());
          if (ksmu_start(nullptr, 0) != 0) self.Report("start: %s\n", ksmu_last_error());
          self.Signal(1);
          self.Await(2, 3600);
        }) {
    EXPECT_TRUE(child_.Await(1));
    EXPECT_TRUE(WaitUntil([&] { return StatusOf(broker).members > 0; }, 10, 0.05));
  }
  void Leave() {
    child_.Signal(2);
    child_.Join();
  }

 private:
  Child child_;
};

// All members but the keeper have gone.
void ExpectNothingLeft(const Broker& broker, Keeper& keeper, std::size_t descriptors_at_first) {
  Status now;
  const auto is_empty = [&](long members) {
    now = StatusOf(broker);
    return now.members == members && now.frames == 0 && now.left == 0 && now.places == 0 && now.connections == members;
  };
  const auto what = [&] {
    return "members " + std::to_string(now.members) + ", frames " + std::to_string(now.frames) + ", left " + std::to_string(now.left) + ", places " +
           std::to_string(now.places) + ", connections " + std::to_string(now.connections) + "\n" + broker.log().substr(0, 3000);
  };
  EXPECT_TRUE(WaitUntil([&] { return is_empty(1); }, 10, 0.05)) << what();
  EXPECT_TRUE(WaitUntil([&] { return DescriptorsOf(broker.pid()).frames_bytes == 0; }, 5, 0.05)) << DescriptorsOf(broker.pid()).frames_bytes;
  keeper.Leave();
  EXPECT_TRUE(WaitUntil([&] { return is_empty(0); }, 10, 0.05)) << what();
  EXPECT_TRUE(WaitUntil([&] { return DescriptorsOf(broker.pid()).count <= descriptors_at_first; }, 5, 0.05))
      << DescriptorsOf(broker.pid()).count << " descriptors, " << descriptors_at_first << " at first";
  EXPECT_EQ(broker.log().find("dropped"), std::string::npos) << broker.log();
}

// Children whose parents were killed have become this process's.
void ExpectChildrenEndedWell() {
  int status = 0;
  pid_t child = 0;
  const auto none = [&] {
    while ((child = waitpid(-1, &status, WNOHANG)) > 0) EXPECT_EQ(status, 0) << "child " << child << " of a member that was killed";
    return child < 0;
  };
  EXPECT_TRUE(WaitUntil(none, 20));
}

// --- the tests -------------------------------------------------------------------------------------------------------

using Counts = std::array<std::int64_t, 4>;
constexpr const char* kCounted[] = {"merged", "breaks", "writes", "shared"};

Counts Count(const Scene::Worker& w) { return {w.merged_total, w.breaks, w.writes, w.shared}; }

// The two that stay have all the while merged, written, and had pages from each other.
void ExpectWork(const Scene* scene, const Counts (&before)[2], std::int64_t least) {
  for (std::size_t i = 0; i < 2; ++i) {
    const Counts now = Count(scene->workers[i]);
    std::printf("  worker %zu:", i);
    for (std::size_t k = 0; k < now.size(); ++k) {
      const std::int64_t more = now[k] - before[i][k];
      std::printf(" %s %ld", kCounted[k], static_cast<long>(more));
      EXPECT_GT(more, least) << kCounted[k];
    }
    std::printf("\n");
  }
}

const double kReachSeconds = kSanitized ? 20 : 5;
constexpr int kAgain = 3;  // for what was not reached at first

void KillMembers() {
  Hits hits(Around({{"connect", 1}, {"join sent", 1}, {"joined received", 1}, {"file sent", 1}, {"fileis received", 1},
                    {"settle sent", 8}, {"settled received", 8}, {"offer sent", 8}, {"wanted received", 8}, {"drop sent", 8},
                    {"release sent", 8}, {"report sent", 1}, {"mmap of frames", 16}, {"UFFDIO_REGISTER", 16},
                    {"UFFDIO_CONTINUE", 16}, {"UFFDIO_UNREGISTER", 16}, {"UFFDIO_MOVE", 16}, {"UFFDIO_WRITEPROTECT", 8}, {"UFFDIO_COPY", 4},
                    {"UFFDIO_ZEROPAGE", 2}, {"UFFDIO_WAKE", 8}, {"mremap", 16}}));
  const int kills = Long() ? 528 : 88;
  const double begun = Now();
  Broker broker;
  const std::size_t descriptors = DescriptorsWithoutMembers(broker);
  Keeper keeper(broker);
  Scene* const scene = Scene::Make();
  std::unique_ptr<Child> workers[] = {Worker(broker, scene, 0), Worker(broker, scene, 1)};
  EXPECT_TRUE(WaitUntil([&] { return scene->workers[0].shared > 0 && scene->workers[1].shared > 0; }, 20));
  const Counts before[] = {Count(scene->workers[0]), Count(scene->workers[1])};
  std::mt19937 random(11);
  std::vector<std::unique_ptr<Child>> victims;  // kept: their children may report after them
  const auto kill_one = [&](int round) {
    const Point& point = hits.at(round);
    victims.push_back(Visitor(broker, scene, 1000 + static_cast<unsigned>(victims.size()), true));
    Child& victim = *victims.back();
    Tracer tracer(victim.pid());
    ASSERT_EQ(tracer.Seize(), 0);
    victim.Signal(1);
    hits.Note(round, tracer.RunTo(point, 1 + static_cast<int>(random() % point.most), kReachSeconds));
    tracer.Kill();
    waitpid(victim.pid(), nullptr, 0);
    victim.Forget();
  };
  for (int round = 0; hits.total() < kills && round < 2 * kills && !::testing::Test::HasFailure(); ++round) kill_one(round);
  for (int point = 0; point < hits.points(); ++point) {
    for (int k = 0; k < kAgain && !hits.Hit(point); ++k) kill_one(point);
  }
  hits.Print("members", Now() - begun);
  EXPECT_GE(hits.total(), kills);
  ExpectWork(scene, before, kills / 4);
  scene->end = true;
  for (auto& worker : workers) worker->Join();
  for (auto& victim : victims) victim->ExpectNoReports();
  std::printf("  children that outlived them: %d\n", scene->children.load());
  EXPECT_GT(scene->children, 0);
  ExpectNothingLeft(broker, keeper, descriptors);
}

KSMU_ISOLATED_TEST(DomainKill, MembersAtEveryPoint, Long() ? 1200 : 120) {
  if (const std::string why = WhyNoTracing(); !why.empty()) GTEST_SKIP() << why;
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  KillMembers();
  ExpectChildrenEndedWell();
}

// Not merely that somebody can connect: an io_uring's references to a socket go some milliseconds after its process has ended
// (measured on 6.18: 12), so what is connected to can be the socket of a broker that was killed, and the new one is not there yet.
void StartAgain(Broker& broker) {
  const std::size_t said = broker.log().size();
  broker.Start();
  EXPECT_TRUE(WaitUntil([&] { return broker.log().find("listens: ", said) != std::string::npos; }, 10));
}

std::size_t TimesJoined(const Broker& broker, const Child& worker, std::size_t from = 0) {
  const std::string log = broker.log(), line = ": member " + std::to_string(worker.pid()) + " (uid " + std::to_string(geteuid()) + ") joined\n";
  std::size_t times = 0;
  for (std::size_t at = log.find(line, from); at != std::string::npos; at = log.find(line, at + 1)) ++times;
  return times;
}

KSMU_ISOLATED_TEST(DomainKill, BrokerAtEveryPoint, Long() ? 1200 : 120) {
  if (const std::string why = WhyNoTracing(); !why.empty()) GTEST_SKIP() << why;
  Hits hits(Around({{"join received", 2}, {"joined sent", 2}, {"file received", 2}, {"fileis sent", 2}, {"settle received", 8},
                    {"settled sent", 8}, {"offer received", 8}, {"wanted sent", 4}, {"drop received", 8}, {"release received", 8},
                    {"report received", 2}, {"memfd_create ksmu-index", 1}, {"memfd_create ksmu-canary", 2},
                    {"memfd_create ksmu-frames", 1}, {"pwrite", 64}, {"fallocate", 8}}));
  const int kills = Long() ? 128 : 32;
  const double begun = Now();
  Broker broker("--log info");
  {
    // Not dumpable: what it has is not for everybody to look at.
    Tracer tracer(broker.pid());
    if (tracer.Seize() != 0) GTEST_SKIP() << "the broker cannot be traced without CAP_SYS_PTRACE";
    tracer.Kill();
  }
  broker.Kill(SIGKILL);
  StartAgain(broker);
  const std::size_t descriptors = DescriptorsWithoutMembers(broker);
  Scene* const scene = Scene::Make();
  std::unique_ptr<Child> workers[] = {Worker(broker, scene, 0), Worker(broker, scene, 1)};
  const auto both = [&](const std::function<bool(std::size_t)>& holds, double seconds) {
    return WaitUntil([&] { return holds(0) && holds(1); }, seconds);
  };
  EXPECT_TRUE(both([&](std::size_t i) { return scene->workers[i].shared > 0; }, 20));
  const Counts before[] = {Count(scene->workers[0]), Count(scene->workers[1])};
  std::mt19937 random(13);
  unsigned seed = 1000;
  const auto kill_one = [&](int round) {
    const Point& point = hits.at(round);
    if (broker.pid() < 0) StartAgain(broker);
    // Two that have come for this make all of it happen at once; every fourth time it is left to those who join again.
    std::vector<std::unique_ptr<Child>> visitors;
    for (int i = 0; i < 2 && round % 4 != 3; ++i) visitors.push_back(Visitor(broker, scene, ++seed, false));
    {
      Tracer tracer(broker.pid());
      const int error = tracer.Seize();
      ASSERT_EQ(error, 0) << strerror(error);
      for (auto& visitor : visitors) visitor->Signal(1);
      hits.Note(round, tracer.RunTo(point, 1 + static_cast<int>(random() % point.most), kReachSeconds));
      tracer.Kill();
    }
    broker.Kill(SIGKILL);
    if (round % 8 == 3) {
      const std::int64_t merged[] = {scene->workers[0].merged_total, scene->workers[1].merged_total};
      EXPECT_TRUE(both([&](std::size_t i) { return scene->workers[i].merged_total > merged[i] + 8; }, 20)) << "alone";
    }
    ++scene->round;
    for (auto& visitor : visitors) visitor->Join();
  };
  for (int round = 0; hits.total() < kills && round < 2 * kills && !::testing::Test::HasFailure(); ++round) kill_one(round);
  for (int point = 0; point < hits.points(); ++point) {
    for (int k = 0; k < kAgain && !hits.Hit(point); ++k) kill_one(point);
  }
  hits.Print("brokers", Now() - begun);
  EXPECT_GE(hits.total(), kills);
  ExpectWork(scene, before, kills / 4);
  for (auto& worker : workers) {
    const std::size_t times = TimesJoined(broker, *worker);
    std::printf("  joined %zu times\n", times);
    EXPECT_GE(times, static_cast<std::size_t>(kills / 8));
  }

  const std::size_t said = broker.log().size();
  StartAgain(broker);
  Keeper keeper(broker);
  EXPECT_TRUE(both([&](std::size_t i) { return TimesJoined(broker, *workers[i], said) > 0; }, 20)) << broker.log().substr(said);
  const Counts joined[] = {Count(scene->workers[0]), Count(scene->workers[1])};
  const auto merge_again = [&](std::size_t i) {
    const Counts now = Count(scene->workers[i]);
    return now[0] > joined[i][0] + 64 && now[3] > joined[i][3];
  };
  EXPECT_TRUE(both(merge_again, 20));
  EXPECT_GT(StatusOf(broker).frames, 0);
  scene->end = true;
  for (auto& worker : workers) worker->Join();
  ExpectNothingLeft(broker, keeper, descriptors);
}

}  // namespace
}  // namespace ksmu::test
