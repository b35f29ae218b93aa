// The commands of ksmuctl, each in a file of its own. `argv` is what follows the command's name; what is returned is the exit
// status. Each prints its own usage for --help.
#pragma once

namespace ksmu::tools {

int RunDoctor(int argc, char** argv);
int RunExec(int argc, char** argv);
int RunMap(int argc, char** argv);
int RunWhatIf(int argc, char** argv);

}  // namespace ksmu::tools
