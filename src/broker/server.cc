#include "broker/server.h"

#include <algorithm>
#include <cstring>

#include "content/content.h"

namespace ksmu::broker {

using wire::Kind;
using wire::Refusal;

namespace {
// Of what has left: asked again after this, then after twice that, up to a second.
constexpr std::uint64_t kFirstDelay = 4'000'000;
std::uint64_t HashOf(const std::byte* page, std::size_t bytes, std::uint64_t seed) { return content::Hash(page, bytes, seed); }
constexpr int kToldAtOnce = 32;
constexpr std::size_t kBlocksAtOnce = 2;  // of what a member held that has gone: some milliseconds

}  // namespace

Server::Server(Config config, Outbox& outbox)
    : config_(std::move(config)), outbox_(outbox), most_frames_(config_.most_frames), by_node_(config_.by_node),
      question_(std::make_unique<control::Message>()), reply_(std::make_unique<control::Message>()), packet_(wire::kMaxPacket) {
  defaults_.key = {~std::uint32_t{0}, -1};  // nobody's
}
Server::~Server() = default;

std::uint32_t Server::AddListener(std::string name) {
  listeners_.push_back(std::move(name));
  return static_cast<std::uint32_t>(listeners_.size() - 1);
}

// --- connections -----------------------------------------------------------------------------------------------------

bool Server::Connected(ConnId id, std::uint32_t listener, Credentials who) {
  int& strangers = strangers_[who.uid];
  if (strangers >= kMaxStrangers) {
    LogMember(Level::kWarning, listeners_[listener].empty() ? "default" : listeners_[listener], who,
              "not let in: too many of its user have connected and not joined");
    return false;
  }
  ++strangers;
  auto conn = std::make_unique<Connection>();
  conn->id = id;
  conn->listener = listener;
  conn->who = who;
  connections_.emplace(id, std::move(conn));
  deadlines_.emplace_back(now_ + kJoinWithin, id);
  return true;
}

void Server::Disconnected(ConnId id) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  Connection& conn = *found->second;
  if (conn.home) LogMember(Level::kInfo, conn.home->name, conn.who, "left");
  Forget(conn);
}

void Server::Drop(Connection& conn, const char* reason) {
  LogMember(Level::kWarning, NameOf(conn), conn.who, std::string("dropped: ") + reason);
  outbox_.Drop(conn.id, reason);
  Forget(conn);
}

// The connection is no more. What it holds it may have mapped, until its canary says otherwise.
void Server::Forget(Connection& conn) {
  if (conn.op) {
    const HomeKey own = conn.op->own;
    std::erase(operators_, conn.id);
    connections_.erase(conn.id);
    return ForgetScope(own);
  }
  if (!conn.home) {
    NoLongerStranger(conn);
  } else {
    Home& home = *conn.home;
    home.connected[conn.member] = nullptr;
    home.domain->Leave(conn.member);
    conn.canary.GivenAway();
    home.left.push_back({conn.member, conn.who, std::move(conn.canary), now_, kFirstDelay});
    if (IsGone(home, home.left.back())) home.left.pop_back();
    CloseIfEmpty(home);
  }
  connections_.erase(conn.id);
}

void Server::NoLongerStranger(const Connection& conn) {
  const auto strangers = strangers_.find(conn.who.uid);
  if (--strangers->second == 0) strangers_.erase(strangers);
}

bool Server::IsGone(Home& home, Left& left) {
  if (!left.going && left.canary.InUse()) {
    left.ask_at = now_ + left.delay;
    left.delay = std::min(left.delay * 2, kSecond);
    return false;
  }
  left.going = true;
  if (!home.domain->Gone(left.member, kBlocksAtOnce)) return false;  // the next Tick goes on
  LogMember(Level::kDebug, home.name, left.who, "gone, with all its children");
  return true;
}

bool Server::MayRead(ConnId id) const {
  const auto found = connections_.find(id);
  return found != connections_.end() && found->second->kept.empty();
}

bool Server::WantsToWrite(ConnId id) const {
  const auto found = connections_.find(id);
  return found != connections_.end() && found->second->blocked;
}

void Server::Reject(ConnId id, const char* why, std::vector<Fd> descriptors) {
  Dispose(std::move(descriptors));
  const auto found = connections_.find(id);
  if (found != connections_.end()) Drop(*found->second, why);
}

