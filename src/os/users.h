// Whose a process at the other end of a socket is, and whether that says anything.
#pragma once

#include <cstdint>

namespace ksmu::os {

// Whether the user is named (a number a line) in the file, which only root can have written.
bool IsUserListed(const char* path, std::uint32_t uid);
std::uint32_t ThisUser();
// What XDG_RUNTIME_DIR says, where it counts; else null. It is to be this user's, by its specification: after `sudo -E` or `su` it is
// that of somebody else, whose broker is not meant.
const char* OwnRuntimeDirectory(const char* named);

// Users that this process's user namespace has no number for all look like this one, and may be anybody; whether there can be
// such.
inline constexpr std::uint32_t kUnknownUser = 65534;
bool SeesUnknownUsers();

}  // namespace ksmu::os
