// The broker's server, with the kernel's files under it and everything else pretended: peers that send what they like, sockets that
// take nothing for a while, children that go on mapping what a member had, descriptors that run out, and time.
//
// Beside it a model of each peer. The properties: what is sent is a packet that a broker may send, the answer to the question
// that was asked, and never to a connection that has ended; a connection is ended for what its peer did, always for what is
// wrong and never for what is right; a frame that was granted has the bytes that were asked for, and keeps them until nobody who
// was ever given it can have it mapped; what is wanted of a member it has offered; nothing is open or kept when all have gone.
// Some peers are operators, who look and set, beside a tuner: a member is told one thing at a time, what has been set is shown,
// who may not set changes nothing, and who asks is answered within a second.
//
// An input is a byte of settings, then (peer, operation) pairs: three bits and five of a byte, then what the operation needs.

#include "broker/server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "server_fuzz_operators.h"
#include "server_fuzz_peers.h"

namespace ksmu::broker {
namespace {

using namespace fuzzing;
using fuzz::Input;
using wire::Kind;
using wire::Message;
using ControlKind = control::Kind;

constexpr std::size_t kPeers = 8;
constexpr std::size_t kFewFrames = 150;  // of all domains, where that is limited

// What a call may do to the peer that it is about.
enum class Verdict { kStays, kEnds, kEither };

class Run final : public Outbox {
 public:
  explicit Run(std::uint8_t settings) : settings_(settings) {
    RingOf(0), HashOfContent(0);
    open_before_ = OpenDescriptors();
    Server::Config config;
    config.page_bytes = kPage;
    config.seed = kSeed;
    config.log = [](Level, const std::string& line) { FUZZ_CHECK(!line.empty(), "a line that is logged says something"); };
    if (settings & 1) config.dispose = [](std::vector<Fd> fds) { FUZZ_CHECK(!fds.empty(), "something to close"); };
    if (settings & 4) config.most_frames = kFewFrames;
    if (settings & 8) config.pressure = [this] { return pressure_; };
    config.owner = kOwner;
    server_ = std::make_unique<Server>(std::move(config), *this);
    server_->AddListener("");
    server_->AddListener("a");
    server_->AddListener("b");
    if (!(settings & 16)) {
      Connect(auditor_, 0);
      AskAsAuditor(ControlKind::kOperate);
    }
  }

  void All(Input& input) {
    for (unsigned step = 1; !input.Done() && step < 400; ++step) {
      Step(input);
      CheckStatus();
      if (step % 8 == 0) Audit();
      if (step % 16 == 0) CheckFrames();
    }
    Audit();
    CheckFrames();
    if (auditor_.id) server_->Disconnected(std::exchange(auditor_.id, 0));
    for (Peer& peer : peers_) {
      if (peer.state == Peer::kNone) continue;
      server_->Disconnected(peer.id);
      End(peer);
    }
    // Longer than any delay: once for those that were seen in use, and none was let go of yet.
    CheckFrames();
    ghosts_.clear();
    Tick(3 * Server::kSecond);
    FUZZ_CHECK(server_->connections() == 0 && server_->Status().empty(), "when all have gone no domain is left");
    // Nobody is counted who has gone.
    if (settings_ & 2) {
      for (ConnId i = 0; i < Server::kMaxStrangers; ++i) FUZZ_CHECK(server_->Connected(++ids_, 0, {1, 1}), "there is room for strangers");
      FUZZ_CHECK(!server_->Connected(++ids_, 0, {1, 1}), "and an end to it");
      FUZZ_CHECK(server_->Connected(++ids_, 0, {2, 1}), "which is one user's own");
      all_strangers_ = true;
      Tick(Server::kJoinWithin);
      FUZZ_CHECK(server_->connections() == 0, "strangers do not stay");
    }
    server_.reset();
    FUZZ_CHECK(OpenDescriptors() == open_before_, "nothing is left open");
  }

