#include "os/without_engine.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "os/mappings.h"
#include "os/process.h"
#include "os/raw.h"
#include "os/thread.h"

namespace ksmu::os {

int DiscardWithoutEngine(Span span) {
  if (int error = raw::Madvise(span.start, span.bytes, MADV_DONTNEED)) return error;
  for (Address at = span.start; at < span.end();) {
    Mapping mapping;
    bool frames = false;
    // With a descriptor of the program's table, which another thread may be closing: then it is tried again.
    int error = -EBADF;
    for (int attempt = 0; attempt < 1000 && error && error != -ENOENT; ++attempt) {
      Mappings mappings;
      if (mappings.Open() != 0) return -ENOMEM;  // frames may show: that is not to be taken for done
      error = mappings.QueryFrames(at, &mapping, &frames);
      mappings.Close();
      if (error && attempt > 10) sched_yield();
    }
    if (error == -ENOENT || (!error && mapping.start >= span.end())) return 0;
    if (error) return error;
    const Address start = std::max(at, mapping.start), end = std::min(span.end(), mapping.end);
    if (frames) {
      const int prot = (mapping.readable ? PROT_READ : 0) | (mapping.writable ? PROT_WRITE : 0) | (mapping.executable ? PROT_EXEC : 0);
      Address placed;
      error = raw::Mmap(start, end - start, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0, &placed);
      if (error) return error;
    }
    at = end;
  }
  return 0;
}

int DiscardAfterStop(Span span) {
  struct Work {
    Span span;
    int result;
  } work{span, 0};
  pthread_t thread;
  const int error = StartThread(
      &thread,
      [](void* argument) -> void* {
        auto* w = static_cast<Work*>(argument);
        w->result = UnshareDescriptors();
        if (!w->result) w->result = DiscardWithoutEngine(w->span);
        return nullptr;
      },
      &work);
  if (error) return DiscardWithoutEngine(span);
  JoinThread(thread);
  return work.result;
}

int DiscardPlainly(Span span) { return raw::Madvise(span.start, span.bytes, MADV_DONTNEED); }

int MapForProgram(std::size_t bytes, Address* out) {
  return raw::Mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, out);
}

int UnmapWithoutEngine(Span span) { return raw::Munmap(span.start, span.bytes); }

}  // namespace ksmu::os
