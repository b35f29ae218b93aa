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
    {"map", ksmu::tools::RunMap, "a picture of a process's memory: what is shared, zero, private, huge, swapped"},
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
