#include "model_world.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

namespace ksmu::model {

using os::FakeOperation;

namespace {
constexpr int kThreads = 4;  // of the program; children have two each
constexpr std::size_t kMaxProcesses = 4;

std::size_t Offset(int value) {
  static constexpr std::size_t offsets[] = {0, 1, 2048, 4088, 4095};
  return offsets[static_cast<std::size_t>(value) % 5];
}
}  // namespace

void Tally::Add(const Tally& t) {
  merged += t.merged, zero += t.zero, breaks += t.breaks, remerged += t.remerged, detached += t.detached;
  discards += t.discards, undone += t.undone, gates += t.gates, calls += t.calls, actions += t.actions;
  failures += t.failures, forks += t.forks;
}

Result World::Run(const Trace& trace, bool replay, const os::FakeLies& lies, bool verbose) {
  auto world = std::make_unique<World>(trace, replay, lies, verbose);
  try {
    world->RunAll();
  } catch (const Livelock& e) {
    world->Fail(std::string("livelock: ") + e.what());
    Result result = world->result_;
    // Somewhere inside the library: not to be taken apart, and not to be taken for a leak.
    static auto* const abandoned = new std::vector<World*>;
    abandoned->push_back(world.release());
    return result;
  }
  return world->result_;
}

World::World(const Trace& trace, bool replay, const os::FakeLies& lies, bool verbose)
    : trace_(trace),
      replay_(replay),
      verbose_(verbose),
      fake_({.fork_events = trace.config.fork_events, .lies = lies}),
      page_size_(fake_.PageSize()) {
  const Config& c = trace.config;
  constexpr std::size_t kSegment = std::size_t{2} << 20;
  base_ = os::FakeSystem::kProgramBase + kSegment - static_cast<std::size_t>(c.before_boundary) * page_size_;
  const auto pages = static_cast<std::size_t>(c.pages);
  fake_.MapProgram(base_, pages * page_size_);
  processes_.push_back({0, true, std::vector<Page>(pages, Page(page_size_))});
  for (int i = 0; i < kThreads; ++i) {
    slots_.emplace_back();
    slots_.back().thread = fake_.AddThread();
    slots_.back().index = i;
  }
  system_thread_ = fake_.AddThread();
  tunables_.remerge_seconds = 0;
  if (c.by_node) {
    fake_.nodes = 2;
    tunables_.merge_across_nodes = 0;
    for (int i = 0; i < c.pages; ++i) fake_.node_of[At(i)] = NodeOf(i);
  }
  fake_.hooks.before = [this](os::FakeCall& call) { return Boundary(call, false); };
  fake_.hooks.after = [this](const os::FakeCall& call) { Boundary(const_cast<os::FakeCall&>(call), true); };
  fake_.hooks.other_thread = [this] { GiveWay(); };
  fake_.hooks.yield = [this] { GiveWay(); };
  engine_ = std::make_unique<engine::Engine>(fake_, tunables_, 12345);
  fibers_ = std::make_unique<Fibers>([this] {
    if (engine_) engine_->HandleEvents();
  });
  fibers_->description = "seed " + std::to_string(c.seed);
}

World::~World() {
  started_ = false;
  settling_ = true;
  engine_.reset();
}

void World::Fail(const std::string& message) {
  if (result_.failed) return;
  result_.failed = true;
  result_.message = "operation " + std::to_string(op_) + ": " + message;
}

std::uint64_t World::Random() {  // splitmix64
  std::uint64_t z = (random_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// --- the run --------------------------------------------------------------------------------------------------------

void World::RunAll() {
  if (int error = engine_->Start()) {
    if (trace_.config.refused.empty()) Fail("Start: " + std::to_string(error));
    return;
  }
  settling_ = false;
  started_ = true;
  for (const Op& op : trace_.ops) {
    op_ = op.id;
    random_ = trace_.config.seed * 1000003 + static_cast<std::uint64_t>(op.id) * 7919;
    occurrences_.clear();
    calls_at_op_ = fake_.calls();
    if (verbose_) {
      Trace one;
      one.ops = {op};
      const std::string text = one.Text();
      const std::size_t from = text.find('\n') + 1;
      std::printf("%s", text.substr(from, text.find("-1 end") - from).c_str());
    }
    Do(op);
    if (verbose_) ShowPages();
    if (!fake_.violations().empty()) Fail(fake_.violations()[0]);
    CheckNodes();
    if (!fibers_->failure().empty()) throw Livelock(fibers_->failure());
    if (result_.failed) break;
  }
  op_ = -1;
  if (verbose_) std::printf("the end\n");
  calls_at_op_ = fake_.calls();
  settling_ = true;
  if (!result_.failed) Settle();
  if (!result_.failed) CheckBytes();
  if (!result_.failed) CheckQuiet(false);
  // In the end everything is unmerged, and must read as before.
  if (!result_.failed && trace_.config.refused.empty()) {
    in_call_ = true;
    int error = engine_->UnmergeAll(true);
    // In a domain nothing may stay in the frames' mappings, and what was written a moment ago has to be waited for.
    for (int i = 0; i < 3 && error == -EAGAIN && trace_.config.shared; ++i) {
      in_call_ = false;
      Settle();
      in_call_ = true;
      fake_.AdvanceTime(std::uint64_t{100} * 1000000000);
      error = engine_->UnmergeAll(true);
    }
    in_call_ = false;
    const bool pinned = !fake_.no_long_term_pins || !pins_.empty();
    if (trace_.config.shared && pinned && (error == -EPERM || error == -EAGAIN)) return;
    if (error != 0) Fail("UnmergeAll: " + std::to_string(error));
    Settle();
    if (!result_.failed) CheckBytes();
    if (!result_.failed) CheckQuiet(true);
    in_call_ = true;
    for (int i = 0; i < 10 && engine_->ReclaimNow(); ++i) fake_.AdvanceTime(1000000);
    if (source_) source_->Die(ModelSource::Death::kNow);
    TendSources();
    in_call_ = false;
  }
  const engine::Counters& c = engine_->counters();
  Tally& t = result_.tally;
  t.merged = c.merged_total, t.zero = c.zero_total, t.breaks = c.cow_breaks, t.remerged = c.remerged;
  t.detached = c.detached, t.discards = c.discards, t.undone = c.gates_undone, t.gates = c.gate_count;
  t.calls = static_cast<std::int64_t>(fake_.calls());
  t.forks = static_cast<std::int64_t>(processes_.size()) - 1;
  // The event thread must not be left in the middle of something.
  for (int i = 0; i < 1000 && fibers_->events_half_done(); ++i) fibers_->RunEvents();
  if (!result_.failed && trace_.config.refused.empty()) CheckAfterwards();
}

// The library is stopped and gone. What was merged must behave like any memory; with two exceptions (docs/limits.md):
// discards after a release of merged memory that is still mapped, and while a child that was forked before is alive.
void World::CheckAfterwards() {
  settling_ = true;
  engine_.reset();
  fake_.EndLibrary();
  CheckBytes();
  bool held = false;
  for (std::size_t p = 1; p < processes_.size(); ++p) held |= processes_[p].alive;
  for (const Page& page : processes_[0].pages) held |= page.mapped && page.released;
  // A synchronous break that the library has answered, and whose copy it has not seen.
  for (const Op& op : trace_.ops) held |= op.kind == OpKind::kAdvise && (op.c & 2) != 0;
  if (held || result_.failed) return;
  for (int i = 0; i < trace_.config.pages && !result_.failed; ++i) {
    const Page& page = processes_[0].pages[static_cast<std::size_t>(i)];
    if (!page.mapped || page.promise || Pinned(i)) continue;
    if (StartProgram(0, ProgramKind::kDiscard, i, 1, 0)) {
      while (slots_[0].busy) StepSlot(0);
    }
  }
  CheckBytes();
}

// The engine's states, and what the page tables hold beneath them.
void World::ShowPages() {
  std::string states = "    ", entries = "    ";
  for (int i = 0; i < trace_.config.pages; ++i) {
    const engine::Page page = engine_->Explain(At(i));
    const char c = ".fsMBdZuR?"[std::min<std::size_t>(static_cast<std::size_t>(page.state()), 9)];
    states += page.busy() ? '!' : c;
    const os::fake::Pte pte = fake_.space().Get(At(i));
    const os::fake::Vma* v = fake_.space().Find(At(i));
    const char e = v == nullptr ? 'x' : pte.swapped ? 'S' : ".m0af"[pte.kind];
    entries += v != nullptr && v->file ? static_cast<char>(std::toupper(e)) : e;
  }
  std::printf("%s\n%s\n", states.c_str(), entries.c_str());
}

void World::Do(const Op& op) {
  switch (op.kind) {
    case OpKind::kEvents:
      fibers_->RunEvents();
      return;
    case OpKind::kProgram: {
      const int slot = op.a % static_cast<int>(slots_.size());
      if (!StartProgram(slot, static_cast<ProgramKind>(op.b), op.c, op.d, op.e)) return;
      for (int i = 0; i < 60 && slots_[static_cast<std::size_t>(slot)].busy; ++i) {
        if (fake_.Ready(slots_[static_cast<std::size_t>(slot)].thread)) {
          StepSlot(slot);
        } else {
          fibers_->RunEvents();
        }
      }
      return;
    }
    case OpKind::kRawUnmap:
      RawUnmap(op.a, op.b);
      return;
    case OpKind::kMapAgain:
      MapAgain(op.a, op.b);
      return;
    case OpKind::kUnpin:
      if (pins_.empty()) return;
      fake_.Unpin(pins_[static_cast<std::size_t>(op.a) % pins_.size()].id);
      pins_.erase(pins_.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(op.a) % pins_.size()));
      return;
    case OpKind::kPinWrite: {
      if (pins_.empty()) return;
      const Pin& pin = pins_[static_cast<std::size_t>(op.a) % pins_.size()];
      if (!pin.write) return;
      Page& page = processes_[0].pages[static_cast<std::size_t>(pin.page)];
      const Change change{Change::kPoke, 77, static_cast<unsigned char>(op.b)};
      page.shadow.Begin(31, change);
      fake_.PinWrite(pin.id, 77, {std::byte(op.b)});
      page.shadow.End(31);
      return;
    }
    case OpKind::kExit: {
      const auto p = static_cast<std::size_t>(op.a);
      if (p == 0 || p >= processes_.size() || !processes_[p].alive) return;
      fake_.Exit(processes_[p].id);
      processes_[p].alive = false;
      for (Slot& s : slots_) {
        if (s.process == op.a) s.busy = false;
      }
      return;
    }
    case OpKind::kTime:
      for (const Slot& s : slots_) {
        if (s.busy && s.kind == ProgramKind::kDiscard) return;  // under way in the kernel it takes no seconds
        // Less than after which a page is merged again in place; and the clock ticks beside this.
        if (s.busy && s.kind == ProgramKind::kDirectPoke && s.seconds + op.a > (fake_.direct_io ? 58 : 8)) return;
      }
      for (Slot& s : slots_) s.seconds += op.a;
      fake_.AdvanceTime(static_cast<std::uint64_t>(op.a) * 1000000000u);
      return;
    case OpKind::kTunable:
      switch (op.a) {
        case 0:
          tunables_.use_zero_pages = op.b;
          break;
        case 1:
          tunables_.max_page_sharing = op.b;
          break;
        case 2:
          tunables_.remerge = op.b;
          break;
        case 3:
          for (const Slot& s : slots_) {
            if (s.busy && s.kind == ProgramKind::kDirectPoke) return;
          }
          tunables_.remerge_seconds = op.b;
          break;
        case 5:
          for (const Slot& s : slots_) {
            if (s.busy && s.kind == ProgramKind::kDirectPoke) return;
          }
          fake_.direct_io = op.b != 0;
          break;
        default:
          tunables_.smart_scan = op.b;
          break;
      }
      return;
    case OpKind::kMapLimit:
      fake_.max_mappings = op.a == 0 ? 65530 : fake_.space().count() + static_cast<std::size_t>(op.a);
      return;
    case OpKind::kPinsPossible:
      fake_.no_long_term_pins = op.a == 0;
      return;
    case OpKind::kMemory:
      fake_.available_memory = static_cast<std::uint64_t>(op.a) << 20;
      return;
    case OpKind::kPeerPublish:
    case OpKind::kPeerOffer:
    case OpKind::kPeerGivesUp:
    case OpKind::kLoseNews:
    case OpKind::kSourceSlow:
    case OpKind::kSourceDies:
    case OpKind::kSourceComes:
      in_call_ = true;
      DomainCall(op);
      in_call_ = false;
      return;
    default:
      LibraryCall(op);
      TendSources();
      return;
  }
}

// As the runtime does between two steps.
void World::TendSources() {
  if (source_ && !engine_->SourceIsThere()) {
    source_->Die(ModelSource::Death::kNow);
    formers_.push_back({std::move(source_), engine_->SourceNumber()});
    engine_->SetSource(nullptr);
  }
  // Children that were forked may map what the engine has given up: they are gone when it says so.
  for (Former& former : formers_) {
    if (former.source && engine_->UsedOf(former.number) == 0) former.source->Gone();
  }
  std::erase_if(formers_, [&](const Former& f) { return engine_->UsedOf(f.number) == 0; });
}

void World::DomainCall(const Op& op) {
  if (op.kind == OpKind::kSourceComes) {
    if (source_) return;
    // The first one has the engine's own seed sometimes, others that of the one before, or another.
    if (op.a == 0) ++sources_;
    source_ = std::make_unique<ModelSource>(fake_, 12345 + static_cast<std::uint64_t>(sources_));
    engine_->SetSource(source_.get());
    return;
  }
  if (!source_) return;
  switch (op.kind) {
    case OpKind::kPeerPublish: source_->PeerPublish(op.a, op.b != 0); break;
    case OpKind::kPeerOffer: source_->PeerOffer(op.a); break;
    case OpKind::kPeerGivesUp: source_->PeerGivesUp(static_cast<unsigned>(op.a)); break;
    case OpKind::kLoseNews: source_->LoseNews(); break;
    case OpKind::kSourceSlow: source_->BeSlow(op.a != 0); break;
    default: source_->Die(static_cast<ModelSource::Death>(op.a)); break;
  }
}

void World::LibraryCall(const Op& op) {
  const os::Span span = SpanOf(op.a, op.b);
  auto each = [&](auto change) {
    for (int i = op.a; i < op.a + op.b; ++i) change(processes_[0].pages[static_cast<std::size_t>(i)], i);
  };
  bool holes = false, quiet = true;
  if (op.kind != OpKind::kStep && op.kind != OpKind::kHousekeeping && op.kind != OpKind::kUnmergeAll) {
    each([&](Page& p, int i) {
      holes |= !p.mapped;
      quiet &= !p.shadow.InFlight() && !Pinned(i);
    });
    for (const Slot& s : slots_) {
      if (s.busy && s.process == 0 && s.page < op.a + op.b && op.a < s.page + s.pages) quiet = false;
    }
  }
  in_call_ = true;
  std::int64_t error = 0;
  switch (op.kind) {
    case OpKind::kAdvise: {
      bool promise = (op.c & 1) != 0;
      each([&](Page& p, int) { promise &= !p.shadow.InFlight(Change::kZero); });  // a raw discard has begun already
      each([&](Page& p, int) { p.promise |= promise; });                          // also while it is being changed
      error = engine_->Advise(span, promise, (op.c & 2) != 0, false);
      each([&](Page& p, int) {
        if (error == 0 || (error == -ENOMEM && holes)) p.promise = promise;
        if (error == 0) p.released = false;
      });
      break;
    }
    case OpKind::kUnmerge:
      error = engine_->Unmerge(span);
      break;
    case OpKind::kRelease:
      if (holes) break;
      error = engine_->Release(span);
      each([&](Page& p, int) { p.released = p.mapped && error == 0; });
      break;
    case OpKind::kDiscard: {
      if (holes || !quiet) break;
      DiscardDuringForks(0, op.a, op.b);
      each([](Page& p, int) { p.shadow.Begin(30, {Change::kZero, 0, 0}); });
      error = engine_->Discard(span);
      each([&](Page& p, int) { error == 0 ? p.shadow.End(30) : p.shadow.Undo(30); });
      if (error != 0 && trace_.config.refused.empty()) Fail("Discard: " + std::to_string(error));
      break;
    }
    case OpKind::kUnmap:
      if (holes || !quiet) break;
      each([](Page& p, int) { p.mapped = false; });
      error = engine_->Unmap(span);
      if (error != 0) each([](Page& p, int) { p.mapped = true; });
      break;
    case OpKind::kMerge:
      error = engine_->Merge(
          span, [](void*) { return false; }, nullptr);
      break;
    case OpKind::kStep:
      for (int i = 0; i < op.a; ++i) engine_->Step();
      break;
    case OpKind::kHousekeeping:
      engine_->Housekeeping();
      break;
    case OpKind::kUnmergeAll:
      error = engine_->UnmergeAll(false);
      break;
    default:
      break;
  }
  in_call_ = false;
  if (verbose_ && error != 0) std::printf("    = %lld\n", static_cast<long long>(error));
}

// --- the program ----------------------------------------------------------------------------------------------------

bool World::Pinned(int page) const {
  return std::any_of(pins_.begin(), pins_.end(), [&](const Pin& p) { return p.page == page; });
}

// Pages of a frame mapping that show nothing: discarded, and not yet answered with zeros. Without the fork event a
// child would see the frames in them.
bool World::DiscardsUnfilled() {
  for (const auto& [start, v] : fake_.space().vmas()) {
    if (!v.file) continue;
    for (os::Address a = v.start; a < v.end; a += page_size_) {
      if (fake_.space().Get(a).kind <= os::fake::Pte::kMarker) return true;
    }
  }
  return false;
}

// A fork that another thread is in the middle of: the discard comes after the copy, but its event can be read before
// the fork's. Pages that are not where the child would look at that moment can be zeros in it: a limit.
void World::DiscardDuringForks(int process, int first, int count) {
  for (const Slot& s : slots_) {
    if (!s.busy || !s.forked || s.process != process) continue;
    Process& child = processes_[static_cast<std::size_t>(s.child)];
    for (int i = first; i < first + count; ++i) child.pages[static_cast<std::size_t>(i)].shadow.AllowZero();
  }
}

bool World::StartProgram(int slot_number, ProgramKind kind, int first, int count, int value) {
  if (slot_number >= static_cast<int>(slots_.size())) return false;
  Slot& slot = slots_[static_cast<std::size_t>(slot_number)];
  Process& process = processes_[static_cast<std::size_t>(slot.process)];
  const Config& c = trace_.config;
  if (slot.busy || !process.alive || first >= c.pages) return false;
  if (kind != ProgramKind::kDiscard && kind != ProgramKind::kProtect) count = 1;
  count = std::min(count, c.pages - first);
  auto page = [&](int i) -> Page& { return process.pages[static_cast<std::size_t>(i)]; };
  if (kind != ProgramKind::kFork) {
    for (int i = first; i < first + count; ++i) {
      if (!page(i).mapped) return false;
      if (page(i).protection != os::Protection::kReadWrite && kind != ProgramKind::kProtect) return false;
    }
  }
  FakeOperation op;
  op.address = At(first);
  op.bytes = page_size_;
  Change change;
  auto direct_in_flight = [&](int i) {
    return std::any_of(slots_.begin(), slots_.end(), [&](const Slot& s) {
      return s.busy && s.process == slot.process && s.page == i &&
             (s.kind == ProgramKind::kDirectPoke || s.kind == ProgramKind::kPinWrite ||
              s.kind == ProgramKind::kPinRead);
    });
  };
  switch (kind) {
    case ProgramKind::kRead:
      op.kind = FakeOperation::kRead;
      break;
    case ProgramKind::kFill:
      if (value < 0) value = page(first).shadow.Usual();
      op.kind = FakeOperation::kWrite;
      op.data.assign(page_size_, std::byte(value));
      change = {Change::kFill, 0, static_cast<unsigned char>(value)};
      break;
    case ProgramKind::kPoke:
    case ProgramKind::kDirectPoke:
      op.kind = kind == ProgramKind::kPoke ? FakeOperation::kWrite : FakeOperation::kDirectWrite;
      change = {Change::kPoke, Offset(value), static_cast<unsigned char>(100 + value)};
      op.address += change.offset;
      op.data.assign(1, std::byte(change.value));
      if (kind == ProgramKind::kDirectPoke) {
        // A page is merged again in place when it has not been written for longer than any direct I/O takes: so there
        // must be such a time.
        if (page(first).shadow.InFlight(Change::kZero) || tunables_.remerge_seconds < 60) return false;
      }
      break;
    case ProgramKind::kDiscard:
      if (!c.raw_discards || (slot.process != 0 && !c.fork_events)) return false;
      for (int i = first; i < first + count; ++i) {
        if (page(i).promise || page(i).shadow.InFlight(Change::kZero) || direct_in_flight(i) ||
            (slot.process == 0 && Pinned(i)))
          return false;
      }
      op.kind = FakeOperation::kDiscard;
      op.bytes = static_cast<std::size_t>(count) * page_size_;
      DiscardDuringForks(slot.process, first, count);
      break;
    case ProgramKind::kFork:
      // Without the event a child that a raw clone makes in the middle of a merge is a limit; libc's fork waits for it.
      if (!c.forks || processes_.size() >= kMaxProcesses || (!c.fork_events && (in_call_ || DiscardsUnfilled())))
        return false;
      op.kind = FakeOperation::kFork;
      break;
    case ProgramKind::kPinWrite:
    case ProgramKind::kPinRead:
      // In the middle of a call: a page that is being merged again in place while it is pinned is a limit of
      // NoLongTermPins.
      if (!c.pins || in_call_ || slot.process != 0 || page(first).shadow.InFlight(Change::kZero)) return false;
      op.kind = FakeOperation::kPin;
      op.write = kind == ProgramKind::kPinWrite;
      break;
    case ProgramKind::kSwapOut:
      if (!c.swap) return false;
      op.kind = FakeOperation::kSwapOut;
      break;
    case ProgramKind::kProtect:
      if (!c.protects || slot.process != 0) return false;
      for (int i = first; i < first + count; ++i) {
        if (page(i).shadow.InFlight() || direct_in_flight(i)) return false;
      }
      op.kind = FakeOperation::kProtect;
      op.bytes = static_cast<std::size_t>(count) * page_size_;
      op.protection = static_cast<os::Protection>(value % 3);
      for (int i = first; i < first + count; ++i) page(i).protection = op.protection;
      break;
    case ProgramKind::kCount:
      return false;
  }
  slot.busy = true;
  slot.seconds = 0;
  slot.forked = false;
  slot.kind = kind;
  slot.page = first;
  slot.pages = kind == ProgramKind::kFork ? 0 : count;
  const bool changes = kind == ProgramKind::kFill || kind == ProgramKind::kPoke || kind == ProgramKind::kDirectPoke ||
                       kind == ProgramKind::kDiscard;
  if (changes) {
    for (int i = first; i < first + count; ++i) page(i).shadow.Begin(slot.index, change);
  }
  fake_.Start(slot.thread, op);
  return true;
}

void World::StepSlot(int number) {
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  if (!slot.busy || !fake_.Step(slot.thread)) return;
  const os::FakeOutcome& outcome = fake_.Outcome(slot.thread);
  if (slot.kind == ProgramKind::kFork && !slot.forked && outcome.child >= 0) {
    slot.forked = true;
    Process child;
    child.id = outcome.child;
    for (const Page& p : processes_[static_cast<std::size_t>(slot.process)].pages) {
      child.pages.push_back(p);
      child.pages.back().shadow = p.shadow.Fork();
    }
    slot.child = static_cast<int>(processes_.size());
    processes_.push_back(std::move(child));
  }
  if (outcome.done) Finished(slot);
}

void World::Finished(Slot& slot) {
  slot.busy = false;
  const os::FakeOutcome outcome = fake_.Outcome(slot.thread);
  Process& process = processes_[static_cast<std::size_t>(slot.process)];
  auto page = [&](int i) -> Page& { return process.pages[static_cast<std::size_t>(i)]; };
  char where[80];
  std::snprintf(where, sizeof where, "process %d page %d", slot.process, slot.page);
  if (outcome.error != 0) {
    Fail(std::string("the program got error ") + std::to_string(outcome.error) + " in " + where + ", operation " +
         std::to_string(static_cast<int>(slot.kind)));
    return;
  }
  switch (slot.kind) {
    case ProgramKind::kRead: {
      const std::string seen(reinterpret_cast<const char*>(outcome.data.data()), outcome.data.size());
      ShadowPage& shadow = page(slot.page).shadow;
      const std::string expected = shadow.Describe();
      if (!shadow.See(seen)) Fail(std::string("wrong bytes: ") + where + " reads " + Short(seen) + ", not " + expected);
      break;
    }
    case ProgramKind::kFill:
    case ProgramKind::kPoke:
    case ProgramKind::kDirectPoke:
    case ProgramKind::kDiscard:
      for (int i = slot.page; i < slot.page + slot.pages; ++i) page(i).shadow.End(slot.index);
      break;
    case ProgramKind::kFork: {
      const int child = slot.child;
      for (int i = 0; i < 2; ++i) {
        Slot s;
        s.thread = fake_.AddThread(outcome.child);
        s.process = child;
        s.index = i;
        slots_.push_back(s);  // `slot` is not valid any more
      }
      break;
    }
    case ProgramKind::kPinWrite:
    case ProgramKind::kPinRead:
      if (in_call_) {  // it had to wait, and was taken in the middle of a call
        fake_.Unpin(outcome.pin);
        break;
      }
      pins_.push_back({outcome.pin, slot.page, slot.kind == ProgramKind::kPinWrite});
      break;
    case ProgramKind::kSwapOut:
    case ProgramKind::kProtect:
    case ProgramKind::kCount:
      break;
  }
}

void World::StepEverybody() {
  for (std::size_t i = 0; i < slots_.size(); ++i) StepSlot(static_cast<int>(i));
}

bool World::AnyBusy() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.busy; });
}

