// The engine: what happens to a page from the moment it is advised until it is broken, discarded or given up.
//
// It is a core without threads of its own, so that it can be model-tested over a fake system. Two threads drive it:
//   the scanner (ksmu-scan) calls everything but HandleEvents;
//   the event thread (ksmu-event) calls HandleEvents, for ever.
// Commands of the program (advise, discard, merge ...) are carried out by the scanner between two steps, so they never
// meet a merge in hand.
//
//   sweep.cc    which pages were written, which are still            merge.cc    shut, take, prove, attach, open
//   match.cc    hash, look up, publish                               remerge.cc  broken pages: merge again in place
//   huge.cc     huge pages: sampled before split                     detach.cc   back to anonymous memory
//   budget.cc   mappings: who gets them when they are short
//   commands.cc advise, unmerge, release, discard, unmap             hold.cc     pages out of a run's mapping, and back
//   events.cc   discards, faults, forks, moves                       share.cc    frames of other processes, by a source
//   nodes.cc    NUMA nodes kept apart
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "base/own_memory.h"
#include "engine/children.h"
#include "engine/counters.h"
#include "engine/gate.h"
#include "engine/page_table.h"
#include "engine/presence.h"
#include "engine/regions.h"
#include "frames/fork_watch.h"
#include "frames/index.h"
#include "frames/pool.h"
#include "frames/sample_table.h"
#include "os/os.h"

namespace ksmu::engine {

// What can be set at any time; read once a step. Names and units as in ksmu.h.
struct Tunables {
  std::atomic<std::int64_t> use_zero_pages{1};
  std::atomic<std::int64_t> max_page_sharing{256};
  std::atomic<std::int64_t> smart_scan{1};
  std::atomic<std::int64_t> remerge{1};
  std::atomic<std::int64_t> remerge_seconds{60};
  std::atomic<std::int64_t> remerge_quick_seconds{10};
  std::atomic<std::int64_t> thp_min_duplicates{64};
  std::atomic<std::int64_t> max_maps{0};  // 0: three quarters of vm.max_map_count
  std::atomic<std::int64_t> merge_across_nodes{1};  // read when an engine starts; then see MergeAcrossNodes
};

struct RegionCounts {
  std::array<std::int64_t, static_cast<std::size_t>(PageState::kCount)> pages{};
  std::array<std::int64_t, static_cast<std::size_t>(Reason::kCount)> unmerged{};
};

class Engine {
 public:
  Engine(os::System& system, const Tunables& tunables, std::uint64_t seed);
  ~Engine();
  Engine(const Engine&) = delete;

  int Start();

  // --- commands: 0 (or a count) or -errno --------------------------------------------------------------------------
  // `part` of them: see ksmu.h. *some tells whether anything was advised (holes give -ENOMEM all the same).
  int Advise(Span span, bool promise, bool sync_break, bool owned);
  int Unmerge(Span span);
  // Before the span is unmerged for a userfaultfd of the program's: nothing may stay in a frame's mapping. 0; -EAGAIN: some
  // pages have to be left alone for a while yet; -EPERM: they may be pinned for good.
  int HandOver(Span span);
  bool HasHoles(Span span);
  // The first mapping that ends behind the address, and whether it shows frames, ours or a parent's. 0 or -errno.
  int FindMapping(Address a, os::Mapping* out, bool* frames);
  bool HasForeign() const { return foreign_at_ != 0; }
  int Release(Span span);
  // With `tend`, what has been discarded is taken back to anonymous memory where it can be at once.
  int Discard(Span span, bool tend = true);
  // Whether advising it means unmerging it first.
  bool ChangesBreaker(Span span, bool sync_break) const;
  int Unmap(Span span);
  // `cancelled` is polled between segments.
  std::int64_t Merge(Span span, bool (*cancelled)(void*), void* cookie);
  // In a forked child: what could not be merged when the parent was advised of it.
  void InheritExcluded(const Region& part) { excluded_.Set(part); }
  // A call of the program's that changes mappings or their attributes, to be made with no merge in hand: `number` and
  // arguments of a system call that neither blocks nor touches the range's pages. Its result, -errno.
  long CallForProgram(Span span, long number, const long* arguments);
  void SetPresence(Presence* presence) { presence_ = presence; }
  // Where no region is any more. Not where pages stay in a run's mapping: what the program does there still concerns us.
  void ForgetPresence(Span span);
  // Whether pages of different NUMA nodes are merged, where no domain says otherwise. -EBUSY: something is shared already;
  // -EOPNOTSUPP: it cannot be told which page lies on which node.
  int MergeAcrossNodes(bool across);
  // Every region; with `forget` the regions end as well (ksmu_stop).
  int UnmergeAll(bool forget);
  // The same of a segment at a time, from *at on, which is moved on: to the end of all addresses when nothing is left.
  int UnmergePart(Address* at);

