// The contexts of forked children, which the kernel hands out with fork events.
//
// Two threads use them at once, and a descriptor number that is closed under a call in progress could come to name
// another child's context: so each user counts itself in, and the last one out closes. No locks: a word for each slot.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "os/os.h"

namespace ksmu::os {

class ChildContexts {
 public:
  static constexpr unsigned kCapacity = 1024;

  // Takes over the descriptor; returns its handle, or -1 when the table is full (the descriptor is left alone).
  Context Add(int fd);
  // The descriptor, held until Release; -1: no such child any more.
  int Acquire(Context child);
  void Release(Context child);
  void Close(Context child);
  // Closes the oldest, to make room: its handle is dead from now on. False: there is none.
  bool EvictOldest();
  void CloseAll();

 private:
  // fd + 1 (24 bits; 0: free), users (7 bits), closing (1 bit), generation (32 bits).
  struct Slot {
    std::atomic<std::uint64_t> word{0};
    std::atomic<std::uint64_t> born{0};
  };
  static constexpr std::uint64_t kFdMask = (1u << 24) - 1;
  static constexpr std::uint64_t kUser = 1u << 24;
  static constexpr std::uint64_t kUserMask = 0x7full << 24;
  static constexpr std::uint64_t kClosing = 1ull << 31;
  static constexpr unsigned kGenerationShift = 32;
  // Handles carry the low bits of the generation: a handle that has been closed names nobody else for a long time.
  static constexpr unsigned kGenerations = 1u << 20;

  Slot* Find(Context child, std::uint64_t* generation);
  static void Drop(Slot* slot, std::uint64_t word);

  Slot slots_[kCapacity];
  std::atomic<std::uint64_t> births_{0};
};

}  // namespace ksmu::os