void World::RawUnmap(int first, int count) {
  for (int i = first; i < first + count; ++i) {
    const Page& p = processes_[0].pages[static_cast<std::size_t>(i)];
    if (!p.mapped || !p.released || p.shadow.InFlight() || Pinned(i)) return;
  }
  for (const Slot& s : slots_) {
    if (s.busy && s.process == 0 && s.page < first + count && first < s.page + s.pages) return;
  }
  FakeOperation op;
  op.kind = FakeOperation::kUnmap;
  op.address = At(first);
  op.bytes = static_cast<std::size_t>(count) * page_size_;
  fake_.Run(system_thread_, op);
  if (fake_.Outcome(system_thread_).error != 0) return;  // at the map limit
  for (int i = first; i < first + count; ++i) processes_[0].pages[static_cast<std::size_t>(i)].mapped = false;
}

void World::MapAgain(int first, int count) {
  for (int i = first; i < first + count; ++i) {
    Page& p = processes_[0].pages[static_cast<std::size_t>(i)];
    if (p.mapped) continue;
    FakeOperation op;
    op.kind = FakeOperation::kMap;
    op.address = At(i);
    op.bytes = page_size_;
    fake_.Run(system_thread_, op);
    if (fake_.Outcome(system_thread_).error != 0) continue;  // at the map limit
    p = Page(page_size_);
  }
}