  // --- scanning ----------------------------------------------------------------------------------------------------
  struct StepResult {
    std::size_t pages_read = 0;  // hashed or compared
    bool pass_ended = false;
    bool fruitful = false;       // in the pass that ended: something was hashed or merged
    bool eager = false;          // and something is to be looked at again at once
  };
  StepResult Step();
  // Whether calls that change attributes of mappings are told to us: the program runs under the shim.
  void SetSeesCalls(bool sees) { sees_calls_ = sees; }
  // Called in the middle of long work, between two merges: may read, must not change anything.
  void SetPoll(void (*poll)(void*), void* cookie) { poll_ = poll, poll_cookie_ = cookie; }
  // Sees to it that discarded pages of the span read as zeros without anybody answering their faults.
  void FillMarked(Span span);
  void FillAllMarked();
  bool HasRegions() const { return regions_.size() != 0; }
  // What must be done also when scanning is off: repairs, moved ranges, frames to be reclaimed. True: call again soon.
  bool Housekeeping();
  bool ReclaimDue() const { return pool_.ReclaimDue(); }
  // Gives back what can be; true if something still waits for a child.
  bool ReclaimNow() {
    ReclaimFrames(true);
    return pool_.ReclaimDue() && !lost_moves_.load(std::memory_order_relaxed);
  }

  // --- other processes (share.cc) ------------------------------------------------------------------------------------
  // From now on frames come from there, and what is known is offered there; what lies in frames of our own goes back to
  // anonymous memory, a little at each step. Null: alone again; what was granted stays as it is.
  void SetSource(frames::Source* source);
  // Not null, and false: it has gone, and is to be replaced.
  bool SourceIsThere() const { return pool_.source() && !source_gone_; }
  // By which the source that there is now is known, also when it has gone; and how many places of its files are in use.
  std::uint32_t SourceNumber() const { return pool_.owner(); }
  std::size_t UsedOf(std::uint32_t source) const { return pool_.UsedOf(source); }
  // Sends what is to be sent, hears what is new. True: the next step has something to do with it.
  bool HearNews();
  // Candidates that others have too and that have not been matched yet; below 0: that is not known.
  std::int64_t NewsPages() const { return looking_up_ ? -1 : static_cast<std::int64_t>(news_.size() - news_at_) + heard_; }
  std::size_t stray_frames() const { return pool_.source() ? pool_.strays() : 0; }

  // --- events ------------------------------------------------------------------------------------------------------
  // Reads and answers whatever is pending on the breakers and the children. Event thread.
  void HandleEvents();
  // True if HandleEvents has something to do soon, event or not.
  bool FillsPending() const { return pending_fills_.load(std::memory_order_relaxed) != 0; }
  // The contexts to wait on. Event thread.
  std::size_t EventContexts(os::Context* contexts, std::size_t capacity);

  // Moves of the program's that could not be noted, and children that could not be served.
  bool lost_moves() const { return lost_moves_.load(std::memory_order_relaxed); }
  std::int64_t unserved_children() const { return unserved_children_.load(std::memory_order_relaxed); }

