// The private anonymous mappings that the shim saw being made, and what is to become of each. Memory that something else
// maps (libc's heap and stacks, by calls inside libc) is not in here: whoever maps it unmaps it unseen.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "os/os.h"
#include "preload/lock.h"

namespace ksmu::preload {

using os::Address;
using os::Span;

class Seen {
 public:
  enum State : std::uint8_t {
    kPlain,     // not writable so far
    kWritable,  // can be merged, if anybody asks for it
    kAdvising,  // being advised by the shim's thread: nobody may unmap it just now
    kAdvised,
    kUnknown,   // not in here
    kRefused,   // the program has said no (MADV_UNMERGEABLE), or it holds stacks or code
  };
  struct Range {
    Address start, end;
    std::uint64_t since;  // nanoseconds, CLOCK_MONOTONIC, of the last change
    State state;
  };

  // A new mapping, in place of whatever was known of its addresses.
  void Add(Span span, State state);
  // Its addresses are given up, or change hands. Waits for what is being advised.
  void Remove(Span span);
  // Gives what is known in the span another state; with `only` nothing but ranges in that state. Waits likewise.
  void Set(Span span, State state, int only = -1);
  // As Remove, and what was known: kRefused where the parts differ.
  State TakeOut(Span span);

  // The next range of at least `least` bytes to be advised, writable since `before`; it is kAdvising then. False: none;
  // *waiting says whether there will be one.
  bool Take(std::size_t least, std::uint64_t before, Span* out, bool* waiting);
  void Done(Span span, State state);
  // In a forked child. What another thread was in the middle of changing is forgotten, all of it: nothing of it is merged
  // automatically here. And the thread that was advising is not here.
  void ResetInChild() {
    if (lock_.ResetInChild()) count_ = 0;
    Done({0, ~Address{0} & ~Address{0xfff}}, kWritable);
  }
  // Calls each(span) for the ranges in this state, one after the other, without the lock.
  template <typename F>
  void ForEach(State state, F&& each) {
    Address at = 0;
    for (Span span; NextIn(state, at, &span); at = span.end()) each(span);
  }

  static std::uint64_t Now();

 private:
  static constexpr std::size_t kCapacity = 65536;
  bool NextIn(State state, Address at, Span* out);
  std::size_t LowerBound(Address a) const;  // the first that ends above `a`
  bool Erase(Span span);                    // false: no room for the two halves
  void Insert(const Range& range);
  void AwaitAdvice(Span span, std::uint64_t* mask);
  bool Ready();

  Lock lock_;
  std::atomic<std::uint32_t> advices_{0};  // changes when one ends
  Range* ranges_ = nullptr;                // sorted, disjoint; inherited over fork
  std::size_t count_ = 0;
};
extern Seen g_seen;

}  // namespace ksmu::preload
