// A broker of a test's own, and processes that are members of its domain.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "test_support.h"

namespace ksmu::test {

// ksmud on a socket in a directory of its own, both gone at the end.
class Broker {
 public:
  explicit Broker(const std::string& options = "");
  ~Broker();
  Broker(const Broker&) = delete;

  void Start();
  void Kill(int signal);  // and waits for it; the socket stays
  pid_t pid() const { return pid_; }
  std::string socket() const { return directory_ + "/default.sock"; }
  std::string log() const;
  // What it says of its domains: the sum over all. -1: it has not answered.
  struct State {
    std::int64_t members = -1, frames = -1;
  };
  State Ask();
  bool WaitForFrames(std::int64_t frames, double seconds);

 private:
  std::string directory_, options_;
  pid_t pid_ = -1;
};

// What members and test tell each other.
struct Board {
  struct Entry {
    std::atomic<std::int64_t> merged, unshared, changing, zero, breaks, merged_total, errors;
  };
  Entry members[64];
  std::atomic<int> phase;
  std::atomic<bool> end;
  static Board* Make();

  std::int64_t Sum(std::atomic<std::int64_t> Entry::*what) const {
    std::int64_t sum = 0;
    for (const Entry& entry : members) sum += (entry.*what).load();
    return sum;
  }
};

// In a member: its counters onto the board.
void Post(Board::Entry* entry);
// In a member, before the library starts: which broker, and flat out.
void JoinFlatOut(const std::string& socket);

}  // namespace ksmu::test
