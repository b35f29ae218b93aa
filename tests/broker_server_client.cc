#include "broker_server_client.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "content/content.h"

namespace ksmu::broker::test {

using wire::Kind;

PageOf MakePage(std::uint64_t number) {
  PageOf page(kPage);
  for (std::size_t i = 0; i < kPage; i += 8) {
    const std::uint64_t word = (number + 1) * 0x9E3779B97F4A7C15ull + i;
    std::memcpy(page.data() + i, &word, 8);
  }
  return page;
}

std::uint32_t HashOf(const PageOf& page, std::uint64_t seed) { return static_cast<std::uint32_t>(content::Hash(page.data(), page.size(), seed) >> 32); }

std::size_t OpenDescriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

TempDir::TempDir() {
  char name[] = "/tmp/ksmud-test-XXXXXX";
  path_ = mkdtemp(name) ? name : "";
}

TempDir::~TempDir() {
  std::error_code ignored;
  if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
}

Fd MakeMemfd(std::size_t bytes, int seals) {
  Fd fd(memfd_create("ksmu-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return Fd();
  if (seals) fcntl(fd.get(), F_ADD_SEALS, seals);
  return fd;
}

Fd MakeRing(std::size_t pages) { return MakeMemfd(pages * kPage, F_SEAL_SHRINK | F_SEAL_GROW); }

void WriteForEver(int fd) {
  const int uffd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC));
  uffdio_api api{UFFD_API, 0, 0};
  void* const memory = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uffdio_register range{{reinterpret_cast<std::uintptr_t>(memory), kPage}, UFFDIO_REGISTER_MODE_MISSING, 0};
  if (uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0 && ioctl(uffd, UFFDIO_REGISTER, &range) == 0) {
    [[maybe_unused]] const ssize_t n = pwrite(fd, memory, kPage, 0);
  }
  _exit(1);
}

bool WaitUntilStopped(pid_t pid) {
  for (int i = 0; i < 2000; ++i) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/syscall");
    long number = -1;
    if (file >> number && number == SYS_pwrite64) return true;
    usleep(1000);
  }
  return false;
}

// --- client ----------------------------------------------------------------------------------------------------------

