// A run of the model test, written down: what the program and the library do, one after the other, and what is put in
// between the library's calls. A trace can be generated from a seed, recorded, replayed, made smaller, and kept as
// text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ksmu::model {

enum class OpKind : std::uint8_t {
  // The library, on the scanner's thread. a: first page, b: pages.
  kAdvise,  // c: bit 0 promise, bit 1 synchronous breaks
  kUnmerge,
  kRelease,
  kDiscard,
  kUnmap,
  kMerge,
  kStep,  // a: times
  kHousekeeping,
  kUnmergeAll,
  // The event thread: a call of HandleEvents.
  kEvents,
  // The program: an operation is started on a thread and run as far as it goes. a: thread.
  kProgram,  // b: ProgramKind, c: page, d: pages, e: value; a fill with -1: as it was before a poke
  // Raw system calls over memory that has been released. a: first page, b: pages.
  kRawUnmap,
  kMapAgain,
  kUnpin,     // a: which of the live pins
  kPinWrite,  // a: which, b: value
  kExit,      // a: process
  // The surroundings.
  kTime,          // a: seconds
  kTunable,       // a: which, b: value
  kMapLimit,      // a: mappings to spare; 0: plenty
  kPinsPossible,  // a: 1: something could hold a long-term pin
  kMemory,        // a: MiB available
  // The domain (model_source.h).
  kPeerPublish,  // a: value, b: as a replica
  kPeerOffer,    // a: value
  kPeerGivesUp,  // a: which third
  kLoseNews,
  kSourceSlow,
  kSourceDies,  // a: when
  kSourceComes,  // a: 1: with the seed of the one before
  kCount,
};

enum class ProgramKind : std::uint8_t {
  kRead,
  kFill,
  kPoke,
  kDirectPoke,
  kDiscard,
  kFork,
  kPinWrite,
  kPinRead,
  kSwapOut,
  kProtect,
  kCount,
};

struct Op {
  int id = 0;  // stays the same when others are taken out
  OpKind kind = OpKind::kStep;
  int a = 0, b = 0, c = 0, d = 0, e = 0;
};

enum class ActionKind : std::uint8_t {
  kStart,   // a: thread, b: ProgramKind, c: page, d: pages, e: value
  kStep,    // a: thread
  kFail,    // a: errno, b: pages done first
  kShort,   // a: pages done, then -EAGAIN
  kEvents,  // the event thread runs on
  kBack,    // the event thread is interrupted: the scanner runs on
  kCount,
};

// Something put in at a call of the library: before it, or after it.
struct Action {
  int op = 0;  // during which operation; -1: in the settling at the end
  bool event_thread = false;
  std::string call;
  int occurrence = 0;  // of the call by that thread in that operation
  bool after = false;
  ActionKind kind = ActionKind::kStep;
  int a = 0, b = 0, c = 0, d = 0, e = 0;
};

struct Config {
  std::uint64_t seed = 0;
  int pages = 32;
  int before_boundary = 16;  // pages before a 2 MiB boundary
  bool fork_events = true;
  bool forks = true;
  bool raw_discards = true;
  bool protects = false;  // raw mprotect while the library is at work
  bool pins = true;
  bool swap = true;
  int act_percent = 10;  // chance of an action at a boundary
  int fail_percent = 0;  // of them, failures
  std::string refused;   // a call that always fails (a seccomp filter) ...
  int refused_from = 0;  // ... from this operation on
  bool shared = false;   // with a domain
  bool by_node = false;  // on two NUMA nodes, with merge_across_nodes 0
};

struct Trace {
  Config config;
  std::vector<Op> ops;
  std::vector<Action> actions;

  std::string Text() const;
  static bool Parse(const std::string& text, Trace* out, std::string* error);
};

// Seeds from here on are those of runs with a domain; without that bit they are the same runs, but for it.
inline constexpr std::uint64_t kSharedSeeds = std::uint64_t{1} << 40;
// The same for two NUMA nodes.
inline constexpr std::uint64_t kNodeSeeds = std::uint64_t{1} << 41;
Trace Generate(std::uint64_t seed);

}  // namespace ksmu::model
