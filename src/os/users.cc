#include "os/users.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cstring>
#include <string_view>

#include "os/raw.h"
#include "os/text.h"

namespace ksmu::os {

std::uint32_t ThisUser() { return geteuid(); }

const char* OwnRuntimeDirectory(const char* named) {
  struct stat status {};
  const bool own = named && *named == '/' && raw::Repeat([&] { return stat(named, &status); }) == 0 && S_ISDIR(status.st_mode) && status.st_uid == geteuid();
  return own ? named : nullptr;
}

// The first namespace maps all numbers to themselves, and has no unknown ones.
bool SeesUnknownUsers() {
  const int fd = static_cast<int>(raw::Repeat([&] { return open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC); }));
  if (fd < 0) return true;
  char text[128];
  const auto n = raw::Repeat([&] { return read(fd, text, sizeof text); });
  close(fd);
  std::string_view map(text, n > 0 ? static_cast<std::size_t>(n) : 0);
  std::uint64_t inside = 1, outside = 1, count = 0;
  const auto number = [&](std::uint64_t* value) {
    while (TakePrefix(&map, " ")) {
    }
    return TakeDecimal(&map, value);
  };
  return !(number(&inside) && number(&outside) && number(&count) && inside == 0 && outside == 0 && count >= 0xffff'ffff);
}

bool IsUserListed(const char* path, std::uint32_t uid) {
  const int fd = static_cast<int>(raw::Repeat([&] { return open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK); }));
  if (fd < 0) return false;
  struct stat status {};
  bool listed = false;
  char text[4096];
  if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == 0 && !(status.st_mode & (S_IWGRP | S_IWOTH))) {
    const auto n = raw::Repeat([&] { return read(fd, text, sizeof text); });
    const char* const end = text + (n > 0 ? n : 0);
    for (const char* at = text; at < end && !listed;) {
      std::uint32_t number;
      const auto parsed = std::from_chars(at, end, number);
      listed = parsed.ec == std::errc() && (parsed.ptr == end || *parsed.ptr == '\n') && number == uid;
      const void* next = std::memchr(at, '\n', static_cast<std::size_t>(end - at));
      at = next ? static_cast<const char*>(next) + 1 : end;
    }
  }
  close(fd);
  return listed;
}

}  // namespace ksmu::os
