// ksmuctl metrics: what is saved, at what cost, and why the rest is not, for Prometheus (docs/metrics.md): printed, into a file of
// node_exporter's, or as the answer to one request of HTTP.
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "os/channel.h"
#include "tools/commands.h"
#include "tools/metrics_http.h"
#include "tools/metrics_text.h"
#include "tools/operator.h"

namespace ksmu::tools {
namespace {

constexpr const char* kUsageText =
    "usage: ksmuctl metrics [--members] [--textfile PATH [--every SECONDS] | --http] [option...]\n"
    "The numbers of all domains for Prometheus, printed in OpenMetrics' form.\n\n"
    "  --members          those of each member as well, with its pid\n"
    "  --textfile PATH    into this file, for node_exporter's textfile collector\n"
    "  --every SECONDS    again and again, until SIGTERM; then the file is removed\n"
    "  --http             the answer to one request of HTTP, read from stdin: for a socket of systemd's\n";
// Of the 10 s in all, which are also Prometheus's own patience; the rest is for the broker and for writing.
constexpr unsigned kHttpSeconds = 10;
constexpr std::uint64_t kRequestMs = 5'000;
constexpr int kHttpPatienceMs = 3'000;

struct MetricsOptions {
  std::string textfile;
  std::int64_t every = 0;  // seconds
  bool http = false, members = false;
};

// What is to be told, and what was wrong. Nothing is told by halves: if the broker goes while it is asked, it is not up.
struct Collected {
  MetricsSnapshot snapshot;
  int status = 0;
  std::string wrong;
};
Collected Collect(const OperatorOptions& options, bool with_members) {
  Collected all;
  MetricsSnapshot& snapshot = all.snapshot;
  try {
    Operator op(options);
    snapshot.page_bytes = op.page_bytes();
    snapshot.most_frames = op.welcome().most_frames;
    try {
      snapshot.domains = op.Domains();
    } catch (const Failed& failed) {
      // A broker without the domain that was asked for is one all the same.
      if (failed.status != kNotThere) throw;
      all.status = failed.status, all.wrong = failed.what;
    }
    if (with_members) {
      for (const auto& domain : snapshot.domains) snapshot.members.push_back(op.Members(domain.domain));
    }
    snapshot.up = true;
  } catch (const Failed& failed) {
    if (failed.status == kUsage) throw;
    all = {{}, failed.status, failed.what};
  }
  return all;
}

std::string ErrorText() { return std::strerror(errno); }

bool WriteAll(int fd, const std::string& text) {
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t n = write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    done += static_cast<std::size_t>(n);
  }
  return true;
}

// --- into a file -----------------------------------------------------------------------------------------------------

// Whoever reads it sees the old text or the new one, as a whole. The temporary name does not end as those that are collected (.prom).
void Replace(const std::string& path, const std::string& text) {
  std::string temporary = path + ".XXXXXX";
  const int fd = mkostemp(temporary.data(), O_CLOEXEC);
  if (fd < 0) throw Failed{kRefused, path + ": no file can be made beside it: " + ErrorText()};
  const bool written = WriteAll(fd, text) && fchmod(fd, 0644) == 0;
  const std::string wrong = written ? "" : ErrorText();
  const bool closed = close(fd) == 0;
  if (written && closed && std::rename(temporary.c_str(), path.c_str()) == 0) return;
  const std::string why = written ? ErrorText() : wrong;
  unlink(temporary.c_str());
  throw Failed{kRefused, path + ": " + why};
}

// Only what is true may stay in the file: who repeats is the only one who says when it no longer is.
int Repeat(const OperatorOptions& options, const MetricsOptions& own) {
  sigset_t ends;
  sigemptyset(&ends);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&ends, signal);
  sigprocmask(SIG_BLOCK, &ends, nullptr);
  std::string said;
  try {
    for (;;) {
      const Collected all = Collect(options, own.members);
      if (!all.wrong.empty() && all.wrong != said) std::fprintf(stderr, "ksmuctl: %s\n", all.wrong.c_str());
      said = all.wrong;
      Replace(own.textfile, MetricsText(all.snapshot, MetricsForm::kPrometheus));
      const timespec pause = {static_cast<time_t>(own.every), 0};
      if (sigtimedwait(&ends, nullptr, &pause) >= 0) break;
    }
  } catch (const Failed&) {
    unlink(own.textfile.c_str());
    throw;
  }
  unlink(own.textfile.c_str());
  return 0;
}

