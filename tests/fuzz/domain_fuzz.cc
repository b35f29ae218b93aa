// A domain under any sequence of what members can do to it, as a server would hand it on: beside it a model of who holds what.
//
// The properties: no frame is punched that somebody holds, no place written that somebody may still map; what is granted has the
// bytes that were asked for, and is refused only with a reason; what the index and the log say is what was published; and when
// all have gone, nothing is left.
//
// An input is (member, operation) pairs: three bits and five of a byte, then what the operation needs. It is built with small
// files and a small index (tests/broker_fuzz_test.py): an input fills them, and they are as many branches as large ones.

#include "broker/domain.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

#include "check.h"

namespace ksmu::broker {
namespace {

using fuzz::Input;
using wire::SettleEntry;

constexpr std::size_t kPage = 64;
constexpr std::uint64_t kSeed = 5;
constexpr std::size_t kSlots = 8;
constexpr std::size_t kMostFiles = 3;
using Content = std::uint16_t;
using PageBytes = std::array<std::byte, kPage>;

PageBytes PageOf(Content content) {
  PageBytes page;
  for (std::size_t i = 0; i < kPage; ++i) page[i] = static_cast<std::byte>((content >> (i % 2 * 8)) ^ (i * 7));
  return page;
}
// One content in eight shares its hash with many others: more than a domain takes of one hash.
std::uint32_t HashOf(Content content) {
  return (content % 8 == 0 ? content / 8 % 3 : content * 2654435761u) + static_cast<std::uint32_t>(kSeed);
}
std::uint64_t WholeHashOf(Content content) { return std::uint64_t{HashOf(content)} << 32 | content; }
std::uint64_t HashOfPage(const std::byte* page, std::size_t bytes, std::uint64_t seed) {
  FUZZ_CHECK(bytes == kPage && seed == kSeed, "a page is hashed, with the domain's seed");
  const auto content = static_cast<Content>(std::to_integer<unsigned>(page[0]) | (std::to_integer<unsigned>(page[1]) ^ 7) << 8);
  const PageBytes whole = PageOf(content);
  FUZZ_CHECK(std::equal(whole.begin(), whole.end(), page), "what is hashed is what was copied");
  return WholeHashOf(content);
}

// --- the model -----------------------------------------------------------------------------------------------------

struct Place {
  Content content = 0;
  int holders = 0, covers = 0;
};
struct Slot {
  enum State { kNone, kHere, kLeft, kGoing } state = kNone;  // going: given up in part
  std::uint16_t number = 0;
  std::uint64_t life = 0;  // of all lives of all slots: tells this one from an earlier of the same number
  std::set<Frame> held, covered;
  std::size_t had = 0;  // when it began to go
};

class Model : public Domain::Files {
 public:
  // --- what the domain asks for ---
  int Add() override {
    if (add_fails || files == kMostFiles) return -ENOSPC;
    ++files;
    return 0;
  }
  int Write(Frame frame, const std::byte* page) override {
    FUZZ_CHECK(frame / Domain::kFramesPerFile < files, "a frame lies in a file");
    FUZZ_CHECK(!places.contains(frame), "no place is written that somebody holds or covers");
    FUZZ_CHECK(!live.contains(frame), "no live frame is written");
    FUZZ_CHECK(settling, "frames are written while somebody publishes");
    PageBytes& bytes = memory[frame];
    if (write_fails) {
      // Half of it got there.
      bytes.fill(std::byte{0xee});
      return -ENOSPC;
    }
    std::copy(page, page + kPage, bytes.begin());
    live.insert(frame);
    written.push_back(frame);
    last_hash[frame] = HashOf(ContentAt(frame));
    return 0;
  }
  int Punch(Frame first, std::size_t count) override {
    FUZZ_CHECK(count > 0 && first / Domain::kFramesPerFile == (first + count - 1) / Domain::kFramesPerFile, "within one file");
    for (Frame frame = first; frame < first + count; ++frame) {
      FUZZ_CHECK(live.erase(frame) == 1, "only what is live is punched, and once");
      const auto place = places.find(frame);
      FUZZ_CHECK(place == places.end() || place->second.holders == 0, "no frame is punched that somebody holds");
      reader->Lookup(HashOf(ContentAt(frame)), [&](Frame found) {
        FUZZ_CHECK(found != frame, "nobody finds a frame that is punched");
        return true;
      });
      std::erase(by_hash[HashOf(ContentAt(frame))], frame);
      if (!punch_fails) memory.erase(frame);
    }
    return punch_fails ? -EIO : 0;
  }
  bool Holds(Frame frame, const std::byte* page) override {
    FUZZ_CHECK(live.contains(frame), "only live frames are looked at");
    return std::memcmp(memory.at(frame).data(), page, kPage) == 0;
  }