 private:
  // --- what the server does ---
  bool Send(ConnId id, const std::byte* packet, std::size_t bytes, const int* descriptors, std::size_t count) override {
    Plenty plenty;
    Peer* const peer = Find(id);
    FUZZ_CHECK(peer, "nothing is sent to a connection that has ended");
    FUZZ_CHECK(!peer->refused, "nothing is said after a refusal");
    if (peer->state == Peer::kOperator || peer->asked) return SendToOperator(*peer, packet, bytes, count);
    FUZZ_CHECK(wire::Decode(packet, bytes, wire::Sender::kBroker, &in_) == nullptr, "what is sent is what a broker may send");
    if (!peer->takes) {
      sent_in_vain_ = id;
      return false;
    }
    if (in_.header.kind == Kind::kWanted) {
      FUZZ_CHECK(count == 0, "no descriptors with what is wanted");
      for (std::size_t i = 0; i < in_.header.count; ++i) {
        const auto offered = peer->may_want.find(in_.words[i]);
        FUZZ_CHECK(offered != peer->may_want.end() && offered->second > 0, "what is wanted it has offered, and it is there, or somebody else has offered it since");
        --offered->second;
      }
      return true;
    }
    if (in_.header.kind == Kind::kTune || in_.header.kind == Kind::kAsk) {
      FUZZ_CHECK(count == 0 && peer->state == Peer::kMember, "members are told, and without descriptors");
      Told(*peer);
      return true;
    }
    FUZZ_CHECK(peer->question && peer->question->number == in_.header.number, "an answer is to the question that was asked");
    const Question question = std::move(*peer->question);
    peer->question.reset();
    switch (in_.header.kind) {
      case Kind::kRefused:
        FUZZ_CHECK(question.kind == Kind::kJoin && count == 0, "who asks to join is refused");
        peer->refused = true;
        break;
      case Kind::kJoined: Joined(*peer, question, descriptors, count); break;
      case Kind::kFileIs:
        FUZZ_CHECK(question.kind == Kind::kFile && question.file == in_.words[0] && count == 1, "the file that was asked for");
        FUZZ_CHECK((fcntl(descriptors[0], F_GETFL) & O_ACCMODE) == O_RDONLY, "frames are not a member's to write");
        peer->has.files[question.file] = Fd(Dup(descriptors[0]));
        break;
      default:
        FUZZ_CHECK(in_.header.kind == Kind::kSettled && question.kind == Kind::kSettle && count == 0, "an answer to a settle");
        FUZZ_CHECK(in_.header.count == question.entries.size(), "an answer for each");
        for (std::size_t i = 0; i < in_.header.count; ++i) {
          FUZZ_CHECK(in_.words[i] != wire::kNoFrame || question.may_be_refused[i], "nothing is refused without a reason");
          Granted(*peer, question.entries[i], in_.words[i]);
        }
        break;
    }
    return true;
  }
  bool SendToOperator(Peer& peer, const std::byte* packet, std::size_t bytes, std::size_t count) {
    FUZZ_CHECK(count == 0 && control::Decode(packet, bytes, control::Sender::kBroker, &said_) == nullptr, "what is sent is what a broker may send an operator");
    FUZZ_CHECK(peer.asked, "one answer to one question");
    // What was kept is judged as of when it was said.
    if (!peer.kept_since) {
      CheckAnswer(*peer.asked, MayWrite(peer.uid), peer.own_domain, said_, now_);
      answered_ = {said_.header.number, said_.kind() == ControlKind::kFailed};
      if (said_.kind() == ControlKind::kWelcome) peer.own_domain = said_.welcome.own_domain, domains_.Note(peer.own_domain);
      if (said_.kind() == ControlKind::kDomainsAre) CheckDomains();
      if (said_.kind() == ControlKind::kMembersAre) CheckMembers();
    }
    if (!peer.takes) {
      FUZZ_CHECK(!peer.kept_since, "an answer that is not taken is kept until it may be");
      peer.kept_since = now_;
      return false;
    }
    peer.kept_since.reset();
    peer.asked.reset();
    return true;
  }
  void CheckDomains() {
    for (std::size_t i = 0; i < said_.header.count; ++i) {
      const control::DomainEntry& entry = said_.domains[i];
      domains_.Note(entry.domain);
      wishes_.Check(entry);
      FUZZ_CHECK(settings_ & 8 || !entry.tuner, "no tuner where there is none");
      const auto is_its = [&](const Peer& p) { return p.state == Peer::kMember && NameOf(p.has.key) == control::NameOf(entry); };
      FUZZ_CHECK(entry.members == static_cast<std::uint64_t>(std::count_if(peers_.begin(), peers_.end(), is_its)), "members of a domain");
    }
  }
  void CheckMembers() {
    for (std::size_t i = 0; i < said_.header.count; ++i) {
      const Peer* const peer = Find(said_.members[i].pid);
      FUZZ_CHECK(peer && peer->state == Peer::kMember && peer->uid == said_.members[i].uid, "a member that is there");
    }
  }
  // A member, of tunables; or it is asked.
  void Told(Peer& peer) {
    if (in_.header.kind == Kind::kAsk) {
      FUZZ_CHECK(!peer.ask_number, "one question after another");
      peer.ask_number = in_.header.number;
      peer.ask_from = in_.ask.from;
      return;
    }
    FUZZ_CHECK(!peer.told_number, "who has not answered is told of nothing more");
    peer.told_number = in_.header.number;
    peer.told.assign(in_.tune.begin(), in_.tune.begin() + in_.header.count);
    for (const wire::TuneEntry& e : peer.told) FUZZ_CHECK(!e.yields || (settings_ & 8 && IsTuners(e.tunable)), "the tuner's wishes yield, and nobody else's");
  }
  void Drop(ConnId id, const char* reason) override {
    Plenty plenty;
    Peer* const peer = Find(id);
    FUZZ_CHECK(peer && reason && reason[0], "a connection ends once, for a reason");
    if (all_strangers_) return;
    FUZZ_CHECK(peer == about_ ? verdict_ != Verdict::kStays : ticking_ && IsLate(*peer), "nobody is dropped who did nothing wrong");
    End(*peer);
  }

