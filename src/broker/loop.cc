#include "broker/loop.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <system_error>
#include <thread>

namespace ksmu::broker {
namespace {

constexpr std::size_t kMostDescriptors = 253;  // of one message, says the kernel
constexpr std::uint64_t kMillisecond = 1'000'000;

template <typename F>
auto Repeat(F&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

std::uint64_t Now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * Server::kSecond + static_cast<std::uint64_t>(now.tv_nsec);
}

Fd OpenSpare() { return Fd(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

std::vector<Fd> TakeDescriptors(msghdr& message) {
  std::vector<Fd> taken;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t n = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < n; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
      taken.emplace_back(fd);
    }
  }
  return taken;
}

}  // namespace

void Disposal::Close(std::vector<Fd> descriptors) {
  if (pending_->fetch_add(1) < kMaxThreads) {
    try {
      std::thread([pending = pending_, mine = std::move(descriptors)]() mutable {
        mine.clear();
        pending->fetch_sub(1);
      }).detach();
      return;
    } catch (const std::system_error&) {
      // No thread to be had: it was closed on the way.
    }
  }
  descriptors.clear();
  pending_->fetch_sub(1);
}

Loop::Loop(Server::Config config, bool io_uring)
    : log_(config.log), io_uring_(io_uring),
      server_([&] {
        config.dispose = [this](std::vector<Fd> descriptors) { disposal_.Close(std::move(descriptors)); };
        return std::move(config);
      }(), *this),
      spare_(OpenSpare()), packet_(wire::kMaxPacket) {}

Loop::~Loop() {
  for (const auto& [key, source] : sources_) {
    if (source->kind != Source::kWatched) close(source->fd);
  }
}

void Loop::Log(Level level, const std::string& line) const {
  if (log_) log_(level, line);
}

Loop::Source& Loop::AddSource(Source::Kind kind, int fd, std::uint64_t* key) {
  *key = ++last_key_;
  auto& source = sources_[*key] = std::make_unique<Source>();
  source->kind = kind;
  source->fd = fd;
  Touch(*key);
  return *source;
}

void Loop::Listen(Fd socket, std::uint32_t listener) {
  std::uint64_t key;
  AddSource(Source::kListener, socket.Release(), &key).listener = listener;
}

void Loop::Watch(int fd, std::function<void()> ready) {
  std::uint64_t key;
  AddSource(Source::kWatched, fd, &key).ready = std::move(ready);
}

// --- rounds ----------------------------------------------------------------------------------------------------------

int Loop::OpenPoller(bool io_uring) {
  if (io_uring) {
    int error = 0;
    poller_ = MakeUringPoller(&error);
    if (!poller_) Log(Level::kInfo, std::string("no io_uring (") + std::strerror(-error) + "): poll is used");
  }
  if (!poller_) poller_ = MakePollPoller();
  for (const auto& [key, source] : sources_) {
    source->armed = 0;
    Touch(key);
  }
  return 0;
}

int Loop::WaitForEvents(std::vector<Poller::Event>* events) {
  const std::uint64_t now = Now();
  const std::uint64_t wait = next_tick_ > now ? next_tick_ - now : 0;
  events->clear();
  const int error = poller_->Wait(static_cast<int>((wait + kMillisecond - 1) / kMillisecond), events);
  if (error == 0 || std::strcmp(poller_->name(), "poll") == 0) return error;
  // Forbidden in mid-life, or without memory: what it was to report is asked of the other.
  Log(Level::kWarning, std::string("io_uring has failed (") + std::strerror(-error) + "): poll is used from here on");
  poller_.reset();
  return OpenPoller(false);
}

int Loop::Run() {
  if (!poller_) OpenPoller(io_uring_);
  std::vector<Poller::Event> events;
  std::vector<std::uint64_t> touched;
  next_tick_ = server_.Tick(Now());
  while (!stop_) {
    // What was closed is closed, what was handled is armed, before anything is waited for.
    while (!touched_.empty()) {
      touched.swap(touched_);
      for (const std::uint64_t key : touched) Tend(key);
      touched.clear();
    }
    if (int error = WaitForEvents(&events)) return error;
    for (const Poller::Event& event : events) HandleEvent(event);
    server_.Flush();
    const std::uint64_t now = Now();
    const bool second_over = now >= next_tick_;
    next_tick_ = server_.Tick(now);
    if (!second_over) continue;
    for (const auto& [key, source] : sources_) {
      if (std::exchange(source->paused, false)) Touch(key);
    }
  }
  return 0;
}

// Closes the source, or arms it with what it waits for now.
void Loop::Tend(std::uint64_t key) {
  const auto found = sources_.find(key);
  if (found == sources_.end()) return;
  Source& source = *found->second;
  if (source.broken && !source.dropped) {
    server_.Disconnected(key);
    source.dropped = true;
  }
  if (source.dropped) {
    poller_->Disarm(key);
    // Now, whoever else has a reference.
    shutdown(source.fd, SHUT_RDWR);
    std::vector<Fd> socket;
    socket.emplace_back(source.fd);
    // What it has sent and nobody has read is freed with it: not here.
    if (!source.drained) disposal_.Close(std::move(socket));
    sources_.erase(found);
    return;
  }
  short wanted = source.paused ? 0 : POLLIN;
  if (source.kind == Source::kConnection) {
    wanted = static_cast<short>((server_.MayRead(key) ? POLLIN : 0) | (server_.WantsToWrite(key) ? POLLOUT : 0));
  }
  if (wanted == source.armed) return;
  source.armed = wanted;
  if (wanted) poller_->Arm(key, source.fd, wanted);
  else poller_->Disarm(key);
}

void Loop::HandleEvent(const Poller::Event& event) {
  const auto found = sources_.find(event.key);
  if (found == sources_.end()) return;
  Source& source = *found->second;
  source.armed = 0;
  Touch(event.key);
  if (source.kind == Source::kListener) return Accept(source);
  if (source.kind == Source::kWatched) return source.ready();
  if (source.dropped || source.broken) return;
  if (event.events & POLLOUT) server_.Writable(event.key);
  if (server_.MayRead(event.key)) {
    if (event.events & (POLLIN | POLLHUP | POLLERR)) ReadFrom(event.key, source);
  } else if (event.events & (POLLHUP | POLLERR)) {
    source.broken = true;  // nobody is left who would take the answer
  }
}

// --- connections -----------------------------------------------------------------------------------------------------

void Loop::Accept(Source& source) {
  for (int i = 0; i < kConnectionsARound; ++i) {
    const int fd = accept4(source.fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno == EAGAIN) return;
      if ((errno == EMFILE || errno == ENFILE) && AcceptWithoutDescriptors(source)) continue;
      // Of no use to ask at once: at the next tick.
      source.paused = true;
      return;
    }
    ucred peer{};
    socklen_t size = sizeof peer;
    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size);
    std::uint64_t key;
    Source& made = AddSource(Source::kConnection, fd, &key);
    if (!server_.Connected(key, source.listener, {peer.uid, peer.pid})) made.dropped = true;
  }
}

