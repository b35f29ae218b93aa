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
    const int error = QueryFramesOnce(at, &mapping, &frames);
    if (error == -ENOENT || (!error && mapping.start >= span.end())) return 0;
    if (error) return -ENOMEM;  // frames may show: that is not to be taken for done
    const Address start = std::max(at, mapping.start), end = std::min(span.end(), mapping.end);
    if (frames) {
      const int prot = (mapping.readable ? PROT_READ : 0) | (mapping.writable ? PROT_WRITE : 0) | (mapping.executable ? PROT_EXEC : 0);
      Address placed;
      constexpr int kHow = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
      if (const int refused = raw::Mmap(start, end - start, prot, kHow, -1, 0, &placed)) return refused;
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