  void Joined(Peer& peer, const Question& question, const int* descriptors, std::size_t count) {
    FUZZ_CHECK(question.kind == Kind::kJoin && count == 2, "the index and the canary for who joins");
    FUZZ_CHECK((fcntl(descriptors[0], F_GETFL) & O_ACCMODE) == O_RDONLY, "the index is not a member's to write");
    FUZZ_CHECK((fcntl(descriptors[1], F_GETFL) & O_ACCMODE) == O_RDWR, "a canary is mapped shared");
    FUZZ_CHECK(in_.joined.seed == kSeed && in_.joined.index_bytes == kIndexFileBytes && in_.joined.log_entries == kLogEntries,
               "what a member has to know");
    peer.has.canary.Reset(Dup(descriptors[1]));
  }
  void Granted(Peer& peer, const SettleEntry& entry, Frame frame) {
    if (frame == wire::kNoFrame) return;
    if (entry.what == SettleEntry::kAcquire) {
      FUZZ_CHECK(frame == entry.place, "the frame that was asked for, or none");
      std::uint32_t content = 0;
      while (content < wire::kRingPages && HashOfContent(content) != entry.hash) ++content;
      FUZZ_CHECK(content < wire::kRingPages, "nothing has a hash that no page has");
      peer.has.held[frame] = content;
    } else {
      peer.has.held[frame] = ContentOf(entry.place);
    }
    peer.has.covered.erase(frame);
  }
  // By somebody of whom that is sure.
  bool IsHeld(const Key& key, const SettleEntry& entry) const {
    const auto has = [&](const Belongings& b) {
      const auto at = b.key == key ? b.held.find(entry.place) : b.held.end();
      return at != b.held.end() && HashOfContent(at->second) == entry.hash;
    };
    return std::any_of(peers_.begin(), peers_.end(), [&](const Peer& p) { return p.state == Peer::kMember && has(p.has); }) ||
           std::any_of(ghosts_.begin(), ghosts_.end(), has);
  }

  // --- what peers do ---
  void Step(Input& input) {
    const std::uint8_t byte = input.Byte();
    Peer& peer = peers_[byte >> 5];
    const unsigned what = byte & 31;
    if (what == 31) return Time(input);
    if (what == 30) return LetGoOfGhost(input);
    if (what == 29) {
      // Descriptors run out so many further on, or not any more.
      const std::uint8_t room = input.Byte();
      starving_ = room & 1;
      room_ = room >> 1 & 7;
      return;
    }
    if (peer.state == Peer::kNone) {
      Connect(peer, input.Byte());
      if (what == 1) return Ask(peer, ControlKind::kOperate, input);
      // Most join at once.
      if (what >= 2) AskToJoin(peer, kRing, wire::kRingPages);
      return;
    }
    if (peer.state == Peer::kOperator) return ActAsOperator(peer, what, input);
    Act(peer, what, input);
    // As members do; to look into frames they need it.
    for (const auto& [frame, content] : peer.has.held) {
      const std::uint32_t file = frame / wire::kFramesPerFile;
      if (peer.has.files.contains(file) || peer.question || !peer.takes) continue;
      AskForFile(peer, file);
      break;
    }
  }
  void Act(Peer& peer, unsigned what, Input& input) {
    switch (what) {
      case 0: return SendRaw(peer, input);
      case 1: return SendMutated(peer, input);
      case 2: {
        const unsigned kind = input.Byte() % kRingKinds;
        const std::uint16_t odd = input.Half();
        return AskToJoin(peer, kind, odd & 1 ? odd : PagesOf(kind), odd);
      }
      case 3: return AskForFile(peer, input.Byte() % 3);
      case 4: case 5: case 6: case 7: return SettleSome(peer, input);
      case 8: case 9: return SettleRun(peer, input);
      case 10: case 11: case 12: return LetGo(peer, input, Kind::kDrop);
      case 13: case 14: case 15: return LetGo(peer, input, Kind::kRelease);
      case 16: case 17: case 18: return Offer(peer, input);
      case 19: return Post(peer, Blank(Kind::kReport, 1, 0), {});
      case 20:
        Call(peer, Verdict::kStays, [&] { server_->Disconnected(peer.id); });
        return End(peer);
      case 21: return Call(peer, Verdict::kEnds, [&] { server_->Reject(peer.id, "rejected", Descriptors(input.Byte())); });
      case 22: peer.takes = false; return;
      case 23: case 24: return MakeWritable(peer);
      case 25: return Ghostly(peer, input);
      case 26:
        if (peer.state == Peer::kStranger) return Ask(peer, ControlKind::kOperate, input);
        MakeTuned(&out_, peer, input.Byte());
        return Post(peer, out_, {});
      case 27: {
        const std::uint8_t first = input.Byte();
        if (first & 8) MakeReport(&out_, first, input.Byte());
        else MakeTold(&out_, peer, first);
        return Post(peer, out_, {});
      }
      default: return Call(peer, Verdict::kStays, [&] { server_->Flush(); });
    }
  }

