#include "child.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

namespace bench {

volatile std::sig_atomic_t g_interrupted = 0;

void CatchSignals() {
  struct sigaction action = {};
  action.sa_handler = [](int signal) { g_interrupted = signal; };
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaction(signal, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

namespace {

[[noreturn]] void Child(const std::function<void(Metrics*)>& run, pid_t parent, int out) {
  // Nobody would put the settings back after us: a child never outlives its parent.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::signal(signal, SIG_DFL);
  // The heap's own reports would land in the middle of the table.
  const int null = open("/dev/null", O_WRONLY);
  if (null >= 0) dup2(null, STDOUT_FILENO);
  Metrics metrics;
  std::string error;
  try {
    run(&metrics);
  } catch (const std::exception& e) {
    error = e.what();
    if (error.empty()) error = "failed";
  }
  std::string text;
  for (const auto& [name, value] : metrics) {
    char line[160];
    snprintf(line, sizeof line, "%s %.17g\n", name.c_str(), value);
    text += line;
  }
  text += error.empty() ? "ok\n" : "error " + error + "\n";
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = write(out, text.data() + at, text.size() - at);
    if (n < 0 && errno != EINTR) break;
    if (n > 0) at += static_cast<size_t>(n);
  }
  // Not through the library's stop: a program that just ends is what most are, and nothing is measured any more.
  _exit(0);
}

void Parse(const std::string& text, Outcome* outcome) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    const size_t space = line.find(' ');
    if (line == "ok") {
      outcome->ok = true;
    } else if (line.compare(0, 6, "error ") == 0) {
      outcome->error = line.substr(6);
    } else if (space != std::string::npos) {
      outcome->metrics[line.substr(0, space)] = strtod(line.c_str() + space + 1, nullptr);
    }
  }
}

}  // namespace

Outcome RunInChild(const std::function<void(Metrics*)>& run, double max_seconds) {
  Outcome outcome;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return outcome.error = strerror(errno), outcome;
  fflush(nullptr);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    Child(run, parent, ends[1]);
  }
  const int fork_error = errno;
  close(ends[1]);
  if (child < 0) {
    close(ends[0]);
    outcome.error = strerror(fork_error);
    return outcome;
  }
  const uint64_t deadline = NowNs() + static_cast<uint64_t>(max_seconds * 1e9);
  std::string text;
  bool killed = false;
  for (;;) {
    pollfd wait = {ends[0], POLLIN, 0};
    // A signal that comes just before the wait is seen this much later.
    const int ready = poll(&wait, 1, 200);
    if (!killed && (g_interrupted || NowNs() > deadline)) {
      outcome.error = g_interrupted ? "interrupted" : "took too long";
      kill(child, SIGKILL);
      killed = true;
    }
    if (ready <= 0) continue;
    char buffer[4096];
    const ssize_t n = read(ends[0], buffer, sizeof buffer);
    if (n == 0) break;
    if (n > 0) text.append(buffer, static_cast<size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  Parse(text, &outcome);
  if (killed) outcome.ok = false;
  if (!killed && WIFSIGNALED(status)) {
    outcome.ok = false;
    outcome.error = std::string("the process died: ") + strsignal(WTERMSIG(status));
  } else if (!outcome.ok && outcome.error.empty()) {
    outcome.error = "the process ended without a result";
  }
  return outcome;
}

}  // namespace bench
