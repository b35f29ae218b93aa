#include "broker/member.h"

#include <algorithm>
#include <cerrno>
#include <new>
#include <utility>

#include "os/users.h"

namespace ksmu::broker {

using wire::Kind;
using wire::SettleEntry;

namespace {
constexpr std::size_t kMostOffers = 1u << 20, kMostWanted = 1u << 20;
constexpr int kPacketsAServe = 16;
constexpr std::size_t kFirstIndexBytes = std::size_t{16} << 20;
}  // namespace

int Member::Begin(const char* path, std::size_t page_bytes, Member** out, os::ErrorText* why) {
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
  if (member->late_file_ >= 0) os::CloseDescriptor(member->late_file_);
  if (member->canary_) os::UnmapReceived(member->canary_, member->page_bytes_);
  if (member->index_) os::UnmapReceived(member->index_, member->index_mapped_);
  if (member->index_fd_ >= 0) os::CloseDescriptor(member->index_fd_);
  if (member->ring_) os::UnmapReceived(member->ring_, wire::kRingPages * member->page_bytes_);
  member->~Member();
  base::UnmapOwnPages(member, sizeof(Member));
}

void Member::Leave() {
  if (channel_.open()) SendGivenUp();
  channel_.Close();
}

int Member::Reach(const char* path, os::Channel* channel, std::uint32_t* user, os::ErrorText* why) {
  if (int error = channel->Connect(path)) {
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
  if (int error = channel->PeerUser(user)) {
    why->Set("it cannot be told whose the broker is");
    return error;
  }
  if (!IsTrusted(*user)) {
    why->Set("the broker is another user's: only root's, one's own, and those of users in /etc/ksmu/brokers are trusted");
    return -EPERM;
  }
  return 0;
}

bool Member::IsTrusted(std::uint32_t user) {
  const bool unknown = user == os::kUnknownUser && os::SeesUnknownUsers();
  return !unknown && (user == 0 || user == os::ThisUser() || os::IsUserListed(kTrustedFile, user));
}

int Member::Open(const char* path, os::ErrorText* why) {
  std::uint32_t user;
  if (int error = Reach(path, &channel_, &user, why)) return error;
  int ring_fd;
  if (int error = os::CreateRing(wire::kRingPages * page_bytes_, &ring_fd, &ring_)) {
    why->Set(error == -EMFILE || error == -ENFILE ? "no descriptors for the ring that is shared with the broker" : "no memory for the ring that is shared with the broker");
    return error;
  }
  out_.header = {0, Kind::kJoin, 1, 0, 0};
  out_.join = {wire::kVersion, static_cast<std::uint32_t>(page_bytes_), wire::kRingPages, 0};
  const Answer asked = AskFor(Kind::kJoined, ring_fd);
  os::CloseDescriptor(ring_fd);
  if (asked == Answer::kGranted) return 0;
  why->Set("the broker does not take what it is sent");
  return -EPIPE;
}

int Member::Finish(os::ErrorText* why) {
  int descriptors[2] = {-1, -1};
  std::size_t count = 0;
  const Answer heard = Hear(0, descriptors, 2, &count);
  if (heard == Answer::kLater) return -EAGAIN;
  if (heard == Answer::kGranted && count == 2) return Admitted(descriptors[0], descriptors[1], why);
  for (std::size_t i = 0; i < count; ++i) os::CloseDescriptor(descriptors[i]);
  channel_.Close();
  if (in_.header.kind == Kind::kRefused) {
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

int Member::Admitted(int index_fd, int canary_fd, os::ErrorText* why) {
  seed_ = in_.joined.seed;
  by_node_ = in_.joined.by_node != 0;
  index_bytes_ = in_.joined.index_bytes;
  index_fd_ = index_fd;
  const bool sound = in_.joined.log_entries == kLogEntries && index_bytes_ == kIndexFileBytes && os::SizeOf(index_fd_) == index_bytes_;
  const int mapped = sound ? os::MapReceived(canary_fd, page_bytes_, true, &canary_) : 0;
  os::CloseDescriptor(canary_fd);
  if (!sound || mapped || !MapIndex()) {
    channel_.Close();
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

// Sends out_. False: it does not fit now; or the broker has gone, and the channel is closed.
bool Member::Send(int descriptor) {
  const int error = channel_.Send(packet_.data(), wire::Encode(out_, packet_.data()), descriptor);
  if (error && error != -EAGAIN) channel_.Close();
  return error == 0;
}

// Asks what out_ says; its number is given here. kGranted: asked, and Hear tells the answer. kLater: not asked.
Member::Answer Member::AskFor(Kind answer, int descriptor) {
  number_ = number_ == ~std::uint32_t{0} ? 1 : number_ + 1;
  out_.header.number = number_;
  if (!Send(descriptor)) return channel_.open() ? Answer::kLater : Answer::kGone;
  awaited_ = answer;
  asked_at_ = os::MonotonicMs();
  return Answer::kGranted;
}

// The next packet, decoded into in_. What is received but not sound is -EPROTO.
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
  if (in_.header.count == 0) lost_ = true;
  for (std::size_t i = 0; i < in_.header.count; ++i) {
    if (wanted_.size() >= kMostWanted || !wanted_.push_back(in_.words[i])) lost_ = true;
  }
  return true;
}

// The same of what an operator wants. What of it has not been taken yet is overtaken by what has come since.
bool Member::NoteWish() {
  if (in_.header.kind == Kind::kTune) {
    for (std::size_t i = 0; i < in_.header.count; ++i) {
      wishes_.tunables |= 1u << in_.tune[i].tunable;
      wishes_.values[in_.tune[i].tunable] = in_.tune[i].value;
      wishes_.yielding &= ~(1u << in_.tune[i].tunable);
      wishes_.yielding |= in_.tune[i].yields << in_.tune[i].tunable;
    }
    tune_number_ = in_.header.number;
    return true;
  }
  if (in_.header.kind != Kind::kAsk) return false;
  wishes_.regions = true;
  wishes_.regions_from = in_.ask.from;
  ask_number_ = in_.header.number;
  told_ = false;
  return true;
}

bool Member::TakeWishes(Wishes* wishes) {
  if (!channel_.open() || (!wishes_.tunables && !wishes_.regions)) return false;
  *wishes = wishes_;
  wishes_ = {};
  return true;
}

void Member::AnswerTunable(std::uint32_t tunable, int error) {
  tuned_ |= 1u << tunable;
  tuned_errors_[tunable] = static_cast<std::uint32_t>(std::clamp(error, 0, static_cast<int>(wire::kMostError)));
}

void Member::AnswerRegions(const RegionReport* regions, std::size_t count) {
  if (wishes_.regions) return;  // asked anew
  told_ = true;
  told_count_ = std::min(count, kMaxRegions);
  std::copy_n(regions, told_count_, told_regions_.begin());
}

// Not before all of what has come has been taken: the number answers for all up to it.
void Member::SendAnswers() {
  static_assert(kCounterSlots == wire::kCounterSlots && kTunableSlots == wire::kTunableSlots && kReasonSlots == wire::kReasonSlots && kMaxRegions == wire::kMaxRegions);
  if (tuned_ && !wishes_.tunables && channel_.open()) {
    std::uint16_t count = 0;
    for (std::uint32_t t = 0; t < kTunableSlots; ++t) {
      if (tuned_ >> t & 1) out_.tuned[count++] = {t, tuned_errors_[t]};
    }
    out_.header = {0, Kind::kTuned, count, tune_number_, 0};
    if (Send()) tuned_ = 0;
  }
  if (told_ && channel_.open()) {
    out_.header = {0, Kind::kTold, static_cast<std::uint16_t>(told_count_), ask_number_, 0};
    for (std::size_t i = 0; i < told_count_; ++i) {
      const RegionReport& r = told_regions_[i];
      out_.regions[i] = {r.start, r.end, r.next, r.flags, r.excluded_cause, r.excluded_bytes, r.merged, r.still, r.changing, r.zero, r.unmerged};
    }
    told_ = !Send();
  }
}

// Reads until the answer that is awaited has come, into in_, or the time is over, or the socket has been read for long enough.
Member::Answer Member::Hear(int wait_ms, int* descriptors, std::size_t capacity, std::size_t* count) {
  const std::uint64_t end = os::MonotonicMs() + static_cast<std::uint64_t>(wait_ms);
  for (int packets = 0; packets < kPacketsAServe;) {
    const std::ptrdiff_t got = ReceiveNext(descriptors, capacity, count);
    if (got == -EAGAIN) {
      const std::uint64_t now = os::MonotonicMs();
      if (now >= end || !channel_.Wait(false, static_cast<int>(end - now))) break;
      continue;
    }
    const bool awaited = got >= 0 && in_.header.kind == awaited_ && in_.header.number == number_;
    if (awaited) {
      awaited_ = kNothing;
      return Answer::kGranted;
    }
    for (std::size_t i = 0; i < *count; ++i) os::CloseDescriptor(descriptors[i]);
    *count = 0;
    if (got >= 0 && (NoteWanted() || NoteWish())) {
      ++packets;
      continue;
    }
    channel_.Close();
    return Answer::kGone;
  }
  const bool too_late = awaited_ != kNothing && os::MonotonicMs() > asked_at_ + kPatienceMs;
  if (!too_late) return Answer::kLater;
  channel_.Close();
  return Answer::kGone;
}

void Member::Keep(Words* words, std::uint32_t word) {
  // Without memory for four bytes the frame stays this process's until it ends.
  if (channel_.open()) words->push_back(word);
}

void Member::Offer(std::uint64_t hash) {
  if (!channel_.open()) return;
  if (offers_.size() >= kMostOffers || !offers_.push_back(hash)) lost_ = true;
}

// Sends what is kept, as entries of the kind, in as many messages as it takes. True: all of it.
template <typename T, std::size_t n>
bool Member::SendKept(Kind kind, base::OwnVector<T>* kept, std::array<T, n>* entries) {
  std::size_t sent = 0;
  while (sent < kept->size()) {
    const std::size_t count = std::min(kept->size() - sent, n);
    out_.header = {0, kind, static_cast<std::uint16_t>(count), 0, 0};
    std::copy_n(kept->begin() + sent, count, entries->begin());
    if (!Send()) break;
    sent += count;
  }
  if (sent) std::copy(kept->begin() + sent, kept->end(), kept->begin());
  for (std::size_t i = 0; i < sent; ++i) kept->pop_back();
  return kept->empty();
}

// In this order: a frame that is granted again is not to be released by what was said before. True: all has been sent.
bool Member::SendGivenUp() {
  return !Busy() && SendKept(Kind::kDrop, &drops_, &out_.words) && SendKept(Kind::kRelease, &releases_, &out_.words);
}

// Two MiB that would else stay with each member of a fleet, which publishes a little now and then.
void Member::ClearRing() {
  if (!ring_used_ || Busy()) return;
  os::ClearReceived(ring_, wire::kRingPages * page_bytes_);
  ring_used_ = false;
}

Member::Answer Member::Settle(Want* wants, std::size_t count) {
  if (!channel_.open() || count == 0 || count > wire::kMaxSettle) return Answer::kGone;
  if (Busy()) return Answer::kLater;
  for (std::size_t i = 0; i < count; ++i) asked_[i] = wants[i], wants[i].theirs = frames::kNoFrame;
  static_assert(int{SettleEntry::kPublish} == int{Want::kPublish} && int{SettleEntry::kReplica} == int{Want::kReplica} &&
                int{SettleEntry::kAcquire} == int{Want::kAcquire});
  if (!SendGivenUp()) return channel_.open() ? Answer::kLater : Answer::kGone;
  out_.header = {0, Kind::kSettle, static_cast<std::uint16_t>(count), 0, 0};
  for (std::size_t i = 0; i < count; ++i) {
    const Want& asked = asked_[i];
    const bool acquired = asked.kind == Want::kAcquire;
    out_.settle[i] = {asked.kind, asked.hash, acquired ? asked.theirs : asked.place, acquired ? 0 : static_cast<std::uint32_t>(asked.node)};
  }
  asked_count_ = count;
  const Answer asked = AskFor(Kind::kSettled, -1);
  if (asked != Answer::kGranted) return asked;
  std::size_t none = 0;
  const Answer heard = Hear(kWaitMs, nullptr, 0, &none);
  if (heard != Answer::kGranted) return heard;
  if (!TakeSettled()) return Answer::kGone;
  for (std::size_t i = 0; i < count; ++i) wants[i].theirs = asked_[i].theirs;
  return Answer::kGranted;
}

// in_ is the answer to what was asked: asked_ says what has been granted. False: it is not as a broker's is.
bool Member::TakeSettled() {
  bool sound = in_.header.count == asked_count_;
  for (std::size_t i = 0; i < asked_count_ && sound; ++i) {
    sound = asked_[i].kind != Want::kAcquire || in_.words[i] == wire::kNoFrame || in_.words[i] == asked_[i].theirs;
    asked_[i].theirs = in_.words[i];
  }
  if (!sound) channel_.Close();
  return sound;
}

bool Member::IsGivenUp(frames::Frame theirs) const {
  return std::find(drops_.begin(), drops_.end(), theirs) != drops_.end() || std::find(releases_.begin(), releases_.end(), theirs) != releases_.end();
}

int Member::OpenFile(std::size_t number, os::File* out) {
  if (!channel_.open() || number >= wire::kMaxFiles) return -EINVAL;
  const int late = std::exchange(late_file_, -1);
  if (late >= 0 && asked_file_ == number) return TakeFile(late, 1, out);
  if (late >= 0) os::CloseDescriptor(late);
  if (Busy()) return -EAGAIN;
  out_.header = {0, Kind::kFile, 1, 0, 0};
  out_.words[0] = static_cast<std::uint32_t>(number);
  asked_file_ = number;
  int fd = -1;
  std::size_t count = 0;
  Answer answer = AskFor(Kind::kFileIs, -1);
  if (answer == Answer::kGranted) answer = Hear(kWaitMs, &fd, 1, &count);
  if (answer == Answer::kGranted) return TakeFile(fd, count, out);
  return answer == Answer::kLater ? -EAGAIN : -EPIPE;
}

int Member::TakeFile(int fd, std::size_t count, os::File* out) {
  const int error = count == 1 ? os::CheckFramesFile(fd, wire::kFramesPerFile * page_bytes_, out) : -EPROTO;
  if (error && count) os::CloseDescriptor(fd);
  if (error) channel_.Close();
  return error;
}

// The answer to what was asked some time ago. Of what it grants some may be what we have had all the time, and given up since:
// that has not been sent, and is to be as it was.
bool Member::TakeLate(int fd, std::size_t count, const News& news) {
  if (in_.header.kind == Kind::kFileIs) {
    late_file_ = count == 1 ? fd : -1;
    return true;
  }
  if (!TakeSettled()) return false;
  for (std::size_t i = 0; i < asked_count_; ++i) {
    // The call may ask for a file, but for no frames: asked_ stays.
    if (asked_[i].theirs != wire::kNoFrame && !IsGivenUp(asked_[i].theirs)) news.granted(news.cookie, asked_[i]);
  }
  return channel_.open();
}

bool Member::Serve(const News& news) {
  if (!channel_.open()) return false;
  MapIndex();
  if (!Reader().ReadLog(&log_position_, [&](std::uint32_t hash, Frame frame) { news.published(news.cookie, hash, frame); }) || lost_) {
    lost_ = false;
    news.missed(news.cookie);
  }
  int fd = -1;
  std::size_t count = 0;
  const Answer heard = Hear(0, &fd, 1, &count);
  if (heard == Answer::kGone || (heard == Answer::kGranted && !TakeLate(fd, count, news))) return false;
  for (std::uint32_t hash : wanted_) news.wanted(news.cookie, hash);
  wanted_.clear();
  SendGivenUp();
  SendKept(Kind::kOffer, &offers_, &out_.offers);
  if (report_is_new_ && channel_.open()) {
    out_.header = {0, Kind::kReport, 1, 0, 0};
    out_.report = {report_.advised, report_.merged, report_.frames, report_.zero, report_.still, report_.changing, report_.breaks, report_.cpu_ns,
                   report_.counters, report_.tunables, report_.unmerging, 0};
    for (std::int64_t& n : out_.report.counters) n = std::clamp(n, -wire::kMostCount, wire::kMostCount);
    report_is_new_ = !Send();
  }
  // After the report that goes with it: who has the answer is not to take what was before it for what came of it.
  if (!report_is_new_) SendAnswers();
  return channel_.open();
}

}  // namespace ksmu::broker