  void ActAsOperator(Peer& peer, unsigned what, Input& input) {
    switch (what) {
      case 2: return Ask(peer, ControlKind::kOperate, input);
      case 3: case 4: case 5: return Ask(peer, ControlKind::kDomains, input);
      case 6: case 7: return Ask(peer, ControlKind::kMembers, input);
      case 16: case 17: return Ask(peer, ControlKind::kExplain, input);
      case 18: return Ask(peer, ControlKind::kLimit, input);
      case 19: return Ask(peer, ControlKind::kDefaults, input);
      case 0: case 1: case 20: case 21: case 22: case 23: case 24: case 25: case 28: return Act(peer, what, input);
      default: return Ask(peer, ControlKind::kSet, input);
    }
  }
  void Ask(Peer& peer, ControlKind kind, Input& input) {
    if (kind == ControlKind::kOperate) {
      const std::uint8_t how = input.Byte();
      asking_.header = control::MakeHeader(kind, 1, ++numbers_);
      asking_.operate = {control::kVersion + (how == 255), how == 254};
    } else {
      MakeQuestion(&asking_, kind, ++numbers_, static_cast<std::uint32_t>(peers_[input.Byte() % kPeers].id), domains_, input);
    }
    last_ = Asking();
    Deliver(peer, last_, {});
  }
  std::vector<std::byte> Asking() const {
    std::vector<std::byte> packet(control::kMaxPacket);
    packet.resize(control::Encode(asking_, packet.data()));
    return packet;
  }

  // One of root's, who looks at everything now and then.
  void Audit() {
    for (std::uint64_t after = 0; auditor_.id; after = said_.domains[said_.header.count - 1].domain) {
      AskAsAuditor(ControlKind::kDomains, after);
      if (said_.header.count == 0) return;
    }
  }
  void AskAsAuditor(ControlKind kind, std::uint64_t word = 0) {
    asking_.header = control::MakeHeader(kind, 1, ++numbers_);
    asking_.operate = {};
    asking_.word = word;
    Deliver(auditor_, Asking(), {});
  }

