#include "domain_support.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <vector>

namespace ksmu::test {

Broker::Broker(const std::string& options) : options_(options) {
  char pattern[] = "/tmp/ksmu-domain-XXXXXX";
  directory_ = mkdtemp(pattern);
  Start();
}

Broker::~Broker() {
  if (pid_ > 0) {
    kill(pid_, SIGCONT);
    Kill(SIGTERM);
  }
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

void Broker::Start() {
  const char* const elsewhere = std::getenv("KSMU_TEST_KSMUD");  // in a guest the build's directory is not there
  std::vector<std::string> words = {elsewhere ? elsewhere : KSMUD, "--socket", socket(), "--log", "info"};
  std::istringstream more(options_);
  for (std::string word; more >> word;) words.push_back(word);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const std::string log = directory_ + "/log";
  const std::size_t said = ReadFile(log).size();
  pid_ = fork();
  if (pid_ == 0) {
    const int fd = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(fd, 1);
    dup2(fd, 2);
    execv(arguments[0], arguments.data());
    _exit(127);
  }
  // Not merely that the socket is there: it can be that of one that was killed.
  const auto listens = [&] {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, socket().c_str());
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    const bool connected = connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    close(fd);
    return connected;
  };
  // And not that of its own that was killed a moment ago: by an io_uring's reference a socket outlives its process by
  // milliseconds, and lets in until then.
  const auto says_so = [&] { return this->log().find("listens:", said) != std::string::npos; };
  EXPECT_TRUE(WaitUntil([&] { return says_so() && listens(); }, 10)) << this->log().substr(said);
}

void Broker::Kill(int signal) {
  kill(pid_, signal);
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = -1;
}

std::string Broker::log() const { return ReadFile(directory_ + "/log"); }

Broker::State Broker::Ask() {
  const std::size_t before = log().size();
  kill(pid_, SIGUSR1);
  State state;
  WaitUntil(
      [&] {
        const std::string said = log().substr(before);
        const auto at = said.find(" domains, ");
        if (at == std::string::npos || said.find('\n', at) == std::string::npos) return false;
        long members, frames;
        if (std::sscanf(said.c_str() + at, " domains, %ld members, %ld frames", &members, &frames) != 2) return false;
        state = {members, frames};
        return true;
      },
      2);
  return state;
}

bool Broker::WaitForFrames(std::int64_t frames, double seconds) {
  State last;
  const bool reached = WaitUntil([&] { return (last = Ask()).frames == frames; }, seconds, 0.05);
  if (!reached) ADD_FAILURE() << "frames: " << last.frames << ", not " << frames << "; members: " << last.members;
  return reached;
}

Board* Board::Make() {
  void* const memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return new (memory) Board();
}

void Post(Board::Entry* entry) {
  ksmu_stats stats{};
  if (ksmu_read_stats(&stats, sizeof stats) != 0) {
    ++entry->errors;
    return;
  }
  entry->merged = stats.pages_merged;
  entry->unshared = stats.pages_unshared;
  entry->changing = stats.pages_volatile;
  entry->zero = stats.ksm_zero_pages;
  entry->breaks = stats.cow_breaks;
  entry->merged_total = stats.pages_merged_total;
}

void JoinFlatOut(const std::string& socket) {
  setenv("KSMU_BROKER", socket.c_str(), 1);
  for (const auto& [name, value] : {std::pair{"sleep_millisecs", 0}, {"cpu_limit_percent", 0}, {"smart_scan", 0}}) ksmu_set(name, value);
}

}  // namespace ksmu::test
