// Named points inside the protocol at which a test can park the thread and do something hostile.
//
// In release builds a point is nothing. In the library that the tests link (KSMU_TEST_POINTS defined) a point calls the
// hook, if one is set, with its name and the address of the run in hand; the hook may block, act from another thread,
// and return. Every gap between two steps of the merge, break, discard and fork protocols has a point; the race tests
// visit each of them with each disturbance (tests/race_test.cc).
#pragma once

#ifdef KSMU_TEST_POINTS
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ksmu::base {
using TestHook = void (*)(const char* point, std::uintptr_t address, std::size_t bytes);
inline std::atomic<TestHook> g_test_hook{nullptr};
inline void ReachTestPoint(const char* point, std::uintptr_t address, std::size_t bytes) {
  if (TestHook hook = g_test_hook.load(std::memory_order_acquire)) hook(point, address, bytes);
}
}  // namespace ksmu::base
#define KSMU_TEST_POINT(name, address, bytes) ::ksmu::base::ReachTestPoint(name, address, bytes)
#else
#define KSMU_TEST_POINT(name, address, bytes) ((void)0)
#endif
