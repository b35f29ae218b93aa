#include "os/child_contexts.h"

#include <unistd.h>

namespace ksmu::os {

Context ChildContexts::Add(int fd) {
  for (unsigned i = 0; i < kCapacity; ++i) {
    Slot& slot = slots_[i];
    std::uint64_t word = slot.word.load();
    if (word & kFdMask) continue;
    std::uint64_t generation = ((word >> kGenerationShift) + 1) % kGenerations;
    slot.born.store(births_.fetch_add(1) + 1);
    std::uint64_t taken = generation << kGenerationShift | static_cast<std::uint64_t>(fd + 1);
    if (!slot.word.compare_exchange_strong(word, taken)) continue;
    return static_cast<Context>(kFirstChild + generation * kCapacity + i);
  }
  return -1;
}

ChildContexts::Slot* ChildContexts::Find(Context child, std::uint64_t* generation) {
  if (child < kFirstChild) return nullptr;
  unsigned number = static_cast<unsigned>(child - kFirstChild);
  *generation = number / kCapacity;
  return &slots_[number % kCapacity];
}

int ChildContexts::Acquire(Context child) {
  std::uint64_t generation;
  Slot* slot = Find(child, &generation);
  if (!slot) return -1;
  std::uint64_t word = slot->word.load();
  do {
    if (!(word & kFdMask) || (word & kClosing) || word >> kGenerationShift != generation) return -1;
  } while (!slot->word.compare_exchange_weak(word, word + kUser));
  return static_cast<int>(word & kFdMask) - 1;
}

// The last one out: nobody can come in while kClosing is set.
void ChildContexts::Drop(Slot* slot, std::uint64_t word) {
  close(static_cast<int>(word & kFdMask) - 1);
  slot->word.store(word >> kGenerationShift << kGenerationShift);
}

void ChildContexts::Release(Context child) {
  std::uint64_t generation;
  Slot* slot = Find(child, &generation);
  std::uint64_t left = slot->word.fetch_sub(kUser) - kUser;
  if ((left & kClosing) && !(left & kUserMask)) Drop(slot, left);
}

void ChildContexts::Close(Context child) {
  std::uint64_t generation;
  Slot* slot = Find(child, &generation);
  if (!slot) return;
  std::uint64_t word = slot->word.load();
  do {
    if (!(word & kFdMask) || (word & kClosing) || word >> kGenerationShift != generation) return;
  } while (!slot->word.compare_exchange_weak(word, word | kClosing));
  if (!(word & kUserMask)) Drop(slot, word | kClosing);
}

bool ChildContexts::EvictOldest() {
  unsigned oldest = kCapacity;
  std::uint64_t birth = ~std::uint64_t{0}, generation = 0;
  for (unsigned i = 0; i < kCapacity; ++i) {
    std::uint64_t word = slots_[i].word.load();
    std::uint64_t born = slots_[i].born.load();
    if (!(word & kFdMask) || (word & kClosing) || born >= birth) continue;
    oldest = i;
    birth = born;
    generation = word >> kGenerationShift;
  }
  if (oldest == kCapacity) return false;
  Close(static_cast<Context>(kFirstChild + generation * kCapacity + oldest));
  return true;
}

void ChildContexts::CloseAll() {
  while (EvictOldest()) {
  }
}

}  // namespace ksmu::os
