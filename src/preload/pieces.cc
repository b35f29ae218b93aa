#include "preload/pieces.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "api/shim.h"
#include "os/raw.h"
#include "os/thread.h"
#include "preload/next.h"

namespace ksmu::preload {
namespace {

using os::raw::Direct;

long L(Address a) { return static_cast<long>(a); }
void* P(Address a) { return reinterpret_cast<void*>(a); }

long MapAnonymous(Address at, size_t bytes, int prot, int how) {
  return Direct(SYS_mmap, L(at), static_cast<long>(bytes), prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | how, -1, 0);
}
long Unmap(Address at, size_t bytes) { return Direct(SYS_munmap, L(at), static_cast<long>(bytes)); }
long Move(Address from, size_t bytes, size_t new_bytes, int flags, Address to) {
  return Direct(SYS_mremap, L(from), static_cast<long>(bytes), static_cast<long>(new_bytes), flags, L(to));
}

// By the kernel: what cannot be read is an error here, and no signal.
bool Copy(Address from, Address to, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const struct { long base; size_t length; } local{L(from + done), bytes - done}, remote{L(to + done), bytes - done};
    const long copied = Direct(SYS_process_vm_writev, Direct(SYS_getpid), reinterpret_cast<long>(&local), 1, reinterpret_cast<long>(&remote), 1, 0);
    if (copied == -EINTR) continue;
    if (copied <= 0) return false;
    done += static_cast<size_t>(copied);
  }
  return true;
}

// Anything but a process with one thread: the entries of a directory of two links, and one for each.
bool HasThreads() {
  struct stat about;
  return Direct(SYS_newfstatat, AT_FDCWD, reinterpret_cast<long>("/proc/self/task"), reinterpret_cast<long>(&about), 0) != 0 ||
         about.st_nlink != 3;
}

template <typename F>
long ForEachFrames(Span span, F&& f) {
  Piece piece;
  for (Address at = span.start; NextPiece(span, &at, &piece);) {
    if (piece.kind != Piece::kFrames) continue;
    if (const long error = f(piece)) return error;
  }
  return 0;
}

// msync(2): EBUSY where a memory lock exists. Nothing is written.
bool IsLocked(Address at) { return Direct(SYS_msync, L(at), static_cast<long>(os::SystemPageSize()), MS_INVALIDATE) == -EBUSY; }

// What a piece that shows frames gains at its end, where it cannot grow by itself: it would show what else lies in their file.
long AddBehind(const Piece& last, Address at, size_t bytes, int how) {
  const long made = MapAnonymous(at, bytes, last.prot, how | (IsLocked(last.start) ? MAP_LOCKED : 0));
  if (Failed(made)) return made == -EEXIST ? -ENOMEM : made;
  if (made == L(at)) return 0;
  Unmap(static_cast<Address>(made), bytes);  // a kernel that takes the address for a hint
  return -ENOMEM;
}

// In place. What is anonymous grows as the kernel has it, with all its attributes.
long GrowInPlace(const Piece& last, size_t more) {
  if (last.kind == Piece::kFrames) return AddBehind(last, last.end, more, MAP_FIXED_NOREPLACE);
  const long grown = Move(last.start, last.bytes(), last.bytes() + more, 0, 0);
  return Failed(grown) ? grown : 0;
}

}  // namespace

bool NextPiece(Span span, Address* at, Piece* piece) {
  if (*at >= span.end()) return false;
  ksmushim_mapping mapping;
  if (const int error = ksmushim_find_mapping(P(*at), &mapping)) {
    *piece = {*at, span.end(), PROT_NONE, Piece::kUnknown};
    *at = span.end();
    return error != -ENOENT;
  }
  const auto start = reinterpret_cast<Address>(mapping.start), end = reinterpret_cast<Address>(mapping.end);
  if (start >= span.end()) return false;
  piece->start = start > *at ? start : *at;
  piece->end = end < span.end() ? end : span.end();
  piece->prot = mapping.prot;
  piece->kind = mapping.kind == KSMU_SHIM_ANONYMOUS ? Piece::kAnonymous : mapping.kind == KSMU_SHIM_FRAMES ? Piece::kFrames : Piece::kOther;
  *at = piece->end;
  return true;
}

Shape ShapeOf(Span span) {
  Shape shape;
  shape.uniform = true;
  Piece piece;
  bool locked = false;
  Address reached = span.start;
  for (Address at = span.start; NextPiece(span, &at, &piece); reached = piece.end) {
    const bool first = shape.pieces++ == 0, was_locked = locked;
    if (first) shape.start = piece.start;
    locked = IsLocked(piece.start);
    shape.uniform &= piece.start == reached && (piece.kind == Piece::kAnonymous || piece.kind == Piece::kFrames) &&
                     (first || (piece.prot == shape.last.prot && locked == was_locked));
    shape.frames |= piece.kind == Piece::kFrames;
    shape.unknown |= piece.kind == Piece::kUnknown;
    shape.last = piece;
  }
  shape.uniform &= reached == span.end();
  return shape;
}

long EmptyFrames(Span span) {
  return ForEachFrames(span, [](const Piece& piece) {
    const long made = MapAnonymous(piece.start, piece.bytes(), piece.prot, MAP_FIXED);
    return Failed(made) ? made : 0L;
  });
}

