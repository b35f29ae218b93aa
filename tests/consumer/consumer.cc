// The same from C++, through the C header and, where it is installed, the C++ one.
#include <ksmu/ksmu.h>
#if __has_include(<ksmu/ksmu.hpp>)
#include <ksmu/ksmu.hpp>
#endif

#include <cerrno>
#include <cstdio>
#include <string>

int main(int argc, char** argv) {
  if (argc != 2 || std::string(ksmu_version()) != argv[1]) {
    std::fprintf(stderr, "version %s, expected %s\n", ksmu_version(), argc == 2 ? argv[1] : "one argument");
    return 1;
  }
  alignas(65536) static char memory[65536];
  errno = 0;
  if (ksmu_advise(memory, sizeof memory, 999) != -1 || errno != EINVAL) {
    std::fprintf(stderr, "unknown advice: errno %d, expected EINVAL\n", errno);
    return 1;
  }
  errno = 0;
  if (ksmu_advise(memory + 8, 4096, KSMU_MERGEABLE | KSMU_F_SYNC_BREAK) != -1 || errno != EINVAL) {
    std::fprintf(stderr, "address in the middle of a page: errno %d, expected EINVAL\n", errno);
    return 1;
  }
  std::puts("ok");
}
