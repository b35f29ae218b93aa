// This process as a member of a domain: the broker's frames, by messages, for the engine (frames/source.h).
//
// All of it is the scanner's, and lives in the library's own memory and descriptor table. An answer is waited for a moment,
// kWaitMs; if it comes later it is heard by Serve, and nothing else is asked for until then: the pages in the ring are the
// broker's to read, and frames are neither dropped nor released, lest what it says of one is about another time than we think.
// After kPatienceMs, or after anything that a broker does not say, the member has left for good: it grants nothing, and what it
// has got stays mapped. It has to be kept for as long as frames of it are in use: the broker knows by its canary (a page that is
// shared with the broker, and with every child that is forked) that they may be.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/own_memory.h"
#include "broker/shared_index.h"
#include "broker/wire.h"
#include "frames/source.h"
#include "os/channel.h"
#include "os/probe.h"

namespace ksmu::broker {

class Member final : public frames::Source {
 public:
  static constexpr int kWaitMs = 50, kPatienceMs = 10'000;
  // Users other than root and our own whose brokers are accepted: a number a line, in a file of root's.
  static constexpr const char* kTrustedFile = "/etc/ksmu/brokers";

  // Asks the broker that listens on the socket to be let into its domain. 0, or -errno with a sentence in *why; -ENOENT and
  // -ECONNREFUSED: there is no broker.
  static int Begin(const char* path, std::size_t page_bytes, Member** out, os::ErrorText* why);
  // Connects to the broker, and says whose it is; asks it for nothing. As Begin; -EPERM: a stranger's, and *user is that one.
  static int Reach(const char* path, os::Channel* channel, std::uint32_t* user, os::ErrorText* why);
  static bool IsTrusted(std::uint32_t user);
  // Whether it has been let in: 0; -EAGAIN: no answer yet; else it is not to be.
  int Finish(os::ErrorText* why);
  // When none of its frames is in use any more.
  static void Destroy(Member* member);
  // Says goodbye; sends what is kept, if the socket takes it. The canary stays.
  void Leave();

  std::uint64_t seed() const override { return seed_; }
  bool merges_across_nodes() const override { return !by_node_; }
  std::byte* ring() override {
    ring_used_ = true;
    return ring_;
  }
  std::size_t ring_pages() const override { return wire::kRingPages; }
  void ClearRing() override;
  Answer Settle(Want* wants, std::size_t count) override;
  bool Busy() const override { return awaited_ != kNothing; }
  int OpenFile(std::size_t number, os::File* out) override;
  void Offer(std::uint64_t hash) override;
  void Drop(frames::Frame theirs) override { Keep(&drops_, theirs); }
  void Release(frames::Frame theirs) override { Keep(&releases_, theirs); }
  void Prefetch(std::uint32_t hash) const override { Reader().Prefetch(hash); }
  void Lookup(std::uint32_t hash, bool (*visit)(void* cookie, frames::Frame theirs), void* cookie) const override;
  bool Serve(const News& news) override;
  void Tell(const Report& report) override { report_ = report, report_is_new_ = true; }
  bool TakeWishes(Wishes* wishes) override;
  void AnswerTunable(std::uint32_t tunable, int error) override;
  void AnswerRegions(const RegionReport* regions, std::size_t count) override;

 private:
  using Words = base::OwnVector<std::uint32_t>;
  static constexpr wire::Kind kNothing{};
  explicit Member(std::size_t page_bytes) : page_bytes_(page_bytes) {}
  int Open(const char* path, os::ErrorText* why);
  int Admitted(int index_fd, int canary_fd, os::ErrorText* why);
  Answer AskFor(wire::Kind answer, int descriptor);
  Answer Hear(int wait_ms, int* descriptors, std::size_t capacity, std::size_t* count);
  bool Send(int descriptor = -1);
  bool SendGivenUp();
  template <typename T, std::size_t n>
  bool SendKept(wire::Kind kind, base::OwnVector<T>* kept, std::array<T, n>* entries);
  void Keep(Words* words, std::uint32_t word);
  std::ptrdiff_t ReceiveNext(int* descriptors, std::size_t capacity, std::size_t* count);
  bool NoteWanted();
  bool NoteWish();
  void SendAnswers();
  bool IsGivenUp(frames::Frame theirs) const;
  bool TakeSettled();
  int TakeFile(int fd, std::size_t count, os::File* out);
  bool TakeLate(int fd, std::size_t count, const News& news);
  bool MapIndex();
  IndexReader Reader() const { return IndexReader(index_, index_mapped_); }

  const std::size_t page_bytes_;
  os::Channel channel_;
  std::byte* ring_ = nullptr;
  bool ring_used_ = false;
  std::byte* canary_ = nullptr;
  int index_fd_ = -1;
  std::byte* index_ = nullptr;
  std::size_t index_bytes_ = 0, index_mapped_ = 0;
  std::uint64_t seed_ = 0, log_position_ = 0;
  bool by_node_ = false;
  std::uint32_t number_ = 0;         // of the last question
  wire::Kind awaited_ = kNothing;    // its answer, if that has not come
  std::uint64_t asked_at_ = 0;       // ms
  std::array<Want, kMaxWants> asked_;  // the last ones
  std::size_t asked_count_ = 0;
  std::size_t asked_file_ = 0;
  int late_file_ = -1;               // file asked_file_, which came late
  base::OwnVector<std::uint64_t> offers_;
  Words drops_, releases_;
  Words wanted_;              // heard while an answer was waited for
  bool lost_ = false;         // offers, or something wanted: all is to be offered again
  Report report_;
  bool report_is_new_ = false;
  // An operator's wishes, until they are taken; the answers to them, until they are sent.
  Wishes wishes_;
  std::uint32_t tune_number_ = 0, ask_number_ = 0;  // of the last of each that has come
  std::uint32_t tuned_ = 0;                         // a bit each
  std::array<std::uint32_t, kTunableSlots> tuned_errors_{};
  bool told_ = false;
  std::size_t told_count_ = 0;
  std::array<RegionReport, kMaxRegions> told_regions_{};
  wire::Message out_, in_;
  alignas(8) std::array<std::byte, wire::kMaxPacket> packet_;
};

}  // namespace ksmu::broker
