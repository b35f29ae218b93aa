// The commands of ksmuctl, each in a file of its own. `argv` is what follows the command's name; what is returned is the exit
// status. Each prints its own usage for --help.
#pragma once

namespace ksmu::tools {

int RunDoctor(int argc, char** argv);
int RunExec(int argc, char** argv);
int RunExplain(int argc, char** argv);
int RunGet(int argc, char** argv);
int RunMap(int argc, char** argv);
int RunMembers(int argc, char** argv);
int RunMetrics(int argc, char** argv);
int RunRun(int argc, char** argv);
int RunSet(int argc, char** argv);
int RunStatus(int argc, char** argv);
int RunTop(int argc, char** argv);
int RunUnmerge(int argc, char** argv);
int RunWhatIf(int argc, char** argv);

}  // namespace ksmu::tools
