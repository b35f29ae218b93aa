#include "preload/config.h"

#include <fcntl.h>
#include <fnmatch.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ksmu/ksmu.h"

extern "C" char** environ;

namespace ksmu::preload {

Config g_config;

namespace {

// Variables that are not a tunable's: those that the library reads itself, and ours.
const char* const kKnown[] = {"CPUS", "USER_MODE_ONLY", "BROKER", "DOMAIN", "LOG",  "STATS", "AUTO",
                              "AUTO_MIN", "ONLY", "EXCLUDE", "NO_RAW_DISCARDS", "MEMORY_MERGE", "PRELOAD"};

bool ReadSwitch(const char* name, bool* out) {
  const char* text = secure_getenv(name);
  if (!text || !*text) return false;
  if (std::strcmp(text, "0") != 0 && std::strcmp(text, "1") != 0) {
    Log("%s=%.100s: neither 0 nor 1, taken for 0", name, text);
    return false;
  }
  *out = text[0] == '1';
  return true;
}

// "4096", "64K", "1M", "2G".
bool ParseSize(const char* text, std::size_t* out) {
  char* end = nullptr;
  errno = 0;
  const unsigned long long value = std::strtoull(text, &end, 10);
  if (errno || end == text || text[0] == '-') return false;
  int shift = 0;
  switch (*end) {
    case 'k': case 'K': shift = 10; break;
    case 'm': case 'M': shift = 20; break;
    case 'g': case 'G': shift = 30; break;
    default: break;
  }
  if (shift) ++end;
  if (*end || value > (~0ull >> shift)) return false;
  *out = static_cast<std::size_t>(value << shift);
  return true;
}

// Whether one of the patterns, separated by commas, is the program's name.
bool Names(const char* list, const char* program) {
  char pattern[256];
  for (const char* at = list; *at;) {
    const std::size_t n = std::strcspn(at, ",");
    if (n && n < sizeof pattern) {
      std::memcpy(pattern, at, n);
      pattern[n] = 0;
      if (fnmatch(pattern, program, 0) == 0) return true;
    }
    at += n + (at[n] == ',');
  }
  return false;
}

// Whether an argument of this process has the text in it. QEMU takes no advice where its user said mem-merge=off.
bool ArgumentsContain(const char* text) {
  const int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char buffer[4096];
  const std::size_t length = std::strlen(text);
  std::size_t kept = 0;
  bool found = false;
  for (ssize_t got; !found && (got = read(fd, buffer + kept, sizeof buffer - kept)) > 0;) {
    const std::size_t bytes = kept + static_cast<std::size_t>(got);
    found = memmem(buffer, bytes, text, length) != nullptr;
    kept = bytes < length ? bytes : length - 1;
    std::memmove(buffer, buffer + bytes - kept, kept);
  }
  close(fd);
  return found;
}

void CopyText(char* to, std::size_t room, const char* from, const char* name) {
  if (std::strlen(from) >= room) {
    Log("%s is too long: not used", name);
    return;
  }
  std::strcpy(to, from);
}

void ReportUnknown() {
  for (char** variable = environ; variable && *variable; ++variable) {
    if (std::strncmp(*variable, "KSMU_", 5) != 0) continue;
    const char* rest = *variable + 5;
    char name[64];
    const std::size_t n = std::strcspn(rest, "=");
    if (n >= sizeof name) continue;
    std::memcpy(name, rest, n);
    name[n] = 0;
    bool known = false;
    for (const char* k : kKnown) known |= std::strcmp(k, name) == 0;
    if (known) continue;
    char lower[64];
    for (std::size_t i = 0; i <= n; ++i) lower[i] = name[i] >= 'A' && name[i] <= 'Z' ? static_cast<char>(name[i] + 32) : name[i];
    const char* value = rest + n + (rest[n] == '=');
    char* end;
    std::strtoll(value, &end, 10);
    int64_t now;
    if (ksmu_get(lower, &now) != 0) Log("KSMU_%s: there is no such variable", name);
    else if (!*value || *end) Log("KSMU_%s=%.100s: not a number", name, value);
  }
}

}  // namespace

void Log(const char* format, ...) {
  if (!g_config.log[0]) return;
  const int saved = errno;
  char line[512];
  int n = std::snprintf(line, sizeof line, "ksmu[%d]: ", static_cast<int>(getpid()));
  va_list arguments;
  va_start(arguments, format);
  const int m = std::vsnprintf(line + n, sizeof line - static_cast<std::size_t>(n) - 1, format, arguments);
  va_end(arguments);
  n += m < 0 ? 0 : m;
  if (static_cast<std::size_t>(n) > sizeof line - 2) n = sizeof line - 2;
  line[n++] = '\n';
  const bool to_stderr = std::strcmp(g_config.log, "stderr") == 0;
  const int fd = to_stderr ? STDERR_FILENO : open(g_config.log, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_NOCTTY | O_CLOEXEC, 0644);
  if (fd >= 0) {
    [[maybe_unused]] const ssize_t written = write(fd, line, static_cast<std::size_t>(n));
    if (!to_stderr) close(fd);
  }
  errno = saved;
}

void ReadConfig() {
  Config& c = g_config;
  if (const char* log = secure_getenv("KSMU_LOG"); log && *log && std::strcmp(log, "0") != 0) {
    CopyText(c.log, sizeof c.log, std::strcmp(log, "1") == 0 ? "stderr" : log, "KSMU_LOG");
  }
  const char* program = program_invocation_short_name;
  const char* only = secure_getenv("KSMU_ONLY");
  const char* exclude = secure_getenv("KSMU_EXCLUDE");
  if ((only && *only && !Names(only, program)) || (exclude && Names(exclude, program))) {
    Log("%s is left alone: KSMU_ONLY or KSMU_EXCLUDE", program);
    return;
  }
  c.active = true;
  ReadSwitch("KSMU_AUTO", &c.automatic);
  bool inherited = false;
  ReadSwitch("KSMU_MEMORY_MERGE", &inherited);  // prctl(PR_SET_MEMORY_MERGE) of whoever executed this program
  if (const char* text = secure_getenv("KSMU_AUTO_MIN"); text && *text && !ParseSize(text, &c.auto_min)) {
    Log("KSMU_AUTO_MIN=%.100s: not a size (4096, 64K, 1M)", text);
  }
  if (inherited) c.automatic = true, c.auto_min = 0;
  ReadSwitch("KSMU_NO_RAW_DISCARDS", &c.promise);
  if (const char* text = secure_getenv("KSMU_STATS"); text && *text) {
    CopyText(c.stats, sizeof c.stats, text, "KSMU_STATS");
    char* colon = std::strrchr(c.stats, ':');
    if (colon && colon[1] && std::strspn(colon + 1, "0123456789") == std::strlen(colon + 1)) {
      c.stats_seconds = static_cast<unsigned>(std::strtoul(colon + 1, nullptr, 10));
      if (c.stats_seconds == 0) c.stats_seconds = 1;
      *colon = 0;
    }
  }
  if (c.automatic && std::strncmp(program, "qemu", 4) == 0 && ArgumentsContain("mem-merge=off")) {
    Log("%s: mem-merge=off", program);
    c.automatic = false;
  }
  if (c.log[0]) ReportUnknown();
}

}  // namespace ksmu::preload
