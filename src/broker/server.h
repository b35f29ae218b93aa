// The broker without its sockets: who is a member of which domain, and what is answered to which message.
//
// Connections come and go by calls, packets come in by Received and go out through an Outbox; time is what Tick was told last.
// One thread, no waiting. Whatever a member sends, the worst that happens is that it is dropped: its connection ends, and what
// it holds is kept until nobody can have it mapped.
//
// An answer is never lost: what the socket does not take is kept, and nothing more is read of that connection (MayRead) until it
// has gone out. What is *wanted* of a member waits for it in a queue with an end; of what does not fit it is told that it was
// lost, and offers all of its pages again.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "broker/control.h"
#include "broker/domain.h"
#include "broker/storage.h"
#include "broker/tuner.h"
#include "broker/wire.h"

namespace ksmu::broker {

using ConnId = std::uint64_t;  // never used twice

struct Credentials {
  std::uint32_t uid = 0;
  std::int32_t pid = 0;
};

class Outbox {
 public:
  virtual ~Outbox() = default;
  // False: it does not fit now, and nothing of it was sent; Writable is to be called when that has changed. A connection that is
  // broken takes everything. The descriptors stay the caller's.
  virtual bool Send(ConnId conn, const std::byte* packet, std::size_t bytes, const int* descriptors, std::size_t count) = 0;
  // The connection is to end, and is not spoken of any more. Does not call the server.
  virtual void Drop(ConnId conn, const char* reason) = 0;
};

enum class Level { kWarning = 1, kInfo, kDebug };

class Server {
 public:
  static constexpr std::size_t kMaxWanted = 1024 * 1024;  // hashes that wait for a member
  static constexpr std::uint64_t kSecond = 1'000'000'000;
  static constexpr std::uint64_t kJoinWithin = 10 * kSecond;
  static constexpr int kMaxStrangers = 128;  // of one user: connections that have not joined
  static constexpr int kMaxOperators = 16;   // of one user
  static constexpr std::uint64_t kAnswerWithin = kSecond;          // members that have not by then are silent
  static constexpr std::uint64_t kTakesWithin = 10 * kSecond;      // an operator its answer

  struct Config {
    std::size_t page_bytes = 4096;
    std::uint64_t seed = 0;
    std::function<void(Level, const std::string&)> log;
    // Closes what a member has sent and nobody wants. To close a file of a stranger's can take as long as the stranger
    // likes (FUSE, a socket that lingers). None: it is closed at once.
    std::function<void(std::vector<Fd>)> dispose;
    std::size_t most_frames = wire::kFrameLimit;  // of all domains together
    std::int64_t unknown_user = -1;  // what users look like that cannot be told apart here: no domain is for them alone
    std::int64_t owner = -1;  // the user who may set tunables, besides root
    bool by_node = false;  // pages of different NUMA nodes are not merged; where nodes::WhyNot says nothing against it
    std::function<Pressure()> pressure = nullptr;  // on the machine's memory. None: there is no tuner
    int cpus = 1;
  };
  Server(Config config, Outbox& outbox);
  ~Server();

  // A place to connect to. Without a name each user has a domain of its own there, else all who come share one.
  std::uint32_t AddListener(std::string name);

  // False: not let in.
  bool Connected(ConnId conn, std::uint32_t listener, Credentials who);
  // A packet; the descriptors are the server's.
  void Received(ConnId conn, const std::byte* packet, std::size_t bytes, std::vector<Fd> descriptors);
  // Something came that cannot even be received.
  void Reject(ConnId conn, const char* why, std::vector<Fd> descriptors);
  void Disconnected(ConnId conn);
  // Takes packets again.
  void Writable(ConnId conn);
  bool MayRead(ConnId conn) const;
  bool WantsToWrite(ConnId conn) const;

  // Sends what is wanted of whom. After every few messages: it is gathered until then.
  void Flush();
  // The time in ns, which does not go back. Returns when the next call is due, a second from now at the latest.
  std::uint64_t Tick(std::uint64_t now);

  struct DomainStatus {
    std::string name;
    std::size_t members = 0, left = 0;  // left: gone, but for processes that may have frames mapped
    std::size_t frames = 0, places = 0;  // live; not free
    std::size_t metadata_bytes = 0;
    std::uint64_t wanted_lost = 0;
    wire::ReportEntry reports;  // of those connected, added up
  };
  std::vector<DomainStatus> Status() const;
  std::size_t connections() const { return connections_.size(); }

