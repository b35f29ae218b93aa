// FakeSystem: the contract of os.h, simulated: deterministic, single-threaded, and as hostile as Linux is.
//
// The library's side is os::System. The program's side is a set of program threads, each with at most one operation in
// hand (a read, a write, a discard, a fork ...), advanced one step at a time: a step is one page fault, or one phase of
// a system call, so that a test can put anything between any two of them. A thread that faults on a range which a
// userfaultfd context serves waits, as in Linux, until somebody wakes it; a discard or a fork under a context that has
// asked for the event waits until the event is read, and zaps in a later step whatever is mapped there by then.
//
// Every call of the library passes `Hooks::before` and `Hooks::after`: there a test steps program threads, and makes
// the call fail. When a call of the library has to wait (for its own event to be read, at a fault),
// `Hooks::other_thread` is called, which runs what the library's other thread would do. If that does not help, the
// library would hang: that, and other conduct that no answer of the fake can express, is recorded as a violation.
//
// Program memory lies at addresses that nothing may dereference. Memory that the library maps for itself
// (MapAnonymous(0, ...)) is real, so that it can be read by plain loads; where a page of it is missing and registered
// MISSING it is PROT_NONE, and the load that would hang in Linux crashes here.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "os/fake_memory.h"
#include "os/os.h"

namespace ksmu::os {

// Things the fake can be told to get wrong, so that a test can show that it would notice if the library got them wrong.
struct FakeLies {
  bool wake_wakes_nobody = false;
  bool unregister_wakes_nobody = false;
  bool move_ignores_pins = false;
  bool move_ignores_children = false;  // takes pages that a child shares
  bool discard_raises_no_event = false;
  bool move_mapping_loses_registration = false;
  bool sharing_is_exclusive = false;  // no page ever seems shared with a child
  bool written_is_never_set = false;  // PAGEMAP_SCAN: no page ever seems written
  bool continue_forgets_protection = false;
  bool zero_page_shows_frame = false;  // ZeroPage says it worked and maps nothing
  bool move_takes_a_copy = false;      // the source stays where it is
  bool events_never_pending = false;
  bool pins_are_never_held = false;  // PossiblePins() knows of none, whatever is pinned
};

struct FakeOptions {
  std::size_t page_size = 4096;
  std::size_t max_mappings = 65530;
  bool fork_events = true;
  FakeLies lies;
};

struct FakeCall {
  const char* name;
  Context context = -1;
  Span span;
  Address other = 0;
  // Set by Hooks::before together with a non-zero result: so many bytes are done first (calls that return Partial, and
  // Register, of which a prefix may stay behind).
  std::size_t do_first = 0;
  // Set by Hooks::before with a result of 0: a Partial call does no more than this and says -EAGAIN.
  std::size_t do_only = SIZE_MAX;
};

using ProcessId = int;  // 0: the program itself
using ThreadId = int;
using PinId = int;

struct FakeOperation {
  enum Kind : std::uint8_t {
    kRead,         // `bytes` within a page
    kWrite,        // `data` within a page; a store, or a system call's copy_to_user
    kDirectWrite,  // the same through a pin that is taken in one step and written in a later one (O_DIRECT, vm_writev)
    kDiscard,      // madvise(MADV_DONTNEED)
    kUnmap,
    kMap,  // mmap(MAP_FIXED) of private anonymous memory
    kProtect,
    kFork,
    kPin,      // a long-term pin; for writing if `write`
    kSwapOut,  // reclaim takes the page: the fake's own, waits for nothing
  } kind = kRead;
  Address address = 0;
  std::size_t bytes = 0;
  std::vector<std::byte> data{};
  Protection protection = Protection::kReadWrite;
  bool write = false;
};

struct FakeOutcome {
  bool done = false;
  int error = 0;  // -EFAULT: SIGSEGV
  std::vector<std::byte> data{};
  ProcessId child = -1;
  PinId pin = -1;
};

class FakeSystem : public System {
 public:
  struct Hooks {
    std::function<int(FakeCall&)> before;  // 0, or the -errno with which the call fails
    std::function<void(const FakeCall&)> after;
    std::function<void()> other_thread;
    std::function<void()> yield;  // Yield() and WaitEvents()
  };

  explicit FakeSystem(const FakeOptions& options = {});
  ~FakeSystem() override;

  Hooks hooks;
  FakeLies lies;

  // --- the program's side -------------------------------------------------------------------------------------------
  static constexpr Address kProgramBase = 0x500000000000;
  // Sets up memory before or between operations, as a program's mmap would; nothing waits.
  void MapProgram(Address at, std::size_t bytes, const std::function<void(fake::Vma&)>& adjust = {});

