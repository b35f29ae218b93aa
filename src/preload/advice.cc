// madvise and its kin. On memory that is merged the kernel answers some advice as it does for a file; what anonymous memory
// would have answered is what the program gets.
#include <sys/mman.h>
#include <sys/uio.h>

#include <cerrno>

#include "api/shim.h"
#include "base/own_memory.h"
#include "os/thread.h"
#include "preload/auto.h"
#include "preload/config.h"
#include "preload/memory.h"
#include "preload/next.h"
#include "preload/own_pidfd.h"
#include "preload/pieces.h"
#include "preload/program.h"
#include "preload/regions.h"
#include "preload/seen.h"

namespace ksmu::preload {
namespace {

using os::raw::Direct;

// Headers older than the kernel.
constexpr int kMadvCollapse = 25, kMadvDontneedLocked = 24, kMadvGuardInstall = 102, kMadvGuardRemove = 103;

long Kernel(void* at, size_t bytes, int advice) {
  const int saved = errno;
  const long result = NextMadvise(at, bytes, advice) == 0 ? 0 : -errno;
  errno = saved;
  return result;
}

long Mergeable(void* at, size_t bytes) {
  // Where the library cannot work, the kernel's own KSM gets the advice, as without the shim.
  if (StartEngine() != 0) return Kernel(at, bytes, MADV_MERGEABLE);
  // A forked child that advises is in a place where threads may be started: its counters are to be written as well.
  StartAuto();
  const int advice = KSMU_MERGEABLE | (g_config.promise ? KSMU_F_NO_RAW_DISCARDS : 0);
  const int error = Advise(PagesOf(at, bytes), advice);
  g_seen.Set(PagesOf(at, bytes), Seen::kAdvised);
  switch (-error) {
    case 0: return 0;
    case EOPNOTSUPP:  // the kernel passes over what cannot be merged, and so do we; not over holes
    case EBUSY: return Direct(SYS_msync, reinterpret_cast<long>(at), static_cast<long>(bytes), MS_ASYNC) == -ENOMEM ? -ENOMEM : 0;
    case EINVAL:
    case ENOMEM: return error;
    default: return Kernel(at, bytes, MADV_MERGEABLE);
  }
}

long Unmergeable(void* at, size_t bytes) {
  g_seen.Set(PagesOf(at, bytes), Seen::kRefused);
  ForgetLocked(PagesOf(at, bytes));
  // The kernel's as well: it may have been told before the library could work, and knows about bad ranges.
  const long result = Kernel(at, bytes, MADV_UNMERGEABLE);
  if (result == -EINVAL || !Concerns(at, bytes)) return result;
  ksmushim_forget(at, bytes);
  if (ksmushim_state() != KSMU_SHIM_RUNNING) return result;
  const int error = Advise(PagesOf(at, bytes), KSMU_UNMERGEABLE);
  return error == -ENOMEM || error == -EAGAIN ? error : result;
}

// Piece by piece, as the kernel goes: until one is refused; holes are passed over, and make it ENOMEM in the end.
template <typename F>
long ForEachPiece(void* at, size_t bytes, F&& f) {
  const Span span = PagesOf(at, bytes);
  Address reached = span.start;
  bool holes = false;
  Piece piece;
  for (Address next = span.start; NextPiece(span, &next, &piece); reached = piece.end) {
    if (piece.kind == Piece::kUnknown) return -ENOMEM;
    holes |= piece.start > reached;
    if (const long error = f(piece, reinterpret_cast<void*>(piece.start))) return error;
  }
  return holes || reached < span.end() ? -ENOMEM : 0;
}

// A discard. A raw one is exact while an engine is there; in a child whose engine sleeps, and where a promise was made that
// there would be none, the library does it.
long Discard(void* at, size_t bytes, int advice) {
  const bool raw = ksmushim_state() == KSMU_SHIM_RUNNING && ksmushim_raw_discards_are_exact();
  if (raw) {
    const long result = Kernel(at, bytes, advice);
    if (result != -EINVAL || advice != MADV_FREE) return result;
  } else if (advice == MADV_DONTNEED) {
    return ksmushim_discard(at, bytes);
  } else if (advice == kMadvDontneedLocked) {
    // Refused only where it is locked: nothing is merged there.
    return ForEachPiece(at, bytes, [&](const Piece& piece, void* start) {
      const long result = ksmushim_discard(start, piece.bytes());
      return result == -EINVAL ? Kernel(start, piece.bytes(), advice) : result;
    });
  }
  // Pages of frames cannot be freed lazily: they are discarded now. What is not ours is the kernel's, which frees no file's
  // memory, and goes no further.
  return ForEachPiece(at, bytes, [&](const Piece& piece, void* start) {
    const bool ours = piece.kind == Piece::kFrames || (piece.kind == Piece::kAnonymous && !raw);
    const long result = ours ? 0 : Kernel(start, piece.bytes(), advice);
    // Refused to anonymous memory: merged since it was looked at; or locked, and then refused again.
    const bool merged = result == -EINVAL && piece.kind == Piece::kAnonymous;
    return ours || merged ? ksmushim_discard(start, piece.bytes()) : result;
  });
}

// What is guarded is discarded: so what still shows frames, having been written since, need not be kept. Not what is locked, which
// the kernel does not guard, nor what lies behind that: it goes no further.
long GuardInstall(void* at, size_t bytes) {
  return ForEachPiece(at, bytes, [](const Piece& piece, void* start) {
    long result = 0;
    if (piece.kind == Piece::kFrames) {
      result = Kernel(start, piece.bytes(), MADV_DONTNEED);
      const Span place{piece.start, piece.bytes()};
      // Best by the engine: what the program has set for its memory (DONTFORK ...) stays.
      if (result == 0 && ksmushim_state() == KSMU_SHIM_RUNNING) LeaveFrames(place, false);
      if (result == 0 && ShapeOf(place).frames) result = EmptyFrames(place);
    }
    return result == 0 ? Kernel(start, piece.bytes(), kMadvGuardInstall) : result;
  });
}

// What lies before the first of our memory is the kernel's to answer for; that answers as private anonymous memory does.
long Remove(void* at, size_t bytes) {
  const Span span = PagesOf(at, bytes);
  Piece piece;
  for (Address next = span.start; NextPiece(span, &next, &piece);) {
    if (piece.kind == Piece::kOther) continue;
    if (piece.start > span.start) {
      // A hole does not keep the kernel from going on.
      const long result = Kernel(at, piece.start - span.start, MADV_REMOVE);
      if (result && result != -ENOMEM) return result;
    }
    return -EINVAL;
  }
  return Kernel(at, bytes, MADV_REMOVE);
}

}  // namespace

long DoMadvise(void* at, size_t bytes, int advice) {
  const auto address = reinterpret_cast<Address>(at);
  // What the kernel refuses whatever is there, it refuses itself.
  const size_t rounded = PagesOf(at, bytes).bytes;
  const bool sound = address % os::SystemPageSize() == 0 && rounded != 0 && address + rounded > address;
  if (!Active() || !sound) return Kernel(at, bytes, advice);
  if (advice == MADV_MERGEABLE) return Mergeable(at, bytes);
  if (advice == MADV_UNMERGEABLE) return Unmergeable(at, bytes);
  if (!Concerns(at, bytes)) return Kernel(at, bytes, advice);
  switch (advice) {
    case MADV_DONTNEED:
    case MADV_FREE:
    case kMadvDontneedLocked:
      return Discard(at, bytes, advice);
    case MADV_REMOVE:
      return Remove(at, bytes);
    case MADV_WIPEONFORK:
    case kMadvCollapse:
    case kMadvGuardRemove: {
      // Not for frames' mappings, and not while every page is watched: plain memory meanwhile.
      LeaveFrames(PagesOf(at, bytes), advice == MADV_WIPEONFORK);
      TakenOut regions(PagesOf(at, bytes), true);
      // What could not be taken just then has its copies in the frames' mapping: once more.
      if (advice == MADV_WIPEONFORK && ShapeOf(PagesOf(at, bytes)).frames) LeaveFrames(PagesOf(at, bytes), true);
      const long result = Kernel(at, bytes, advice);
      regions.PutBack();
      return result;
    }
    case kMadvGuardInstall: {
      // Never on a merged page (it does not return); a guarded range is not merged from now on.
      TakenOut regions(PagesOf(at, bytes), true);
      const long result = GuardInstall(at, bytes);
      if (result) regions.PutBack();
      else g_seen.Set(PagesOf(at, bytes), Seen::kRefused);
      return result;
    }
    case MADV_DONTFORK:
    case MADV_DOFORK:
    case MADV_DONTDUMP:
    case MADV_DODUMP:
    case MADV_HUGEPAGE:
    case MADV_NOHUGEPAGE:
    case MADV_KEEPONFORK: {
      // A merge in hand would carry the old attribute over.
      const long arguments[6] = {static_cast<long>(address), static_cast<long>(bytes), advice, 0, 0, 0};
      long result;
      if (ksmushim_call(at, bytes, SYS_madvise, arguments, &result)) return result;
      return Kernel(at, bytes, advice);
    }
    default:
      return Kernel(at, bytes, advice);
  }
}

long DoProcessMadvise(int pidfd, const void* vectors, size_t count, int advice, unsigned flags) {
  const auto kernel = [&] {
    return Direct(SYS_process_madvise, pidfd, reinterpret_cast<long>(vectors), static_cast<long>(count), advice, static_cast<long>(flags));
  };
  constexpr size_t kMost = 1024, kMostBytes = 0x7ffff000;  // UIO_MAXIOV, MAX_RW_COUNT
  if (!Active() || flags || count > kMost || !IsOwnPidfd(pidfd)) return kernel();
  // A kernel that does not take this advice for a process's own memory either says so, for nothing at all.
  const iovec nothing{nullptr, 0};
  if (Direct(SYS_process_madvise, pidfd, reinterpret_cast<long>(&nothing), 0, advice, 0) < 0) return kernel();
  // All of them first, as the kernel does.
  const size_t bytes = count * sizeof(iovec);
  auto* const parts = static_cast<iovec*>(bytes ? base::MapOwnPages(bytes) : nullptr);
  if (!parts) return bytes ? -ENOMEM : 0;
  long done = 0, result = ReadProgram(vectors, parts, bytes) ? 0 : -EFAULT;
  for (size_t i = 0; i < count && !result; ++i) {
    if (static_cast<ssize_t>(parts[i].iov_len) < 0) result = -EINVAL;
  }
  for (size_t i = 0, left = kMostBytes; i < count && result >= 0; ++i) {
    const size_t length = parts[i].iov_len < left ? parts[i].iov_len : left;
    left -= length;
    result = DoMadvise(parts[i].iov_base, length, advice);
    if (result >= 0) done += static_cast<long>(length);
  }
  base::UnmapOwnPages(parts, bytes);
  return done || result >= 0 ? done : result;
}

}  // namespace ksmu::preload
