// mmap, munmap, mremap, mprotect and locks.
#include "preload/memory.h"

#include <sys/mman.h>
#include <sys/shm.h>

#include <cerrno>
#include <cstring>

#include "api/shim.h"
#include "os/thread.h"
#include "preload/auto.h"
#include "preload/config.h"
#include "preload/next.h"
#include "preload/pieces.h"
#include "preload/regions.h"
#include "preload/seen.h"

namespace ksmu::preload {
namespace {

using os::raw::Direct;

long L(const void* p) { return reinterpret_cast<long>(p); }

// Where the addresses end that the kernel gives to a program which does not ask for more.
constexpr Address kTop = (Address{1} << 47) - 4096;

// The result of one of libc's functions as that of a system call.
long Result(long result) {
  return result == -1 ? -errno : result;
}

// Which mappings can become regions when somebody asks.
bool Mergeable(int flags) {
  constexpr int kNot = MAP_STACK | MAP_GROWSDOWN | MAP_HUGETLB | MAP_LOCKED;
  return (flags & MAP_ANONYMOUS) && (flags & MAP_TYPE) == MAP_PRIVATE && !(flags & kNot);
}
Seen::State StateFor(int prot) {
  return prot & PROT_EXEC ? Seen::kRefused : prot & PROT_WRITE ? Seen::kWritable : Seen::kPlain;
}

}  // namespace

long DoMmap(void* at, size_t bytes, int prot, int flags, int fd, off_t offset) {
  if (!Active()) return Result(L(NextMmap(at, bytes, prot, flags, fd, offset)));
  const bool replaces = (flags & MAP_FIXED) && (flags & MAP_FIXED_NOREPLACE) != MAP_FIXED_NOREPLACE;
  const Span replaced = replaces ? PagesOf(at, bytes) : Span{};
  if (replaced.bytes) {
    g_seen.Remove(replaced);
    ForgetLocked(replaced);
  }
  TakenOut regions(replaced.bytes && Concerns(at, bytes) ? replaced : Span{}, false);
  const long result = Result(L(NextMmap(at, bytes, prot, flags, fd, offset)));
  if (Failed(result)) {
    regions.PutBack();  // a range that is not to be replaced after all is what it was
    return result;
  }
  const Span made = PagesOf(reinterpret_cast<void*>(result), bytes);
  if (Mergeable(flags)) {
    g_seen.Add(made, StateFor(prot));
    if (prot & PROT_WRITE) WakeAuto();
  }
  return result;
}

long DoMunmap(void* at, size_t bytes) {
  if (!Active() || bytes == 0) return Result(NextMunmap(at, bytes));
  g_seen.Remove(PagesOf(at, bytes));
  ForgetLocked(PagesOf(at, bytes));
  if (!Concerns(at, bytes)) return Result(NextMunmap(at, bytes));
  // In a child whose engine sleeps, or is just waking. After it the state is asked for anew.
  ksmushim_forget(at, bytes);
  if (ksmushim_state() == KSMU_SHIM_RUNNING) return Result(ksmu_unmap(at, bytes));
  return Result(NextMunmap(at, bytes));
}

long DoMremap(void* from, size_t bytes, size_t new_bytes, int flags, void* to) {
  const auto plain = [&] { return Result(L(NextMremap(from, bytes, new_bytes, flags, to))); };
  const bool sound = reinterpret_cast<Address>(from) % os::SystemPageSize() == 0 && !(flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP));
  if (!Active() || new_bytes == 0 || !sound) return plain();
  const Span old = PagesOf(from, bytes);
  const size_t rounded = PagesOf(nullptr, new_bytes).bytes;
  const bool placed = flags & MREMAP_FIXED;
  // Before its addresses are given up, and after what is in hand with them: nobody advises them from here on.
  const Seen::State known = bytes ? g_seen.TakeOut(old) : Seen::kRefused;
  const auto keep = [&](long result) {
    if (known != Seen::kUnknown && bytes) g_seen.Add(old, known);
    return result;
  };
  if (placed) {
    g_seen.Remove(PagesOf(to, new_bytes));
    ForgetLocked(PagesOf(to, new_bytes));
  }
  const bool concerns = bytes && Concerns(from, bytes), overwrites = placed && Concerns(to, new_bytes);
  const auto follow = [&](long result) {
    if (Failed(result)) return;
    const auto start = static_cast<Address>(result);
    ForgetLocked(old);
    if (known != Seen::kUnknown && bytes) g_seen.Add({start, rounded}, known);
    if (flags & MREMAP_DONTUNMAP) g_seen.Add(old, Seen::kRefused);
    WakeAuto();
  };
  if (!concerns && !overwrites) {
    const long result = plain();
    if (Failed(result)) return keep(result);
    follow(result);
    return result;
  }
  if (!placed && !(flags & MREMAP_DONTUNMAP) && rounded <= old.bytes) {
    keep(0);
    // It begins in a hole: the kernel's to refuse.
    Piece head;
    Address at = old.start;
    if (!NextPiece(old, &at, &head) || head.start > old.start) return plain();
    // Shrinking in place unmaps the rest, whatever it consists of. Whether there is anything is the kernel's to say.
    if (rounded < old.bytes) {
      const long result = DoMunmap(reinterpret_cast<void*>(old.start + rounded), old.bytes - rounded);
      if (result) return result;
    }
    return Result(L(NextMremap(from, new_bytes, new_bytes, flags, to)));
  }
  const int before = errno;
  TakenOut replaced(overwrites ? PagesOf(to, new_bytes) : Span{}, false);
  TakenOut moved(old, true);
  // What the kernel refuses whatever is there, it refuses itself. And never more than one mapping to it: some kernels move a
  // part and fail (6.17), and what shows frames would grow into the frames' file.
  const auto target = reinterpret_cast<Address>(to);
  const bool possible = (!placed || (target % os::SystemPageSize() == 0 && target + rounded > target && target + rounded <= kTop &&
                                     (target + rounded <= old.start || target >= old.end()))) &&
                        (flags & MREMAP_MAYMOVE || !(flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))) &&
                        (!(flags & MREMAP_DONTUNMAP) || rounded == old.bytes) && old.start + rounded > old.start && rounded <= kTop;
  const Shape shape = possible ? ShapeOf(old) : Shape{};
  const bool several = shape.frames || (shape.uniform && shape.pieces > 1);
  const long result = shape.unknown ? -ENOMEM : several ? MovePieces(old, shape, rounded, flags, target) : plain();
  if (Failed(result)) {
    moved.PutBack();
    replaced.PutBack();
    return keep(result);
  }
  errno = before;
  follow(result);
  const auto start = static_cast<Address>(result);
  // It is several mappings still, and the next call on it is to know: where no engine runs, nobody else takes note of it.
  if (several) ksmushim_note(reinterpret_cast<void*>(start), rounded);
  moved.PutBack(start - old.start, start + rounded);
  if (flags & MREMAP_DONTUNMAP) moved.PutBack();
  return result;
}

