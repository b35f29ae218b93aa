// ksmud as a process of its own, for the tests.
#pragma once

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "broker_server_client.h"
#include "test_support.h"

namespace ksmu::broker::test {

using ::ksmu::test::Now;
using ::ksmu::test::WaitUntil;

// Under a sanitizer everything takes longer.
inline double Patience() { return ::ksmu::test::kSanitized ? 4 : 1; }

// A ksmud, ended with this object.
class Broker {
 public:
  struct Setup {
    std::vector<std::string> arguments;
    std::vector<std::string> environment;  // NAME=VALUE
    std::function<void()> before;          // in the new process
  };
  explicit Broker(Setup setup) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return;
    pid_ = fork();
    if (pid_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      dup2(ends[1], STDERR_FILENO);
      const char* const other = std::getenv("KSMU_TEST_KSMUD");  // for a look at whether the tests can fail
      const char* const program = other ? other : KSMUD;
      std::vector<char*> arguments{const_cast<char*>(program)};
      for (const std::string& a : setup.arguments) arguments.push_back(const_cast<char*>(a.c_str()));
      arguments.push_back(nullptr);
      unsetenv("XDG_RUNTIME_DIR");
      for (const std::string& e : setup.environment) putenv(const_cast<char*>(e.c_str()));
      if (setup.before) setup.before();
      execv(program, arguments.data());
      _exit(127);
    }
    close(ends[1]);
    out_.Reset(ends[0]);
  }
  Broker(const Broker&) = delete;
  ~Broker() {
    if (pid_ > 0) Kill(SIGKILL);
  }

  pid_t pid() const { return pid_; }
  const std::string& said() const { return said_; }
  // Reads what it says until it has said this. False: it ends before, or does not within some seconds.
  bool WaitFor(const std::string& text, double seconds = 10) {
    const double end = Now() + Patience() * seconds;
    for (;;) {
      if (const std::size_t at = said_.find(text, heard_); at != std::string::npos && said_.find('\n', at) != std::string::npos) {
        heard_ = said_.find('\n', at);
        return true;
      }
      pollfd entry{out_.get(), POLLIN, 0};
      const double left = end - Now();
      if (left <= 0 || poll(&entry, 1, static_cast<int>(left * 1000) + 1) < 0) return false;
      if (!entry.revents) continue;
      char buffer[4096];
      const ssize_t n = read(out_.get(), buffer, sizeof buffer);
      if (n <= 0) return false;
      said_.append(buffer, static_cast<std::size_t>(n));
    }
  }
  bool Ready() { return WaitFor("listens"); }
  // Its exit status; -1: it was killed, or does not end.
  int Wait() {
    int status = -1;
    if (!WaitUntil([&] { return waitpid(pid_, &status, WNOHANG) == pid_; }, 20)) return -1;
    pid_ = 0;
    WaitFor("\1", 0.1);  // the rest of what it has said
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  int Stop() {
    kill(pid_, SIGTERM);
    return Wait();
  }
  void Kill(int signal) {
    kill(pid_, signal);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

  struct Counts {
    long domains = -1, members = -1, frames = -1, connections = -1;
    std::string by;
  };
  Counts Count() {
    Counts counts;
    kill(pid_, SIGUSR1);
    if (!WaitFor(" connections, by ")) return counts;
    const std::size_t line = said_.rfind('\n', said_.rfind(" connections, by ")) + 1;
    char by[32] = {};
    std::sscanf(said_.c_str() + line, "ksmud: %ld domains, %ld members, %ld frames, %ld connections, by %31s", &counts.domains, &counts.members,
                &counts.frames, &counts.connections, by);
    counts.by = by;
    return counts;
  }
  bool ComesTo(long domains, long members, long frames, double seconds = 5) {
    Counts counts;
    const bool ok = WaitUntil([&] {
      counts = Count();
      return counts.domains == domains && counts.members == members && counts.frames == frames;
    }, Patience() * seconds, 0.05);
    EXPECT_TRUE(ok) << counts.domains << " domains, " << counts.members << " members, " << counts.frames << " frames\n" << said_;
    return ok;
  }
  std::size_t Descriptors() const {
    std::size_t n = 0;
    for (int fd = 0; fd < 4096; ++fd) n += faccessat(AT_FDCWD, ("/proc/" + std::to_string(pid_) + "/fd/" + std::to_string(fd)).c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    return n;
  }
  double CpuSeconds() const {
    std::ifstream file("/proc/" + std::to_string(pid_) + "/stat");
    std::string text((std::istreambuf_iterator<char>(file)), {});
    std::istringstream rest(text.substr(text.rfind(')') + 2));
    std::string field;
    long user = 0, system = 0;
    for (int i = 3; i <= 13; ++i) rest >> field;
    rest >> user >> system;
    return static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
  }

 private:
  pid_t pid_ = 0;
  Fd out_;
  std::string said_;
  std::size_t heard_ = 0;
};

// A child process of the test that does this, and is killed with the object.
class Process {
 public:
  explicit Process(const std::function<void()>& body) {
    pid_ = fork();
    if (pid_ == 0) {
      body();
      _exit(0);
    }
  }
  Process(const Process&) = delete;
  ~Process() { Kill(); }
  void Kill() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_;
};

inline bool Exists(const std::string& path) {
  struct stat about {};
  return lstat(path.c_str(), &about) == 0;
}

// Refuses a system call from here on, also in what is executed.
inline void Refuse(int number) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(filter), filter};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) _exit(126);
}

}  // namespace ksmu::broker::test