Client::Client(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  fd_.Reset(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (connect(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) fd_.Reset();
}

bool Client::SendRaw(const void* bytes, std::size_t count, const std::vector<int>& descriptors) {
  iovec part{const_cast<void*>(bytes), count};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  std::vector<char> control(CMSG_SPACE(descriptors.size() * sizeof(int)));
  if (!descriptors.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(descriptors.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size() * sizeof(int));
  }
  return fd_ && sendmsg(fd_.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(count);
}

bool Client::Send(const wire::Message& message, const std::vector<int>& descriptors) {
  std::vector<std::byte> packet(wire::kMaxPacket);
  return SendRaw(packet.data(), wire::Encode(message, packet.data()), descriptors);
}

std::unique_ptr<Packet> Client::Receive(int timeout_ms) {
  pollfd entry{fd_.get(), POLLIN, 0};
  if (!fd_ || poll(&entry, 1, timeout_ms) != 1) return nullptr;
  std::vector<std::byte> packet(wire::kMaxPacket);
  iovec part{packet.data(), packet.size()};
  alignas(cmsghdr) char control[256];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC);
  auto out = std::make_unique<Packet>();
  for (cmsghdr* header = got > 0 ? CMSG_FIRSTHDR(&message) : nullptr; header; header = CMSG_NXTHDR(&message, header)) {
    for (std::size_t i = 0; i < (header->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
      out->descriptors.emplace_back(fd);
    }
  }
  if (got <= 0 || wire::Decode(packet.data(), static_cast<std::size_t>(got), wire::Sender::kBroker, &out->message)) return nullptr;
  return out;
}

std::unique_ptr<Packet> Client::Ask(wire::Message& message, const std::vector<int>& descriptors) {
  message.header.number = ++number_;
  if (!Send(message, descriptors)) return nullptr;
  for (;;) {
    auto answer = Receive();
    if (!answer || answer->message.header.kind != Kind::kWanted) return answer && answer->message.header.number == number_ ? std::move(answer) : nullptr;
    wanted_.insert(wanted_.end(), answer->message.words.begin(), answer->message.words.begin() + answer->message.header.count);
  }
}

bool Client::IsEnded(int timeout_ms) {
  if (!fd_) return true;
  pollfd entry{fd_.get(), POLLIN, 0};
  char byte;
  while (poll(&entry, 1, timeout_ms) == 1) {
    if (recv(fd_.get(), &byte, 1, MSG_DONTWAIT) <= 0) return true;
  }
  return false;
}

bool Client::Join(std::size_t ring_pages) {
  ring_fd_ = MakeRing(ring_pages);
  ring_ = Mapping(ring_fd_.get(), ring_pages * kPage, PROT_READ | PROT_WRITE);
  wire::Message join{};
  join.header = {0, Kind::kJoin, 1, 0, 0};
  join.join = {wire::kVersion, kPage, static_cast<std::uint32_t>(ring_pages), 0};
  const auto answer = Ask(join, {ring_fd_.get()});
  if (!answer || answer->message.header.kind != Kind::kJoined || answer->descriptors.size() != 2) return false;
  seed_ = answer->message.joined.seed;
  member_ = answer->message.joined.member;
  index_ = Mapping(answer->descriptors[0].get(), 16 << 20, PROT_READ);
  canary_ = Mapping(answer->descriptors[1].get(), kPage, PROT_READ | PROT_WRITE);
  return index_ && canary_ && ring_;
}

std::vector<std::uint32_t> Client::Publish(const std::vector<PageOf>& pages) {
  auto message = std::make_unique<wire::Message>();
  message->header = {0, Kind::kSettle, static_cast<std::uint16_t>(pages.size()), 0, 0};
  for (std::size_t i = 0; i < pages.size(); ++i) {
    std::memcpy(ring_.data() + i * kPage, pages[i].data(), kPage);
    message->settle[i] = {wire::SettleEntry::kPublish, HashOf(pages[i]), static_cast<std::uint32_t>(i), 0};
  }
  const auto answer = Ask(*message);
  if (!answer || answer->message.header.kind != Kind::kSettled) return {};
  return {answer->message.words.begin(), answer->message.words.begin() + answer->message.header.count};
}

std::uint32_t Client::Acquire(std::uint32_t frame, std::uint32_t hash) {
  auto message = std::make_unique<wire::Message>();
  message->header = {0, Kind::kSettle, 1, 0, 0};
  message->settle[0] = {wire::SettleEntry::kAcquire, hash, frame, 0};
  const auto answer = Ask(*message);
  return answer && answer->message.header.kind == Kind::kSettled ? answer->message.words[0] : wire::kNoFrame;
}

bool Client::SendWords(Kind kind, const std::vector<std::uint32_t>& words) {
  auto message = std::make_unique<wire::Message>();
  message->header = {0, kind, static_cast<std::uint16_t>(words.size()), 0, 0};
  if (kind == Kind::kOffer) std::transform(words.begin(), words.end(), message->offers.begin(), [](std::uint32_t w) { return std::uint64_t{w} << 32; });
  else std::copy(words.begin(), words.end(), message->words.begin());
  return Send(*message);
}

std::uint32_t Client::Lookup(std::uint32_t hash) const {
  std::uint32_t found = wire::kNoFrame;
  IndexReader(index_.data(), 16 << 20).Lookup(hash, [&](Frame frame) {
    found = frame;
    return false;
  });
  return found;
}

Fd Client::File(std::uint32_t number) {
  auto message = std::make_unique<wire::Message>();
  message->header = {0, Kind::kFile, 1, 0, 0};
  message->words[0] = number;
  const auto answer = Ask(*message);
  return answer && answer->message.header.kind == Kind::kFileIs && answer->descriptors.size() == 1 ? std::move(answer->descriptors[0]) : Fd();
}

PageOf Client::Read(std::uint32_t frame) {
  const Fd file = File(frame / wire::kFramesPerFile);
  if (!file) return {};
  PageOf page(kPage);
  const ssize_t n = pread(file.get(), page.data(), kPage, static_cast<off_t>(frame % wire::kFramesPerFile * kPage));
  return n == static_cast<ssize_t>(kPage) ? page : PageOf();
}

}  // namespace ksmu::broker::test
