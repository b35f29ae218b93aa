// Messages for the program (ksmu_options.log): one sentence each, of one kind at most one a minute.
//
// The scanner puts a sentence into its kind's slot; a thread, ksmu-log, hands it to the callback. A thread of its own,
// for the callback is the program's code. It may take a lock whose holder waits for the scanner (an allocator that calls
// the library under its own lock), for the event thread (a discard) or at a shut gate; and it may write to a descriptor,
// of which only a thread in the program's own descriptor table knows the number's meaning. There is no such thread where
// nobody wants messages.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ksmu::engine {

// A sentence put together in a fixed buffer; what does not fit is cut.
class Sentence {
 public:
  Sentence& operator<<(const char* text);
  Sentence& operator<<(std::int64_t number);
  const char* text() const { return text_; }

 private:
  char text_[400] = {};
  std::size_t size_ = 0;
};

class Log {
 public:
  using Callback = void (*)(int level, const char* message, void* cookie);
  // Delivered in this order where several are waiting.
  enum Kind : std::uint8_t { kStarted, kContext, kRefused, kFailed, kMaps, kPool, kMemory, kMoves, kChildren, kDomain, kStopped, kKindCount };
  static constexpr std::uint64_t kOncePerNs = 60'000'000'000;

  Log() = default;
  Log(const Log&) = delete;

  // Starts the thread, if there is a callback; to be called by a thread of the program, whose descriptors it is to have.
  // 0 or -errno.
  int Start(Callback callback, void* cookie);
  // Hands out what has been said, and ends the thread. The callback is not called any more.
  void Stop();
  bool on() const { return callback_ != nullptr; }

  // True if a message of this kind may be said at that moment (monotonic). Scanner only, like Say.
  bool May(Kind kind, std::uint64_t now) const;
  void Say(Kind kind, int level, const Sentence& sentence, std::uint64_t now);

 private:
  struct Slot {
    std::atomic<bool> full{false};
    int level = 0;
    std::uint64_t said_at = 0;  // 0: never
    Sentence sentence;
  };
  static void* Main(void* self);
  void Deliver();

  Callback callback_ = nullptr;
  void* cookie_ = nullptr;
  pthread_t thread_{};
  std::atomic<std::uint32_t> bell_{0};
  std::atomic<bool> ending_{false};
  std::array<Slot, kKindCount> slots_;
};

}  // namespace ksmu::engine
