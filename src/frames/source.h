// Frames that another process hands out: the broker's side of the pool, as the engine sees it (docs/broker.md). Implemented by
// broker/member.h over a socket, and by the tests over a domain in the same process.
//
// Its frames have numbers of their own; the pool translates. A frame that is granted is held, bytes and place, until Drop and
// Release: the rules of pool.h decide when. What is said of contents is a hint: every byte is proved by the engine itself.
//
// All calls but Lookup come from the scanner, with no gate shut. An answer that takes its time is not waited for: it comes with
// the news. Once a call has said that the source is gone, nothing is granted any more; what was granted stays mapped and
// unchanged.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "os/os.h"

namespace ksmu::frames {

using Frame = std::uint32_t;
inline constexpr Frame kNoFrame = ~Frame{0};

class Source {
 public:
  static constexpr std::size_t kFramesPerFile = 65536;
  static constexpr std::size_t kMaxWants = 512, kMaxRing = 512;

  struct Want {
    enum Kind : std::uint32_t {
      kPublish = 1,  // the frame that holds what lies at `place` in the ring: there already, or new
      kReplica,      // a new one beside those that hold it, or one of them
      kAcquire,      // theirs, if it has this hash still
    };
    Kind kind = kPublish;
    std::uint32_t hash = 0;
    std::uint32_t place = 0;
    Frame theirs = kNoFrame;  // kAcquire: which; afterwards what was granted, or kNoFrame
    int node = 0;             // of the page; 0 in a domain that merges across nodes
  };

  virtual ~Source() = default;

  virtual std::uint64_t seed() const = 0;  // of the domain's hashes
  // False: hashes are by node (content::SeedOfNode), and so are the frames that are granted for them.
  virtual bool merges_across_nodes() const { return true; }
  // Where contents are put that are to be published.
  virtual std::byte* ring() = 0;
  virtual std::size_t ring_pages() const = 0;
  // What lies in the ring is not needed any more. While no answer is awaited.
  virtual void ClearRing() {}

  enum class Answer { kGranted, kLater, kGone };
  // Asks for all of them (at most kMaxWants) and waits a moment for the answers. kLater: nothing is granted now; if it has been
  // asked for (Busy), then as news, and the ring is left alone until then.
  virtual Answer Settle(Want* wants, std::size_t count) = 0;
  // An answer is awaited: nothing can be asked for.
  virtual bool Busy() const = 0;
  // File `number` of the source's, to be closed by the caller, sealed against changes of its length. 0 or -errno; -EAGAIN: not
  // yet.
  virtual int OpenFile(std::size_t number, os::File* out) = 0;
  // This member has a page of this hash, once: all 64 bits of it, so that nobody can guess it who has no such page. Kept and
  // sent with others.
  virtual void Offer(std::uint64_t hash) = 0;
  // The bytes are needed no more; the place is covered no more. Kept and sent with others, before anything is asked for.
  virtual void Drop(Frame theirs) = 0;
  virtual void Release(Frame theirs) = 0;

  // Calls `visit(cookie, theirs)` for what the index says of the hash, until it answers false. No call, no message.
  virtual void Prefetch(std::uint32_t hash) const = 0;  // for a look-up that is about to come
  virtual void Lookup(std::uint32_t hash, bool (*visit)(void* cookie, Frame theirs), void* cookie) const = 0;

  // Sends what has been kept, and reads what has come, without waiting. False: it is gone.
  struct News {
    void* cookie = nullptr;
    void (*wanted)(void* cookie, std::uint32_t hash) = nullptr;                    // somebody else has such a page
    void (*published)(void* cookie, std::uint32_t hash, Frame theirs) = nullptr;  // there is such a frame
    void (*granted)(void* cookie, const Want& asked) = nullptr;                    // `theirs` of it is held from now on
    void (*missed)(void* cookie) = nullptr;  // more was published than is known: look everything up
  };
  virtual bool Serve(const News& news) = 0;

  // What this process has of it, for whoever looks at the domain. Pages, but for the CPU time, and what the counters of ksmu_stats
  // are.
  static constexpr std::size_t kCounterSlots = 64, kTunableSlots = 32, kReasonSlots = 32, kMaxRegions = 16;
  struct Report {
    std::uint64_t advised = 0, merged = 0, frames = 0, zero = 0, still = 0, changing = 0, breaks = 0;
    std::uint64_t cpu_ns = 0;
    std::array<std::int64_t, kCounterSlots> counters{};  // in the order of struct ksmu_stats
    std::array<std::int64_t, kTunableSlots> tunables{};  // in the order of engine/tunables.h
    std::uint32_t unmerging = 0;                         // EINPROGRESS, or the errno that it has ended with
    bool operator==(const Report&) const = default;
  };
  virtual void Tell(const Report& report) = 0;

  // What an operator of the domain asks of this process, if it has come: tunables to be set, and whether regions are to be told.
  // Answers are sent by Serve. What has been asked anew meanwhile is answered in place of what was asked before.
  struct Wishes {
    std::uint32_t tunables = 0;  // a bit each
    std::array<std::int64_t, kTunableSlots> values{};
    std::uint32_t yielding = 0;  // likewise: what the program has set itself goes before (EEXIST)
    bool regions = false;
    std::uint64_t regions_from = 0;
  };
  virtual bool TakeWishes(Wishes*) { return false; }
  virtual void AnswerTunable(std::uint32_t /*tunable*/, int /*error*/) {}
  struct RegionReport {
    std::uint64_t start = 0, end = 0;
    std::uint64_t next = 0;  // where the next one is to be asked for; 0: nowhere
    std::uint32_t flags = 0, excluded_cause = 0;
    std::uint64_t excluded_bytes = 0;
    std::uint64_t merged = 0, still = 0, changing = 0, zero = 0;
    std::array<std::uint64_t, kReasonSlots> unmerged{};
  };
  virtual void AnswerRegions(const RegionReport*, std::size_t /*count*/) {}
};

// Where a source is to be had. On the scanner.
class Door {
 public:
  // Null where there is none, with the reason, if it is one that a user should hear of, in `why`; or with *soon: it has been
  // asked to let us in, and Enter is to be called again in some milliseconds to hear whether it does.
  virtual Source* Enter(std::size_t page_bytes, const char** why, bool* soon) = 0;
  // Enter will not be called for a while.
  virtual void GiveUp() = 0;
  // No question any more; what is kept is sent, if that needs no waiting. Its frames may be in use still.
  virtual void Leave(Source* source) = 0;
  // None of them is. The source is gone afterwards.
  virtual void Forget(Source* source) = 0;

 protected:
  ~Door() = default;
};

}  // namespace ksmu::frames
