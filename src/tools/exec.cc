// ksmuctl exec: runs a program with the preloaded shim.
//
//   ksmuctl exec [option...] [--] program [argument...]
#include <sys/stat.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ksmu/ksmu.h"
#include "tools/commands.h"

namespace ksmu::tools {
namespace {

constexpr const char* kUsage =
    "usage: ksmuctl exec [option...] [--] program [argument...]\n"
    "Runs the program with libksmu_preload.so: what it advises by madvise(MADV_MERGEABLE) is merged by the library.\n"
    "The program takes ksmuctl's place: same process, same standard streams, its own exit status.\n"
    "\n"
    "  --auto               merge what it maps without being asked, too (KSMU_AUTO=1)\n"
    "  --auto-min SIZE      but no mapping smaller than this, 1M by default (KSMU_AUTO_MIN)\n"
    "  --only NAMES         only in programs of these names, separated by commas; * is a wildcard (KSMU_ONLY)\n"
    "  --exclude NAMES      not in these (KSMU_EXCLUDE)\n"
    "  --no-raw-discards    it makes no discards but by libc's functions: merging is cheaper (KSMU_NO_RAW_DISCARDS=1)\n"
    "  --set NAME=VALUE     a tunable, by KSM's name, as cpu_limit_percent=20 (KSMU_NAME)\n"
    "  --stats FILE[:S]     the counters go to this file every S (10) seconds and at the end; %p: the process (KSMU_STATS)\n"
    "  --log FILE           what the library has to say goes to this file, or to stderr (KSMU_LOG)\n"
    "  --help               this text\n"
    "\n"
    "exit status: the program's; 2 usage; 126 it cannot be executed, or the shim is not there; 127 there is no such program.\n";

[[noreturn]] void Usage(const char* what, const char* which) {
  std::fprintf(stderr, "ksmuctl: %s%s\n%s", what, which, kUsage);
  std::exit(2);
}

bool Exists(const std::string& path) { return access(path.c_str(), R_OK) == 0; }

// Beside this program in a build tree, or where it has been installed.
std::string FindShim() {
  if (const char* given = std::getenv("KSMU_PRELOAD"); given && *given) return given;
  char self[4096];
  const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  const std::string directory = n > 0 ? std::string(self, static_cast<size_t>(n)).substr(0, std::string(self, static_cast<size_t>(n)).rfind('/')) : ".";
  const std::string name = "/libksmu_preload.so";
  for (const std::string& place : {directory, directory + "/../" KSMU_LIBDIR, std::string(KSMU_FULL_LIBDIR)}) {
    if (!Exists(place + name)) continue;
    char resolved[4096];
    return realpath((place + name).c_str(), resolved) ? resolved : place + name;
  }
  return {};
}

void SetTunable(const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) Usage("--set wants NAME=VALUE, not ", assignment.c_str());
  const std::string name = assignment.substr(0, equals), value = assignment.substr(equals + 1);
  char* end = nullptr;
  errno = 0;
  const long long number = std::strtoll(value.c_str(), &end, 10);
  // The library itself knows what there is and what it may be; nothing is started by asking.
  if (value.empty() || *end || errno || ksmu_set(name.c_str(), number) != 0) {
    const char* why = value.empty() || *end || errno == ERANGE ? "the value is not a number" : ksmu_last_error();
    std::fprintf(stderr, "ksmuctl: --set %s: %s\n", assignment.c_str(), why);
    std::exit(2);
  }
  std::string variable = "KSMU_" + name;
  for (char& c : variable) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  setenv(variable.c_str(), value.c_str(), 1);
}

// The loader takes no preloads into a program that has more rights than its user.
void WarnIfPrivileged(const char* program) {
  struct stat about;
  if (std::strchr(program, '/') && stat(program, &about) == 0 && (about.st_mode & (S_ISUID | S_ISGID))) {
    std::fprintf(stderr, "ksmuctl: %s is set-user-ID or set-group-ID: nothing will be preloaded into it\n", program);
  }
}

}  // namespace

int RunExec(int argc, char** argv) {
  const struct {
    const char *option, *variable;
    bool value;
  } kOptions[] = {{"--auto", "KSMU_AUTO", false},       {"--auto-min", "KSMU_AUTO_MIN", true},
                  {"--only", "KSMU_ONLY", true},        {"--exclude", "KSMU_EXCLUDE", true},
                  {"--stats", "KSMU_STATS", true},      {"--log", "KSMU_LOG", true},
                  {"--no-raw-discards", "KSMU_NO_RAW_DISCARDS", false}};
  int i = 0;
  for (; i < argc && argv[i][0] == '-'; ++i) {
    if (std::strcmp(argv[i], "--") == 0) {
      ++i;
      break;
    }
    if (std::strcmp(argv[i], "--help") == 0) {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (std::strcmp(argv[i], "--set") == 0) {
      if (++i == argc) Usage("--set wants NAME=VALUE", "");
      SetTunable(argv[i]);
      continue;
    }
    bool known = false;
    for (const auto& option : kOptions) {
      if (std::strcmp(argv[i], option.option) != 0) continue;
      known = true;
      if (option.value && i + 1 == argc) Usage(option.option, " wants a value");
      setenv(option.variable, option.value ? argv[++i] : "1", 1);
      break;
    }
    if (!known) Usage("unknown option ", argv[i]);
  }
  if (i == argc) Usage("no program is named", "");
  const std::string shim = FindShim();
  if (shim.empty() || !Exists(shim)) {
    std::fprintf(stderr, "ksmuctl: libksmu_preload.so is not where it should be: KSMU_PRELOAD can name it\n");
    return 126;
  }
  const char* before = std::getenv("LD_PRELOAD");
  setenv("LD_PRELOAD", (before && *before ? shim + ":" + before : shim).c_str(), 1);
  WarnIfPrivileged(argv[i]);
  execvp(argv[i], argv + i);
  const int error = errno;
  std::fprintf(stderr, "ksmuctl: %s: %s\n", argv[i], std::strerror(error));
  return error == ENOENT ? 127 : 126;
}

}  // namespace ksmu::tools