// --- the end --------------------------------------------------------------------------------------------------------

void World::Settle() {
  fake_.max_mappings = 65530;
  fake_.available_memory = std::uint64_t{16} << 30;
  for (int i = 0; i < 200; ++i) {
    for (int k = 0; k < 20; ++k) StepEverybody();
    do {
      fibers_->RunEvents();
      StepEverybody();
    } while (fibers_->events_half_done());
    in_call_ = true;
    const bool again = engine_->Housekeeping();
    TendSources();
    in_call_ = false;
    if (i >= 3 && !again && !AnyBusy() && !fake_.EventsUnread()) break;
  }
  if (!fake_.violations().empty()) Fail(fake_.violations()[0]);
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].busy) Fail("stuck: thread " + std::to_string(i) + ": " + fake_.Describe(slots_[i].thread));
  }
}

void World::CheckBytes() {
  for (std::size_t p = 0; p < processes_.size(); ++p) {
    if (!processes_[p].alive) continue;
    int reader = -1;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].process == static_cast<int>(p) && !slots_[i].busy) reader = static_cast<int>(i);
    }
    if (reader < 0) continue;
    for (int page = 0; page < trace_.config.pages && !result_.failed; ++page) {
      Page& shadow = processes_[p].pages[static_cast<std::size_t>(page)];
      if (!shadow.mapped) continue;
      if (shadow.protection == os::Protection::kNone) continue;
      const os::Protection protection = std::exchange(shadow.protection, os::Protection::kReadWrite);
      StartProgram(reader, ProgramKind::kRead, page, 1, 0);
      shadow.protection = protection;
      for (int i = 0; i < 50 && slots_[static_cast<std::size_t>(reader)].busy; ++i) {
        StepSlot(reader);
        if (slots_[static_cast<std::size_t>(reader)].busy) fibers_->RunEvents();
      }
      if (slots_[static_cast<std::size_t>(reader)].busy)
        Fail("stuck at the end: " + fake_.Describe(slots_[static_cast<std::size_t>(reader)].thread));
    }
  }
  for (const Pin& pin : pins_) {
    if (!fake_.PinInPlace(pin.id))
      Fail("the pinned page " + std::to_string(pin.page) + " is not the program's any more");
  }
  if (!fake_.violations().empty()) Fail(fake_.violations()[0]);
}

