#include "os/io_batch.h"

#include <liburing.h>
#include <linux/falloc.h>
#include <poll.h>

#include <new>

#include "base/own_memory.h"
#include "os/pool_file.h"
#include "os/raw.h"

namespace ksmu::os {

struct IoBatch::Ring {
  io_uring ring;
};

int IoBatch::OpenRing() {
  if (ring_) return 0;
  void* place = base::MapOwnPages(sizeof(Ring));
  if (!place) return -ENOMEM;
  auto* made = new (place) Ring{};
  int error = io_uring_queue_init(kEntries, &made->ring, IORING_SETUP_CLAMP);
  // A forked child would hold the ring open, and with it our files.
  if (error == 0) error = io_uring_ring_dontfork(&made->ring);
  if (error != 0) {
    base::UnmapOwnPages(place, sizeof(Ring));
    return error;
  }
  ring_ = made;
  return 0;
}

void IoBatch::Close() {
  if (!ring_) return;
  io_uring_queue_exit(&ring_->ring);
  base::UnmapOwnPages(ring_, sizeof(Ring));
  ring_ = nullptr;
}

std::size_t IoBatch::RingMappings(Span out[2]) const {
  if (!ring_) return 0;
  const io_uring& ring = ring_->ring;
  out[0] = {reinterpret_cast<Address>(ring.sq.ring_ptr), ring.sq.ring_sz};
  out[1] = {reinterpret_cast<Address>(ring.sq.sqes), ring.sq.ring_entries * sizeof(io_uring_sqe)};
  return 2;
}

template <typename Request, typename Prepare, typename Complete, typename Plain>
std::size_t IoBatch::Run(Request* requests, std::size_t count, Prepare prepare, Complete complete, Plain plain) {
  std::size_t succeeded = 0, next = 0;
  while (ring_ && next < count) {
    io_uring* ring = &ring_->ring;
    std::size_t last = next;
    while (last < count) {
      io_uring_sqe* entry = io_uring_get_sqe(ring);
      if (!entry) break;
      prepare(entry, requests[last]);
      io_uring_sqe_set_data64(entry, last++);
    }
    std::size_t prepared = last - next;
    std::size_t submitted = 0, completed = 0;
    int error = 0;
    while (completed < prepared) {
      int result = io_uring_submit_and_wait(ring, 1);
      if (result > 0) submitted += static_cast<std::size_t>(result);
      if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY) error = result;
      unsigned head, seen = 0;
      io_uring_cqe* done;
      io_uring_for_each_cqe(ring, head, done) {
        succeeded += complete(requests[done->user_data], done->res);
        ++seen;
      }
      io_uring_cq_advance(ring, seen);
      completed += seen;
      // Forbidden in mid-life (a seccomp filter): what was submitted still completes, the rest is done plainly.
      if (error && completed >= submitted) break;
      if (error) poll(nullptr, 0, 1);
    }
    if (error) {
      std::size_t first = next + submitted;
      Close();
      for (std::size_t i = first; i < last; ++i) succeeded += plain(requests[i]);
    }
    next = last;
  }
  for (; next < count; ++next) succeeded += plain(requests[next]);
  return succeeded;
}

std::size_t IoBatch::Punch(Hole* holes, std::size_t count) {
  return Run(
      holes, count,
      [](io_uring_sqe* entry, const Hole& hole) {
        io_uring_prep_fallocate(entry, hole.file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                static_cast<off_t>(hole.offset), static_cast<off_t>(hole.bytes));
      },
      [](Hole& hole, int result) {
        if (result == -EINTR) result = PunchPoolFile(hole.file, hole.offset, hole.bytes);
        hole.error = result;
        return result == 0;
      },
      [](Hole& hole) {
        hole.error = PunchPoolFile(hole.file, hole.offset, hole.bytes);
        return hole.error == 0;
      });
}

std::size_t IoBatch::Write(FrameWrite* writes, std::size_t count) {
  // A short write is finished plainly, which also tells why it was short.
  auto finish = [](FrameWrite& write, std::size_t done) {
    write.result = WritePoolFile(write.file, write.offset + done, write.from + done, write.bytes - done);
    write.result.done += done;
    return write.result.error == 0;
  };
  return Run(
      writes, count,
      [](io_uring_sqe* entry, const FrameWrite& write) {
        io_uring_prep_write(entry, write.file.fd, reinterpret_cast<const void*>(write.from),
                            static_cast<unsigned>(write.bytes), write.offset);
      },
      [&](FrameWrite& write, int result) {
        std::size_t done = result > 0 ? static_cast<std::size_t>(result) : 0;
        if (done == write.bytes) {
          write.result = {0, done};
          return true;
        }
        return finish(write, done);
      },
      [&](FrameWrite& write) { return finish(write, 0); });
}

}  // namespace ksmu::os
