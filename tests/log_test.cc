// The messages of ksmu_options.log: that they come, on which thread, what they say, and how often.

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

#include "engine/log.h"
#include "os/refusals.h"
#include "test_support.h"

namespace ksmu::test {
namespace {

using engine::Log;
using engine::Sentence;

struct Message {
  int level;
  std::string text, thread;
};

// What the callback has been called with. Its cookie.
class Received {
 public:
  static void Callback(int level, const char* message, void* cookie) {
    auto& self = *static_cast<Received*>(cookie);
    char name[16] = {};
    prctl(PR_GET_NAME, name, 0, 0, 0);
    if (self.delay > 0) SleepSeconds(self.delay);
    std::lock_guard lock(self.mutex_);
    self.messages_.push_back({level, message, name});
  }
  std::vector<Message> All() const {
    std::lock_guard lock(mutex_);
    return messages_;
  }
  std::size_t Count(const std::string& part) const {
    const std::vector<Message> all = All();
    return static_cast<std::size_t>(
        std::count_if(all.begin(), all.end(), [&](const Message& m) { return m.text.find(part) != std::string::npos; }));
  }
  ::testing::AssertionResult Comes(const std::string& part, double seconds = 20) const {
    if (WaitUntil([&] { return Count(part) > 0; }, seconds)) return ::testing::AssertionSuccess();
    auto result = ::testing::AssertionFailure() << "no message with \"" << part << "\" among:";
    for (const Message& m : All()) result << "\n  " << m.level << " " << m.text;
    return result;
  }
  Message First(const std::string& part) const {
    for (const Message& m : All()) {
      if (m.text.find(part) != std::string::npos) return m;
    }
    return {};
  }
  double delay = 0;

