// ksmu-fs's working half: answers what the kernel asks about the tree, on a descriptor of /dev/fuse that somebody else has mounted. It may
// be killed at any moment: what the next one has to know is in memory that both share (ServeState), and the mount lives on.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "tools/fs_tree.h"
#include "tools/operator.h"

namespace ksmu::tools {

struct ServeState {
  static constexpr std::size_t kMostWaiting = 64;
  // What was agreed on with the kernel at the beginning, which it says but once; and whether it has been answered.
  std::array<std::byte, 1024> greeting{};
  std::atomic<std::uint32_t> greeting_bytes{0};
  std::atomic<bool> greeted{false};
  // The question in hand, where read(2) puts it: there is no moment in which the kernel has given it away and nobody knows of it. Its
  // header's number is 0 when it has been answered.
  alignas(16) std::array<std::byte, 4 * Tree::kFileBytes> question{};
  // Those that wait for their answers, by the kernel's numbers; 0: none. Whoever asked waits, and cannot even be killed.
  std::array<std::atomic<std::uint64_t>, kMostWaiting> waiting{};
  Tree::Kept kept;
  std::atomic<std::uint64_t> last_handle{0};  // of an open file or directory: never used twice
  std::atomic<std::uint64_t> alive_at_ms{0};  // os::MonotonicMs: it goes round, and is not stuck
};

// Until SIGTERM, or until the tree is unmounted. 0 or an errno. `uid`: whose the files are that are no member's.
int Serve(int fuse, const OperatorOptions& options, std::uint32_t uid, ServeState* state);

}  // namespace ksmu::tools