void Server::Received(ConnId id, const std::byte* packet, std::size_t bytes, std::vector<Fd> descriptors) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return Dispose(std::move(descriptors));
  Connection& conn = *found->second;
  wire::Header header;
  if (!conn.home && bytes >= sizeof header) std::memcpy(&header, packet, sizeof header);
  if (conn.op || control::IsControl(header.kind)) {
    ReceivedFromOperator(conn, packet, bytes, !descriptors.empty());
    return Dispose(std::move(descriptors));
  }
  const char* wrong = wire::Decode(packet, bytes, wire::Sender::kMember, &in_);
  if (!wrong && !conn.home) {
    if (in_.header.kind == Kind::kJoin) Join(conn, descriptors);
    else wrong = "the first message is no join";
  } else if (!wrong) {
    wrong = descriptors.empty() ? Handle(conn) : "descriptors with a message that has none";
  }
  if (wrong) Drop(conn, wrong);
  Dispose(std::move(descriptors));
}

void Server::Dispose(std::vector<Fd> descriptors) {
  if (!descriptors.empty() && config_.dispose) config_.dispose(std::move(descriptors));
}

// --- joining ---------------------------------------------------------------------------------------------------------

Server::HomeKey Server::KeyOf(const Connection& conn) const {
  return {conn.listener, listeners_[conn.listener].empty() ? std::int64_t{conn.who.uid} : -1};
}

std::string Server::NameOf(const Connection& conn) const {
  const std::string& name = listeners_[conn.listener];
  return name.empty() ? "default/" + std::to_string(conn.who.uid) : name;
}

Server::Home* Server::HomeFor(const Connection& conn) {
  std::unique_ptr<Home>& home = homes_[KeyOf(conn)];
  if (home) return home.get();
  auto made = std::make_unique<Home>(config_.page_bytes);
  made->name = NameOf(conn);
  if (int error = made->storage.Open()) {
    homes_.erase(KeyOf(conn));
    Log(Level::kWarning, "domain " + NameOf(conn) + ": no memory or no descriptors for its index: " + std::strerror(-error));
    return nullptr;
  }
  made->index = std::make_unique<IndexWriter>(made->storage.index(), &Storage::PunchIndex, &made->storage);
  made->reader = std::make_unique<IndexReader>(made->storage.index(), kIndexFileBytes);
  made->domain = std::make_unique<Domain>(made->storage, *made->index, *made->reader, config_.page_bytes, config_.seed, &HashOf);
  if (by_node_) made->domain->KeepNodesApart();
  made->scope = &ScopeFor(KeyOf(conn), made->name);
  home = std::move(made);
  return home.get();
}

void Server::CloseIfEmpty(Home& home) {
  if (home.domain->members() != 0) return;
  const HomeKey key = home.scope->key;
  const auto found = homes_.find(key);
  if (found == homes_.end() || found->second.get() != &home) return;  // the next Tick sees to those that are retired
  homes_.erase(found);
  ForgetScope(key);
}

void Server::Refuse(Connection& conn, Refusal why, const char* words) {
  out_.header = {0, Kind::kRefused, 1, in_.header.number, 0};
  out_.words[0] = static_cast<std::uint32_t>(why);
  const std::size_t bytes = wire::Encode(out_, packet_.data());
  // The first packet to it, which fits; and if not, the end of the connection says enough.
  outbox_.Send(conn.id, packet_.data(), bytes, nullptr, 0);
  Drop(conn, words);
}

void Server::Join(Connection& conn, std::vector<Fd>& descriptors) {
  const wire::JoinEntry& join = in_.join;
  if (join.version != wire::kVersion) return Refuse(conn, Refusal::kVersion, "another version of the protocol");
  if (join.page_bytes != config_.page_bytes) return Refuse(conn, Refusal::kPageSize, "another page size");
  if (config_.unknown_user == std::int64_t{conn.who.uid} && listeners_[conn.listener].empty()) {
    return Refuse(conn, Refusal::kNotAllowed, "its user has no number here, and so no domain of its own");
  }
  if (descriptors.size() != 1) return Refuse(conn, Refusal::kRing, "a join without a ring, or with more than that");
  if (const char* why = conn.ring.Take(descriptors[0].get(), join.ring_pages, config_.page_bytes)) return Refuse(conn, Refusal::kRing, why);
  descriptors[0].Release();
  descriptors.clear();
  Home* const home = HomeFor(conn);
  if (!home) return Refuse(conn, Refusal::kFull, "there is no room for its domain");
  const std::uint16_t number = home->domain->Join();
  const char* wrong = nullptr;
  if (number == Domain::kMaxMembers) {
    wrong = "the domain has as many members as it can have";
  } else if (conn.canary.Create(config_.page_bytes) != 0) {
    home->domain->Gone(number);
    wrong = "no memory or no descriptors for its canary";
  }
  if (wrong) {
    CloseIfEmpty(*home);
    return Refuse(conn, Refusal::kFull, wrong);
  }
  NoLongerStranger(conn);
  conn.home = home;
  conn.member = number;
  conn.joined_at = now_;
  ++home->scope->joined;
  if (home->connected.size() <= number) home->connected.resize(number + std::size_t{1});
  home->connected[number] = &conn;
  LogMember(Level::kInfo, home->name, conn.who, "joined");
  out_.header = {0, Kind::kJoined, 1, in_.header.number, 0};
  out_.joined = {config_.seed, kIndexFileBytes, kLogEntries, number, by_node_};
  const int given[] = {home->storage.index_for_members(), conn.canary.for_member()};
  Answer(conn, given, 2);
  // Else it is given away when it has been sent.
  if (conn.kept.empty()) conn.canary.GivenAway();
  QueueTelling(conn);
}

