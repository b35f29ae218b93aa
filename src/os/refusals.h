// Which calls the kernel has refused: so that the log can name them. Atomics only; any thread notes, any thread reads.
#pragma once

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace ksmu::os {

class Refusals {
 public:
  enum Call : std::uint8_t {
    kRegister, kUnregister, kWriteProtect, kContinue, kMove, kCopy, kZeroPage, kWake, kRead, kScan, kMadvise, kMmap,
    kMremap, kMunmap, kMprotect, kCreateFile, kWriteFile, kPunchFile, kMapFile,
    kMovePages, kBindFile, kCallCount,
  };
  // Returns the error. What protocols live with (EAGAIN, EBUSY, ENOENT, EEXIST, ESRCH) is no news and is not noted.
  int Note(Call call, int error) {
    switch (error) {
      case 0:
      case -EAGAIN:
      case -EBUSY:
      case -ENOENT:
      case -EEXIST:
      case -ESRCH:
        return error;
    }
    errors_[call].store(error, std::memory_order_relaxed);
    last_.store(call, std::memory_order_relaxed);
    if (Forbidden(error)) forbidden_[call].fetch_add(1, std::memory_order_release);
    return error;
  }
  // What only a filter, a limit or a broken machine says; ENOMEM and EINVAL have reasons of their own to be looked at.
  static bool Forbidden(int error) {
    return error == -EPERM || error == -EACCES || error == -ENOSYS || error == -EIO || error == -EMFILE ||
           error == -ENFILE || error == -EFBIG || error == -ENOSPC;
  }
  std::uint64_t forbidden(Call call) const { return forbidden_[call].load(std::memory_order_acquire); }
  int error(Call call) const { return errors_[call].load(std::memory_order_relaxed); }
  Call last() const { return last_.load(std::memory_order_relaxed); }  // kCallCount: none so far
  static const char* Name(Call call);

 private:
  std::array<std::atomic<int>, kCallCount> errors_{};
  std::array<std::atomic<std::uint64_t>, kCallCount> forbidden_{};
  std::atomic<Call> last_{kCallCount};
};

// "EPERM" for -EPERM or EPERM; "an unknown error" for what has no name.
const char* ErrorName(int error);

}  // namespace ksmu::os
