// This process as a member of a domain: the broker's frames, by messages, for the engine (frames/source.h).
//
// All of it is the scanner's, and lives in the library's own memory and descriptor table. Nothing is waited for but the answer to
// a question, kPatienceMs at the most; after that, or after anything that a broker does not say, the member has left for good:
// it grants nothing, and what it has got stays mapped. It has to be kept for as long as frames of it are in use: the broker
// knows by its canary (a page that is shared with the broker, and with every child that is forked) that they may be.
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
  static constexpr int kPatienceMs = 2000, kJoinPatienceMs = 500;
  // Users other than root and our own whose brokers are accepted: a number a line, in a file of root's.
  static constexpr const char* kTrustedFile = "/etc/ksmu/brokers";

  // Joins the domain of the broker that listens on the socket. 0, or -errno with a sentence in *why; -ENOENT and -ECONNREFUSED:
  // there is no broker.
  static int Join(const char* path, std::size_t page_bytes, Member** out, os::ErrorText* why);
  // When none of its frames is in use any more.
  static void Destroy(Member* member);
  // Says goodbye; sends what is kept, if the socket takes it. The canary stays.
  void Leave();

  std::uint64_t seed() const override { return seed_; }
  std::byte* ring() override { return ring_; }
  std::size_t ring_pages() const override { return wire::kRingPages; }
  bool Settle(Want* wants, std::size_t count) override;
  int OpenFile(std::size_t number, os::File* out) override;
  void Offer(std::uint32_t hash) override;
  void Drop(frames::Frame theirs) override { Keep(&drops_, theirs); }
  void Release(frames::Frame theirs) override { Keep(&releases_, theirs); }
  void Lookup(std::uint32_t hash, bool (*visit)(void* cookie, frames::Frame theirs), void* cookie) const override;
  bool Serve(const News& news) override;
  bool Pending() const override { return !drops_.empty() || !releases_.empty() || !offers_.empty(); }

 private:
  using Words = base::OwnVector<std::uint32_t>;
  explicit Member(std::size_t page_bytes) : page_bytes_(page_bytes) {}
  int Open(const char* path, os::ErrorText* why);
  bool Ask(wire::Kind answer, int patience_ms, int* descriptors, std::size_t capacity, std::size_t* count);
  bool SendQuestion(int descriptor, int patience_ms);
  bool Flush(int patience_ms);
  bool FlushWords(wire::Kind kind, Words* words, int patience_ms);
  void Keep(Words* words, std::uint32_t word);
  std::ptrdiff_t ReceiveNext(int* descriptors, std::size_t capacity, std::size_t* count);
  bool NoteWanted();
  bool MapIndex();
  IndexReader Reader() const { return IndexReader(index_, index_mapped_); }

  const std::size_t page_bytes_;
  os::Channel channel_;
  std::byte* ring_ = nullptr;
  std::byte* canary_ = nullptr;
  int index_fd_ = -1;
  std::byte* index_ = nullptr;
  std::size_t index_bytes_ = 0, index_mapped_ = 0;
  std::uint64_t seed_ = 0, log_position_ = 0;
  std::uint32_t number_ = 0;  // of the last question
  Words offers_, drops_, releases_;
  Words wanted_;              // heard while an answer was waited for
  bool lost_ = false;         // offers, or something wanted: all is to be offered again
  wire::Message out_, in_;
  alignas(8) std::array<std::byte, wire::kMaxPacket> packet_;
};

}  // namespace ksmu::broker