  // --- statistics --------------------------------------------------------------------------------------------------
  const Counters& counters() const { return counters_; }
  std::size_t pages_shared() const { return pool_.shared(); }
  std::size_t frames_in_use() const { return pool_.in_use(); }
  std::size_t frames_live() const { return pool_.live(); }
  std::size_t metadata_bytes() const;
  std::size_t maps_used() const { return maps_used_; }  // runs: each is a mapping, whatever lies around it
  const RegionList& regions() const { return regions_; }
  const RegionList& excluded() const { return excluded_; }
  bool NextAdvised(Address a, AdvisedRegion* out) const { return engine::NextAdvised(regions_, excluded_, a, out); }
  RegionCounts CountRegion(Span span) const;
  Page Explain(Address a) const { return table_.Load(a); }
  std::uint32_t SharersOf(Page page) const {
    return page.state() == PageState::kMerged ? pool_.sharers(page.value()) : 0;
  }
  std::uint32_t HeatOf(Address a) const {
    const Segment* segment = table_.FindSegment(a);
    return segment ? segment->backoff : 0;
  }
  std::size_t PoolFiles(os::File* files, std::size_t capacity) const { return pool_.Files(files, capacity); }
  // In a forked child: the pool files of the parent, whose mappings it has inherited.
  void SetInherited(const os::File* files, std::size_t count) { inherited_ = files, inherited_count_ = count; }
  std::size_t page_size() const { return page_; }
  // After which a broken page may be merged again, as far as is known.
  std::uint32_t SecondsToRemerge() const;

 private:
  struct Planned {
    Address page;
    frames::Frame frame;
  };
  struct Moved {
    Address from, end, to;
  };
  struct Bitmaps {
    std::array<std::uint64_t, kMaxSegmentPages / 64> present{}, written{}, zero{};
  };
  using Words = std::atomic<std::uint64_t>;

  // words.cc: transitions, with their counters
  bool Change(Words* word, Page& from, Page to);  // compare and swap; `from` is reloaded on failure
  void Set(Address a, Page to);                   // scanner, page not in an event's reach
  void MarkDiscarded(Words* word);                // event thread
  std::size_t RunStartsAt(Address a) const;       // runs that begin at the page or at the one after it
  void ForgetPage(Address a, Words* word);        // the page is in nobody's run any more: gives up frame and cover
  void ForgetRange(Span span);

  // sweep.cc
  std::size_t Sweep(const Region& region, Address from, Address to, bool now, Address* swept_to);
  Address QuietUntil(const Region& region, Address from);
  std::size_t SweepPart(const Region& region, Address segment, std::size_t low, std::size_t high, const Bitmaps& bits,
                        bool now);
  bool MayBeReferredTo(Page page);
  bool WrittenLongAgo(Page page) const;
  void ConfirmBreaks(Span span);
  bool ConfirmCopy(Words* word, Page* page);
  void LookAtCovering(Span span);
  void ReclaimFrames(bool at_once);
  void Audit(const Region& region);  // forgets what was unmapped without a word
  bool Later(Page page) const;       // kUnmerged: its time has not come

  // huge.cc
  bool SamplesHuge() const;
  void SetSegment(const Segment& segment, Page to);
  bool BeginSampling(const Region& region, Address start);
  void EndSampling(Segment* segment, bool approved);
  bool SampleSegment(Segment* segment);
  std::size_t ExpectedOf(const Segment& segment, bool now);
  void TendSampled(Segment* segment, bool now);
  void CountPass(std::uint64_t now);
  Address TendUnarmed(Segment* segment, Address end, bool now);
  void LetGoIfFruitless(Segment* segment);
  void TendLetGo(Segment* segment, bool now);
  void ArmAgain(Segment* segment);
  static void LookAnew(Segment* segment);
  void LookAgainAt(Segment* segment);
  void LetGoOn(Segment* segment);
  bool IsWhole(const Segment& segment, bool* huge);
  bool IsUnchanged(const Segment& segment, bool* huge);
  bool HasChanged(Segment* segment);
  bool IsKnown(std::uint32_t hash);
  bool IsWorthIt(const Segment& segment, bool now);
  bool ApproveIfWorthIt(Segment* segment, bool now);
  bool ApproveSampled(Span span);

