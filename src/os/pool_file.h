// Memory files: creation, writing, punching.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "os/os.h"

namespace ksmu::os {

// How a mapping of a pool file is named in /proc/PID/maps.
inline constexpr std::string_view kPoolFileLinkPrefix = "/memfd:ksmu-frames";

int CreatePoolFile(std::size_t bytes, File* out);
Partial WritePoolFile(const File& file, std::uint64_t offset, Address from, std::size_t bytes);
int PunchPoolFile(const File& file, std::uint64_t offset, std::size_t bytes);
int MapPoolFile(const File& file, std::size_t bytes, const std::byte** out);

}  // namespace ksmu::os
