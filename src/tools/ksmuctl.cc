// ksmuctl: what a user does with the library from a shell.
//
//   ksmuctl COMMAND [argument...]
#include <cstdio>
#include <cstring>

#include "ksmu/ksmu.h"
#include "tools/commands.h"

namespace {

constexpr struct {
  const char* name;
  int (*run)(int argc, char** argv);
  const char* help;
} kCommands[] = {
    {"doctor", ksmu::tools::RunDoctor, "can ksmu work here? what is in the way, and the command that mends it"},
    {"exec", ksmu::tools::RunExec, "run a program with libksmu_preload.so"},
    {"explain", ksmu::tools::RunExplain, "each region of a process: what is merged, and why the rest is not"},
    {"get", ksmu::tools::RunGet, "a counter or a tunable of a domain, or all of them"},
    {"map", ksmu::tools::RunMap, "a picture of a process's memory: what is shared, zero, private, huge, swapped"},
    {"members", ksmu::tools::RunMembers, "the processes of a domain"},
    {"metrics", ksmu::tools::RunMetrics, "the numbers of all domains for Prometheus"},
    {"run", ksmu::tools::RunRun, "0 stop merging, 1 merge, 2 stop and unmerge everything"},
    {"set", ksmu::tools::RunSet, "set a tunable of a domain"},
    {"status", ksmu::tools::RunStatus, "what is saved, by whom, at what cost, and why the rest is not"},
    {"top", ksmu::tools::RunTop, "the same, live"},
    {"unmerge", ksmu::tools::RunUnmerge, "give a process copies of its own of everything that is merged"},
    {"what-if", ksmu::tools::RunWhatIf, "what merging the memory of processes would save"},
};

void PrintUsage(FILE* to) {
  std::fputs("usage: ksmuctl COMMAND [argument...]\n       ksmuctl COMMAND --help\n       ksmuctl --version\n\n", to);
  for (const auto& command : kCommands) std::fprintf(to, "  %-10s %s\n", command.name, command.help);
}

int Usage(const char* what, const char* which) {
  std::fprintf(stderr, "ksmuctl: %s%s\n", what, which);
  PrintUsage(stderr);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return Usage("a command is missing", "");
  for (const auto& command : kCommands) {
    if (std::strcmp(argv[1], command.name) == 0) return command.run(argc - 2, argv + 2);
  }
  if (std::strcmp(argv[1], "--version") == 0) {
    std::printf("ksmuctl %s\n", ksmu_version());
    return 0;
  }
  if (std::strcmp(argv[1], "--help") == 0) {
    PrintUsage(stdout);
    return 0;
  }
  return Usage("unknown command ", argv[1]);
}
