// The way from a name to a domain: which socket, and whose broker.
#pragma once

#include <cstddef>

#include "frames/source.h"
#include "os/probe.h"

namespace ksmu::broker {

class Member;

// Trivially destructible: library threads outlive static destructors.
class BrokerDoor final : public frames::Door {
 public:
  static constexpr std::size_t kCandidates = 2;

  // By the path of a socket ("none": no domain at all), by the name of a domain, by both (the name's socket in the path's
  // directory), or by neither: the default domain, if its broker listens. `runtime_directory` is XDG_RUNTIME_DIR, or null;
  // one that is not this user's is none.
  // Null, or what is wrong with them.
  const char* Choose(const char* broker, const char* domain, const char* runtime_directory);
  bool has_choice() const { return paths_[0][0] != 0; }
  // The sockets that are tried, in this order; "" where there is none. Of those that were not asked for, nobody is missed.
  const char* path(std::size_t i) const { return paths_[i]; }
  bool asked_for() const { return asked_for_; }
  bool SameAs(const BrokerDoor& other) const;

  frames::Source* Enter(std::size_t page_bytes, const char** why, bool* soon) override;
  void GiveUp() override;
  void Leave(frames::Source* source) override;
  void Forget(frames::Source* source) override;
  // In a forked child: who has asked to be let in is the parent, and its memory is not here.
  void ForgetParent() { joining_ = nullptr; }

 private:
  static constexpr std::size_t kMaxPath = 256;  // more than a socket's can be
  char paths_[kCandidates][kMaxPath] = {};  // tried in this order
  Member* joining_ = nullptr;  // has asked to be let in
  bool asked_for_ = false;    // whoever is not there is missed
  int last_error_ = 0;        // said already
  os::ErrorText why_;
};

}  // namespace ksmu::broker