  // match.cc
  std::size_t HashAndMatch(const Region& region, const Address* pages, std::size_t count);
  std::size_t ReadPages(const Address* pages, std::size_t count, std::byte* into);
  std::byte* ReadBuffer(std::size_t count);
  void ForgetReadBuffer();
  void ForgetScratch();
  void TrimIndex();
  const std::byte* ReadTwin(Address candidate);
  static constexpr std::size_t kReadPages = kMaxRunPages;  // read and hashed at a time
  using PortionBits = std::bitset<kReadPages>;
  void MatchPage(Address page, std::uint32_t hash, const std::byte* bytes, int node, bool wanted);
  frames::Frame WriteFrame(const std::byte* bytes, int node);
  void Enter(frames::Frame frame, std::uint32_t hash, frames::Frame chain);
  std::uint64_t WholeHashOf(const std::byte* bytes, int node) const;
  std::uint32_t HashOf(const std::byte* bytes, int node) const;
  frames::Frame FrameWithRoom(frames::Frame head, Address page, const std::byte* bytes);
  frames::Frame Publish(std::uint32_t hash, const std::byte* bytes, int node, frames::Frame chain);
  void Unsettle(Address page);
  void Leave(Address page, Reason reason);
  void LeaveUnpublished(Address page);
  void MergePlanned(Planned* plan, std::size_t count);
  static void ForgetFrame(void* self, frames::Frame frame);
  static bool HashOfEntry(void* self, const frames::Index::Entry& entry, std::uint32_t* hash);

  // nodes.cc
  void Adopt(std::uint64_t seed);
  void ForgetSeen();
  void FindNodes(const Address* pages, std::size_t count);
  void FindNodes(Span span);
  int NodeNow(Address page);
  void SeeAgain(Address page);  // of a candidate
  void MakeFresh(Address page, Page known);
  int NodeOf(frames::Frame frame) const;
  // Whether pages of that node may map the frame.
  bool LiesOn(frames::Frame frame, int node) const { return !by_node_ || NodeOf(frame) == node; }

  // share.cc
  frames::Frame Provide(std::uint32_t hash, const std::byte* bytes, int node, frames::Frame chain);
  frames::Frame PublishNow(std::uint32_t hash, const std::byte* bytes, int node, frames::Frame chain);
  void AcquireKnown(const std::uint32_t* hashes, std::size_t count, const PortionBits& leave);
  void SettleProvisions();
  void ReplaceProvisions(Planned* plan, std::size_t* count);
  bool Ask(frames::Source::Want* wants, std::size_t count);
  frames::Frame TakeGranted(std::uint32_t hash, frames::Frame theirs, int node);
  frames::Frame HeadOf(std::uint32_t hash, frames::Frame frame);
  void TendShared();
  void NoteNews(std::uint32_t hash, bool wanted);
  void LookUpKnown();
  void MatchNews();
  void ReturnStrays();
  bool TellsWrites(Address a);
  int LeaveForeign();
  // Of no use to anybody else: pages that lie in it are on their way back, and no other is merged into it.
  bool IsLeftAlone(frames::Frame frame) const { return pool_.source() && pool_.IsStray(frame); }