  // --- what the members have ---
  void Grant(Slot& slot, Frame frame) {
    Place& place = places[frame];
    if (slot.held.insert(frame).second) ++place.holders;
    if (slot.covered.erase(frame)) --place.covers;
  }
  void Drop(Slot& slot, Frame frame) {
    Place& place = places.at(frame);
    slot.held.erase(frame), --place.holders;
    slot.covered.insert(frame), ++place.covers;
  }
  void LetGo(Slot& slot, Frame frame) {
    Place& place = places.at(frame);
    if (slot.held.erase(frame)) --place.holders;
    if (slot.covered.erase(frame)) --place.covers;
    if (place.holders + place.covers == 0) places.erase(frame);
  }
  Content ContentAt(Frame frame) const {
    const PageBytes& bytes = memory.at(frame);
    return static_cast<Content>(std::to_integer<unsigned>(bytes[0]) | (std::to_integer<unsigned>(bytes[1]) ^ 7) << 8);
  }

  const IndexReader* reader = nullptr;
  std::size_t files = 0;
  bool add_fails = false, write_fails = false, punch_fails = false, settling = false;
  std::map<Frame, Place> places;
  std::set<Frame> live;
  std::unordered_map<Frame, PageBytes> memory;
  std::unordered_map<std::uint32_t, std::vector<Frame>> by_hash;  // live frames
  std::unordered_map<Frame, std::uint32_t> last_hash;             // of live frames, and of others in their time
  std::vector<Frame> written;  // in order, by the call under way
};

struct Offered {
  std::size_t slot;
  std::uint64_t life;
};

// The index's memory is mapped once: an input writes few pages of it.
std::byte* IndexMemory() {
  static auto* const memory = static_cast<std::byte*>(
      mmap(nullptr, kIndexFileBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  FUZZ_CHECK(memory != MAP_FAILED, "memory for an index");
  return memory;
}
int PunchIndex(void*, std::size_t offset, std::size_t bytes) { return madvise(IndexMemory() + offset, bytes, MADV_DONTNEED); }

class Run {
 public:
  Run() { model_.reader = &reader_; }
  ~Run() { PunchIndex(nullptr, 0, 2 * std::max(index_.table_bytes(), kSmallestTable)); }

  void All(Input& input) {
    for (unsigned step = 1; !input.Done(); ++step) {
      Step(input);
      CheckCounts();
      if (step % 32 == 0) CheckAll();
    }
    CheckAll();
    for (Slot& slot : slots_) {
      if (slot.state == Slot::kNone) continue;
      Gone(slot, kAll);
      CheckCounts();
    }
    FUZZ_CHECK(domain_.frames_live() == 0 && domain_.members() == 0 && index_.size() == 0, "when all are gone nothing is live");
    FUZZ_CHECK(domain_.frames_given_out() == 0, "when all are gone every place is free");
    FUZZ_CHECK(model_.live.empty() && model_.places.empty(), "when all are gone all is punched");
  }

 private:
  void Step(Input& input) {
    const std::uint8_t byte = input.Byte();
    Slot& slot = slots_[byte >> 5];
    const unsigned what = byte & 31;
    if (what == 30) {
      const std::uint8_t failing = input.Byte();
      model_.add_fails = failing & 1, model_.write_fails = failing & 2, model_.punch_fails = failing & 4;
      most_ = failing & 8 ? domain_.frames_live() + (failing >> 4) : wire::kFrameLimit;
      domain_.LimitTo(most_);
      return;
    }
    if (slot.state == Slot::kNone) Join(slot);
    if (slot.state != Slot::kHere || what == 31) {
      // All that is left for it to do: at once, or a part.
      if (what >= 24) Gone(slot, what == 31 ? 1 : kAll);
      return;
    }
    if (what < 6) return SettleSome(slot, input);
    if (what < 12) return SettleRun(slot, input, what < 9 ? SettleEntry::kPublish : SettleEntry::kReplica);
    if (what < 15) return LetGoSome(slot, input, what == 12);
    if (what < 19) return LetGoRun(slot, input, what < 17);
    if (what < 22) return Offer(slot, input);
    if (what < 26) return AcquireRun(slot, input);
    if (what < 28) return Leave(slot);
    Gone(slot, kAll);
  }

  // --- coming and going ---
  void Join(Slot& slot) {
    slot.number = domain_.Join();
    FUZZ_CHECK(slot.number < Domain::kMaxMembers, "there is room for a member");
    for (const Slot& other : slots_) {
      FUZZ_CHECK(other.state == Slot::kNone || other.number != slot.number, "a number belongs to one member");
    }
    slot.state = Slot::kHere;
    slot.life = ++lives_;
  }
  void Leave(Slot& slot) {
    domain_.Leave(slot.number);
    slot.state = Slot::kLeft;
  }
  void Gone(Slot& slot, std::size_t blocks) {
    if (slot.state != Slot::kGoing) slot.had = slot.held.size() + slot.covered.size();
    for (const auto* frames : {&slot.held, &slot.covered}) {
      const std::set<Frame> all = *frames;
      for (Frame frame : all) model_.LetGo(slot, frame);
    }
    slot.state = Slot::kGoing;
    const bool all = domain_.Gone(slot.number, blocks);
    FUZZ_CHECK(all || blocks != kAll, "all at once is all");
    if (all) slot.state = Slot::kNone;
  }
  bool AnyIsGoing() const {
    return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.state == Slot::kGoing; });
  }

  // --- asking for frames ---
  void SettleSome(Slot& slot, Input& input) {
    std::vector<SettleEntry> entries;
    const unsigned count = 1 + input.Byte() % 16;
    for (unsigned i = 0; i < count && !input.Done(); ++i) {
      const std::uint8_t how = input.Byte();
      if (how & 1) {
        entries.push_back(AcquireOf(slot, input, how));
        continue;
      }
      const Content content = Contents(input, how & 2);
      const std::uint32_t place = how >> 4 & 7;  // some share a place, which then holds the last one's page
      ring_[place] = content;
      entries.push_back({how & 4 ? SettleEntry::kReplica : SettleEntry::kPublish, 0, place, 0});
      // One in sixteen lies, if it can.
      lies_.push_back(how >> 4 == 15 && how & 8);
    }
    std::size_t lie = 0;
    for (SettleEntry& entry : entries) {
      if (entry.what == SettleEntry::kAcquire) continue;
      entry.hash = HashOf(ring_[entry.place]) + (lies_[lie] ? 1 : 0);
      ++lie;
    }
    lies_.clear();
    Settle(slot, entries);
  }
  void SettleRun(Slot& slot, Input& input, SettleEntry::What what) {
    std::vector<SettleEntry> entries;
    const Content first = input.Half();
    const unsigned count = 1 + input.Byte();
    const unsigned stride = what == SettleEntry::kReplica ? first & 1 : 1;
    for (unsigned i = 0; i < count; ++i) {
      ring_[i] = static_cast<Content>(first + i * stride);
      entries.push_back({what, HashOf(ring_[i]), i, 0});
    }
    Settle(slot, entries);
  }
  SettleEntry AcquireOf(const Slot& slot, Input& input, unsigned how) {
    std::uint32_t frame = input.Half();
    if (how & 2) {
      // One that there is, as the index would have said.
      if (const auto at = model_.live.lower_bound(frame); at != model_.live.end()) frame = *at;
    } else if (how & 4) {
      frame = wire::kFrameLimit - 1 - frame;
    } else if (const auto at = slot.covered.lower_bound(frame); at != slot.covered.end()) {
      frame = *at;
    }
    const auto last = model_.last_hash.find(frame);
    const std::uint32_t hash = last == model_.last_hash.end() ? how : last->second;
    return {SettleEntry::kAcquire, hash + (how >> 4 == 15), frame, 0};
  }
  void AcquireRun(Slot& slot, Input& input) {
    std::vector<SettleEntry> entries;
    const unsigned count = 1 + input.Byte();
    for (auto at = model_.live.lower_bound(input.Half()); at != model_.live.end() && entries.size() < count; ++at) {
      entries.push_back({SettleEntry::kAcquire, HashOf(model_.ContentAt(*at)), *at, 0});
    }
    if (!entries.empty()) Settle(slot, entries);
  }

  struct Copies {
    Run* run;
    std::size_t made;
  };
  void Settle(Slot& slot, const std::vector<SettleEntry>& entries) {
    // An input that takes long finds no more than several short ones.
    if (entries.empty() || entries.size() > budget_) return;
    budget_ -= entries.size();
    std::vector<std::uint32_t> answers(entries.size(), kUnanswered);
    Copies copies{this, 0};
    model_.settling = true;
    model_.written.clear();
    const std::size_t most = std::max(most_, domain_.frames_live());
    const char* const wrong = domain_.Settle(
        slot.number, entries.data(), entries.size(),
        [](void* cookie, std::uint32_t place, std::byte* page) {
          auto& [run, made] = *static_cast<Copies*>(cookie);
          const PageBytes bytes = PageOf(run->ring_[place]);
          std::copy(bytes.begin(), bytes.end(), page);
          ++made;
        },
        &copies, answers.data());
    model_.settling = false;
    auto written = model_.written.begin();
    std::size_t asked = 0;
    bool lied = false;
    for (std::size_t i = 0; i < entries.size() && !lied; ++i) {
      const SettleEntry& entry = entries[i];
      const Frame frame = answers[i];
      if (entry.what == SettleEntry::kAcquire) {
        CheckAcquired(entry, frame);
      } else {
        ++asked;
        lied = entry.hash != HashOf(ring_[entry.place]);
        if (lied) break;
        const bool is_new = written != model_.written.end() && *written == frame;
        CheckPublished(entry, frame, is_new);
        if (is_new) {
          ++written;
          offered_.erase(WholeHashOf(ring_[entry.place]));
          logged_.emplace_back(entry.hash, frame);
          model_.by_hash[entry.hash].push_back(frame);
        }
      }
      if (frame != wire::kNoFrame) Give(slot, frame);
    }
    FUZZ_CHECK((wrong != nullptr) == lied, "who claims a false hash has broken the protocol, and nobody else");
    FUZZ_CHECK(domain_.frames_live() <= most, "no more frames than are allowed");
    FUZZ_CHECK(copies.made == asked, "a page is copied out of the ring once");
    FUZZ_CHECK(written == model_.written.end(), "what is written is granted");
    if (wrong) Leave(slot);
  }
  void CheckAcquired(const SettleEntry& entry, Frame frame) {
    // The frames of this very call are in `places` by now.
    const auto place = model_.places.find(entry.place);
    const bool held = place != model_.places.end() && place->second.holders > 0;
    const bool is_it = held && HashOf(place->second.content) == entry.hash;
    // Of somebody who is not all gone yet.
    if (!held && frame == entry.place && AnyIsGoing()) {
      FUZZ_CHECK(model_.live.contains(frame) && HashOf(model_.ContentAt(frame)) == entry.hash, "a live frame of that hash");
      return;
    }
    FUZZ_CHECK(frame == (is_it ? entry.place : wire::kNoFrame), "an acquire is granted for a live frame of that hash, and no other");
  }
  void CheckPublished(const SettleEntry& entry, Frame frame, bool is_new) {
    const Content content = ring_[entry.place];
    int others = 0, same = 0;
    for (Frame f : model_.by_hash[entry.hash]) model_.ContentAt(f) == content ? ++same : ++others;
    if (frame == wire::kNoFrame) {
      const bool wants_a_place = entry.what == SettleEntry::kReplica ? same < Domain::kMaxReplicas : same == 0;
      const bool all_taken = domain_.frames_given_out() == model_.files * Domain::kFramesPerFile;
      const bool no_file = model_.add_fails || model_.files == kMostFiles;
      const bool no_place = wants_a_place && (model_.write_fails || (all_taken && no_file) || domain_.frames_live() >= most_);
      FUZZ_CHECK(others >= Domain::kMaxContents || no_place, "publishing is refused for a reason");
      return;
    }
    FUZZ_CHECK(model_.live.contains(frame) && model_.memory.at(frame) == PageOf(content), "what is published is what is granted");
    if (!is_new) {
      FUZZ_CHECK(same > 0, "a frame that was there");
      FUZZ_CHECK(entry.what != SettleEntry::kReplica || same + others >= Domain::kMaxReplicas, "a replica is a new one, until there are many");
      return;
    }
    // What lies behind the first that is the same is not compared.
    FUZZ_CHECK(others < Domain::kMaxContents || (entry.what == SettleEntry::kReplica && same > 0), "contents of one hash are bounded");
    FUZZ_CHECK(same < (entry.what == SettleEntry::kReplica ? Domain::kMaxReplicas : 1), "frames of one content are bounded");
  }
  void Give(Slot& slot, Frame frame) {
    const bool known = model_.places.contains(frame);
    model_.Grant(slot, frame);
    if (!known) model_.places.at(frame).content = model_.ContentAt(frame);
  }

  // --- letting go ---
  void LetGoSome(Slot& slot, Input& input, bool release) {
    std::vector<std::uint32_t> frames;
    const unsigned count = 1 + input.Byte() % 16;
    for (unsigned i = 0; i < count && !input.Done(); ++i) {
      const std::uint16_t word = input.Half();
      const Frame near = word >> 2;
      const std::set<Frame>& from = word & 1 && !slot.covered.empty() ? slot.covered : slot.held;
      const auto at = from.lower_bound(near);
      // Without one it is one that it has not.
      frames.push_back(at != from.end() && (word & 3) != 2 ? *at : near);
    }
    LetGo(slot, frames, release);
  }
  void LetGoRun(Slot& slot, Input& input, bool release) {
    std::vector<std::uint32_t> frames;
    const Frame first = input.Half();
    const std::uint8_t how = input.Byte();
    const unsigned stride = 1 + (how & 3), count = 1 + (how >> 2) * 16u;
    unsigned seen = 0;
    for (const auto* set : {&slot.held, &slot.covered}) {
      if (set == &slot.covered && !release) break;
      for (auto at = set->lower_bound(first); at != set->end() && frames.size() < count; ++at) {
        if (seen++ % stride == 0) frames.push_back(*at);
      }
    }
    if (how & 128) std::reverse(frames.begin(), frames.end());
    LetGo(slot, frames, release);
  }
  void LetGo(Slot& slot, const std::vector<std::uint32_t>& frames, bool release) {
    if (frames.empty()) return;
    bool wrong = false;
    for (Frame frame : frames) {
      wrong = !(slot.held.contains(frame) || (release && slot.covered.contains(frame)));
      if (wrong) break;
      if (release) model_.LetGo(slot, frame);
      else model_.Drop(slot, frame);
    }
    const char* const said = release ? domain_.Release(slot.number, frames.data(), frames.size())
                                     : domain_.Drop(slot.number, frames.data(), frames.size());
    FUZZ_CHECK((said != nullptr) == wrong, "who lets go of what it has not has broken the protocol, and nobody else");
    if (said) Leave(slot);
  }

  // --- offers ---
  void Offer(Slot& slot, Input& input) {
    const std::uint32_t first = input.Half();
    const std::uint8_t how = input.Byte();
    // Enough at times for the table to grow.
    const unsigned count = how % 16 == 15 ? how * 8u : 1 + how / 8u;
    std::vector<std::uint64_t> hashes;
    std::vector<std::pair<std::uint16_t, std::uint32_t>> expected, wanted;
    for (unsigned i = 0; i < count; ++i) {
      const std::uint32_t hash = HashOf(static_cast<Content>(first + i));
      hashes.push_back(WholeHashOf(static_cast<Content>(first + i)));
      if (const auto there = model_.by_hash.find(hash); there != model_.by_hash.end() && !there->second.empty()) {
        expected.emplace_back(slot.number, hash);
        continue;
      }
      const auto before = offered_.find(hashes.back());
      if (before != offered_.end() && before->second.life != slot.life) {
        const Slot& other = slots_[before->second.slot];
        if (other.state == Slot::kHere && other.life == before->second.life) expected.emplace_back(other.number, hash);
      }
      offered_[hashes.back()] = {static_cast<std::size_t>(&slot - slots_.data()), slot.life};
    }
    domain_.Offer(
        slot.number, hashes.data(), hashes.size(),
        [](void* out, std::uint16_t who, std::uint32_t hash) { static_cast<decltype(wanted)*>(out)->emplace_back(who, hash); }, &wanted);
    FUZZ_CHECK(wanted == expected, "asked to publish is who can have what is there, or else the one before, if it is there");
  }

  // --- what always holds ---
  void CheckCounts() {
    std::size_t here = 0, members = 0, going = 0;
    for (const Slot& slot : slots_) {
      members += slot.state != Slot::kNone, here += slot.state == Slot::kHere;
      if (slot.state == Slot::kGoing) going += slot.had;
      if (slot.state != Slot::kNone) FUZZ_CHECK(domain_.IsMember(slot.number) == (slot.state == Slot::kHere), "who is a member");
    }
    FUZZ_CHECK(domain_.members() == members, "all are counted");
    FUZZ_CHECK(domain_.frames_live() == model_.live.size() && index_.size() == model_.live.size(), "what is live is in the index");
    FUZZ_CHECK(domain_.frames_given_out() >= model_.places.size(), "what somebody has is not free");
    FUZZ_CHECK(domain_.frames_given_out() <= model_.places.size() + going + here * Domain::kChunk,
               "what nobody has is free, but for stretches");
    std::size_t next = 0;
    const bool complete = reader_.ReadLog(&log_at_, [&](std::uint32_t hash, Frame frame) {
      FUZZ_CHECK(next < logged_.size() && logged_[next] == std::make_pair(hash, frame), "the log says what was published");
      ++next;
    });
    FUZZ_CHECK(complete && next == logged_.size(), "the log says all that was published");
    logged_.clear();
  }
  void CheckAll() {
    std::size_t live = 0;
    for (const auto& [frame, place] : model_.places) {
      for (const Slot& slot : slots_) {
        if (slot.state == Slot::kNone) continue;
        FUZZ_CHECK(domain_.Holds(slot.number, frame) == slot.held.contains(frame), "who holds what");
      }
      if (place.holders == 0) continue;
      ++live;
      FUZZ_CHECK(model_.live.contains(frame), "what is held is live");
      FUZZ_CHECK(model_.memory.at(frame) == PageOf(place.content), "what is held does not change");
      bool found = false;
      reader_.Lookup(HashOf(place.content), [&found, wanted = frame](Frame f) { return found = f == wanted, !found; });
      FUZZ_CHECK(found, "what is live is found");
    }
    FUZZ_CHECK(AnyIsGoing() || live == model_.live.size(), "what nobody holds is punched");
    FUZZ_CHECK(domain_.metadata_bytes() < (std::size_t{8} << 20), "the bookkeeping of eight members is small");
  }

  // Two kinds: few that meet often, and many.
  static Content Contents(Input& input, bool few) { return few ? static_cast<Content>(input.Byte() % 64) : input.Half(); }

  static constexpr std::size_t kAll = ~std::size_t{0};
  static constexpr std::uint32_t kUnanswered = 0xabcd'abcd;
  Model model_;
  IndexWriter index_{IndexMemory(), &PunchIndex, nullptr};
  IndexReader reader_{IndexMemory(), kIndexFileBytes};
  Domain domain_{model_, index_, reader_, kPage, kSeed, &HashOfPage};
  std::array<Slot, kSlots> slots_;
  std::array<Content, wire::kRingPages> ring_{};
  std::vector<bool> lies_;
  std::map<std::uint64_t, Offered> offered_;
  std::vector<std::pair<std::uint32_t, Frame>> logged_;
  std::uint64_t lives_ = 0, log_at_ = 0;
  std::size_t most_ = wire::kFrameLimit;  // live frames
  std::size_t budget_ = 5'000;  // entries to settle
};

}  // namespace
}  // namespace ksmu::broker

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  ksmu::fuzz::Input input(data, bytes);
  ksmu::broker::Run().All(input);
  return 0;
}
