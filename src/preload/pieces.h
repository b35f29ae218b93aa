// What a range of the program's consists of. To the program it is a mapping that it made; since parts of it were merged it can
// be several, and those that show frames cannot do all that anonymous memory can: grow, be guarded, be wiped in children.
#pragma once

#include "os/os.h"

namespace ksmu::preload {

using os::Address;
using os::Span;

struct Piece {
  enum Kind { kAnonymous, kFrames, kOther, kUnknown };  // unknown: no descriptor to look with
  Address start = 0, end = 0;
  int prot = 0;
  Kind kind = kOther;
  size_t bytes() const { return end - start; }
};

// The part of the range's next mapping, from *at on; *at goes on behind it. False: nothing more is mapped there.
bool NextPiece(Span span, Address* at, Piece* piece);

// How a range that was one mapping looks when it has been merged: without a hole, private, of one protection, all of it locked
// or nothing. Two system calls and a look-up a piece: to be asked once.
struct Shape {
  size_t pieces = 0;
  bool frames = false;   // some of it shows frames
  bool unknown = false;  // some of it could not be looked at
  bool uniform = false;  // it can have been one private anonymous mapping
  Address start = 0;     // of the first piece
  Piece last;
};
Shape ShapeOf(Span span);

// Empty anonymous memory in place of what shows frames. -errno.
long EmptyFrames(Span span);

// A copy in anonymous memory in place of what shows frames. Only in a process with one thread, as a forked child is at first:
// what another one, or a device, writes meanwhile would be lost. -errno.
long CopyFrames(Span span);

// Nothing of the range shows frames afterwards, and nothing that a device may be writing was replaced: waits for that, if
// `patient`. Where an engine runs, the caller takes the regions out next. False: some of it still does.
bool LeaveFrames(Span span, bool patient);

// As mremap does with one mapping, for a range of several pieces, of this shape. It is no region any more. -errno, or where it is.
long MovePieces(Span from, const Shape& shape, size_t new_bytes, int flags, Address to);

}  // namespace ksmu::preload
