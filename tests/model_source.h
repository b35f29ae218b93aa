// A domain beside the engine under test, in the same process: the broker's own state machine over the simulated system's files,
// and another member, who publishes, offers and gives up as the trace says. It can die before it has heard a question, or
// before it has answered.
#pragma once

#include <cstdint>
#include <vector>

#include "broker/domain.h"
#include "frames/source.h"
#include "os/fake_system.h"

namespace ksmu::model {

class ModelSource final : public frames::Source, private broker::Domain::Files {
 public:
  enum class Death : std::uint8_t { kNone, kNow, kBeforeNext, kBeforeAnswer };

  ModelSource(os::FakeSystem& fake, std::uint64_t seed);
  ~ModelSource() override;

  // The other member: pages that are full of this byte.
  void PeerPublish(int value, bool replica);
  void PeerOffer(int value);
  void PeerGivesUp(unsigned which);  // every third of its frames
  void Die(Death when);
  void LoseNews() { lose_news_ = true; }
  // The answer to what is asked for next is slow: the question is heard at once, or only when the answer comes.
  void BeSlow(bool heard_at_once) { slow_ = heard_at_once ? 1 : 2; }
  // The process of the engine can map nothing of it any more.
  void Gone();
  bool Empty() const { return domain_.frames_live() == 0; }

  std::uint64_t seed() const override { return seed_; }
  std::byte* ring() override { return ring_.data(); }
  std::size_t ring_pages() const override { return kRing; }
  Answer Settle(Want* wants, std::size_t count) override;
  bool Busy() const override { return !asked_.empty(); }
  int OpenFile(std::size_t number, os::File* out) override;
  void Offer(std::uint64_t hash) override { offers_.push_back(hash); }
  void Drop(frames::Frame theirs) override { drops_.push_back(theirs); }
  void Release(frames::Frame theirs) override { releases_.push_back(theirs); }
  void Prefetch(std::uint32_t) const override {}
  void Lookup(std::uint32_t hash, bool (*visit)(void* cookie, frames::Frame theirs), void* cookie) const override;
  bool Serve(const News& news) override;
  void Tell(const Report&) override {}

 private:
  static constexpr std::size_t kRing = 8;  // it fills up
  int Add() override;
  int Write(broker::Frame frame, const std::byte* page) override;
  int Punch(broker::Frame first, std::size_t count) override;
  bool Holds(broker::Frame frame, const std::byte* page) override;
  void Flush();
  void FlushGivenUp();
  std::vector<std::uint32_t> Answers(const std::vector<Want>& wants);
  void TakeLate(const News& news);
  static void Wanted(void* self, std::uint16_t member, std::uint32_t hash);

  os::FakeSystem& fake_;
  const std::uint64_t seed_;
  const std::size_t page_;
  void* const memory_;
  broker::IndexWriter index_;
  broker::IndexReader reader_;
  broker::Domain domain_;
  std::vector<os::File> files_;
  std::vector<const std::byte*> bytes_;
  std::vector<std::byte> ring_, peer_page_;
  std::uint16_t me_, peer_;
  std::vector<broker::Frame> peer_holds_;
  std::vector<std::uint64_t> offers_;
  std::vector<std::uint32_t> drops_, releases_, wanted_;
  std::vector<Want> asked_;              // what has not been answered
  std::vector<std::uint32_t> answers_;   // to it, if it has been heard
  int slow_ = 0;
  std::uint64_t log_position_ = 0;
  Death death_ = Death::kNone;
  bool gone_ = false, lose_news_ = false;
};

}  // namespace ksmu::model
