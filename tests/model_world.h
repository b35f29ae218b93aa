// The engine over the fake, a program beside it, and a shadow copy of the program's memory.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "model_fibers.h"
#include "model_shadow.h"
#include "model_source.h"
#include "model_trace.h"
#include "os/fake_system.h"

namespace ksmu::model {

struct Tally {
  std::int64_t merged = 0, zero = 0, breaks = 0, remerged = 0, detached = 0, discards = 0, undone = 0, gates = 0;
  std::int64_t calls = 0, actions = 0, failures = 0, forks = 0;
  void Add(const Tally& t);
};

struct Result {
  bool failed = false;
  std::string message;
  std::vector<Action> actions;  // what was put in
  Tally tally;
};

class World {
 public:
  // With `replay` the trace's actions are put in, else actions are made up from its seed.
  World(const Trace& trace, bool replay, const os::FakeLies& lies, bool verbose);
  ~World();

  static Result Run(const Trace& trace, bool replay, const os::FakeLies& lies = {}, bool verbose = false);

 private:
  struct Page {
    explicit Page(std::size_t page_size) : shadow(page_size) {}
    ShadowPage shadow;
    bool mapped = true, released = false, promise = false;
    os::Protection protection = os::Protection::kReadWrite;
  };
  struct Process {
    os::ProcessId id = 0;
    bool alive = true;
    std::vector<Page> pages;
  };
  struct Slot {
    os::ThreadId thread = 0;
    int process = 0;
    int index = 0;  // within the process: names its changes in flight
    bool busy = false;
    bool forked = false;
    ProgramKind kind = ProgramKind::kRead;
    int page = 0, pages = 0;
    int child = 0;  // of a fork
    int seconds = 0;  // for which it has been under way
  };
  struct Pin {
    os::PinId id;
    int page;
    bool write;
  };

  void RunAll();
  void Do(const Op& op);
  void ShowPages();
  void LibraryCall(const Op& op);
  void DomainCall(const Op& op);
  void TendSources();
  bool StartProgram(int slot, ProgramKind kind, int page, int pages, int value);
  bool DiscardsUnfilled();
  void DiscardDuringForks(int process, int first, int count);
  void StepSlot(int slot);
  void Finished(Slot& slot);
  void StepEverybody();
  bool AnyBusy() const;
  void RawUnmap(int first, int count);
  void MapAgain(int first, int count);

  int Boundary(os::FakeCall& call, bool after);
  int Apply(const Action& action, os::FakeCall& call);
  bool MakeUp(Action* action, const os::FakeCall& call);
  void GiveWay();
  std::uint64_t Random();
  int Pick(int n) { return static_cast<int>(Random() % static_cast<std::uint64_t>(n)); }

  void Settle();
  void CheckBytes();
  void CheckNodes();
  void CheckQuiet(bool unmerged);
  void CheckAfterwards();
  void Fail(const std::string& message);
  bool Pinned(int page) const;
  static int NodeOf(int page) { return page / 4 % 2; }
  os::Address At(int page) const { return base_ + static_cast<std::size_t>(page) * page_size_; }
  os::Span SpanOf(int first, int count) const { return {At(first), static_cast<std::size_t>(count) * page_size_}; }

  const Trace& trace_;
  const bool replay_, verbose_;
  os::FakeSystem fake_;
  engine::Tunables tunables_;
  // Sources that have gone, and whose frames are in use; before the engine, which uses the one that is there.
  struct Former {
    std::unique_ptr<ModelSource> source;
    std::uint32_t number;
  };
  std::vector<Former> formers_;
  std::unique_ptr<ModelSource> source_;
  int sources_ = 0;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<Fibers> fibers_;
  const std::size_t page_size_;
  os::Address base_;
  std::vector<Process> processes_;
  std::vector<Slot> slots_;
  std::vector<Pin> pins_;
  os::ThreadId system_thread_ = 0;  // for what is done at once
  bool in_call_ = false;            // the scanner is inside the library
  bool settling_ = true;
  bool endless_ = false;
  bool started_ = false;
  int op_ = -1;
  std::uint64_t random_ = 0, calls_at_op_ = 0;
  std::map<std::pair<bool, std::string>, int> occurrences_;
  Result result_;
};

}  // namespace ksmu::model