  void Connect(Peer& peer, std::uint8_t how) {
    peer = Peer{};
    peer.id = ++ids_;
    peer.listener = how % 3;
    peer.uid = how >> 2 & 3;
    peer.since = now_;
    peer.takes = (how >> 4 & 3) != 3;  // some not even the answer to their joining
    peer.has.key = {peer.listener, peer.listener ? 0 : peer.uid};
    FUZZ_CHECK(server_->Connected(peer.id, peer.listener, {peer.uid, static_cast<std::int32_t>(peer.id)}), "there is room for strangers");
    peer.state = Peer::kStranger;
  }
  void AskToJoin(Peer& peer, unsigned ring, std::uint32_t pages, std::uint16_t odd = 0) {
    Message& m = Blank(Kind::kJoin, 1, ++numbers_);
    m.join = {wire::kVersion + (odd % 32 == 30), static_cast<std::uint32_t>(kPage << (odd % 32 == 28)), pages, 0};
    std::vector<Fd> fds;
    if (odd % 32 != 26) fds.emplace_back(Dup(RingOf(ring)));
    if (odd % 32 == 24) fds.emplace_back(Dup(RingOf(kRing)));
    joins_with_ = ring;
    Post(peer, m, std::move(fds));
  }
  void AskForFile(Peer& peer, std::uint32_t number) {
    Message& m = Blank(Kind::kFile, 1, ++numbers_);
    m.words[0] = number;
    Post(peer, m, {});
  }
  void SettleSome(Peer& peer, Input& input) {
    Message& m = Blank(Kind::kSettle, 0, ++numbers_);
    const unsigned count = 1 + input.Byte() % 8;
    for (; m.header.count < count && (!input.Done() || m.header.count == 0); ++m.header.count) {
      const std::uint8_t how = input.Byte();
      const std::uint32_t place = input.Half() % (how & 4 ? wire::kRingPages : 64u);
      SettleEntry& entry = m.settle[m.header.count];
      if (how & 1) {
        entry = Acquired(peer, place, how);
      } else {
        entry = {how & 2 ? SettleEntry::kReplica : SettleEntry::kPublish, HashOfContent(ContentOf(place)), place, 0};
      }
      if (how >= 0xf8) ++entry.hash;
    }
    Post(peer, m, {});
  }
  // A frame of somebody's in the same domain, or else one that is unlikely.
  SettleEntry Acquired(const Peer& peer, std::uint32_t place, std::uint8_t how) {
    const auto from = [&](const Belongings& b) -> std::optional<SettleEntry> {
      const auto at = b.key == peer.has.key ? b.held.lower_bound(place) : b.held.end();
      if (at == b.held.end()) return std::nullopt;
      return SettleEntry{SettleEntry::kAcquire, HashOfContent(at->second), at->first, 0};
    };
    for (std::size_t i = 0; i < kPeers && how & 2; ++i) {
      const Peer& other = peers_[(i + (how >> 3)) % kPeers];
      if (other.state != Peer::kMember || &other == &peer) continue;
      if (const auto entry = from(other.has)) return *entry;
    }
    for (const Belongings& ghost : ghosts_) {
      if (const auto entry = from(ghost)) return *entry;
    }
    return {SettleEntry::kAcquire, HashOfContent(how), how & 8 ? wire::kFrameLimit - 1 - place : place, 0};
  }
  void SettleRun(Peer& peer, Input& input) {
    Message& m = Blank(Kind::kSettle, 0, ++numbers_);
    const std::uint32_t first = input.Byte() % 128;
    m.header.count = static_cast<std::uint16_t>(1 + input.Byte() % 64);
    for (std::uint32_t i = 0; i < m.header.count; ++i) {
      m.settle[i] = {SettleEntry::kPublish, HashOfContent(ContentOf(first + i)), first + i, 0};
    }
    Post(peer, m, {});
  }
  void LetGo(Peer& peer, Input& input, Kind kind) {
    Message& m = Blank(kind, 0, 0);
    const std::uint8_t how = input.Byte();
    const unsigned stride = 1 + (how & 3), count = 1 + (how >> 2);
    unsigned seen = 0;
    for (const auto& [frame, content] : peer.has.held) {
      if (seen++ % stride == 0 && m.header.count < count) m.words[m.header.count++] = frame;
    }
    for (Frame frame : peer.has.covered) {
      if (kind == Kind::kRelease && seen++ % stride == 0 && m.header.count < count) m.words[m.header.count++] = frame;
    }
    // Once more than there is.
    if (how == 255 || m.header.count == 0) m.words[m.header.count] = m.header.count ? m.words[0] : how, ++m.header.count;
    Post(peer, m, {});
  }
  void Offer(Peer& peer, Input& input) {
    const std::uint32_t first = input.Byte();
    const std::uint8_t how = input.Byte();
    const bool all = how == 255;
    Message& m = Blank(Kind::kOffer, static_cast<std::uint16_t>(all ? wire::kMaxOffers : 1 + how % 64), 0);
    // Few that meet, or many; the latter as hashes of nothing.
    for (std::uint32_t i = 0; i < m.header.count; ++i) m.offers[i] = how & 128 ? std::uint64_t{first * 64 + i} << 32 : WholeHashOf((first + i) % 256);
    Post(peer, m, {});
    if (how & 64 && !all) Call(peers_[0], Verdict::kStays, [&] { server_->Flush(); });
  }
  void SendRaw(Peer& peer, Input& input) {
    const std::size_t bytes = input.Byte();
    const std::uint8_t descriptors = input.Byte();
    std::vector<std::byte> packet;
    for (std::size_t i = 0; i < bytes && !input.Done(); ++i) packet.push_back(static_cast<std::byte>(input.Byte()));
    Deliver(peer, packet, descriptors > 250 ? Descriptors(descriptors) : std::vector<Fd>());
  }
  // What was posted last, by whomever, with a byte of it changed, or a part of it, or descriptors beside it.
  void SendMutated(Peer& peer, Input& input) {
    std::vector<std::byte> packet = last_;
    const std::uint16_t where = input.Half();
    const std::uint8_t how = input.Byte(), descriptors = input.Byte();
    if (packet.empty()) return;
    if (how & 1) packet.resize(where % (packet.size() + 2));
    else packet[where % packet.size()] ^= static_cast<std::byte>(how);
    Deliver(peer, packet, descriptors > 192 ? Descriptors(descriptors) : std::vector<Fd>());
  }
  // Calls about connections that there are not; and descriptors where none belong.
  void Ghostly(Peer& peer, Input& input) {
    const std::uint8_t how = input.Byte();
    const ConnId nobody = ids_ + 1 + how;
    Call(peer, Verdict::kStays, [&] {
      server_->Writable(nobody);
      server_->Disconnected(nobody);
      server_->Received(nobody, last_.data(), last_.size(), Descriptors(how));
      server_->Reject(nobody, "nobody", Descriptors(how));
    });
    FUZZ_CHECK(!server_->MayRead(nobody) && !server_->WantsToWrite(nobody), "nobody is nobody");
  }
  std::vector<Fd> Descriptors(std::uint8_t how) {
    Plenty plenty;
    std::vector<Fd> fds;
    for (unsigned i = 0; i <= how % 3u; ++i) fds.emplace_back(Dup(RingOf((how / 3u + i) % kRingKinds)));
    joins_with_ = how / 3u % kRingKinds;
    return fds;
  }

