#include "model_source.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "content/content.h"

namespace ksmu::model {

using broker::Domain;
using broker::wire::SettleEntry;

namespace {
std::uint64_t HashOf(const std::byte* page, std::size_t bytes, std::uint64_t seed) { return content::Hash(page, bytes, seed); }
void* MapIndex() {
  return mmap(nullptr, broker::kIndexFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
int PunchIndex(void* memory, std::size_t offset, std::size_t bytes) { return madvise(static_cast<char*>(memory) + offset, bytes, MADV_REMOVE); }
}  // namespace

ModelSource::ModelSource(os::FakeSystem& fake, std::uint64_t seed)
    : fake_(fake), seed_(seed), page_(fake.PageSize()), memory_(MapIndex()), index_(memory_, &PunchIndex, memory_),
      reader_(memory_, broker::kIndexFileBytes), domain_(*this, index_, reader_, page_, seed, &HashOf), ring_(kRing * page_),
      peer_page_(page_), me_(domain_.Join()), peer_(domain_.Join()) {}

ModelSource::~ModelSource() { munmap(memory_, broker::kIndexFileBytes); }

int ModelSource::Add() {
  os::File file;
  const std::byte* bytes = nullptr;
  if (int error = fake_.CreateFile(kFramesPerFile * page_, &file)) return error;
  if (int error = fake_.MapFile(file, kFramesPerFile * page_, &bytes)) {
    fake_.CloseFile(file);
    return error;
  }
  files_.push_back(file);
  bytes_.push_back(bytes);
  return 0;
}

int ModelSource::Write(broker::Frame frame, const std::byte* page) {
  const os::Partial written = fake_.WriteFile(files_[frame / kFramesPerFile], frame % kFramesPerFile * page_, reinterpret_cast<os::Address>(page), page_);
  return written.done == page_ ? 0 : -1;
}

int ModelSource::Punch(broker::Frame first, std::size_t count) {
  return fake_.PunchFile(files_[first / kFramesPerFile], first % kFramesPerFile * page_, count * page_);
}

bool ModelSource::Holds(broker::Frame frame, const std::byte* page) {
  return std::memcmp(bytes_[frame / kFramesPerFile] + frame % kFramesPerFile * page_, page, page_) == 0;
}

void ModelSource::PeerPublish(int value, bool replica) {
  std::fill(peer_page_.begin(), peer_page_.end(), static_cast<std::byte>(value));
  const SettleEntry entry{replica ? SettleEntry::kReplica : SettleEntry::kPublish, static_cast<std::uint32_t>(HashOf(peer_page_.data(), page_, seed_) >> 32), 0, 0};
  std::uint32_t answer = broker::wire::kNoFrame;
  const char* const wrong = domain_.Settle(
      peer_, &entry, 1,
      [](void* self, std::uint32_t, std::byte* page) {
        const auto& from = static_cast<ModelSource*>(self)->peer_page_;
        std::copy(from.begin(), from.end(), page);
      },
      this, &answer);
  EXPECT_EQ(wrong, nullptr) << wrong;
  const bool new_one = answer != broker::wire::kNoFrame && std::find(peer_holds_.begin(), peer_holds_.end(), answer) == peer_holds_.end();
  if (new_one) peer_holds_.push_back(answer);
}

void ModelSource::PeerOffer(int value) {
  std::fill(peer_page_.begin(), peer_page_.end(), static_cast<std::byte>(value));
  const std::uint64_t hash = HashOf(peer_page_.data(), page_, seed_);
  domain_.Offer(peer_, &hash, 1, &ModelSource::Wanted, this);
}

void ModelSource::PeerGivesUp(unsigned which) {
  std::vector<broker::Frame> kept, given;
  for (std::size_t i = 0; i < peer_holds_.size(); ++i) (i % 3 == which % 3 ? given : kept).push_back(peer_holds_[i]);
  const char* const wrong = domain_.Release(peer_, given.data(), given.size());
  EXPECT_EQ(wrong, nullptr) << wrong;
  peer_holds_ = kept;
}

void ModelSource::Wanted(void* self, std::uint16_t member, std::uint32_t hash) {
  auto& source = *static_cast<ModelSource*>(self);
  if (member == source.me_) source.wanted_.push_back(hash);
}

void ModelSource::Die(Death when) {
  death_ = when;
  if (when == Death::kNow && !gone_) {
    gone_ = true;
    domain_.Leave(me_);
  }
}

void ModelSource::Gone() {
  Die(Death::kNow);
  domain_.Gone(me_);
}

void ModelSource::FlushGivenUp() {
  const auto say = [](const char* wrong) { EXPECT_EQ(wrong, nullptr) << wrong; };
  say(domain_.Drop(me_, drops_.data(), drops_.size()));
  say(domain_.Release(me_, releases_.data(), releases_.size()));
  drops_.clear();
  releases_.clear();
}

void ModelSource::Flush() {
  if (!Busy()) FlushGivenUp();
  domain_.Offer(me_, offers_.data(), offers_.size(), &ModelSource::Wanted, this);
  offers_.clear();
}

std::vector<std::uint32_t> ModelSource::Answers(const std::vector<Want>& wants) {
  std::vector<SettleEntry> entries;
  for (const Want& want : wants) entries.push_back({want.kind, want.hash, want.kind == Want::kAcquire ? want.theirs : want.place, 0});
  std::vector<std::uint32_t> answers(wants.size(), broker::wire::kNoFrame);
  const char* const wrong = domain_.Settle(
      me_, entries.data(), entries.size(),
      [](void* self, std::uint32_t place, std::byte* page) {
        auto& source = *static_cast<ModelSource*>(self);
        std::memcpy(page, source.ring_.data() + place * source.page_, source.page_);
      },
      this, answers.data());
  EXPECT_EQ(wrong, nullptr) << wrong;
  return answers;
}

ModelSource::Answer ModelSource::Settle(Want* wants, std::size_t count) {
  EXPECT_FALSE(Busy()) << "asked while an answer is awaited";
  if (death_ == Death::kBeforeNext) Die(Death::kNow);
  if (gone_) return Answer::kGone;
  Flush();
  const std::vector<Want> asked(wants, wants + count);
  for (std::size_t i = 0; i < count; ++i) wants[i].theirs = frames::kNoFrame;
  if (const int slow = std::exchange(slow_, 0)) {
    if (slow == 1) answers_ = Answers(asked);
    asked_ = asked;
    return Answer::kLater;
  }
  const std::vector<std::uint32_t> answers = Answers(asked);
  if (death_ == Death::kBeforeAnswer) Die(Death::kNow);
  if (gone_) return Answer::kGone;
  for (std::size_t i = 0; i < count; ++i) wants[i].theirs = answers[i];
  return Answer::kGranted;
}

// What was given up meanwhile, and not said, stays given up.
void ModelSource::TakeLate(const News& news) {
  const std::vector<Want> asked = std::exchange(asked_, {});
  if (answers_.empty()) answers_ = Answers(asked);
  const auto answers = std::exchange(answers_, {});
  const auto has = [](const auto& words, std::uint32_t word) { return std::find(words.begin(), words.end(), word) != words.end(); };
  for (std::size_t i = 0; i < asked.size(); ++i) {
    const std::uint32_t theirs = answers[i];
    if (theirs != broker::wire::kNoFrame && !has(drops_, theirs) && !has(releases_, theirs)) news.granted(news.cookie, {asked[i].kind, asked[i].hash, asked[i].place, theirs, asked[i].node});
  }
}

int ModelSource::OpenFile(std::size_t number, os::File* out) {
  if (gone_ || number >= files_.size()) return -EPIPE;
  if (Busy()) return -EAGAIN;
  if (slow_ == 2) return slow_ = 0, -EAGAIN;
  return fake_.ReopenFile(files_[number], out);
}

void ModelSource::Lookup(std::uint32_t hash, bool (*visit)(void* cookie, frames::Frame theirs), void* cookie) const {
  reader_.Lookup(hash, [&](broker::Frame frame) { return visit(cookie, frame); });
}

bool ModelSource::Serve(const News& news) {
  if (gone_) return false;
  if (Busy() && slow_++ % 2) slow_ = 0, TakeLate(news);
  Flush();
  const auto wanted = std::exchange(wanted_, {});
  const bool lose = std::exchange(lose_news_, false);
  if (!lose) {
    for (std::uint32_t hash : wanted) news.wanted(news.cookie, hash);
  }
  reader_.ReadLog(&log_position_, [&](std::uint32_t hash, broker::Frame frame) {
    if (!lose) news.published(news.cookie, hash, frame);
  });
  if (lose) news.missed(news.cookie);
  return true;
}

}  // namespace ksmu::model