 private:
  struct Home;
  using HomeKey = std::pair<std::uint32_t, std::int64_t>;  // listener, user (-1: all)
  // A domain as operators know it: for as long as it has members, or something has been set for it.
  struct Scope {
    std::uint32_t number = 0;
    HomeKey key;
    std::string name;
    std::uint32_t version = 0;  // the number of times that anything was set
    std::array<std::uint32_t, wire::kTunableSlots> versions{};  // as of when it was set; 0: it has not been
    std::array<std::int64_t, wire::kTunableSlots> values{};
    bool own = false;  // something has been set for it, not only for all
    bool tuned_by_others = false;  // an operator has set what the tuner would
    std::uint64_t joined = 0;      // members, so far
    std::unique_ptr<Tuner> tuner;
  };
  // What is set for one member alone; whatever was set last counts.
  struct OwnTunables {
    std::array<std::uint32_t, wire::kTunableSlots> versions{};
    std::array<std::int64_t, wire::kTunableSlots> values{};
    std::uint32_t by_tuner = 0;  // a bit each: it yields to what the member's program has set
  };
  struct Operator {
    bool may_write = false;
    HomeKey own;
    // The question that cannot be answered yet: none, kSet or kExplain.
    control::Kind asks{};
    std::uint32_t number = 0;
    std::uint64_t until = 0, look_at = 0;
    std::uint32_t scope = 0, pid = 0;
    std::uint32_t tunable = 0;
    std::map<std::uint32_t, std::uint32_t> versions;  // kSet: of each domain that it was set for, by number
    std::map<ConnId, std::uint32_t> refused;          // kSet: by whom, and the errno. Others may set the same meanwhile, with other answers
    std::uint64_t from = 0;                  // kExplain
    ConnId member = 0;                       // that has been asked
  };
  struct Connection {
    ConnId id = 0;
    std::uint32_t listener = 0;
    Credentials who;
    Home* home = nullptr;  // null: has not joined
    std::uint16_t member = 0;
    Ring ring;
    Canary canary;
    bool blocked = false;         // the socket takes nothing
    std::vector<std::byte> kept;  // an answer that it has not taken
    std::vector<int> kept_descriptors;
    std::deque<std::uint32_t> wanted;
    bool wanted_lost = false;  // some did not fit in: to be said when the others have been sent
    wire::ReportEntry report;
    std::unique_ptr<Operator> op;  // it is an operator's
    std::uint64_t kept_since = 0;
    // A member: what it has been told of tunables, and has answered to; what it has been asked. One of each at a time.
    std::uint64_t joined_at = 0, reported_at = 0;
    std::uint32_t told = 0, answered = 0;
    std::uint64_t told_at = 0;
    bool to_be_told = false;
    std::unique_ptr<OwnTunables> own;
    // Of its tunables, a bit each: what the tuner has set, to which value; and what it leaves alone, since somebody else has set it.
    std::uint32_t tuned = 0, not_tuned = 0;
    std::array<std::int64_t, wire::kTunableSlots> tuned_values{};
    std::uint32_t ask_number = 0;
    bool ask_open = false;
    std::uint64_t ask_at = 0, ask_from = 0;
    ConnId asker = 0;
  };
  // Whose connection has ended.
  struct Left {
    std::uint16_t member = 0;
    Credentials who;
    Canary canary;
    std::uint64_t ask_at = 0, delay = 0;
    bool going = false;  // nobody has its canary any more
  };
  // A domain, with all that belongs to it.
  struct Home {
    Home(std::size_t page_bytes) : storage(page_bytes) {}
    std::string name;
    Scope* scope = nullptr;
    Storage storage;
    std::unique_ptr<IndexWriter> index;
    std::unique_ptr<IndexReader> reader;
    std::unique_ptr<Domain> domain;
    std::vector<Connection*> connected;  // by the member's number
    std::vector<Left> left;
    std::uint64_t wanted_lost = 0;
  };