// --- messages --------------------------------------------------------------------------------------------------------

// Sends out_.
void Server::Answer(Connection& conn, const int* descriptors, std::size_t count) {
  const std::size_t bytes = wire::Encode(out_, packet_.data());
  if (outbox_.Send(conn.id, packet_.data(), bytes, descriptors, count)) return;
  conn.blocked = true;
  conn.kept_since = now_;
  conn.kept.assign(packet_.begin(), packet_.begin() + static_cast<std::ptrdiff_t>(bytes));
  // Of the domain and of the member: there for as long as the connection is.
  conn.kept_descriptors.assign(descriptors, descriptors + count);
}

void Server::Writable(ConnId id) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  Connection& conn = *found->second;
  if (!conn.kept.empty()) {
    if (!outbox_.Send(id, conn.kept.data(), conn.kept.size(), conn.kept_descriptors.data(), conn.kept_descriptors.size())) return;
    conn.kept.clear();
    conn.canary.GivenAway();
  }
  conn.blocked = false;
  if (conn.home) QueueTelling(conn);
  SendWanted(conn);
}

// in_ is one of a member's. Not null: why it is dropped.
const char* Server::Handle(Connection& conn) {
  const std::size_t count = in_.header.count;
  Domain& domain = *conn.home->domain;
  switch (in_.header.kind) {
    case Kind::kJoin: return "a second join";
    case Kind::kFile: {
      const std::uint32_t number = in_.words[0];
      const int fd = conn.home->storage.file_for_members(number);
      if (fd < 0) return "a file is asked for that there is not";
      out_.header = {0, Kind::kFileIs, 1, in_.header.number, 0};
      out_.words[0] = number;
      Answer(conn, &fd, 1);
      return nullptr;
    }
    case Kind::kSettle: return Settle(conn);
    case Kind::kOffer: {
      struct Cookie {
        Server* self;
        Home* home;
      } cookie{this, conn.home};
      domain.Offer(conn.member, in_.offers.data(), count, [](void* c, std::uint16_t member, std::uint32_t hash) {
        auto& [self, home] = *static_cast<Cookie*>(c);
        if (member < home->connected.size() && home->connected[member]) self->Want(*home->connected[member], hash);
      }, &cookie);
      return nullptr;
    }
    case Kind::kDrop: return domain.Drop(conn.member, in_.words.data(), count);
    case Kind::kRelease: return domain.Release(conn.member, in_.words.data(), count);
    case Kind::kReport:
      conn.report = in_.report;
      conn.reported_at = now_;
      return nullptr;
    case Kind::kTuned: return NoteTuned(conn);
    case Kind::kTold: return NoteTold(conn);
    default: return "a message of an unknown kind";
  }
}

const char* Server::Settle(Connection& conn) {
  const std::size_t count = in_.header.count;
  for (std::size_t i = 0; i < count; ++i) {
    const wire::SettleEntry& entry = in_.settle[i];
    if (entry.what != wire::SettleEntry::kAcquire && entry.place >= conn.ring.pages()) return "a place that its ring has not";
  }
  out_.header = {0, Kind::kSettled, in_.header.count, in_.header.number, 0};
  const auto copy = [](void* ring, std::uint32_t place, std::byte* page) { static_cast<const Ring*>(ring)->Copy(place, page); };
  conn.home->domain->LimitTo(conn.home->domain->frames_live() + (most_frames_ - std::min(FramesLive(), most_frames_)));
  const char* const wrong = conn.home->domain->Settle(conn.member, in_.settle.data(), count, copy, &conn.ring, out_.words.data());
  if (wrong) return wrong;
  Answer(conn, nullptr, 0);
  return nullptr;
}

std::size_t Server::FramesLive() const {
  std::size_t frames = 0;
  for (const auto& [key, home] : homes_) frames += home->domain->frames_live();
  return frames;
}

