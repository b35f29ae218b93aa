// The library's two threads as two fibers of one thread, so that which of them runs is decided by the test, at every
// call into the fake, and every run can be repeated. The scanner is the test's own stack; the event thread has another.
//
// The mutex that both take is the C library's: pthread_mutex_lock is defined here, and where it would wait, the other
// fiber runs.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace ksmu::model {

// The library does not come to an end of what it is doing. Thrown through it; the world is then left as it is.
struct Livelock : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Fibers {
 public:
  // `events`: one call of HandleEvents.
  explicit Fibers(std::function<void()> events);
  ~Fibers();
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;

  bool in_events() const { return in_events_; }
  // The event thread is in the middle of a HandleEvents.
  bool events_half_done() const { return half_done_; }
  // What was thrown through HandleEvents, or nothing.
  const std::string& failure() const { return failure_; }
  // Scanner: the event thread runs until it is interrupted or has done one HandleEvents.
  void RunEvents();
  // Event thread: the scanner runs on, until it calls RunEvents again.
  void Interrupt();
  // Whoever runs lets the other one run. False: there is no other.
  bool Other();

  static Fibers* current;
  std::string description;  // printed if it ends in an abort

 private:
  static void Enter(unsigned high, unsigned low);
  void Main();

  std::function<void()> events_;
  std::vector<char> stack_;
  ucontext_t scanner_{}, event_{};
  bool in_events_ = false, half_done_ = false;
  std::string failure_;
  // For the address sanitizer: the fake stacks.
  void* scanner_stack_ = nullptr;
  void* event_stack_ = nullptr;
  const void* scanner_bottom_ = nullptr;
  std::size_t scanner_size_ = 0;
};

}  // namespace ksmu::model
