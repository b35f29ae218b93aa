#include "os/move_watch.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <string_view>

#include "os/process.h"
#include "os/raw.h"
#include "os/text.h"
#include "os/thread.h"
#include "os/uffd.h"

namespace ksmu::os {

bool MoveWatch::IsNeeded() {
  char release[64];
  KernelRelease(release, sizeof release);
  std::string_view text = release;
  std::uint64_t major = 0, minor = 0;
  const bool known = TakeDecimal(&text, &major) && TakePrefix(&text, ".") && TakeDecimal(&text, &minor);
  return !known || major < 6 || (major == 6 && minor < 18);
}

int MoveWatch::Start(std::size_t page_bytes, void (*registers)(void* cookie, int thread), void* cookie) {
  page_bytes_ = page_bytes;
  registers_ = registers;
  cookie_ = cookie;
  if (int error = pthread_getcpuclockid(pthread_self(), &mover_clock_)) return -error;
  if (int error = StartThread(&thread_, &MoveWatch::ThreadMain, this)) return error;
  started_ = true;
  return 0;
}

void MoveWatch::Stop() {
  if (!started_) return;
  end_.store(1);
  round_.fetch_add(1);
  FutexWake(&round_, 1);
  FutexWake(&end_, 1);
  JoinThread(thread_);
  started_ = false;
}

std::uint64_t MoveWatch::MoverCpu() const {
  timespec used{};
  clock_gettime(mover_clock_, &used);
  return static_cast<std::uint64_t>(used.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(used.tv_nsec);
}

Partial MoveWatch::Move(int fd, Address to, Address from, std::size_t bytes) {
  Partial all{0, 0};
  while (all.done < bytes) {
    to_ = to + all.done;
    pages_ = std::min((bytes - all.done) / page_bytes_, kMostPages);
    begun_cpu_.store(MoverCpu());
    round_.fetch_add(1);
    state_.store(kMoving);
    if (asleep_.load()) FutexWake(&round_, 1);
    const Partial moved = uffd::Move(fd, to_, from + all.done, pages_ * page_bytes_);
    all.done += moved.done;
    std::uint32_t expected = kMoving;
    if (!state_.compare_exchange_strong(expected, kNone)) {
      while (state_.load() != kBroken) FutexWait(&state_, kBreaking, -1);
      state_.store(kNone);
      raw::Madvise(to_ + moved.done, pages_ * page_bytes_ - moved.done, MADV_DONTNEED);
      if (moved.done == pages_ * page_bytes_) continue;  // it ended by itself, just before
      all.error = -EBUSY;
      break;
    }
    all.error = moved.error;
    if (moved.error || moved.done != pages_ * page_bytes_) break;
  }
  return all;
}

void* MoveWatch::ThreadMain(void* self) {
  auto& watch = *static_cast<MoveWatch*>(self);
  NameThisThread("ksmu-watch");
  watch.registers_(watch.cookie_, CurrentThread());
  std::uint32_t seen = watch.round_.load();
  for (int idle = 0; !watch.end_.load();) {
    FutexWait(&watch.end_, 0, kLookNs);
    const std::uint32_t round = watch.round_.load();
    if (round == seen && watch.state_.load() == kMoving) watch.Look();
    idle = round == seen && watch.state_.load() == kNone ? idle + 1 : 0;
    seen = round;
    if (idle < kLooksWhileIdle) continue;
    watch.asleep_.store(1);
    if (watch.state_.load() == kNone && !watch.end_.load()) FutexWait(&watch.round_, seen, -1);
    watch.asleep_.store(0);
    idle = 0;
  }
  return nullptr;
}

// The same move as some time ago.
void MoveWatch::Look() {
  if (MoverCpu() < begun_cpu_.load() + kTooLongNs) return;  // it waits for a CPU, or for somebody who will come
  std::uint32_t expected = kMoving;
  if (!state_.compare_exchange_strong(expected, kBreaking)) return;
  for (std::size_t i = pages_; i-- > 0;) static_cast<void>(*reinterpret_cast<const volatile std::byte*>(to_ + i * page_bytes_));
  state_.store(kBroken);
  FutexWake(&state_, 1);
}

}  // namespace ksmu::os
