// Ends a UFFDIO_MOVE that the kernel would never end.
//
// To take one page out of a large folio the kernel splits it, which fails as long as somebody else has a reference to the folio:
// a pin (io_uring's registered buffers, direct I/O), a vmsplice. Before Linux 6.18 (seen on 6.12) the kernel then tries again
// for ever, with the mapping locked; only a signal that kills ends it, and who maps anything waits meanwhile. But each time it
// looks at the target first, and once there is a page in that it returns EEXIST. So a thread looks at moves that have used more
// CPU time than any honest one, and puts one in: by reading, which brings the zero page, and which harms no page that has
// arrived. That thread takes no lock of the mappings: its faults need the target's alone (locks of one mapping: 6.4).
//
// The target has to be the library's own memory, which nobody else looks at.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "os/os.h"

namespace ksmu::os {

class MoveWatch {
 public:
  // Whether this kernel needs it.
  static bool IsNeeded();

  // On the thread that will call Move. 0 or -errno. Starts a thread.
  int Start(std::size_t page_bytes, void (*registers)(void* cookie, int thread), void* cookie);
  void Stop();
  bool started() const { return started_; }

  // As uffd::Move. A page that the kernel would not let go of is -EBUSY, as on later kernels; the target is empty behind what has
  // been moved.
  Partial Move(int fd, Address to, Address from, std::size_t bytes);

 private:
  // Smaller than a huge page: one that moves whole would have to be split on its way back.
  static constexpr std::size_t kMostPages = 255;
  static constexpr std::int64_t kLookNs = 5'000'000;
  static constexpr std::uint64_t kTooLongNs = 5'000'000;  // of CPU time
  static constexpr int kLooksWhileIdle = 20;

  enum State : std::uint32_t { kNone, kMoving, kBreaking, kBroken };
  static void* ThreadMain(void* self);
  void Look();
  std::uint64_t MoverCpu() const;

  bool started_ = false;
  std::size_t page_bytes_ = 0;
  pthread_t thread_{};
  clockid_t mover_clock_{};
  void (*registers_)(void* cookie, int thread) = nullptr;
  void* cookie_ = nullptr;
  Address to_ = 0;               // of the move in hand; the mover's, but in kBreaking
  std::size_t pages_ = 0;
  std::atomic<std::uint64_t> begun_cpu_{0};
  std::atomic<std::uint32_t> round_{0};  // of moves
  std::atomic<std::uint32_t> state_{kNone};
  std::atomic<std::uint32_t> asleep_{0}, end_{0};
};

}  // namespace ksmu::os