long CopyFrames(Span span) {
  if (HasThreads()) return -EAGAIN;
  return ForEachFrames(span, [](const Piece& piece) {
    const long copy = MapAnonymous(0, piece.bytes(), PROT_READ | PROT_WRITE, 0);
    if (Failed(copy)) return copy;
    const auto made = static_cast<Address>(copy);
    const auto protect = [](Address at, size_t bytes, int prot) { return Direct(SYS_mprotect, L(at), static_cast<long>(bytes), prot); };
    const bool readable = piece.prot & PROT_READ;
    long error = readable ? 0 : protect(piece.start, piece.bytes(), piece.prot | PROT_READ);
    if (!error && !Copy(piece.start, made, piece.bytes())) error = -ENOMEM;
    if (!error) error = protect(made, piece.bytes(), piece.prot);
    if (!error) {
      const long moved = Move(made, piece.bytes(), piece.bytes(), MREMAP_MAYMOVE | MREMAP_FIXED, piece.start);
      error = Failed(moved) ? moved : 0;
    }
    if (error) {
      Unmap(made, piece.bytes());
      if (!readable) protect(piece.start, piece.bytes(), piece.prot);
    }
    return error;
  });
}

bool LeaveFrames(Span span, bool patient) {
  if (ksmushim_state() != KSMU_SHIM_RUNNING) return CopyFrames(span) == 0;
  // Pages that were written lately may be about to be written by a device, too. Bounded: what is written all the time is
  // never left alone.
  constexpr int64_t kPauseMs = 10, kLongerMs = 5000;
  int64_t seconds = 0;
  ksmu_get("remerge_seconds", &seconds);
  for (int64_t left = patient ? seconds * 1000 + kLongerMs : 0;; left -= kPauseMs) {
    const int kept = ksmushim_hand_over(P(span.start), span.bytes);
    if (kept != -EAGAIN || left <= 0) return kept == 0;
    const timespec pause{0, kPauseMs * 1000000};
    Direct(SYS_nanosleep, reinterpret_cast<long>(&pause), 0);
  }
}

long MovePieces(Span from, const Shape& shape, size_t new_bytes, int flags, Address to) {
  const bool moves = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP), stays = flags & MREMAP_DONTUNMAP;
  // To the program several mappings, or holes: what the kernel says of that, which is nothing good where it changes size, or
  // begins with a hole.
  if (shape.pieces == 0 || shape.start != from.start || (!shape.uniform && new_bytes != from.bytes)) return -EFAULT;
  const size_t kept = new_bytes < from.bytes ? new_bytes : from.bytes;
  const size_t more = new_bytes - kept;
  if (kept < from.bytes) {
    if (const long error = Unmap(from.start + kept, from.bytes - kept)) return error;
  }
  if (!moves) {
    if (!more) return L(from.start);
    const long error = GrowInPlace(shape.last, more);
    if (!error || !(flags & MREMAP_MAYMOVE)) return error ? error : L(from.start);
  }
  const long place = MapAnonymous(to, new_bytes, PROT_NONE, flags & MREMAP_FIXED ? MAP_FIXED : 0);
  if (Failed(place)) return place;
  const auto target = static_cast<Address>(place);
  // What is moved leaves its place mapped until all of it is moved: should one be refused, nobody else can have taken the place
  // that it goes back to. Not the last, after which nothing can be refused; nor what is locked, since the kernel unlocks all of a
  // mapping of which a part leaves so. Holes are holes where it goes to, too: up to `done` lies what has been moved.
  const auto leaves = [&](const Piece& piece, Address end) {
    return stays || (piece.end != end && piece.kind != Piece::kOther && !IsLocked(piece.start));
  };
  size_t done = 0, last = kept;
  long error = 0;
  Piece piece;
  for (Address next = from.start; !error && NextPiece({from.start, kept}, &next, &piece);) {
    const size_t offset = piece.start - from.start;
    if (offset > done) Unmap(target + done, offset - done);
    size_t grown = 0;
    if (piece.end == from.start + kept) {
      last = offset;
      if (piece.kind != Piece::kFrames) grown = more;
      else if (more) error = AddBehind(piece, target + kept, more, MAP_FIXED);
    }
    if (error) break;
    const int how = MREMAP_MAYMOVE | MREMAP_FIXED | (leaves(piece, from.start + kept) ? MREMAP_DONTUNMAP : 0);
    const long moved = Move(piece.start, piece.bytes(), piece.bytes() + grown, how, target + offset);
    if (Failed(moved)) error = moved;
    else done = offset + piece.bytes();
  }
  if (!error && done < kept) Unmap(target + done, kept - done);
  // What stays behind is empty.
  if (!error && stays) error = EmptyFrames({from.start, kept});
  if (!error && !stays) {
    for (Address next = target; NextPiece({target, last}, &next, &piece);) {
      if (leaves(piece, 0)) Unmap(from.start + (piece.start - target), piece.bytes());
    }
  }
  if (!error) return place;
  // First what nothing has come to: that gives mappings back. What cannot go back is kept where it is.
  if (done < new_bytes) Unmap(target + done, new_bytes - done);
  for (Address next = target; NextPiece({target, done}, &next, &piece);) {
    Move(piece.start, piece.bytes(), piece.bytes(), MREMAP_MAYMOVE | MREMAP_FIXED, from.start + (piece.start - target));
  }
  return error;
}

}  // namespace ksmu::preload