  // --- a packet, and what has to come of it ---
  Message& Blank(Kind kind, unsigned count, std::uint32_t number) {
    out_.header = {0, kind, static_cast<std::uint16_t>(count), number, 0};
    return out_;
  }
  void Post(Peer& peer, const Message& message, std::vector<Fd> fds) {
    std::vector<std::byte> packet(wire::kMaxPacket);
    packet.resize(wire::Encode(message, packet.data()));
    last_ = packet;
    Deliver(peer, packet, std::move(fds));
  }
  void Deliver(Peer& peer, const std::vector<std::byte>& packet, std::vector<Fd> fds) {
    if (IsForOperators(peer, packet)) return DeliverForOperators(peer, packet, std::move(fds));
    FUZZ_CHECK(server_->MayRead(peer.id) == !peer.question, "who waits for an answer is not read from, and everybody else is");
    if (peer.question) return;
    // Of its very size.
    const std::unique_ptr<std::byte[]> exact(new std::byte[packet.size()]);
    std::copy(packet.begin(), packet.end(), exact.get());
    const Verdict verdict = Foresee(peer, exact.get(), packet.size(), fds.size());
    Call(peer, verdict, [&] { server_->Received(peer.id, exact.get(), packet.size(), std::move(fds)); });
    if (peer.state == Peer::kNone || !peer.question) return;
    FUZZ_CHECK(!peer.takes && sent_in_vain_ == peer.id, "a question is answered at once, where the socket takes the answer");
    FUZZ_CHECK(!server_->MayRead(peer.id) && server_->WantsToWrite(peer.id), "an answer is kept that the socket does not take");
  }
  void DeliverForOperators(Peer& peer, const std::vector<std::byte>& packet, std::vector<Fd> fds) {
    FUZZ_CHECK(server_->MayRead(peer.id) == !peer.kept_since, "who has not taken an answer is not read from");
    if (peer.kept_since) return;
    const std::unique_ptr<std::byte[]> exact(new std::byte[packet.size()]);
    std::copy(packet.begin(), packet.end(), exact.get());
    const bool good = control::Decode(exact.get(), packet.size(), control::Sender::kOperator, &question_) == nullptr && fds.empty();
    const ControlKind kind = good ? question_.kind() : ControlKind{};
    const bool begins = kind == ControlKind::kOperate;
    // Another rule about nodes would let all members go.
    if (kind == ControlKind::kSet && question_.set.tunable == engine::kTunable_merge_across_nodes && question_.set.value == 0) return;
    Verdict verdict = Verdict::kEnds;
    if (good && begins == (peer.state == Peer::kStranger) && !peer.asked) {
      const Peer* const member = kind == ControlKind::kExplain ? Find(question_.explain.pid) : nullptr;
      peer.asked = NoteQuestion(question_, peer.uid, member && member->state == Peer::kMember ? std::optional(member->uid) : std::nullopt, now_);
      if (!begins || !peer.asked->must_fail) verdict = Verdict::kStays, peer.state = Peer::kOperator;
    }
    const ConnId id = peer.id;
    answered_ = {};
    Call(peer, verdict, [&] { server_->Received(id, exact.get(), packet.size(), std::move(fds)); });
    if (peer.state == Peer::kNone) return;
    FUZZ_CHECK(!peer.asked || peer.kept_since || !peer.asked->must_fail, "what must not be is refused at once");
    const bool is_answered = answered_.number == question_.header.number;
    FUZZ_CHECK(is_answered || kind == ControlKind::kSet || kind == ControlKind::kExplain, "what needs no member is answered at once");
    if (is_answered && answered_.failed) return;
    if (kind == ControlKind::kSet) wishes_.Note(question_.set);
    if (kind == ControlKind::kLimit) limit_changed_ = true;
  }
  // What must come of a packet; the peer's side of it is noted.
  Verdict Foresee(Peer& peer, const std::byte* packet, std::size_t bytes, std::size_t descriptors) {
    if (wire::Decode(packet, bytes, wire::Sender::kMember, &in_) != nullptr) return Verdict::kEnds;
    const wire::Header& header = in_.header;
    if (peer.state == Peer::kStranger) {
      if (header.kind != Kind::kJoin) return Verdict::kEnds;
      peer.question = Question{header.kind, header.number, 0, {}, {}};
      const bool fits = descriptors == 1 && joins_with_ <= kRingOfFew && in_.join.ring_pages == PagesOf(joins_with_);
      if (in_.join.version != wire::kVersion || in_.join.page_bytes != kPage || !fits) return Verdict::kEnds;
      peer.ring_pages = in_.join.ring_pages;
      peer.state = Peer::kMember;
      return starving_ ? Verdict::kEither : Verdict::kStays;
    }
    if (descriptors != 0) return Verdict::kEnds;
    switch (header.kind) {
      case Kind::kReport: return Verdict::kStays;
      case Kind::kTuned:
        if (!peer.told_number || header.number != peer.told_number) return Verdict::kEnds;
        peer.told_number = 0, peer.told.clear();
        return Verdict::kStays;
      case Kind::kTold:
        if (!peer.ask_number || header.number != peer.ask_number || (header.count && in_.regions[0].end <= peer.ask_from)) return Verdict::kEnds;
        peer.ask_number = 0;
        return Verdict::kStays;
      case Kind::kFile: {
        peer.question = Question{header.kind, header.number, in_.words[0], {}, {}};
        const auto in_file = [&](const auto& frame) { return frame.first / wire::kFramesPerFile == in_.words[0]; };
        return std::any_of(peer.has.held.begin(), peer.has.held.end(), in_file) ? Verdict::kStays : Verdict::kEither;
      }
      case Kind::kSettle: {
        bool good = true;
        Question question{header.kind, header.number, 0, {in_.settle.begin(), in_.settle.begin() + header.count}, {}};
        for (const SettleEntry& e : question.entries) {
          const bool acquires = e.what == SettleEntry::kAcquire;
          good &= acquires || (e.place < peer.ring_pages && e.node == 0 && HashOfContent(ContentOf(e.place)) == e.hash);
          if (good && !acquires) published_.emplace(peer.has.key, e.hash);
          question.may_be_refused.push_back(acquires ? !IsHeld(peer.has.key, e) : starving_ || settings_ & 4 || limit_changed_);
        }
        peer.question = std::move(question);
        return good ? Verdict::kStays : Verdict::kEnds;
      }
      case Kind::kOffer:
        for (std::size_t i = 0; i < header.count; ++i) {
          // What is there already is wanted of who offers it: it then gets the frame.
          const auto hash = static_cast<std::uint32_t>(in_.offers[i] >> 32);
          peer.may_want[hash] += published_.contains({peer.has.key, hash});
          for (Peer& other : peers_) {
            if (&other == &peer || other.state != Peer::kMember || other.has.key != peer.has.key) continue;
            if (const auto at = other.may_want.find(hash); at != other.may_want.end()) ++at->second;
          }
        }
        return Verdict::kStays;
      case Kind::kDrop:
      case Kind::kRelease:
        for (std::size_t i = 0; i < header.count; ++i) {
          const Frame frame = in_.words[i];
          const bool held = peer.has.held.erase(frame) != 0;
          const bool covered = header.kind == Kind::kRelease && !held && peer.has.covered.erase(frame) != 0;
          if (!held && !covered) return Verdict::kEnds;
          if (header.kind == Kind::kDrop) peer.has.covered.insert(frame);
        }
        return Verdict::kStays;
      default: return Verdict::kEnds;
    }
  }