  ThreadId AddThread(ProcessId process = 0);
  void Start(ThreadId, const FakeOperation&);
  bool Busy(ThreadId) const;   // an operation is in hand
  bool Ready(ThreadId) const;  // and it does not wait
  bool Step(ThreadId);         // one step; false: not ready
  const FakeOutcome& Outcome(ThreadId) const;
  std::string Describe(ThreadId) const;
  std::size_t threads() const { return threads_.size(); }
  // Starts the operation and steps it until it is done or waits. True: done.
  bool Run(ThreadId, const FakeOperation&);
  // The children of the program's forks live until Exit: their threads go with them.
  void Exit(ProcessId);
  bool Alive(ProcessId) const;

  void PinWrite(PinId, std::size_t offset, const std::vector<std::byte>& data);  // the device writes
  std::vector<std::byte> PinBytes(PinId) const;
  bool PinInPlace(PinId) const;  // the pinned page is still the one that the program sees
  void Unpin(PinId);

  // --- looking at it ------------------------------------------------------------------------------------------------
  const std::vector<std::string>& violations() const { return violations_; }
  void Violation(std::string text) { violations_.push_back(std::move(text)); }
  fake::AddressSpace& space(ProcessId id = 0) { return processes_[static_cast<std::size_t>(id)]->space; }
  std::size_t RegisteredPages(Context) const;
  std::size_t PrivatePages(ProcessId id = 0) const;  // distinct private pages that the process maps
  std::size_t FramePages() const;                    // pages that the pool files hold
  bool EventsUnread() const;
  std::uint64_t calls() const { return calls_; }

  // --- knobs of the environment -------------------------------------------------------------------------------------
  // The library has gone: its descriptors are closed, and with them the contexts. Nobody reads anything any more.
  void EndLibrary();
  void AdvanceTime(std::uint64_t nanoseconds) { now_ += nanoseconds; }
  std::size_t max_mappings;
  bool no_long_term_pins = true;  // false: something could hold one, though nothing does
  bool direct_io = true;          // and it could have a device write to memory for a while
  bool direct_io_refers = false;  // through a reference that Move does not see (NFS), not through a pin
  std::uint64_t available_memory = std::uint64_t{16} << 30;
  std::uint64_t file_size_limit = UINT64_MAX;
  std::vector<Address> unwaitable_words;
  int nodes = 1;
  std::map<Address, int> node_of;  // of the program's pages; what is not in it lies on node 0
  int full_node = kNoNode;         // what is to be taken from it comes from node 0

  // --- System -------------------------------------------------------------------------------------------------------
  std::size_t PageSize() const override { return page_size_; }
  const Features& features() const override { return features_; }
  int Register(Context, Span, std::uint32_t modes) override;
  int Unregister(Context, Span) override;
  int WriteProtect(Context, Span, bool protect) override;
  Partial Continue(Context, Span, bool protect) override;
  Partial Move(Context, Address to, Address from, std::size_t bytes) override;
  Partial Copy(Context, Address to, const void* from, std::size_t bytes, bool wake) override;
  Partial ZeroPage(Context, Span) override;
  int Wake(Context, Span) override;
  bool EventPending(Context) override;
  std::size_t ReadEvents(Context, Event* events, std::size_t capacity) override;
  void CloseContext(Context child) override;
  bool ContextAlive(Context child) override;
  ScanResult Scan(Span, const ScanRequest&, PageRun* runs, std::size_t capacity) override;
  int ReadSharing(Address start, Sharing* out, std::size_t pages) override;
  std::size_t ReadProgram(Address from, void* to, std::size_t bytes) override;
  int Discard(Span) override;
  int PopulateWrite(Span) override;
  int ApplyAttributes(Span, const Attributes&) override;
  int QueryMapping(Address address, Mapping* out) override;
  int ReadAttributes(Span, void (*each)(void* cookie, const AttributedMapping&), void* cookie) override;
  std::size_t CountMappings() override;
  std::size_t MaxMappings() override { return max_mappings; }
  HugePages TransparentHugePages() override { return HugePages::kAlways; }
  int MapFrames(Address at, std::size_t bytes, const File&, std::uint64_t offset, Protection, Address* out) override;
  int MapAnonymous(Address at, std::size_t bytes, Protection, Address* out) override;
  int MapApart(std::size_t bytes, bool no_reserve, Address* out) override;
  int MoveMapping(Address from, std::size_t bytes, Address to) override;
  int TakePages(Span, Address* out) override;
  int Unmap(Span) override;
  long CallForProgram(long, const long*) override { return -ENOSYS; }
  int Protect(Span, Protection) override;
  int CountNodes() override { return nodes; }
  int QueryNodes(const Address* pages, std::size_t count, int* out) override;
  int BindFile(const File&, std::size_t bytes, int node) override;
  int CreateFile(std::size_t bytes, File* out) override;
  void CloseFile(const File&) override;
  int ReopenFile(const File&, File* out);  // another descriptor of it, as one that has been passed by a socket
  Partial WriteFile(const File&, std::uint64_t offset, Address from, std::size_t bytes) override;
  int PunchFile(const File&, std::uint64_t offset, std::size_t bytes) override;
  int MapFile(const File&, std::size_t bytes, const std::byte** out) override;
  void UnmapFile(const std::byte*, std::size_t bytes) override;
  void VisitUnwaitableWords(bool (*each)(void* cookie, Address), void* cookie) override;
  Pins PossiblePins() override;
  bool PossibleReferences() override;
  std::uint64_t AvailableMemory() override { return available_memory; }
  std::uint64_t NowNanoseconds() override { return now_ += 1000; }
  std::uint64_t ThreadCpuNanoseconds() override { return now_; }
  void Yield() override;
  void WaitEvents(const Context* contexts, std::size_t count, int timeout_ms) override;
  void Notify() override {}

