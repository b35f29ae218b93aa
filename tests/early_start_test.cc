// A program that makes it hard for the library: it uses it in a static initialiser, which in a statically linked program
// may come before the library's own constructor, and it has more thread variables than a small stack has room for.

#include <ksmu/ksmu.h>

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "test_support.h"

namespace ksmu::test {
namespace {

// glibc takes them out of each thread's stack.
thread_local volatile char t_large[700 * 1024];

struct Early {
  Early() {
    t_large[0] = 1;
    memory = ksmu_map(16 * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), 0);
    error = memory == MAP_FAILED ? errno : 0;
    sentence = ksmu_last_error();
  }
  void* memory;
  int error;
  std::string sentence;
} g_early;

TEST(EarlyStart, InAStaticInitialiserWithLargeThreadVariables) {
  const std::string why = WhyNoUserfaultfd();
  if (!why.empty()) GTEST_SKIP() << why;
  ASSERT_NE(g_early.memory, MAP_FAILED) << strerror(g_early.error) << ": " << g_early.sentence;
  EXPECT_EQ(Get("regions"), 1);
  char* const pages = static_cast<char*>(g_early.memory);
  for (std::size_t i = 0; i < 16; ++i) FillPage(pages + i * PageSize(), 7);
  EXPECT_OK(ksmu_merge(nullptr, SIZE_MAX / PageSize() * PageSize()));
  EXPECT_EQ(Get("pages_merged"), 16);
  // The handlers of fork are registered, once: twice would wait for ever.
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool right = ksmu_advise(pages, PageSize(), KSMU_DISCARD) == 0 && FindWrongByte(pages, 0) < 0 &&
                       FindWrongByte(pages + PageSize(), 7) < 0;
    _exit(right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  for (std::size_t i = 0; i < 16; ++i) EXPECT_TRUE(PageIs(pages + i * PageSize(), 7));
  EXPECT_OK(ksmu_stop());
  EXPECT_OK(ksmu_unmap(pages, 16 * PageSize()));
}

}  // namespace
}  // namespace ksmu::test