 private:
  mutable std::mutex mutex_;
  std::vector<Message> messages_;
};

bool StartWith(Received* received) {
  ksmu_options options = {};
  options.log = &Received::Callback;
  options.log_cookie = received;
  return ksmu_start(&options, sizeof options) == 0;
}

std::size_t AllBytes() { return SIZE_MAX / PageSize() * PageSize(); }

// --- the log itself, with a clock of our own -------------------------------------------------------------------------

constexpr std::uint64_t kSecond = 1'000'000'000;

TEST(LogUnit, EachKindOnceAMinute) {
  Received received;
  Log log;
  ASSERT_EQ(log.Start(&Received::Callback, &received), 0);
  const auto say = [&](Log::Kind kind, const char* text, std::uint64_t seconds) {
    Sentence s;
    s << text;
    log.Say(kind, 4, s, seconds * kSecond);
  };
  const auto delivered = [&](std::size_t n) { return WaitUntil([&] { return received.All().size() == n; }, 10); };
  say(Log::kMaps, "first", 100);
  EXPECT_TRUE(delivered(1));
  say(Log::kMaps, "too early", 159);
  say(Log::kPool, "another kind", 159);
  EXPECT_TRUE(delivered(2));
  // Waits until the slot is free again.
  EXPECT_TRUE(WaitUntil([&] { return log.May(Log::kMaps, 160 * kSecond); }, 10));
  EXPECT_FALSE(log.May(Log::kMaps, 160 * kSecond - 1));
  say(Log::kMaps, "a minute later", 160);
  EXPECT_TRUE(delivered(3));
  log.Stop();
  std::vector<std::string> texts;
  for (const Message& m : received.All()) texts.push_back(m.text);
  EXPECT_EQ(texts, (std::vector<std::string>{"first", "another kind", "a minute later"}));
}

TEST(LogUnit, WhatHasBeenSaidIsHandedOutBeforeTheEnd) {
  Received received;
  received.delay = 0.05;
  Log log;
  ASSERT_EQ(log.Start(&Received::Callback, &received), 0);
  for (int kind = 0; kind < Log::kKindCount; ++kind) {
    Sentence s;
    s << "kind " << kind;
    log.Say(static_cast<Log::Kind>(kind), kind, s, 5);
  }
  log.Stop();
  EXPECT_EQ(received.All().size(), static_cast<std::size_t>(Log::kKindCount));
  EXPECT_EQ(received.All().back().text, "kind " + std::to_string(Log::kStopped));
  log.Say(Log::kStarted, 3, Sentence(), 500 * kSecond);
  SleepSeconds(0.1);
  EXPECT_EQ(received.All().size(), static_cast<std::size_t>(Log::kKindCount)) << "after the end";
}

TEST(LogUnit, SentencesAreCutNotOverrun) {
  Sentence s;
  s << std::int64_t{-12} << "/" << INT64_MIN << " ";
  EXPECT_STREQ(s.text(), "-12/-9223372036854775808 ");
  for (int i = 0; i < 100; ++i) s << "0123456789";
  EXPECT_EQ(strlen(s.text()), sizeof(Sentence) - sizeof(std::size_t) - 1);
}

TEST(LogUnit, RefusalsAreThoseThatNobodyExpects) {
  os::Refusals refusals;
  for (const int expected : {0, -EAGAIN, -EBUSY, -ENOENT, -EEXIST, -ESRCH}) {
    EXPECT_EQ(refusals.Note(os::Refusals::kMove, expected), expected);
  }
  EXPECT_EQ(refusals.last(), os::Refusals::kCallCount);
  EXPECT_EQ(refusals.Note(os::Refusals::kMove, -EINVAL), -EINVAL);
  EXPECT_EQ(refusals.last(), os::Refusals::kMove);
  EXPECT_EQ(refusals.forbidden(os::Refusals::kMove), 0u) << "worth naming, not worth a message of its own";
  refusals.Note(os::Refusals::kMapFile, -EPERM);
  EXPECT_EQ(refusals.forbidden(os::Refusals::kMapFile), 1u);
  EXPECT_EQ(refusals.error(os::Refusals::kMapFile), -EPERM);
  EXPECT_STREQ(os::Refusals::Name(os::Refusals::kMapFile), "mmap of the pool");
  EXPECT_STREQ(os::ErrorName(-EPERM), "EPERM");
  EXPECT_STREQ(os::ErrorName(99999), "an unknown error");
}

// --- the library's messages ------------------------------------------------------------------------------------------

KSMU_ISOLATED_TEST(Log, StartAndStop, 60) {
  Received received;
  ASSERT_TRUE(StartWith(&received)) << ksmu_last_error();
  ASSERT_TRUE(received.Comes("runs on Linux"));
  utsname kernel;
  ASSERT_EQ(uname(&kernel), 0);
  const Message start = received.First("runs on Linux");
  EXPECT_NE(start.text.find(ksmu_version()), std::string::npos) << start.text;
  EXPECT_NE(start.text.find(kernel.release), std::string::npos) << start.text;
  EXPECT_EQ(start.level, KSMU_LOG_INFO) << start.text;
  Set("run", 0);
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 64);
  ASSERT_OK(ksmu_stop());
  // What is to be said has been said when ksmu_stop returns.
  const std::vector<Message> all = received.All();
  ASSERT_EQ(all.size(), 2u) << "nothing happened in between";
  EXPECT_EQ(all[1].text, "ksmu has stopped");
  EXPECT_EQ(all[1].level, KSMU_LOG_INFO);
  for (const Message& m : all) {
    EXPECT_EQ(m.text.find('\n'), std::string::npos);
    EXPECT_EQ(m.thread, "ksmu-log");
  }
  // Again, and without: the old callback is not called any more.
  ASSERT_OK(ksmu_start(nullptr, sizeof(ksmu_options)));
  ASSERT_OK(ksmu_stop());
  EXPECT_EQ(received.All().size(), 2u);
  ASSERT_TRUE(StartWith(&received));
  ASSERT_OK(ksmu_stop());
  EXPECT_EQ(received.All().size(), 4u);
}

// The callback writes to a file of the program's, by its number: in the library's descriptor table that is something else.
KSMU_ISOLATED_TEST(Log, CallbackHasTheProgramsDescriptors, 60) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ksmu_options options = {};
  options.log = [](int, const char* message, void* cookie) {
    const int fd = *static_cast<int*>(cookie);
    if (write(fd, message, strlen(message)) < 0) abort();
  };
  options.log_cookie = &ends[1];
  ASSERT_OK(ksmu_start(&options, sizeof options));
  ASSERT_OK(ksmu_stop());
  char text[1000] = {};
  ASSERT_GT(read(ends[0], text, sizeof text - 1), 0);
  EXPECT_NE(strstr(text, "runs on Linux"), nullptr) << text;
  EXPECT_NE(strstr(text, "ksmu has stopped"), nullptr) << text;
}

// A callback that waits for a lock whose holder is in a function of the library, as malloc's in an allocator that is
// built on it: both go on.
std::mutex g_allocator;

KSMU_ISOLATED_TEST(Log, CallbackMayTakeTheLockUnderWhichTheLibraryIsCalled, 60) {
  ksmu_options options = {};
  static std::atomic<int> calls = 0;
  options.log = [](int, const char*, void*) {
    ++calls;
    std::lock_guard lock(g_allocator);
  };
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  {
    std::lock_guard lock(g_allocator);
    ASSERT_OK(ksmu_start(&options, sizeof options));
    ASSERT_TRUE(WaitUntil([] { return calls > 0; }, 20));
    Set("run", 0);
    ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
    EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 64);
    EXPECT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_DISCARD));
  }
  ASSERT_OK(ksmu_stop());
}

