// The shim's locks. Whoever holds one neither allocates nor waits for anything else, and takes no signal: a handler that
// maps memory would wait for the thread that it has interrupted.
#pragma once

#include <atomic>
#include <cstdint>

#include "os/raw.h"
#include "os/thread.h"

namespace ksmu::preload {

class Lock {
 public:
  // The signal mask is the caller's to keep until Unlock.
  std::uint64_t Acquire() {
    const std::uint64_t mask = os::BlockSignals();
    std::uint32_t free = 0;
    if (word_.compare_exchange_strong(free, 1, std::memory_order_acquire)) return mask;
    while (word_.exchange(2, std::memory_order_acquire) != 0) Wait(&word_, 2, -1);
    return mask;
  }
  void Release(std::uint64_t mask) {
    if (word_.exchange(0, std::memory_order_release) == 2) Wake(&word_, 1);
    os::RestoreSignals(mask);
  }
  // In a forked child: true if another thread held it at that moment. What it guards may be in any state then. It is not held
  // over a fork: that would be to wait, in one fork handler, for a thread that waits for what another handler holds.
  bool ResetInChild() { return word_.exchange(0, std::memory_order_relaxed) != 0; }

  // Sleeps while *word == expected, `ns` at most (< 0: for ever).
  static void Wait(const std::atomic<std::uint32_t>* word, std::uint32_t expected, long ns) {
    const struct { long seconds, nanoseconds; } timeout{ns / 1'000'000'000, ns % 1'000'000'000};
    os::raw::Direct(SYS_futex, reinterpret_cast<long>(word), 128 /* FUTEX_WAIT_PRIVATE */, static_cast<long>(expected),
                    ns < 0 ? 0 : reinterpret_cast<long>(&timeout));
  }
  static void Wake(const std::atomic<std::uint32_t>* word, int count) {
    os::raw::Direct(SYS_futex, reinterpret_cast<long>(word), 129 /* FUTEX_WAKE_PRIVATE */, count);
  }

 private:
  std::atomic<std::uint32_t> word_{0};
};

class Held {
 public:
  explicit Held(Lock& lock) : lock_(lock), mask_(lock.Acquire()) {}
  ~Held() { lock_.Release(mask_); }
  Held(const Held&) = delete;

 private:
  Lock& lock_;
  std::uint64_t mask_;
};

}  // namespace ksmu::preload
