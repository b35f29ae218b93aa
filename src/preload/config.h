// What the environment asks of the shim, and where it says what it does. Read once, when the shim is loaded.
#pragma once

#include <cstddef>

namespace ksmu::preload {

struct Config {
  bool active = false;     // false: every call goes on untouched
  bool automatic = false;  // KSMU_AUTO=1: what nobody advised is advised
  bool promise = false;    // KSMU_NO_RAW_DISCARDS=1: regions are advised with KSMU_F_NO_RAW_DISCARDS
  std::size_t auto_min = std::size_t{1} << 20;  // KSMU_AUTO_MIN, bytes
  char stats[512] = {};    // KSMU_STATS=file[:seconds]; "": none
  unsigned stats_seconds = 10;
  char log[512] = {};      // KSMU_LOG: a file, or "stderr" (or "1"); "": silent
};
extern Config g_config;

void ReadConfig();

// A line of at most some 400 bytes, where a log is wanted. Neither allocates nor keeps a descriptor. Not under a lock.
void Log(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace ksmu::preload