// Whoever waits for an answer that cannot come is told so, instead of being reported as ready for ever.
bool Loop::AcceptWithoutDescriptors(Source& source) {
  if (const std::uint64_t now = Now(); now >= quiet_until_) {
    quiet_until_ = now + 10 * Server::kSecond;
    Log(Level::kWarning, "no more descriptors: those that connect are turned away");
  }
  if (!spare_) return false;
  spare_.Reset();
  const int fd = accept4(source.fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd >= 0) close(fd);
  spare_ = OpenSpare();
  return fd >= 0;
}

void Loop::ReadFrom(std::uint64_t key, Source& source) {
  const std::uint64_t end = Now() + kTimeARound;
  for (int i = 0; i < kMessagesARound && (i == 0 || Now() < end); ++i) {
    if (!ReceiveOne(key, source) || source.dropped || source.broken || !server_.MayRead(key)) return;
  }
}

// False: nothing was there.
bool Loop::ReceiveOne(std::uint64_t key, Source& source) {
  iovec part{packet_.data(), packet_.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMostDescriptors * sizeof(int))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = Repeat([&] { return recvmsg(source.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC); });
  if (got < 0) {
    source.broken = errno != EAGAIN;
    return false;
  }
  std::vector<Fd> descriptors = TakeDescriptors(message);
  if (got == 0) {
    // The end; or an empty packet, which is none of the protocol's either.
    if (!descriptors.empty()) disposal_.Close(std::move(descriptors));
    source.broken = source.drained = true;
    return false;
  }
  if (message.msg_flags & MSG_TRUNC) {
    server_.Reject(key, "a packet that is longer than any message", std::move(descriptors));
  } else if (message.msg_flags & MSG_CTRUNC) {
    server_.Reject(key, "its descriptors do not fit in: too many are open", std::move(descriptors));
  } else {
    server_.Received(key, packet_.data(), static_cast<std::size_t>(got), std::move(descriptors));
  }
  return true;
}

bool Loop::Send(ConnId conn, const std::byte* packet, std::size_t bytes, const int* descriptors, std::size_t count) {
  const auto found = sources_.find(conn);
  if (found == sources_.end() || found->second->broken || found->second->dropped) return true;
  Source& source = *found->second;
  iovec part{const_cast<std::byte*>(packet), bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (count) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    std::memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
  }
  if (Repeat([&] { return sendmsg(source.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); }) >= 0) return true;
  Touch(conn);
  if (errno == EAGAIN) return false;
  // Not to be mended by waiting: the other end has gone, or the kernel has no memory, or too many descriptors are under way.
  if (errno != EPIPE && errno != ECONNRESET) Log(Level::kWarning, std::string("a member cannot be answered: ") + std::strerror(errno));
  source.broken = true;
  return true;
}

void Loop::Drop(ConnId conn, const char*) {
  const auto found = sources_.find(conn);
  if (found == sources_.end()) return;
  found->second->dropped = true;
  Touch(conn);
}

}  // namespace ksmu::broker