void Server::Want(Connection& conn, std::uint32_t hash) {
  if (conn.wanted.size() >= kMaxWanted) {
    ++conn.home->wanted_lost;
    conn.wanted_lost = true;
    return;
  }
  if (conn.wanted.empty()) wanting_.push_back(conn.id);
  conn.wanted.push_back(hash);
}

// Until the socket takes no more; Writable goes on then.
void Server::SendWanted(Connection& conn) {
  while (!conn.wanted.empty() && !conn.blocked) {
    const std::size_t n = std::min(conn.wanted.size(), wire::kMaxHashes);
    out_.header = {0, Kind::kWanted, static_cast<std::uint16_t>(n), 0, 0};
    std::copy_n(conn.wanted.begin(), n, out_.words.begin());
    if (outbox_.Send(conn.id, packet_.data(), wire::Encode(out_, packet_.data()), nullptr, 0)) {
      conn.wanted.erase(conn.wanted.begin(), conn.wanted.begin() + static_cast<std::ptrdiff_t>(n));
    } else {
      conn.blocked = true;
    }
  }
  if (!conn.wanted_lost || conn.blocked) return;
  out_.header = {0, Kind::kWanted, 0, 0, 0};
  const bool sent = outbox_.Send(conn.id, packet_.data(), wire::Encode(out_, packet_.data()), nullptr, 0);
  (sent ? conn.wanted_lost : conn.blocked) = !sent;
}

void Server::Flush() {
  for (const ConnId id : wanting_) {
    if (const auto found = connections_.find(id); found != connections_.end()) SendWanted(*found->second);
  }
  wanting_.clear();
  // A few at a time: what an operator has set does not keep members waiting for their answers.
  for (int i = 0; i < kToldAtOnce && !telling_.empty(); ++i) {
    const auto found = connections_.find(telling_.front());
    telling_.pop_front();
    if (found != connections_.end()) TellTunables(*found->second);
  }
}

// --- time ------------------------------------------------------------------------------------------------------------

std::uint64_t Server::Tick(std::uint64_t now) {
  now_ = now;
  std::uint64_t next = now + kSecond;
  while (!deadlines_.empty() && deadlines_.front().first <= now) {
    const auto found = connections_.find(deadlines_.front().second);
    deadlines_.pop_front();
    if (found != connections_.end() && !found->second->home && !found->second->op) Drop(*found->second, "has connected and not joined");
  }
  const auto tend = [&](Home& home) {
    std::erase_if(home.left, [&](Left& left) { return left.ask_at <= now && IsGone(home, left); });
    for (const Left& left : home.left) next = std::min(next, left.ask_at);
    return home.domain->members() != 0;
  };
  std::vector<HomeKey> gone;
  std::erase_if(retired_, [&](const std::unique_ptr<Home>& home) {
    if (tend(*home)) return false;
    gone.push_back(home->scope->key);
    return true;
  });
  for (const HomeKey& key : gone) ForgetScope(key);
  for (auto at = homes_.begin(); at != homes_.end();) {
    if (tend(*at->second)) {
      ++at;
      continue;
    }
    const HomeKey key = at->first;
    at = homes_.erase(at);
    ForgetScope(key);
  }
  TendOperators(&next);
  TendTuners(&next);
  return telling_.empty() ? next : now;
}

// --- what is said ----------------------------------------------------------------------------------------------------

void Server::Log(Level level, const std::string& line) const {
  if (config_.log) config_.log(level, line);
}

void Server::LogMember(Level level, const std::string& domain, Credentials who, const std::string& what) const {
  Log(level, "domain " + domain + ": member " + std::to_string(who.pid) + " (uid " + std::to_string(who.uid) + ") " + what);
}

std::vector<Server::DomainStatus> Server::Status() const {
  std::vector<DomainStatus> all;
  for (const auto& [key, home] : homes_) {
    DomainStatus status;
    status.name = home->name;
    status.left = home->left.size();
    status.members = home->domain->members() - status.left;
    status.frames = home->domain->frames_live();
    status.places = home->domain->frames_given_out();
    status.metadata_bytes = home->domain->metadata_bytes();
    status.wanted_lost = home->wanted_lost;
    for (const Connection* conn : home->connected) {
      if (!conn) continue;
      const wire::ReportEntry& from = conn->report;
      wire::ReportEntry& to = status.reports;
      to.advised += from.advised, to.merged += from.merged, to.frames += from.frames, to.zero += from.zero;
      to.still += from.still, to.changing += from.changing, to.breaks += from.breaks, to.cpu_ns += from.cpu_ns;
    }
    all.push_back(std::move(status));
  }
  return all;
}

}  // namespace ksmu::broker