 private:
  struct Process {
    explicit Process(std::size_t page_size) : space(page_size) {}
    ProcessId id = 0;
    bool alive = true;
    fake::AddressSpace space;
  };
  // One who waits, at a fault or for an event to be read: a program thread, or the library itself.
  struct Waiter {
    enum State : std::uint8_t { kRunning, kAtFault, kForEvent } state = kRunning;
    Context context = -1;
    Event fault{};
    bool told = false;  // the message has been read
  };
  struct Raised {
    Context context;
    Event event;
    Waiter* waiter = nullptr;
    std::shared_ptr<Process> child;  // kFork
  };
  struct ContextState {
    bool open = true;
    bool wp_async = false, wp_unpopulated = false, event_remove = false, event_remap = false, event_fork = false;
    Process* process = nullptr;
    int changing = 0;            // mmap_changing: events raised and not yet gone on from
    std::deque<Raised> events;   // raised, and not read
    std::deque<Waiter*> faults;  // who waits, in the order of arrival
  };
  struct Thread {
    ProcessId process = 0;
    bool busy = false;
    int phase = 0;
    Address cursor = 0;
    FakeOperation op;
    FakeOutcome outcome;
    Waiter waiter;
    std::vector<Raised> raised;  // events that the operation still has to raise and wait for
    std::shared_ptr<fake::Page> pinned;
    bool refers = false;  // and not counted as a pin
  };
  struct PinState {
    std::shared_ptr<fake::Page> page;
    ProcessId process = 0;
    Address address = 0;
    bool live = true;
  };
  enum class Access : std::uint8_t { kRead, kWrite, kUnshare };
  enum class FaultResult : std::uint8_t { kRetry, kBlocked, kSegv };
  class Scope;  // a call of the library: hooks around it

  Process& program() { return *processes_[0]; }
  ContextState* Open(Context);
  Process* ProcessOf(Context);
  bool Permits(const fake::Vma&, const fake::Pte&, Access) const;
  FaultResult Fault(Process&, Address page, Access, Waiter&);
  void BlockAt(Waiter&, const fake::Vma&, Address page, bool write_protect, bool minor, bool write);
  void MapFromFile(Process&, fake::Vma&, Address page, bool write, bool keep_mark);
  void Release(ContextState&, Context);
  void WakeRange(Context, Span, bool lie);
  // The event is raised (mmap_changing) now and queued by Queue; GoneOn ends it.
  Raised Raise(Context, const Event&);
  void Queue(const Raised&, Waiter&);
  void GoneOn(const Raised&);
  void RaiseRemap(Process&, Span from, Address to, std::vector<Raised>* out);
  // The library's own waiting.
  void WaitRaised(std::vector<Raised>&, const char* who);
  // Makes the page accessible for the library's own access; false: it cannot be, or would wait for ever.
  bool FaultIn(Process&, Address page, Access, const char* who);
  Waiter* NewLibraryWaiter();

  bool StepThread(Thread&);
  bool StepAccess(Thread&);
  bool StepDiscard(Thread&);
  bool StepFork(Thread&);
  bool StepPin(Thread&);
  void StepSwapOut(Thread&);
  void Finish(Thread&, int error);
  std::shared_ptr<Process> CopyProcess(Process&, std::vector<Raised>*);
  void ZapRange(Process&, Span);
  int ProtectRange(Process&, Span, Protection);
  int UnmapRange(Process&, Span);
  int MapRange(Process&, const fake::Vma&);
  Address FreeAddress(std::size_t bytes);
  void FillMapping(const fake::Vma&, Mapping*) const;
  int FileMappings(const fake::PoolFile&, std::uint64_t page, bool present_only, bool count_all) const;

  std::size_t page_size_;
  Features features_;
  bool fork_events_;
  std::vector<std::shared_ptr<Process>> processes_;
  std::vector<std::unique_ptr<ContextState>> contexts_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<PinState> pins_;
  std::map<int, std::shared_ptr<fake::PoolFile>> files_;
  int next_fd_ = 100;
  std::uint64_t next_inode_ = 1000;
  Address next_free_ = 0x200000000000;
  std::uint64_t now_ = 1000000000;
  std::uint64_t calls_ = 0;
  std::vector<std::string> violations_;
};

}  // namespace ksmu::os
