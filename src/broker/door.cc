#include "broker/door.h"

#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "broker/member.h"
#include "os/users.h"

namespace ksmu::broker {
namespace {

bool IsName(std::string_view name) {
  if (name.empty() || name.size() > 64 || name[0] == '.') return false;
  for (const char c : name) {
    const bool good = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
    if (!good) return false;
  }
  return true;
}

template <std::size_t n>
bool Join(char (&path)[n], std::initializer_list<std::string_view> parts) {
  std::size_t size = 0;
  for (const std::string_view part : parts) {
    if (size + part.size() >= n) return false;
    std::memcpy(path + size, part.data(), part.size());
    size += part.size();
  }
  path[size] = 0;
  return true;
}

}  // namespace

const char* BrokerDoor::Choose(const char* broker, const char* domain, const char* runtime_directory) {
  static constexpr const char* kTooLong = "the path of the broker's socket is too long";
  *this = BrokerDoor();
  const std::string_view name = domain && *domain ? domain : "default";
  if (!IsName(name)) return "a domain's name consists of letters, digits, '-', '_' and '.', 64 at the most, and does not begin with '.'";
  asked_for_ = (broker && *broker) || (domain && *domain);
  if (broker && *broker) {
    if (std::strcmp(broker, "none") == 0) return nullptr;
    if (*broker != '/') return "the path of the broker's socket is to begin with '/'";
    const std::string_view path = broker;
    const std::string_view directory = path.substr(0, path.rfind('/'));
    const bool fits = domain && *domain ? Join(paths_[0], {directory, "/", name, ".sock"}) : Join(paths_[0], {path});
    return fits ? nullptr : kTooLong;
  }
  std::size_t n = 0;
  if (const char* const own = os::OwnRuntimeDirectory(runtime_directory)) {
    if (!Join(paths_[n], {own, "/ksmu/", name, ".sock"})) return kTooLong;
    ++n;
  }
  Join(paths_[n], {"/run/ksmu/", name, ".sock"});
  return nullptr;
}

bool BrokerDoor::SameAs(const BrokerDoor& other) const {
  for (std::size_t i = 0; i < kCandidates; ++i) {
    if (std::strcmp(paths_[i], other.paths_[i]) != 0) return false;
  }
  return true;
}

frames::Source* BrokerDoor::Enter(std::size_t page_bytes, const char** why, bool* soon) {
  int error = 0;
  for (const auto& path : paths_) {
    if (!path[0] || joining_) break;
    os::ErrorText text;
    const int result = Member::Begin(path, page_bytes, &joining_, &text);
    if (result == 0) {
      *soon = true;
      return nullptr;
    }
    const bool nobody = result == -ENOENT || result == -ECONNREFUSED;
    if (nobody && (!asked_for_ || error)) continue;
    error = result;
    why_ = text;
    if (!nobody) break;  // a broker that is there and does not let us in is not passed by
  }
  if (joining_) {
    error = joining_->Finish(&why_);
    *soon = error == -EAGAIN;
    if (*soon) return nullptr;
    Member* const member = std::exchange(joining_, nullptr);
    if (error == 0) {
      last_error_ = 0;
      return member;
    }
    Member::Destroy(member);
  }
  // Once for each reason.
  if (error && error != last_error_) *why = why_.text;
  last_error_ = error;
  return nullptr;
}

void BrokerDoor::GiveUp() {
  if (Member* const member = std::exchange(joining_, nullptr)) Member::Destroy(member);
}

void BrokerDoor::Leave(frames::Source* source) { static_cast<Member*>(source)->Leave(); }
void BrokerDoor::Forget(frames::Source* source) { Member::Destroy(static_cast<Member*>(source)); }

}  // namespace ksmu::broker
