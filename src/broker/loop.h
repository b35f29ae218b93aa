// The broker's sockets: who connects, what comes, what goes out, when. One thread, which waits in one place only.
//
// What is ready is told by a Poller, once for each time that it was asked: then as many messages are read as are one member's
// share of a round, and it is asked again. So no member waits for more than the shares of the others.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "broker/server.h"

namespace ksmu::broker {

// Descriptors that become ready, by poll(2) or by io_uring.
class Poller {
 public:
  struct Event {
    std::uint64_t key;
    short events;  // of poll(2)
  };
  virtual ~Poller() = default;
  // To be reported once, under this key, in place of what the key was armed with before.
  virtual void Arm(std::uint64_t key, int fd, short events) = 0;
  // Not any more. Before the descriptor is closed.
  virtual void Disarm(std::uint64_t key) = 0;
  // Until something is ready, or the time is over. 0, or -errno: it is of no use any more.
  virtual int Wait(int timeout_ms, std::vector<Event>* out) = 0;
  virtual const char* name() const = 0;
};
std::unique_ptr<Poller> MakePollPoller();
// Null, with the reason: there is none to be had.
std::unique_ptr<Poller> MakeUringPoller(int* error);

// Closes what strangers have sent, and what has been dropped, in threads of its own: a close can wait for whoever the file
// belongs to (a FUSE file's flush, a TCP socket that lingers), and frees what is the last reference to.
class Disposal {
 public:
  // More at the same time are closed by the caller.
  static constexpr int kMaxThreads = 64;
  void Close(std::vector<Fd> descriptors);
  int pending() const { return pending_->load(); }

 private:
  std::shared_ptr<std::atomic<int>> pending_ = std::make_shared<std::atomic<int>>(0);
};

class Loop final : public Outbox {
 public:
  static constexpr int kMessagesARound = 4;   // of one member; one, if that takes long
  static constexpr std::uint64_t kTimeARound = 1'000'000;
  static constexpr int kConnectionsARound = 16;

  Loop(Server::Config config, bool io_uring);
  ~Loop() override;

  Server& server() { return server_; }
  // A socket that listens already. Connections to it are of this listener of the server's.
  void Listen(Fd socket, std::uint32_t listener);
  // Calls `ready` whenever the descriptor, which stays the caller's, can be read.
  void Watch(int fd, std::function<void()> ready);
  // Until Stop, called by something watched. 0 or -errno.
  int Run();
  void Stop() { stop_ = true; }
  const char* poller() const { return poller_ ? poller_->name() : "none"; }

  bool Send(ConnId conn, const std::byte* packet, std::size_t bytes, const int* descriptors, std::size_t count) override;
  void Drop(ConnId conn, const char* reason) override;

 private:
  struct Source {
    enum Kind { kListener, kWatched, kConnection } kind = kConnection;
    int fd = -1;
    std::uint32_t listener = 0;
    std::function<void()> ready;
    short armed = 0;
    bool paused = false;   // a listener that cannot accept now
    bool broken = false;   // the socket's other end has gone
    bool drained = false;  // and all has been read
    bool dropped = false;  // by the server
  };
  Source& AddSource(Source::Kind kind, int fd, std::uint64_t* key);
  int OpenPoller(bool io_uring);
  int WaitForEvents(std::vector<Poller::Event>* events);
  void HandleEvent(const Poller::Event& event);
  void Accept(Source& source);
  bool AcceptWithoutDescriptors(Source& source);
  void ReadFrom(std::uint64_t key, Source& source);
  bool ReceiveOne(std::uint64_t key, Source& source);
  void Touch(std::uint64_t key) { touched_.push_back(key); }
  void Tend(std::uint64_t key);
  void Log(Level level, const std::string& line) const;

  std::function<void(Level, const std::string&)> log_;
  Disposal disposal_;
  const bool io_uring_;
  Server server_;
  std::unique_ptr<Poller> poller_;
  std::unordered_map<std::uint64_t, std::unique_ptr<Source>> sources_;
  std::vector<std::uint64_t> touched_;  // to be armed anew, or closed
  std::uint64_t last_key_ = 0;
  std::uint64_t next_tick_ = 0, quiet_until_ = 0;
  Fd spare_;  // let go of when there are no descriptors, to tell who connects that it is so
  bool stop_ = false;
  std::vector<std::byte> packet_;
};

}  // namespace ksmu::broker
