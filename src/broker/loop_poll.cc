// Readiness by poll(2): everywhere, at a cost that grows with the number of members.
#include <poll.h>

#include <cerrno>
#include <unordered_map>

#include "broker/loop.h"

namespace ksmu::broker {
namespace {

class PollPoller final : public Poller {
 public:
  void Arm(std::uint64_t key, int fd, short events) override {
    const auto [at, is_new] = places_.try_emplace(key, entries_.size());
    if (is_new) {
      entries_.emplace_back();
      keys_.push_back(key);
    }
    entries_[at->second] = {fd, events, 0};
  }

  void Disarm(std::uint64_t key) override {
    const auto found = places_.find(key);
    if (found == places_.end()) return;
    const std::size_t at = found->second;
    places_.erase(found);
    if (at + 1 != entries_.size()) {
      entries_[at] = entries_.back();
      keys_[at] = keys_.back();
      places_[keys_[at]] = at;
    }
    entries_.pop_back();
    keys_.pop_back();
  }

  int Wait(int timeout_ms, std::vector<Event>* out) override {
    const int ready = poll(entries_.data(), entries_.size(), timeout_ms);
    if (ready < 0) return errno == EINTR || errno == EAGAIN ? 0 : -errno;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (!entries_[i].revents) continue;
      out->push_back({keys_[i], entries_[i].revents});
      // A negative one is passed over; without it, a hang-up would be reported whether it is asked for or not.
      entries_[i].fd = -1;
      entries_[i].revents = 0;
    }
    return 0;
  }

  const char* name() const override { return "poll"; }

 private:
  std::vector<pollfd> entries_;
  std::vector<std::uint64_t> keys_;
  std::unordered_map<std::uint64_t, std::size_t> places_;
};

}  // namespace

std::unique_ptr<Poller> MakePollPoller() { return std::make_unique<PollPoller>(); }

}  // namespace ksmu::broker