  void Join(Connection& conn, std::vector<Fd>& descriptors);
  const char* Handle(Connection& conn);
  const char* Settle(Connection& conn);
  Home* HomeFor(const Connection& conn);
  void CloseIfEmpty(Home& home);
  std::size_t FramesLive() const;
  HomeKey KeyOf(const Connection& conn) const;
  void Answer(Connection& conn, const int* descriptors, std::size_t count);
  void Refuse(Connection& conn, wire::Refusal why, const char* words);
  void Drop(Connection& conn, const char* reason);
  void Forget(Connection& conn);
  void SendWanted(Connection& conn);
  void Want(Connection& conn, std::uint32_t hash);
  void Dispose(std::vector<Fd> descriptors);
  bool IsGone(Home& home, Left& left);
  std::string NameOf(const Connection& conn) const;
  void Log(Level level, const std::string& line) const;
  void LogMember(Level level, const std::string& domain, Credentials who, const std::string& what) const;
  void NoLongerStranger(const Connection& conn);

  // operators.cc
  void ReceivedFromOperator(Connection& conn, const std::byte* packet, std::size_t bytes, bool descriptors);
  void Operate(Connection& conn);
  void AnswerOperator(Connection& conn);
  void FailOperator(Connection& conn, std::uint32_t number, int error);
  void ListDomains(Connection& conn);
  void ListMembers(Connection& conn);
  void SetTunable(Connection& conn);
  int MaySet(const Scope& scope, std::uint32_t tunable, std::int64_t value) const;
  int MaySetForAll(std::uint32_t tunable, std::int64_t value) const;
  std::uint32_t Note(Scope& scope, Connection* one, std::uint32_t tunable, std::int64_t value);
  void SetDone(Connection& conn, std::uint32_t number);
  int KeepNodesApart(bool apart);
  void SetLimit(Connection& conn);
  void TellDefaults(Connection& conn);
  Operator& Await(Connection& conn, control::Kind asks, std::uint32_t number);
  void BeginExplaining(Connection& conn);
  void TendOperators(std::uint64_t* next);
  bool TendSetting(Connection& conn, bool late);
  bool TendExplaining(Connection& conn, bool late);
  bool MayAsk(const Connection& conn, const Scope& scope) const;
  Scope* FindScope(const Connection& conn, std::uint32_t number);
  Scope& ScopeFor(const HomeKey& key, const std::string& name);
  void ForgetScope(const HomeKey& key);
  Connection* FindMember(const Scope& scope, std::uint32_t pid) const;
  std::vector<Connection*> FindMembers(const Scope& scope, std::uint32_t pid) const;
  Home* HomeOf(const Scope& scope) const;
  void FillDomain(const Scope& scope, control::DomainEntry* entry) const;
  void FillMember(const Connection& member, control::MemberEntry* entry) const;
  // tuning.cc
  void TendTuners(std::uint64_t* next);
  void Tune(Connection& conn, const Tuner::Plan& plan);
  void EndTuning(Scope& scope);
  bool IsTuned(const Scope& scope) const;
  void QueueTelling(Connection& conn);
  void TellTunables(Connection& conn);
  const char* NoteTuned(Connection& conn);
  void NoteRefusal(const Connection& conn, std::uint32_t tunable, std::uint32_t error);
  const char* NoteTold(Connection& conn);

  const Config config_;
  Outbox& outbox_;
  std::vector<std::string> listeners_;
  std::unordered_map<ConnId, std::unique_ptr<Connection>> connections_;
  std::map<HomeKey, std::unique_ptr<Home>> homes_;
  std::deque<std::pair<std::uint64_t, ConnId>> deadlines_;  // of those that have connected, in order
  std::map<std::uint32_t, int> strangers_;                  // of each user: connections that have not joined
  std::vector<ConnId> wanting_;                             // something is wanted of them
  std::size_t most_frames_;
  bool by_node_;
  std::vector<std::unique_ptr<Home>> retired_;  // of which nothing is given out any more, until their members have let go of them
  std::map<std::uint32_t, Scope> scopes_;      // by number
  Scope defaults_;                             // what is set for all domains: those to come begin with it
  std::map<HomeKey, std::uint32_t> numbers_;  // of scopes
  std::uint32_t last_scope_ = 0;
  std::vector<ConnId> operators_;
  std::deque<ConnId> telling_;  // members that are to be told of tunables
  std::uint64_t now_ = 0, tune_at_ = 0;
  wire::Message in_, out_;
  std::unique_ptr<control::Message> question_, reply_;
  std::vector<std::byte> packet_;
};

}  // namespace ksmu::broker