  // merge.cc
  std::size_t MergeRun(const Region& region, Address start, std::size_t pages, frames::Frame first);
  void MapZeroPage(Span run);
  std::size_t DropZeroRun(const Region& region, Address start, std::size_t pages);
  int Prepare(const Region& region, Span run, frames::Frame first, const os::Attributes& attributes, Address* at);
  int AttachFast(const Region& region, Span run, frames::Frame first, const os::Attributes& attributes);
  void Book(Span run, frames::Frame first);
  bool MarkBusy(Span run);
  void ClearBusy(Span run);
  // How many pages from the start can be taken now; *reason for the one after them.
  void NoteDiscards(Span run, std::size_t from);
  void NoteInFlight(Address page);
  bool DiscardInFlight(Address page, std::uint64_t now) const;
  void LookAgain(Address page);
  void LookAtPages(Address start, Address limit);
  std::size_t Fit(const Region& region, Address start, std::size_t pages, os::Attributes* attributes, Reason* reason);
  Reason WhyNotTaken(Address page, int error, Span rest, bool* healed);
  void RefreshAttributes();
  bool AttributesDue(bool awaited) const;
  bool AttributesUnreadAt(Address a) const;
  void AttributesUnread(Span span);
  bool AttributesKnown(Address a);
  os::Attributes FindAttributes(Address a, Address* until);
  os::Attributes LastAttributes(Address a, Address* until) const;
  os::Attributes AttributesOf(Span run, Address* until);
  void RefreshUnwaitable();
  bool Unwaitable(Address page) const;

  // budget.cc
  enum class Budget : std::uint8_t { kThere, kNotYet, kNone };
  struct Replicas {
    frames::Frame first = 0;
    std::uint32_t hash = 0;
    std::uint32_t count = 0;
  };
  void CountMappings(bool again);
  std::size_t MappingsNow() const;
  bool LeavesMappings(std::size_t part) const;
  std::size_t BudgetSpent(std::size_t runs);
  Budget BudgetFor(Address start, std::size_t pages);
  const Replicas* ReplicasOf(frames::Frame frame, std::size_t pages);
  bool HasRoom(frames::Frame frame) const;
  void SpreadRepeats(Planned* plan, std::size_t count);

  // remerge.cc
  void TendBroken(const Region& region, Address from, Address to);
  void TendDropped(const Region& region, Span span);
  void TendRun(const Region& region, Span run);
  os::Pins LookForPins();
  std::uint32_t QuickSeconds() const;
  bool OldEnough(Page page, std::uint32_t now, std::uint32_t seconds) const;
  std::size_t Remerge(Span run);

  // detach.cc
  int Detach(const Region& region, Span run, PageState expected);  // back to anonymous memory, contents kept
  Address PageBeside(const Region& region, Span run, const os::Mapping& mapping);
  bool CopyHeld();
  bool IsEmpty(Span span);
  bool Land(Span landing, bool* used);
  bool JoinBeside(Address beside, os::Context breaker, bool tracked);
  void FillHeld(os::Context breaker);
  bool FillByMoving(std::size_t first, std::size_t end);
  void LetGoOfBeside(Address beside, os::Context breaker);
  void LetGoOfDetached(const Region& region, Address beside, os::Context breaker);
  void UndoDetach();

  // hold.cc
  void NoteWritten(Span taken);
  int MoveOwn(Address from, std::size_t bytes, Address to);
  bool TakeFromRun(Span run, PageState expected);
  void Settle();
  void EndHold();
  void FollowHeld(std::size_t i);
  bool PlaceIsGone(std::size_t i, Address at);
  int CopyBack(Address at, const std::byte* bytes);
  enum class Went : std::uint8_t { kBack, kAgain, kRefused };
  void KeepCopy(std::size_t i);
  void ReturnHeld(std::size_t i);
  void MoveBackHeld(std::size_t i);
  Went MoveBack(std::size_t i);
  void LetGo();
  void WakeRun(Span run);
  void UnmapTaken(Address taken_to, std::size_t bytes);
  bool IsZapped(Address a);
  bool IsEmptied(Address a, Page page);
  bool HasCopy(Address a);
  bool IsPrivate(Address a, bool unmarked = false);

