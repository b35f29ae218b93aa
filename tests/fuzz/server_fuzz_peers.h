// The peers of server_fuzz.cc: what they have to send, and what is known of each.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "broker/server.h"
#include "check.h"
#include "content/content.h"
#include "server_fuzz_operators.h"

namespace ksmu::broker::fuzzing {

using wire::SettleEntry;

inline constexpr std::size_t kPage = 4096;
inline constexpr std::uint64_t kSeed = 7;
inline constexpr std::size_t kSmallRing = 8;

// --- what peers have to send ---------------------------------------------------------------------------------------

using PageBytes = std::array<std::byte, kPage>;

// Of a place in the ring, which every peer fills alike, each content twice.
inline std::uint32_t ContentOf(std::uint32_t place) { return place / 2; }
inline PageBytes PageOf(std::uint32_t content) {
  PageBytes page{};
  std::memcpy(page.data(), &content, sizeof content);
  std::memcpy(page.data() + kPage - sizeof content, &content, sizeof content);
  return page;
}
inline std::uint64_t WholeHashOf(std::uint32_t content) {
  static const auto hashes = [] {
    std::array<std::uint64_t, wire::kRingPages> all;
    for (std::uint32_t c = 0; c < all.size(); ++c) {
      const PageBytes page = PageOf(c);
      all[c] = content::Hash(page.data(), kPage, kSeed);
    }
    return all;
  }();
  return hashes.at(content);
}
inline std::uint32_t HashOfContent(std::uint32_t content) { return static_cast<std::uint32_t>(WholeHashOf(content) >> 32); }

// Descriptors that come with a join. Made once: the same description is sent by all.
enum RingKind : std::uint8_t { kRing, kRingOfFew, kUnsealed, kPipe, kNull, kRingKinds };
inline int RingOf(unsigned kind) {
  static const auto all = [] {
    std::array<int, kRingKinds> fds{};
    for (unsigned k : {kRing, kRingOfFew, kUnsealed}) {
      const std::uint32_t pages = k == kRingOfFew ? kSmallRing : wire::kRingPages;
      fds[k] = memfd_create("fuzz-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
      FUZZ_CHECK(fds[k] >= 0 && ftruncate(fds[k], static_cast<off_t>(pages * kPage)) == 0, "a ring");
      for (std::uint32_t place = 0; place < pages; ++place) {
        const PageBytes page = PageOf(ContentOf(place));
        FUZZ_CHECK(pwrite(fds[k], page.data(), kPage, static_cast<off_t>(place * kPage)) == static_cast<ssize_t>(kPage), "a ring's page");
      }
      if (k != kUnsealed) FUZZ_CHECK(fcntl(fds[k], F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0, "a ring's seals");
    }
    int ends[2];
    FUZZ_CHECK(pipe2(ends, O_CLOEXEC) == 0, "a pipe");
    fds[kPipe] = ends[0];
    fds[kNull] = open("/dev/null", O_RDWR | O_CLOEXEC);
    return fds;
  }();
  return all[kind];
}
inline std::uint32_t PagesOf(unsigned kind) {
  return kind == kRing ? wire::kRingPages : kind == kRingOfFew ? static_cast<std::uint32_t>(kSmallRing) : 0;
}

inline int Dup(int fd) {
  const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  FUZZ_CHECK(copy >= 0, "a descriptor that was sent is open");
  return copy;
}

// --- the model -----------------------------------------------------------------------------------------------------

using Key = std::pair<std::uint32_t, std::uint32_t>;  // listener, user (of a listener with a name: 0)

// What a process has got of its domain, and keeps when its connection ends.
struct Belongings {
  Key key;
  Fd canary;
  std::map<std::uint32_t, Fd> files;
  std::map<Frame, std::uint32_t> held;  // and what is in them
  std::set<Frame> covered;              // dropped, and mapped still
};
struct Question {
  wire::Kind kind;
  std::uint32_t number;
  std::uint32_t file = 0;
  std::vector<SettleEntry> entries;
  std::vector<bool> may_be_refused;  // each of them
};
struct Peer {
  enum State { kNone, kStranger, kMember, kOperator } state = kNone;
  ConnId id = 0;
  std::uint32_t listener = 0, uid = 0;
  std::uint64_t since = 0;
  std::uint32_t ring_pages = 0;
  bool takes = true;    // the socket has room
  bool refused = false;  // told so
  std::optional<Question> question;
  Belongings has;
  std::map<std::uint32_t, std::size_t> may_want;  // hashes offered by it, and how often others have offered them since
  // Of an operator.
  std::optional<Asked> asked;
  std::optional<std::uint64_t> kept_since;  // an answer that it did not take
  std::uint32_t own_domain = 0;
  // Of a member, and not answered by it.
  std::vector<wire::TuneEntry> told;
  std::uint32_t told_number = 0, ask_number = 0;  // 0: nothing
  std::uint64_t ask_from = 0;
};
inline std::string NameOf(const Key& key) {
  return key.first == 0 ? "default/" + std::to_string(key.second) : std::string(key.first == 1 ? "a" : "b");
}

// Whose question a packet is to be understood as.
inline bool IsForOperators(const Peer& peer, const std::vector<std::byte>& packet) {
  wire::Header header;
  if (peer.state != Peer::kStranger || packet.size() < sizeof header) return peer.state == Peer::kOperator;
  std::memcpy(&header, packet.data(), sizeof header);
  return control::IsControl(header.kind);
}
// Mostly plenty of memory.
inline Pressure PressureOf(std::uint8_t how) {
  static constexpr Pressure kPressures[] = {{100 << 20, 90 << 20, -1}, {100 << 20, 90 << 20, 0}, {100 << 20, 10 << 20, 0}, {0, 0, 50}};
  return kPressures[how % 16 < 4 ? how % 4 : 0];
}

// --- what members answer ---------------------------------------------------------------------------------------------

// All that it was told of, or not; with errors, or without.
inline void MakeTuned(wire::Message* m, const Peer& peer, std::uint8_t how) {
  const std::size_t count = std::max<std::size_t>(1, peer.told.size());
  m->header = {0, wire::Kind::kTuned, static_cast<std::uint16_t>(count), how < 250 ? std::max(peer.told_number, 1u) : how, 0};
  for (std::size_t i = 0; i < count; ++i) {
    static constexpr std::uint32_t kErrors[] = {0, 0, EEXIST, EBUSY, ENOMEM, EINVAL, 0, 0};
    m->tuned[i] = {i < peer.told.size() ? peer.told[i].tunable : how % static_cast<std::uint32_t>(engine::kTunableCount), kErrors[(how + i) % 8]};
  }
}
// From where it was asked; or, seldom, from before.
inline void MakeTold(wire::Message* m, const Peer& peer, std::uint8_t how) {
  m->header = {0, wire::Kind::kTold, static_cast<std::uint16_t>(how & 3), how < 250 ? std::max(peer.ask_number, 1u) : how, 0};
  std::uint64_t at = how < 240 ? (peer.ask_from + kPage - 1) & ~std::uint64_t{kPage - 1} : 0;
  for (std::size_t i = 0; i < m->header.count; ++i, at += kPage) {
    m->regions[i] = {};
    m->regions[i].start = at, m->regions[i].end = at + kPage;
    m->regions[i].next = i + 1u < m->header.count || how & 4 ? at + kPage : 0;
  }
}
inline void MakeReport(wire::Message* m, std::uint8_t size, std::uint8_t how) {
  m->header = {0, wire::Kind::kReport, 1, 0, 0};
  m->report = {};
  const std::int64_t pages = std::int64_t{size} << 10;
  for (std::size_t c = 0; c < wire::kCounterSlots; ++c) {
    if (how >> c % 8 & 1) m->report.counters[c] = how == 255 ? wire::kMostCount : pages;
  }
  m->report.tunables[engine::kTunable_advisor_mode] = how & 1;
  m->report.cpu_ns = static_cast<std::uint64_t>(pages) << 10;
}

}  // namespace ksmu::broker::fuzzing
