#include "broker/member.h"

#include <algorithm>
#include <cerrno>
#include <new>

namespace ksmu::broker {

using wire::Kind;
using wire::SettleEntry;

namespace {
constexpr std::size_t kMostOffers = 1u << 20, kMostWanted = 1u << 20;
constexpr int kPacketsAServe = 16;
constexpr std::size_t kFirstIndexBytes = std::size_t{16} << 20;
}  // namespace

int Member::Join(const char* path, std::size_t page_bytes, Member** out, os::ErrorText* why) {
  void* const memory = base::MapOwnPages(sizeof(Member));
  if (!memory) {
    why->Set("no memory for the library's own data");
    return -ENOMEM;
  }
  auto* const member = new (memory) Member(page_bytes);
  const int error = member->Open(path, why);
  if (error) Destroy(member);
  else *out = member;
  return error;
}

void Member::Destroy(Member* member) {
  member->channel_.Close();
  if (member->canary_) os::UnmapReceived(member->canary_, member->page_bytes_);
  if (member->index_) os::UnmapReceived(member->index_, member->index_mapped_);
  if (member->index_fd_ >= 0) os::CloseDescriptor(member->index_fd_);
  if (member->ring_) os::UnmapReceived(member->ring_, wire::kRingPages * member->page_bytes_);
  member->~Member();
  base::UnmapOwnPages(member, sizeof(Member));
}

void Member::Leave() {
  if (channel_.open()) Flush(0);
  channel_.Close();
}

int Member::Open(const char* path, os::ErrorText* why) {
  if (int error = channel_.Connect(path)) {
    why->Set(error == -ENAMETOOLONG   ? "the path of the broker's socket is longer than a socket's can be"
             : error == -EACCES       ? "the broker's socket may not be used by this user"
             : error == -EPROTOTYPE   ? "what is named as the broker's socket is another kind of socket"
             : error == -ENOTSOCK     ? "what is named as the broker's socket is no socket"
             : error == -ECONNREFUSED ? "nobody listens on the broker's socket"
             : error == -ENOENT       ? "there is no broker's socket of this name"
             : error == -EMFILE || error == -ENFILE ? "no descriptors for the broker's socket"
                                      : "the broker's socket cannot be connected to");
    return error;
  }
  std::uint32_t user;
  if (int error = channel_.PeerUser(&user)) {
    why->Set("it cannot be told whose the broker is");
    return error;
  }
  if (user != 0 && user != os::ThisUser() && !os::IsUserListed(kTrustedFile, user)) {
    why->Set("the broker is another user's: only root's, one's own, and those of users in /etc/ksmu/brokers are trusted");
    return -EPERM;
  }
  int ring_fd;
  if (int error = os::CreateRing(wire::kRingPages * page_bytes_, &ring_fd, &ring_)) {
    why->Set(error == -EMFILE || error == -ENFILE ? "no descriptors for the ring that is shared with the broker" : "no memory for the ring that is shared with the broker");
    return error;
  }
  out_.header = {0, Kind::kJoin, 1, ++number_, 0};
  out_.join = {wire::kVersion, static_cast<std::uint32_t>(page_bytes_), wire::kRingPages, 0};
  const bool sent = SendQuestion(ring_fd, kJoinPatienceMs);
  os::CloseDescriptor(ring_fd);
  int descriptors[2] = {-1, -1};
  std::size_t count = 0;
  if (!sent || !Ask(Kind::kJoined, kJoinPatienceMs, descriptors, 2, &count)) {
    if (in_.header.kind == Kind::kRefused && sent) {
      const auto reason = static_cast<wire::Refusal>(in_.words[0]);
      why->Set(reason == wire::Refusal::kVersion      ? "the broker speaks another version of the protocol"
               : reason == wire::Refusal::kPageSize   ? "the broker has another page size"
               : reason == wire::Refusal::kNotAllowed ? "the broker does not let this user into the domain"
               : reason == wire::Refusal::kFull       ? "the broker has no room for another member"
                                                      : "the broker has refused the ring");
      return -ECONNABORTED;
    }
    why->Set("the broker does not answer, or not as a broker does");
    return -ETIMEDOUT;
  }
  seed_ = in_.joined.seed;
  index_bytes_ = in_.joined.index_bytes;
  index_fd_ = descriptors[0];
  const bool sound = count == 2 && in_.joined.log_entries == kLogEntries && index_bytes_ == kIndexFileBytes && os::SizeOf(index_fd_) == index_bytes_;
  const int mapped = sound ? os::MapReceived(descriptors[1], page_bytes_, true, &canary_) : 0;
  if (count == 2) os::CloseDescriptor(descriptors[1]);
  if (!sound || mapped || !MapIndex()) {
    why->Set(sound ? "no memory for the broker's index" : "the broker's answer is not as a broker's is");
    return sound ? -ENOMEM : -EPROTO;
  }
  // What has been published before is looked up by the engine.
  log_position_ = Reader().log_head();
  return 0;
}

// The index grows as frames are published; what of it lies behind the mapping is not seen. False: nothing could be mapped.
bool Member::MapIndex() {
  const std::size_t wanted = index_ ? std::min(index_bytes_, std::max(Reader().table_bytes() * 4, kFirstIndexBytes)) : kFirstIndexBytes;
  if (wanted <= index_mapped_) return true;
  std::byte* grown;
  if (os::MapReceived(index_fd_, wanted, false, &grown) != 0) return index_ != nullptr;
  if (index_) os::UnmapReceived(index_, index_mapped_);
  index_ = grown;
  index_mapped_ = wanted;
  return true;
}

void Member::Lookup(std::uint32_t hash, bool (*visit)(void* cookie, frames::Frame theirs), void* cookie) const {
  if (!channel_.open()) return;
  Reader().Lookup(hash, [&](Frame frame) { return visit(cookie, frame); });
}

bool Member::SendQuestion(int descriptor, int patience_ms) {
  const std::size_t bytes = wire::Encode(out_, packet_.data());
  for (;;) {
    const int error = channel_.Send(packet_.data(), bytes, descriptor);
    if (error == 0) return true;
    if (error != -EAGAIN || patience_ms == 0 || !channel_.Wait(true, patience_ms)) return false;
  }
}

// The next packet, decoded into in_. What is received but not sound ends the membership: -EPROTO.
std::ptrdiff_t Member::ReceiveNext(int* descriptors, std::size_t capacity, std::size_t* count) {
  const std::ptrdiff_t bytes = channel_.Receive(packet_.data(), packet_.size(), descriptors, capacity, count);
  if (bytes == -EAGAIN) return bytes;
  if (bytes >= 0 && wire::Decode(packet_.data(), static_cast<std::size_t>(bytes), wire::Sender::kBroker, &in_) == nullptr) return bytes;
  for (std::size_t i = 0; i < *count; ++i) os::CloseDescriptor(descriptors[i]);
  *count = 0;
  in_.header = {};
  return -EPROTO;
}

// What is in in_ came by itself. False: nothing that does.
bool Member::NoteWanted() {
  if (in_.header.kind != Kind::kWanted) return false;
  for (std::size_t i = 0; i < in_.header.count; ++i) {
    if (wanted_.size() >= kMostWanted || !wanted_.push_back(in_.words[i])) lost_ = true;
  }
  return true;
}

// Waits for the answer to the last question, into in_. False: it did not come, or another one did.
bool Member::Ask(Kind answer, int patience_ms, int* descriptors, std::size_t capacity, std::size_t* count) {
  for (;;) {
    const std::ptrdiff_t got = ReceiveNext(descriptors, capacity, count);
    if (got == -EAGAIN) {
      if (!channel_.Wait(false, patience_ms)) break;
      continue;
    }
    if (got < 0) break;
    if (in_.header.kind == answer && in_.header.number == number_) return true;
    for (std::size_t i = 0; i < *count; ++i) os::CloseDescriptor(descriptors[i]);
    *count = 0;
    if (!NoteWanted()) break;
  }
  channel_.Close();
  return false;
}

void Member::Keep(Words* words, std::uint32_t word) {
  // Without memory for four bytes the frame stays this process's until it ends.
  if (channel_.open()) words->push_back(word);
}

void Member::Offer(std::uint32_t hash) {
  if (!channel_.open()) return;
  if (offers_.size() >= kMostOffers || !offers_.push_back(hash)) lost_ = true;
}

bool Member::FlushWords(Kind kind, Words* words, int patience_ms) {
  std::size_t sent = 0;
  while (sent < words->size()) {
    const std::size_t n = std::min(words->size() - sent, wire::kMaxEntries);
    out_.header = {0, kind, static_cast<std::uint16_t>(n), 0, 0};
    std::copy_n(words->begin() + sent, n, out_.words.begin());
    if (!SendQuestion(-1, patience_ms)) break;
    sent += n;
  }
  const bool all = sent == words->size();
  if (sent) {
    std::copy(words->begin() + sent, words->end(), words->begin());
    for (std::size_t i = 0; i < sent; ++i) words->pop_back();
  }
  return all;
}

// In this order: a frame that is granted again is not to be released by what was said before.
bool Member::Flush(int patience_ms) {
  return FlushWords(Kind::kDrop, &drops_, patience_ms) && FlushWords(Kind::kRelease, &releases_, patience_ms) &&
         FlushWords(Kind::kOffer, &offers_, patience_ms);
}

bool Member::Settle(Want* wants, std::size_t count) {
  const auto fail = [&] {
    channel_.Close();
    for (std::size_t i = 0; i < count; ++i) wants[i].theirs = frames::kNoFrame;
    return false;
  };
  if (!channel_.open() || count == 0 || count > wire::kMaxSettle) return fail();
  static_assert(int{SettleEntry::kPublish} == int{Want::kPublish} && int{SettleEntry::kReplica} == int{Want::kReplica} &&
                int{SettleEntry::kAcquire} == int{Want::kAcquire});
  if (!Flush(kPatienceMs)) return fail();
  out_.header = {0, Kind::kSettle, static_cast<std::uint16_t>(count), ++number_, 0};
  for (std::size_t i = 0; i < count; ++i) {
    out_.settle[i] = {wants[i].kind, wants[i].hash, wants[i].kind == Want::kAcquire ? wants[i].theirs : wants[i].place, 0};
  }
  std::size_t none = 0;
  if (!SendQuestion(-1, kPatienceMs) || !Ask(Kind::kSettled, kPatienceMs, nullptr, 0, &none) || in_.header.count != count) return fail();
  for (std::size_t i = 0; i < count; ++i) {
    const bool odd = wants[i].kind == Want::kAcquire && in_.words[i] != wire::kNoFrame && in_.words[i] != wants[i].theirs;
    if (odd) return fail();
  }
  for (std::size_t i = 0; i < count; ++i) wants[i].theirs = in_.words[i];
  return true;
}

int Member::OpenFile(std::size_t number, os::File* out) {
  if (!channel_.open() || number >= wire::kMaxFiles) return -EINVAL;
  out_.header = {0, Kind::kFile, 1, ++number_, 0};
  out_.words[0] = static_cast<std::uint32_t>(number);
  int fd = -1;
  std::size_t count = 0;
  if (!SendQuestion(-1, kPatienceMs) || !Ask(Kind::kFileIs, kPatienceMs, &fd, 1, &count)) {
    channel_.Close();
    return -EPIPE;
  }
  int error = count == 1 && in_.words[0] == number ? os::CheckFramesFile(fd, wire::kFramesPerFile * page_bytes_, out) : -EPROTO;
  if (error && count) os::CloseDescriptor(fd);
  if (error) channel_.Close();
  return error;
}

bool Member::Serve(const News& news) {
  if (!channel_.open()) return false;
  MapIndex();
  if (!Reader().ReadLog(&log_position_, [&](std::uint32_t hash, Frame frame) { news.published(news.cookie, hash, frame); }) || lost_) {
    lost_ = false;
    news.missed(news.cookie);
  }
  for (int i = 0; i < kPacketsAServe; ++i) {
    std::size_t none = 0;
    const std::ptrdiff_t got = ReceiveNext(nullptr, 0, &none);
    if (got == -EAGAIN) break;
    if (got < 0 || !NoteWanted()) {
      channel_.Close();
      return false;
    }
  }
  for (std::uint32_t hash : wanted_) news.wanted(news.cookie, hash);
  wanted_.clear();
  Flush(0);
  return true;
}

}  // namespace ksmu::broker