  // commands.cc
  bool NextIn(Span span, Address* at, Region* part) const;
  int UnmergeRange(const Region& region, Span span);
  int UnmergeRun(const Region& region, Span run);
  void DetachEverything();
  void SettlePins();
  void Untrack(Span span);
  bool IsInherited(const os::Mapping& mapping) const;
  bool Exclude(Span span, const base::OwnVector<Region>& parts);
  void RetryForeign();

  // events.cc
  void HandleContext(os::Context context, Child* child);
  void OnRemove(os::Context context, Address start, Address end);
  void OnRemap(const os::Event& event);
  void NoteMove(const Moved& moved);
  void ForgetMove(const Moved& moved);
  void OnFork(os::Context context, Child* parent, os::Context child);
  void ServeHold(Child* child);
  void ServeHeld(Child* child, std::size_t i);
  void OnFault(os::Context context, Child* child, const os::Event& event);
  bool FillZeros(os::Context context, Span span);
  void FillPending();
  bool ApplyMoves();
  void AwaitForks(std::uint64_t until);
  bool EventsPending(std::uint64_t until);
  std::uint64_t Patience() const;
  Address Translate(Address a) const;
  Address NowAt(Address a) const;
  Address WhereNow(Address a);
  bool LeftBehind(Address a) const;

  os::Context BreakerOf(const Region& region) const { return region.sync_break ? os::kSyncBreaker : os::kBreaker; }
  std::uint32_t NowSeconds() const { return static_cast<std::uint32_t>(system_.NowNanoseconds() / 1000000000u); }

  os::System& system_;
  const Tunables& tunables_;
  std::uint64_t seed_;
  // NUMA nodes are kept apart: a page's hash is seeded by its node, so that candidates, offers and frames are apart by
  // themselves. false on a machine with one node, whatever is wanted.
  bool by_node_ = false;
  bool across_nodes_ = true;  // what the tunable says
  const std::size_t page_;
  Counters counters_;
  PageTable table_;
  RegionList regions_;
  std::uint64_t foreign_at_ = 0;  // when to ask again about what another userfaultfd held; 0: nothing
  Presence* presence_ = nullptr;  // told of every region; never nullptr in a runtime
  RegionList excluded_;  // what was advised with them and cannot be merged, where no region is; scanner only
  frames::ForkWatch forks_;
  frames::Pool pool_;
  frames::Index index_;
  frames::SampleTable sample_table_;
  base::OwnSlab<Sample> samples_;
  Gate gate_;
  std::atomic<std::size_t> maps_used_{0};

