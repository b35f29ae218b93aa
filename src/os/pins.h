// Whether anything in the process can hold a pin on its memory (DMA by a device, a registered buffer, direct I/O).
//
// A page that was broken cannot be asked whether it is pinned: UFFDIO_MOVE refuses pages of a private file mapping, and
// no other call tells. So the question is turned round: pins are taken through descriptors, and every descriptor of
// the program has to be of a kind that is known to hold none beyond a single request, or (buffered files, pipes, sockets) none
// at all. A request that outlives the descriptors and rings that it was made through is not seen.
#pragma once

#include "os/os.h"
#include "os/process.h"

namespace ksmu::os {

struct PinPolicy {
  // io_uring: fdinfo shows registered buffers, but neither provided-buffer rings, nor rings set up in memory of the
  // program's (IORING_SETUP_NO_MMAP), nor user-provided regions; each of these pins for the life of the ring (6.18).
  // False: a ring counts as holding pins, whatever fdinfo shows. True: one that shows no registered buffers does not.
  bool trust_ring_without_buffers = false;
};

// What can be. Looks afresh at each call: descriptor tables of all threads but our own, and the mappings, which
// keep a file alive whose descriptor has been closed. `own_rings` are mappings of rings of the library's own.
Pins PossiblePins(const OwnThreads& own, const PinPolicy& policy, const Span* own_rings, std::size_t own_ring_count);

// Whether a request may be under way whose pages are not pinned, but only referred to: UFFDIO_MOVE takes those, and what is read
// arrives in a page that is nobody's any more. NFS with O_DIRECT, 9p, and with O_DIRECT file systems that are not known.
bool PossibleReferences(const OwnThreads& own);

}  // namespace ksmu::os