  // Any call to the server about a peer.
  template <typename F>
  void Call(Peer& peer, Verdict verdict, F&& call) {
    about_ = &peer;
    verdict_ = verdict;
    sent_in_vain_ = 0;
    {
      const Scarce scarce(starving_, room_);
      call();
    }
    about_ = nullptr;
    FUZZ_CHECK(verdict != Verdict::kEnds || peer.state == Peer::kNone, "who breaks the protocol is dropped");
  }
  void MakeWritable(Peer& peer) {
    peer.takes = true;
    Call(peer, Verdict::kStays, [&] { server_->Writable(peer.id); });
    FUZZ_CHECK(!peer.question && !peer.kept_since && !server_->WantsToWrite(peer.id), "what was kept is sent as soon as it is taken");
  }
  // The connection is no more; the process may be, or its children.
  void End(Peer& peer) {
    if (peer.has.canary) ghosts_.push_back(std::move(peer.has));
    peer = Peer{};
  }
  void LetGoOfGhost(Input& input) {
    const std::uint8_t which = input.Byte();
    if (ghosts_.empty()) return;
    CheckBytes(*std::next(ghosts_.begin(), which % static_cast<std::ptrdiff_t>(ghosts_.size())));
    ghosts_.erase(std::next(ghosts_.begin(), which % static_cast<std::ptrdiff_t>(ghosts_.size())));
    unseen_ = true;
  }
  void Time(Input& input) {
    const std::uint8_t how = input.Byte();
    pressure_ = PressureOf(how);
    Tick(std::uint64_t{how} * 50'000'000);
  }
  void Tick(std::uint64_t by) {
    now_ += by;
    ticking_ = true;
    std::uint64_t next = server_->Tick(now_);
    // As often as it asks for: what is much is done in parts.
    for (int parts = 0; next <= now_; ++parts) {
      FUZZ_CHECK(parts < 64, "there is an end to what is due now");
      server_->Flush();
      next = server_->Tick(now_);
    }
    ticking_ = false;
    FUZZ_CHECK(next <= now_ + Server::kSecond, "when the next tick is due");
    for (const Peer& peer : peers_) FUZZ_CHECK(peer.state == Peer::kNone || !IsLate(peer), "strangers do not stay, nor who takes no answer");
    for (const Peer& peer : peers_) FUZZ_CHECK(!peer.asked || peer.kept_since || now_ < peer.asked->since + Server::kAnswerWithin, "who asks is answered within a second");
    if (by > 2 * Server::kSecond) unseen_ = false;
  }
  bool IsLate(const Peer& peer) const {
    if (peer.state == Peer::kOperator) return peer.kept_since && *peer.kept_since + Server::kTakesWithin <= now_;
    return peer.state == Peer::kStranger && peer.since + Server::kJoinWithin <= now_;
  }

