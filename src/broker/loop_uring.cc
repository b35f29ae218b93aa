// Readiness by io_uring: what is armed is told to the kernel once, together with the waiting, in one call a round.
#include <liburing.h>
#include <poll.h>

#include <cerrno>
#include <unordered_map>

#include "broker/loop.h"

namespace ksmu::broker {
namespace {

class UringPoller final : public Poller {
 public:
  ~UringPoller() override {
    if (open_) io_uring_queue_exit(&ring_);
  }

  int Open() {
    const int error = io_uring_queue_init(256, &ring_, IORING_SETUP_CLAMP);
    open_ = error == 0;
    return error;
  }

  void Arm(std::uint64_t key, int fd, short events) override {
    Disarm(key);
    io_uring_sqe* const entry = NextEntry();
    if (!entry) return;
    io_uring_prep_poll_add(entry, fd, static_cast<unsigned short>(events));
    // Each under a number of its own: what comes of an earlier one is not taken for it.
    io_uring_sqe_set_data64(entry, ++last_number_);
    numbers_[key] = last_number_;
    keys_[last_number_] = key;
  }

  // The request holds the file: as long as it is there, the other end does not see that the socket was closed.
  void Disarm(std::uint64_t key) override {
    const auto found = numbers_.find(key);
    if (found == numbers_.end()) return;
    if (io_uring_sqe* const entry = NextEntry()) {
      io_uring_prep_poll_remove(entry, found->second);
      io_uring_sqe_set_data64(entry, 0);
    }
    keys_.erase(found->second);
    numbers_.erase(found);
  }

  int Wait(int timeout_ms, std::vector<Event>* out) override {
    if (error_) return error_;
    io_uring_cqe* first = nullptr;
    __kernel_timespec limit{timeout_ms / 1000, timeout_ms % 1000 * 1'000'000ll};
    const int result = io_uring_submit_and_wait_timeout(&ring_, &first, 1, &limit, nullptr);
    // EAGAIN, EBUSY: no memory for a request now, or completions that have to be taken first; which is what follows.
    if (result < 0 && result != -ETIME && result != -EINTR && result != -EAGAIN && result != -EBUSY) return result;
    unsigned head, seen = 0;
    io_uring_cqe* done;
    io_uring_for_each_cqe(&ring_, head, done) {
      ++seen;
      const auto found = keys_.find(done->user_data);
      if (found == keys_.end()) continue;  // a removal, or what was removed
      const std::uint64_t key = found->second;
      keys_.erase(found);
      numbers_.erase(key);
      // Whatever it could not be polled for is found by whoever reads.
      out->push_back({key, static_cast<short>(done->res < 0 ? POLLERR : done->res)});
    }
    io_uring_cq_advance(&ring_, seen);
    return 0;
  }

  const char* name() const override { return "io_uring"; }

 private:
  io_uring_sqe* NextEntry() {
    if (io_uring_sqe* const entry = io_uring_get_sqe(&ring_)) return entry;
    const int result = io_uring_submit(&ring_);
    io_uring_sqe* const entry = io_uring_get_sqe(&ring_);
    if (!entry) error_ = result < 0 ? result : -EAGAIN;
    return entry;
  }

  io_uring ring_{};
  bool open_ = false;
  int error_ = 0;  // something could not be armed
  std::uint64_t last_number_ = 0;
  std::unordered_map<std::uint64_t, std::uint64_t> numbers_, keys_;  // key -> number, number -> key
};

}  // namespace

std::unique_ptr<Poller> MakeUringPoller(int* error) {
  auto made = std::make_unique<UringPoller>();
  *error = made->Open();
  if (*error) made.reset();
  return made;
}

}  // namespace ksmu::broker