long DoMprotect(void* at, size_t bytes, int prot, int key, bool with_key) {
  const auto plain = [&] { return Result(with_key ? NextPkeyMprotect(at, bytes, prot, key) : NextMprotect(at, bytes, prot)); };
  if (!Active() || bytes == 0) return plain();
  long result;
  if (!Concerns(at, bytes)) {
    result = plain();
  } else if (prot & PROT_EXEC) {
    // Code is not merged; and pages of frames are not to be executed.
    TakenOut code(PagesOf(at, bytes), true);
    result = plain();
    if (result) code.PutBack();
  } else {
    // A merge in hand would carry the old protection over.
    const long arguments[6] = {L(at), static_cast<long>(bytes), prot, key, 0, 0};
    if (!ksmushim_call(at, bytes, with_key ? SYS_pkey_mprotect : SYS_mprotect, arguments, &result)) result = plain();
  }
  if (result == 0 && !(prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC))) {
    if (prot & PROT_EXEC) {
      g_seen.Set(PagesOf(at, bytes), Seen::kRefused);
    } else if (prot & PROT_WRITE) {
      g_seen.Set(PagesOf(at, bytes), Seen::kWritable, Seen::kPlain);
      WakeAuto();
    }
  }
  return result;
}

namespace {
// What a lock concerns: it need not begin with a page, and takes the whole of each that it touches.
Span PagesLocked(long start, long bytes) {
  const auto inside = static_cast<Address>(start) % os::SystemPageSize();
  return PagesOf(reinterpret_cast<void*>(static_cast<Address>(start) - inside), static_cast<size_t>(bytes) + inside);
}
}  // namespace

// Locked memory is not to be merged: it gets its own pages back first. It stays known as a region that cannot be merged at
// the moment, and becomes one again when it is unlocked.
long DoLock(long number, long a, long b, long c) {
  const bool all = number == SYS_mlockall;
  const Span span = all ? Span{0, Address{1} << 48} : PagesLocked(a, b);
  const auto plain = [&] { return Direct(number, a, b, c); };
  // MCL_FUTURE alone locks nothing that is there.
  if (!Active() || (all && !(a & MCL_CURRENT)) || (!all && !Concerns(reinterpret_cast<void*>(span.start), span.bytes))) {
    return plain();
  }
  // As far as may be: locked, what shows frames could not leave them later.
  if (ksmushim_state() == KSMU_SHIM_RUNNING) LeaveFrames(span, false);
  TakenOut locked(span, true);
  const long result = plain();
  if (result == 0) locked.ForEach([](Span part, int advice) { NoteLockedAdvice(part, advice); });
  locked.PutBack();
  return result;
}

long DoUnlock(long number, long a, long b) {
  const long result = Direct(number, a, b);
  if (result || !Active() || ksmushim_state() != KSMU_SHIM_RUNNING) return result;
  const bool all = number == SYS_munlockall;
  const Span span = all ? Span{0, Address{1} << 48} : PagesLocked(a, b);
  ReadviseUnlocked(span);
  return result;
}

long DoOnRange(long number, const long* arguments, int first) {
  const auto plain = [&] {
    return Direct(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
  };
  void* const at = reinterpret_cast<void*>(arguments[first]);
  const auto bytes = static_cast<size_t>(arguments[first + 1]);
  if (!Concerns(at, bytes)) return plain();
  LeaveFrames(PagesOf(at, bytes), false);
  TakenOut regions(PagesOf(at, bytes), true);
  const long result = plain();
  regions.PutBack();
  return result;
}

}  // namespace ksmu::preload