// --- over HTTP -------------------------------------------------------------------------------------------------------

// The request, as far as it has come in time.
std::string ReadRequest(bool* late) {
  std::string request;
  const std::uint64_t end = os::MonotonicMs() + kRequestMs;
  while (!IsWhole(request)) {
    const std::uint64_t now = os::MonotonicMs();
    pollfd in = {STDIN_FILENO, POLLIN, 0};
    if (now >= end) {
      *late = true;
      break;
    }
    if (poll(&in, 1, static_cast<int>(end - now)) <= 0) continue;
    char bytes[4096];
    const ssize_t n = read(STDIN_FILENO, bytes, sizeof bytes);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n <= 0) break;
    request.append(bytes, static_cast<std::size_t>(n));
  }
  return request;
}

int Serve(const OperatorOptions& options, const MetricsOptions& own) {
  std::signal(SIGPIPE, SIG_IGN);
  // Whatever it waits for: a reader who does not read, a broker that answers by drops.
  std::signal(SIGALRM, [](int) { _exit(kNoAnswer); });
  alarm(kHttpSeconds);
  bool late = false;
  const std::string text = ReadRequest(&late);
  HttpRequest request = ParseRequest(text);
  if (late) request.status = 408;
  std::string body;
  if (request.status == 200) {
    try {
      OperatorOptions soon = options;
      soon.patience_ms = kHttpPatienceMs;
      body = MetricsText(Collect(soon, own.members).snapshot, request.form);
    } catch (const Failed&) {
      WriteAll(STDOUT_FILENO, HttpAnswer(500, request.form, ""));
      throw;
    }
  }
  // One who has gone meanwhile is no error of ours.
  WriteAll(STDOUT_FILENO, HttpAnswer(request.status, request.form, body));
  return 0;
}

}  // namespace

int RunMetrics(int argc, char** argv) {
  OperatorOptions options;
  return Guarded(options, [&] {
    MetricsOptions own;
    bool to_file = false;
    const Arguments::Own take = [&](const std::string& option, const Arguments::Value& value) {
      if (option == "--members") {
        own.members = true;
      } else if (option == "--http") {
        own.http = true;
      } else if (option == "--textfile") {
        own.textfile = value();
        to_file = true;
      } else if (option == "--every") {
        const std::string text = value();
        if (!ParseNumber(text, &own.every) || own.every < 1 || own.every > 86400) throw Failed{kUsage, option + " wants a number from 1 to 86400, not " + text};
      } else {
        return false;
      }
      return true;
    };
    const Arguments arguments(kUsageText, argc, argv, &options, take);
    if (arguments.help()) return 0;
    if (!arguments.rest().empty()) arguments.Usage("metrics takes no arguments, and not " + arguments.rest()[0]);
    if (options.json) arguments.Usage("metrics has no --json: that is status");
    if (to_file && (own.textfile.empty() || own.textfile.ends_with('/'))) arguments.Usage("--textfile wants the path of a file");
    if (own.every && !to_file) arguments.Usage("--every goes with --textfile");
    if (own.http && to_file) arguments.Usage("either --http or --textfile");
    if (own.http) return Serve(options, own);
    if (own.every) return Repeat(options, own);

    const Collected all = Collect(options, own.members);
    if (to_file) {
      Replace(own.textfile, MetricsText(all.snapshot, MetricsForm::kPrometheus));
    } else if (!WriteAll(STDOUT_FILENO, MetricsText(all.snapshot, MetricsForm::kOpenMetrics))) {
      throw Failed{kRefused, "standard output: " + ErrorText()};
    }
    if (all.status) throw Failed{all.status, all.wrong};
    return 0;
  });
}

}  // namespace ksmu::tools