  // The scanner's place in the pass, and its scratch, allocated at Start: nothing is allocated while a gate is shut.
  Address cursor_ = 0;
  std::uint32_t pass_ = 1;        // counts passes, and seconds where a pass takes longer (with the sleep after it)
  std::uint32_t pass_step_ = 1;   // what the last one counted for
  bool audits_ = false;           // this pass audits regions, and tries again what could not be helped
  std::uint64_t pass_at_ = 0;     // when the last one ended
  bool probing_ = false;          // this pass looks whether unarmed segments have changed
  bool probe_found_ = false;      // and has found one
  std::uint64_t probe_at_ = 0, probe_sleep_ = 0;  // the next one that does, ns, and how long after the last one
  std::uint64_t reclaim_at_ = 0, audit_at_ = 0;
  bool skip_cold_ = false;        // this pass asks nothing about segments that have been quiet for long
  std::uint32_t cold_pass_ = 0;   // the last one that did, and when it ended
  std::uint64_t cold_at_ = 0;
  bool looking_ = false;          // this pass looks at everything, whether it was written or not
  std::uint32_t trim_pass_ = 0;   // the last one that trimmed the index
  std::uint32_t look_pass_ = 0;   // the last one that did, and when it ended
  std::uint64_t look_at_ = 0;
  bool fruitful_ = false;
  bool eager_ = false;            // in this pass: something is to be looked at again at once
  std::int64_t heard_ = 0;        // pages of segments that are sampled that others have too, by what was heard since the pass began
  bool now_ = false;              // ksmu_merge: pages need not have been still
  std::uint64_t mappings_until_ = 0;  // not counted again before, however often ksmu_merge is called
  std::size_t mappings_at_pass_ = 0;  // counted once a pass, 0: not yet
  std::size_t maps_at_pass_ = 0;      // maps_used_ at that moment
  std::size_t max_mappings_ = 0;      // the kernel's limit, read then
  // The part of the limit (1/N) that stays the program's, whatever max_maps says. To bring pages back to anonymous memory
  // can cut mappings too, and needs some for a moment; but it is how they are given back, and may go further.
  static constexpr std::size_t kMergingLeaves = 4, kTendingLeaves = 8, kUnmergingLeaves = 16;
  bool long_runs_first_ = true;       // of ksmu_merge: false once they have had their turn
  bool short_runs_wait_ = false;      // some were turned away for that
  std::array<Replicas, 64> replicas_{};  // made last; each may have been given up since
  std::size_t replicas_next_ = 0;
  std::size_t chunk_ = 0;
  static constexpr std::size_t kTwinPages = 16;            // candidates read ahead
  static constexpr std::size_t kHugeBytes = std::size_t{2} << 20;
  std::byte* buffer_ = nullptr;   // kReadPages pages
  std::size_t buffer_used_ = 0;   // bytes of buffer_ that have been touched in this pass
  std::byte* huge_ = nullptr;     // the same in a huge page, and kTwinPages more
  std::size_t huge_used_ = 0;     // what it takes now
  std::array<int, kReadPages> nodes_{};  // of the pages of the portion; all 0 unless by_node_
  std::array<std::uint64_t, kReadPages / 64> unread_{};  // pages of the portion that could not be read
  std::byte* twin_bytes_ = nullptr;  // in huge_
  Span twins_read_;                  // whose bytes these are; of the batch in hand
  std::byte* scratch_ = nullptr;  // one page
  os::PageRun* runs_ = nullptr;
  Planned* plan_ = nullptr;       // of the segment in hand: its own pages, then their twins elsewhere
  std::size_t plan_size_ = 0;
  Planned* twins_ = nullptr;
  std::size_t twins_size_ = 0;
  Address* zeros_ = nullptr;
  std::size_t zeros_size_ = 0;
  // Of what is shared with other processes.
  bool put_off_ = false;             // pages whose frames a broker has not answered for in time: for ksmu_merge
  bool source_gone_ = false;         // found out in the middle of something; seen to by Housekeeping
  frames::Source::Want* wants_ = nullptr;
  std::array<frames::Frame, frames::Source::kMaxRing> settled_{};  // what became of each provision
  std::array<int, frames::Source::kMaxRing> provided_for_{};       // the node of each
  struct News {
    Address page;
    std::uint32_t hash;
    bool wanted;
  };
  base::OwnVector<News> news_;       // candidates that others have too; those before news_at_ are done
  std::size_t news_at_ = 0;
  bool looking_up_ = false;          // all candidates are to be offered and looked up: up to where
  Address looked_up_to_ = 0, strays_at_ = 0;
  std::uint64_t strays_after_ = 0;
  // What Fit has seen, good for the batch in hand.
  struct Look {
    os::Mapping mapping;
    Span scanned;
    std::size_t runs = 0;
  };
  static constexpr std::size_t kRuns = 1024, kLookRuns = kMaxSegmentPages;
  Look look_;
  os::PageRun* look_runs_ = nullptr;
  base::OwnVector<os::AttributedMapping> attributes_;
  std::uint64_t attributes_until_ = 0, attributes_cost_ = 0;  // 0: at once
  std::uint64_t attributes_oldest_ = 0, attributes_cpu_ = 0;  // due then at the latest; not before so much of the scanner's CPU time
  std::size_t attributes_maps_ = 0;  // maps_used_ when they were read
  static constexpr std::uint64_t kCheapAttributes = 2'000'000;  // ns
  bool sees_calls_ = false;
  bool attributes_known_ = false, attributes_lost_ = false;
  base::OwnVector<Span> not_read_;  // advised since the last reading
  base::OwnVector<Address> unwaitable_;  // sorted page addresses
  std::uint64_t unwaitable_until_ = 0;
  os::Pins pins_ = os::Pins::kForLong;  // answer of the last look at the descriptors
  bool requests_seen_ = false;          // direct I/O was possible, at requests_at_
  std::uint32_t requests_at_ = 0;       // seconds
  struct InFlight {
    Address page = 0;
    std::uint64_t until = 0;
  };
  std::array<InFlight, 4 * kMaxRunPages> in_flight_{};  // a ring; scanner only
  std::size_t in_flight_next_ = 0;
  std::uint64_t in_flight_until_ = 0;  // the latest of them
  std::uint64_t all_in_flight_until_ = 0;  // more than the ring can hold: any page may be one
  bool pins_known_ = false;       // and it is of this pass
  std::uint64_t pins_until_ = 0;  // and good until then, ns
  // The same of requests that hold pages by a reference only.
  bool references_ = false, references_known_ = false;
  std::uint64_t references_until_ = 0;  // not looked for again before
  struct PassTime {
    std::uint32_t second, pass;
  };
  std::array<PassTime, 64> pass_times_{};  // when passes began: a ring, in which some are left out
  std::size_t pass_times_next_ = 0;
  void (*poll_)(void*) = nullptr;
  void* poll_cookie_ = nullptr;
  const os::File* inherited_ = nullptr;
  std::size_t inherited_count_ = 0;