  // --- what always holds ---
  void CheckStatus() {
    std::map<std::string, std::pair<std::size_t, std::size_t>> expected;  // members, ghosts
    std::map<std::string, std::set<Frame>> frames;
    std::size_t connected = auditor_.id != 0;
    for (const Peer& peer : peers_) {
      connected += peer.state != Peer::kNone;
      if (peer.state != Peer::kMember) continue;
      ++expected[NameOf(peer.has.key)].first;
      for (const auto& [frame, content] : peer.has.held) frames[NameOf(peer.has.key)].insert(frame);
    }
    for (const Belongings& ghost : ghosts_) {
      ++expected[NameOf(ghost.key)].second;
      for (const auto& [frame, content] : ghost.held) frames[NameOf(ghost.key)].insert(frame);
    }
    FUZZ_CHECK(server_->connections() == connected, "every connection is known");
    std::size_t all = 0;
    for (const Server::DomainStatus& status : server_->Status()) {
      all += status.frames;
      const auto& [members, ghosts] = expected[status.name];
      FUZZ_CHECK(status.members == members, "members are counted");
      FUZZ_CHECK(status.left >= ghosts && (unseen_ || status.left == ghosts), "who has left is waited for, as long as it may map frames");
      FUZZ_CHECK(status.members + status.left > 0, "no domain without a member");
      FUZZ_CHECK(status.frames >= frames[status.name].size() && status.places >= status.frames, "what somebody holds is live");
      expected.erase(status.name);
    }
    FUZZ_CHECK(!(settings_ & 4) || limit_changed_ || all <= kFewFrames, "no more frames than are allowed");
    for (const auto& [domain, counts] : expected) FUZZ_CHECK(counts == std::make_pair(std::size_t{0}, std::size_t{0}), "a domain of members is there");
  }
  void CheckFrames() {
    for (const Peer& peer : peers_) {
      if (peer.state == Peer::kMember) CheckBytes(peer.has);
    }
    for (const Belongings& ghost : ghosts_) CheckBytes(ghost);
  }
  static void CheckBytes(const Belongings& has) {
    for (const auto& [frame, content] : has.held) {
      const auto file = has.files.find(frame / wire::kFramesPerFile);
      if (file == has.files.end()) continue;
      PageBytes bytes;
      const auto offset = static_cast<off_t>(frame % wire::kFramesPerFile * kPage);
      FUZZ_CHECK(pread(file->second.get(), bytes.data(), kPage, offset) == static_cast<ssize_t>(kPage), "a frame can be read");
      FUZZ_CHECK(bytes == PageOf(content), "a frame has the bytes that were asked for, for as long as it is held");
    }
  }

  // By one call for all.
  static constexpr std::size_t kLooked = 256;
  static std::bitset<kLooked> OpenDescriptors() {
    std::array<pollfd, kLooked> fds{};
    for (std::size_t i = 0; i < kLooked; ++i) fds[i].fd = static_cast<int>(i);
    poll(fds.data(), kLooked, 0);
    std::bitset<kLooked> open;
    for (std::size_t i = 0; i < kLooked; ++i) open[i] = !(fds[i].revents & POLLNVAL);
    return open;
  }

  Peer* Find(ConnId id) {
    static Peer stranger;
    if (all_strangers_) return &stranger;
    if (id && id == auditor_.id) return &auditor_;
    const auto at = std::find_if(peers_.begin(), peers_.end(), [&](const Peer& p) { return p.state != Peer::kNone && p.id == id; });
    return at == peers_.end() ? nullptr : &*at;
  }

  // Descriptors for few more files than are open; and, within, for as many as ever.
  static void LimitTo(rlim_t descriptors) {
    rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = std::min(descriptors, limit.rlim_max);
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  static inline rlim_t plenty_ = 0;
  static inline rlim_t limit_ = 0;  // 0: none
  struct Scarce {
    Scarce(bool on, unsigned room) {
      if (!on) return;
      rlimit now;
      getrlimit(RLIMIT_NOFILE, &now);
      plenty_ = now.rlim_cur;
      const int next = Dup(RingOf(0));
      close(next);
      limit_ = static_cast<rlim_t>(next) + room;
      LimitTo(limit_);
    }
    ~Scarce() {
      if (limit_) LimitTo(plenty_);
      limit_ = 0;
    }
  };
  struct Plenty {
    Plenty() {
      if (limit_) LimitTo(plenty_);
    }
    ~Plenty() {
      if (limit_) LimitTo(limit_);
    }
  };

  const std::uint8_t settings_;
  std::bitset<kLooked> open_before_;
  std::unique_ptr<Server> server_;
  std::array<Peer, kPeers> peers_;
  Peer auditor_;
  std::list<Belongings> ghosts_;
  std::set<std::pair<Key, std::uint32_t>> published_;  // ever
  bool unseen_ = false;  // a ghost has gone, and the server may not have looked yet
  bool starving_ = false, ticking_ = false, all_strangers_ = false;
  unsigned room_ = 0, joins_with_ = 0;
  Wishes wishes_;
  Domains domains_;  // that operators have seen
  Pressure pressure_;
  bool limit_changed_ = false;  // of frames
  struct {
    std::uint32_t number = 0;
    bool failed = false;
  } answered_;  // the operator's question that was answered last
  Peer* about_ = nullptr;
  Verdict verdict_ = Verdict::kStays;
  ConnId ids_ = 0, sent_in_vain_ = 0;
  std::uint32_t numbers_ = 0;
  std::uint64_t now_ = 0;
  std::vector<std::byte> last_;
  Message in_, out_;
  control::Message asking_, question_, said_;  // made; as received; answered
};

}  // namespace
}  // namespace ksmu::broker

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  ksmu::fuzz::Input input(data, bytes);
  const auto run = std::make_unique<ksmu::broker::Run>(input.Byte());
  run->All(input);
  return 0;
}