KSMU_ISOLATED_TEST(Log, AForkedChildHasItsOwn, 60) {
  Received received;
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  ASSERT_TRUE(StartWith(&received)) << ksmu_last_error();
  Set("run", 0);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  ASSERT_TRUE(received.Comes("runs on Linux"));
  Child child(Child::Kind::kFork, [&](Child& self) {
    const std::size_t before = received.Count("runs on Linux");
    if (ksmu_merge(nullptr, AllBytes()) < 0) self.Report("ksmu_merge: errno %d", errno);
    if (!WaitUntil([&] { return received.Count("runs on Linux") == before + 1; }, 20)) self.Report("no message");
  });
  EXPECT_TRUE(child.Join(40));
  EXPECT_EQ(received.Count("runs on Linux"), 1u) << "the child's messages are the child's";
}

KSMU_ISOLATED_TEST(Log, WantOfMappings, 60) {
  Received received;
  ASSERT_TRUE(StartWith(&received)) << ksmu_last_error();
  Set("run", 0);
  Set("max_maps", 1);
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 0);
    SleepSeconds(0.02);
  }
  EXPECT_GT(Get("unmerged_map_budget"), 0);
  ASSERT_TRUE(received.Comes("want of mappings"));
  const Message m = received.First("want of mappings");
  EXPECT_EQ(m.level, KSMU_LOG_WARNING);
  EXPECT_NE(m.text.find("max_maps 1 "), std::string::npos) << m.text;
  // It ends and comes back within the minute: said once.
  Set("max_maps", 0);
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 64);
  EXPECT_EQ(Get("unmerged_map_budget"), 0);
  Set("max_maps", 1);
  FillPages(memory, [](std::size_t i) { return 100 + i / 2; });
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 0);
  ASSERT_OK(ksmu_stop());
  EXPECT_EQ(received.Count("want of mappings"), 1u);
}

KSMU_ISOLATED_TEST(Log, PoolThatCannotGrow, 60) {
  Received received;
  ASSERT_TRUE(StartWith(&received)) << ksmu_last_error();
  Set("run", 0);
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  limit.rlim_cur = 0;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 0);
  EXPECT_GT(Get("unmerged_pool"), 0);
  EXPECT_TRUE(received.Comes("pool of frames cannot grow"));
  EXPECT_NE(received.First("pool of frames cannot grow").text.find("EFBIG"), std::string::npos);
  EXPECT_TRUE(received.Comes("memfd_create or ftruncate has been refused with EFBIG"));
}

// A filter for all threads that refuses one ioctl.
bool RefuseIoctl(std::uint32_t request) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, request, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program = {sizeof filter / sizeof *filter, filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0;
}

void UnderFilter(std::uint32_t request, const std::vector<std::string>& expected) {
  Received received;
  ASSERT_TRUE(StartWith(&received)) << ksmu_last_error();
  Set("run", 0);
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  if (!RefuseIoctl(request)) GTEST_SKIP() << "no filter can be installed: " << strerror(errno);
  ksmu_merge(nullptr, AllBytes());
  for (const std::string& part : expected) EXPECT_TRUE(received.Comes(part));
  EXPECT_TRUE(PagesAre(memory, [](std::size_t) { return 7; }));
}

KSMU_ISOLATED_TEST(Log, ContextGivenUp, 60) {
  UnderFilter(UFFDIO_WAKE, {"UFFDIO_WAKE has been refused with EPERM", "a userfaultfd has been closed"});
}

KSMU_ISOLATED_TEST(Log, RefusedCallIsNamed, 60) {
  UnderFilter(UFFDIO_CONTINUE, {"UFFDIO_CONTINUE has been refused with EPERM", "cannot be merged because a system call was refused"});
}

// A slow callback holds nobody up but the messages after it, and the stop.
KSMU_ISOLATED_TEST(Log, SlowCallback, 60) {
  Received received;
  received.delay = 2;
  Memory memory(64);
  FillPages(memory, [](std::size_t) { return 7; });
  const double begun = Now();
  ASSERT_TRUE(StartWith(&received)) << ksmu_last_error();
  Set("run", 0);
  ASSERT_OK(ksmu_advise(memory.data(), memory.bytes(), KSMU_MERGEABLE));
  EXPECT_EQ(ksmu_merge(nullptr, AllBytes()), 64);
  if (Now() - begun < received.delay) {
    EXPECT_EQ(received.All().size(), 0u) << "it is still at the first message";
  }
  ASSERT_OK(ksmu_stop());
  EXPECT_EQ(received.All().size(), 2u);
}

}  // namespace
}  // namespace ksmu::test