  // Shared by both threads. events_mutex_ is held by the event thread from before it reads a message until it has acted
  // on it; by the scanner for the instant in which a page that it has taken out of a run comes back. Whoever holds it
  // waits for nobody.
  std::mutex events_mutex_;
  struct Hold {
    Span run;             // taken out of its place by mremap, accesses to it wait in the breaker
    Address taken_to = 0;  // where its pages are
    bool settled = false;  // and which of them are private can be told: children that were forked meanwhile are served
    bool copied = false;   // what the pages held lies in buffer_, where held_filled_ says so
  };
  Hold hold_;                                // under events_mutex_
  std::array<bool, kMaxRunPages> held_marks_{};  // of the hold: which pages carried the mark before; scanner
  std::array<bool, kMaxRunPages> held_written_{};  // which were written since the last sweep; scanner
  std::uint64_t held_since_ = 0;                   // how long accesses to the run have had to wait; scanner
  std::uint64_t hold_until_ = 0;                   // what waits for an instant without an event gives up then; scanner
  // Which have been moved back, and where to; and of which buffer_ has a copy, for children. Scanner writes, under
  // events_mutex_.
  std::array<bool, kMaxRunPages> held_moved_{}, held_kept_{};
  std::array<Address, kMaxRunPages> held_put_{};
  Span held_gone_;                           // a hole that is known to be one; scanner
  std::array<bool, kMaxRunPages> held_filled_{};  // which are not to read as zeros; scanner, and events once hold_.copied
  std::byte* event_scratch_ = nullptr;       // one page; event thread
  std::uint64_t children_checked_at_ = 0;    // event thread
  std::atomic<Address> own_move_from_{0}, own_move_to_{0};  // the scanner's own move, whose event is none of the program's
  static constexpr std::size_t kMaxMoves = 4096;
  std::array<Moved, kMaxMoves>* moves_ = nullptr;  // of the program, not yet followed; under events_mutex_
  std::atomic<std::size_t> move_count_{0};
  std::atomic<bool> lost_moves_{false};
  std::atomic<std::int64_t> unserved_children_{0};
  ChildList children_;                       // under events_mutex_
  struct Fill {
    Span span;
    os::Context context = 0;
    std::uint8_t tries = 0;
  };
  std::array<Fill, 64> fills_{};              // discarded ranges that have not been zapped yet; event thread
  std::atomic<std::size_t> pending_fills_{0};
};

}  // namespace ksmu::engine