// What is merged is merged with pages of its node. A domain that merges across nodes goes before what the process wants.
void World::CheckNodes() {
  if (!trace_.config.by_node || trace_.config.shared) return;
  for (int i = 0; i < trace_.config.pages; ++i) {
    const os::fake::Vma* v = fake_.space().Find(At(i));
    if (!v || !v->file || fake_.space().Get(At(i)).kind != os::fake::Pte::kFile) continue;
    if (v->file->node != NodeOf(i)) Fail("page " + std::to_string(i) + " is merged on another node than its own");
  }
}

void World::CheckQuiet(bool unmerged) {
  if (!trace_.config.refused.empty()) return;
  if (fake_.RegisteredPages(os::kGate) != 0) Fail("a gate is still shut");
  for (const auto& [a, pte] : fake_.space().ptes()) {
    const os::fake::Vma* v = fake_.space().Find(a);
    if (v != nullptr && v->context == os::kStaging) Fail("a page is left in staging");
  }
  if (unmerged) {
    const bool refusals =
        result_.tally.failures != 0 ||
        std::any_of(trace_.ops.begin(), trace_.ops.end(), [](const Op& op) { return op.kind == OpKind::kMapLimit; });
    if (!refusals && fake_.RegisteredPages(os::kTracker) != 0) Fail("memory is still registered with the tracker");
  }
  // The program's protections are its own.
  for (int i = 0; i < trace_.config.pages; ++i) {
    const Page& page = processes_[0].pages[static_cast<std::size_t>(i)];
    const os::fake::Vma* v = fake_.space().Find(At(i));
    if ((v != nullptr) != page.mapped) {
      Fail("page " + std::to_string(i) + (page.mapped ? " is not mapped" : " is mapped again"));
    } else if (v != nullptr && (v->readable != (page.protection != os::Protection::kNone) ||
                                v->writable != (page.protection == os::Protection::kReadWrite))) {
      Fail("page " + std::to_string(i) + " has another protection than the program gave it");
    }
  }
  // The gauges agree with the pages.
  std::array<std::int64_t, static_cast<std::size_t>(engine::PageState::kCount)> count{};
  for (int i = 0; i < trace_.config.pages; ++i) ++count[static_cast<std::size_t>(engine_->Explain(At(i)).state())];
  for (std::size_t s = 1; s < count.size(); ++s) {
    const auto shown = engine_->counters().pages[s].load();
    if (shown != count[s])
      Fail("the gauge of state " + std::to_string(s) + " is " + std::to_string(shown) + ", not " +
           std::to_string(count[s]));
  }
}

}  // namespace ksmu::model
