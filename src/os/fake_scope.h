// A call of the library into the fake: the hooks before and after it, and an injected failure.
#pragma once

#include <algorithm>
#include <cerrno>

#include "os/fake_system.h"

namespace ksmu::os {

class FakeSystem::Scope {
 public:
  Scope(FakeSystem& system, const char* name, Context context = -1, Span span = {}, Address other = 0)
      : call{.name = name, .context = context, .span = span, .other = other}, system_(system) {
    ++system_.calls_;
    system_.now_ += 100;
    if (system_.hooks.before) error = system_.hooks.before(call);
  }
  ~Scope() {
    if (system_.hooks.after) system_.hooks.after(call);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  // Runs a call that can do part of its work: `work(limit)` does at most that many bytes.
  template <typename Work>
  Partial Do(std::size_t bytes, Work work) {
    const std::size_t page = system_.page_size_;
    if (error != 0) {
      const std::size_t first = std::min(bytes, call.do_first) / page * page;
      if (first == 0) return {error, 0};
      Partial result = work(first);
      if (result.error == 0) result.error = error;
      return result;
    }
    const std::size_t limit = std::min(bytes, call.do_only) / page * page;
    Partial result = work(limit);
    if (result.error == 0 && limit < bytes) result.error = -EAGAIN;
    return result;
  }

  FakeCall call;
  int error = 0;

 private:
  FakeSystem& system_;
};

}  // namespace ksmu::os
