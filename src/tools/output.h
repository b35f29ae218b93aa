// What the commands print numbers and names with.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace ksmu::tools {

std::string Grouped(std::uint64_t number);  // 12,345
std::string MiB(std::uint64_t bytes);       // 48.2
// With its quotes. Bytes that are no ASCII are taken for Latin-1, since names of files and mappings may be anything.
std::string JsonString(std::string_view text);

}  // namespace ksmu::tools
