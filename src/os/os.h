// The contract between ksmu and the operating system.
//
// This is the only place through which the layers above reach the kernel. `LinuxSystem` (linux_system.h) does it for
// real; `FakeSystem` (fake_system.h) simulates the same contract, with the program's memory, faults and events, so that
// the protocol can be model-tested with any call failing at any step.
//
// What holds for every call:
//   - Addresses and lengths are multiples of PageSize() unless said otherwise; lengths are bytes and not 0.
//   - Errors are values: 0 (or a count) on success, -errno on failure. errno itself is not part of the contract.
//   - EINTR never comes back: the implementation repeats the call (our threads block all signals).
//   - No call allocates from the program's heap. No call touches the program's memory by plain loads and stores:
//     ReadProgram and the kernel do that, so that a hole or PROT_NONE is an error value and not a signal.
//   - All calls but Notify() run on threads that share the library's own descriptor table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ksmu::os {

using Address = std::uintptr_t;

struct Span {
  Address start = 0;
  std::size_t bytes = 0;
  constexpr Address end() const { return start + bytes; }
  constexpr bool contains(Address a) const { return a >= start && a < end(); }
};

// A userfaultfd context. The five named ones exist from Open() on; children's contexts, received with a kFork event,
// have handles >= kFirstChild and live until CloseContext().
enum ContextHandle : int { kNoContext = -1, kTracker = 0, kGate = 1, kStaging = 2, kBreaker = 3, kSyncBreaker = 4, kFirstChild = 5 };
using Context = int;

// Registration modes (bits).
enum : std::uint32_t { kMissing = 1, kWriteProtect = 2, kMinor = 4 };

// Outcome of a call that may do part of its work: `done` bytes from the start are done, also when error != 0.
struct Partial {
  int error = 0;  // 0 or -errno
  std::size_t done = 0;
};

struct Event {
  enum Kind : std::uint8_t { kFault, kRemove, kRemap, kFork, kUnmap } kind;
  // kFault only: what stopped the thread. Both false: a MISSING fault.
  bool write_protect = false;
  bool minor = false;
  bool write = false;
  Address start = 0;  // kFault: the faulting page; kRemove, kUnmap: start of the range; kRemap: old start
  Address end = 0;    // kRemove, kUnmap: end of the range; kRemap: old end
  Address to = 0;     // kRemap: new start
  Context child = -1; // kFork: handle of the child's context; it has the registrations of the parent's at the fork
};

// PAGEMAP_SCAN categories (the kernel's bits).
enum : std::uint32_t {
  kWpAllowed = 1, kWritten = 2, kFile = 4, kPresent = 8, kSwapped = 16, kPfnZero = 32, kHuge = 64,
};
struct PageRun {
  Address start = 0, end = 0;
  std::uint32_t categories = 0;
};
struct ScanRequest {
  std::uint32_t required = 0;  // all of these must be set (after inversion)
  std::uint32_t inverted = 0;  // these count as set when they are clear
  std::uint32_t any_of = 0;    // if not 0: at least one of these
  std::uint32_t returned = 0;  // reported in PageRun::categories
  bool write_protect = false;  // re-arm the pages found; mappings outside an asynchronous WP registration are passed over
  std::size_t max_pages = 0;   // stop after as many; 0: no bound. One run can be as long as what is asked about
};

// Private pages that are there: frames are file pages and passed over, and broken pages are among what is found.
inline ScanRequest PrivatePages(std::uint32_t returned) {
  ScanRequest request;
  request.required = kPresent | kFile;
  request.inverted = kFile;
  request.returned = returned;
  return request;
}

struct ScanResult {
  int error = 0;
  std::size_t runs = 0;       // filled entries
  Address walked_to = 0;      // continue here; == span.end() when all was walked
};

// One mapping of the process, as /proc/self/maps shows it.
struct Mapping {
  Address start = 0, end = 0;
  bool readable = false, writable = false, executable = false, shared = false;
  bool anonymous = false;  // no file behind it
  bool stack = false;      // the main thread's stack
  bool heap = false;       // the brk heap: libc unmaps from it unseen
  bool special = false;    // [vdso], [vvar], [vsyscall] ...
  std::uint64_t offset = 0;
  std::uint64_t device = 0, inode = 0;  // as File::device and File::inode
};

// What a new mapping over the same address loses and has to be given again (from smaps' VmFlags).
struct Attributes {
  bool dont_fork = false, dont_dump = false, huge_page = false, no_huge_page = false, wipe_on_fork = false;
  bool locked = false, mergeable = false /* kernel KSM */, sealed = false, hugetlb = false, pfn_map = false;
  bool grows_down = false, userfault = false /* some userfaultfd holds it */, protection_key = false;
  bool no_reserve = false;  // MAP_NORESERVE: mappings that differ in it never become one
};
struct AttributedMapping {
  Mapping mapping;
  Attributes attributes;
};

// A pool file.
struct File {
  int fd = -1;
  std::uint64_t device = 0, inode = 0;
};
// Entries of a batch, with their outcomes.
struct Hole {
  File file;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  int error = 0;
};
struct FrameWrite {
  File file;
  std::uint64_t offset = 0;
  Address from = 0;
  std::size_t bytes = 0;
  Partial result;
};

// Which pages of [span) a fork has left shared: see ReadExclusive.
enum class Sharing : std::uint8_t { kAbsent, kExclusive, kShared };

enum class Protection : std::uint8_t { kNone, kRead, kReadWrite };

enum class HugePages : std::uint8_t { kNever, kAdvised, kAlways };

// NUMA nodes have numbers below. kNoNode: no page is there, or none of its own; or nobody can tell.
inline constexpr int kMostNodes = 1024, kNoNode = -1;

struct Features {
  bool kernel_faults = false;  // faults of system calls are handled (else user-mode-only)
  bool fork_events = false;    // EVENT_FORK is permitted (CAP_SYS_PTRACE)
  bool mapping_query = false;  // PROCMAP_QUERY (6.11)
  bool io_uring = false;
};

// For how long somebody may be writing to pages of the process past its page tables, by the descriptors that it has open.
enum class Pins : std::uint8_t {
  kBrief,     // for the time of a call of another process's (process_vm_writev, ptrace)
  kRequests,  // of a request to a device, too: direct I/O
  kForLong,   // for ever: registered buffers, DMA
};


class System {
 public:
  virtual ~System() = default;

  virtual std::size_t PageSize() const = 0;
  virtual const Features& features() const = 0;

  // --- userfaultfd -------------------------------------------------------------------------------------------------
  // Registers the range with the context. The range must be mapped; -EBUSY: another context holds part of it;
  // -ENOMEM: no memory, or at the map limit (the mapping has to be split). On failure a prefix may be registered.
  virtual int Register(Context, Span, std::uint32_t modes) = 0;
  // Ends the registration and wakes everybody who waits on the range. Clears write-protect marks. -ENOMEM at the map limit.
  virtual int Unregister(Context, Span) = 0;
  // Sets or clears write protection; clearing wakes. -EAGAIN: an event of the context is unread. -ENOENT: not registered.
  virtual int WriteProtect(Context, Span, bool protect) = 0;
  // Maps the frames that the page cache holds; with `protect` write-protected. Stops with -EEXIST at a page that is
  // mapped already. -EAGAIN: an event is unread. Wakes waiters of what it mapped.
  virtual Partial Continue(Context, Span, bool protect) = 0;
  // Moves private anonymous pages from `from` to `to` (the context that holds `to` is the one to name). Both ends lie in
  // one mapping each. -EBUSY: pinned, or shared with a child; -ENOENT: no page there; -EAGAIN: raced, or event unread;
  // -EINVAL: mapping changed. Afterwards `from` reads as not present. Does not wake.
  virtual Partial Move(Context, Address to, Address from, std::size_t bytes) = 0;
  // Copies from the library's memory into pages that are not present. -EEXIST: a page is there. Wakes if `wake`.
  virtual Partial Copy(Context, Address to, const void* from, std::size_t bytes, bool wake) = 0;
  // Maps the zero page where nothing is mapped. -EEXIST: something is there (also a write-protect mark). Wakes.
  virtual Partial ZeroPage(Context, Span) = 0;
  // Wakes whoever waits on the range in this context, registered or not. Cannot fail usefully.
  virtual int Wake(Context, Span) = 0;
  // True while an event of the context has been raised and its raiser has not yet gone on: a harmless call says EAGAIN.
  virtual bool EventPending(Context) = 0;
  // Reads up to `capacity` messages, never waits. The raiser of an event goes on as soon as it has been read.
  virtual std::size_t ReadEvents(Context, Event* events, std::size_t capacity) = 0;
  virtual void CloseContext(Context child) = 0;
  // False when the process behind a child's context has gone.
  virtual bool ContextAlive(Context child) = 0;

  // --- page tables -------------------------------------------------------------------------------------------------
  virtual ScanResult Scan(Span, const ScanRequest&, PageRun* runs, std::size_t capacity) = 0;
  // pagemap bit 56 for up to `capacity` pages from `start`. kShared: more than one process maps the page (a forked child).
  virtual int ReadSharing(Address start, Sharing* out, std::size_t pages) = 0;

  // --- the program's memory ----------------------------------------------------------------------------------------
  // Copies up to `bytes` out of the program's memory; returns the bytes copied, 0 where nothing could be (a hole,
  // PROT_NONE). The bytes may be torn by concurrent writers. Never on a shut gate: it would wait. Pages that a forked
  // child shares are not copied by it. Cost: 1.2 µs for one page, 0.48 µs a page from 16 pages on, and 0.29 µs where `to`
  // lies in a huge page.
  virtual std::size_t ReadProgram(Address from, void* to, std::size_t bytes) = 0;
  virtual int Discard(Span) = 0;             // madvise(MADV_DONTNEED)
  virtual int PopulateWrite(Span) = 0;       // madvise(MADV_POPULATE_WRITE): the kernel copies shared pages, bytes unchanged
  virtual int ApplyAttributes(Span, const Attributes&) = 0;  // replays what a new mapping lost

  // --- mappings ----------------------------------------------------------------------------------------------------
  // The mapping that contains `address`, or the first one above it. -ENOENT: none.
  virtual int QueryMapping(Address address, Mapping* out) = 0;
  // The mappings that intersect the span, in address order, with attributes; costs a read of smaps. Calls `each` for
  // each; returns the number, or -errno.
  virtual int ReadAttributes(Span, void (*each)(void* cookie, const AttributedMapping&), void* cookie) = 0;
  // Number of mappings of the process.
  virtual std::size_t CountMappings() = 0;
  virtual std::size_t MaxMappings() = 0;     // vm.max_map_count
  virtual HugePages TransparentHugePages() = 0;  // .../transparent_hugepage/enabled, read each time
  // A private mapping of frames. `at` == 0: at a free address; else replaces what is at `at` (MAP_FIXED: attributes,
  // registration and contents of the old mapping are lost, waiters are not woken). Returns the address in *out.
  virtual int MapFrames(Address at, std::size_t bytes, const File&, std::uint64_t offset, Protection, Address* out) = 0;
  // Private anonymous memory, reads as zeros. `at` as above.
  virtual int MapAnonymous(Address at, std::size_t bytes, Protection, Address* out) = 0;
  // The same at a free address, apart from every other mapping, readable and writable. As long as it has never been touched
  // it takes on what the place asks that it is moved to, and so can become one mapping with its neighbours there.
  virtual int MapApart(std::size_t bytes, bool no_reserve, Address* out) = 0;
  // Moves a mapping, page tables included, over `to` (mremap, MREMAP_FIXED); atomic for everybody who looks at `to`.
  // The registration moves along if the context has EVENT_REMAP (and then the call waits until that event is read);
  // else it is lost. The old place is a hole afterwards. -EPERM sealed, -ENOMEM at the map limit: nothing has changed.
  virtual int MoveMapping(Address from, std::size_t bytes, Address to) = 0;
  // Takes the pages out of a range into a new mapping at a free address (*out); the range stays mapped and registered
  // as it was, with nothing present (mremap, MREMAP_DONTUNMAP). Atomic. Waits for EVENT_REMAP to be read, as above.
  virtual int TakePages(Span, Address* out) = 0;
  virtual int Unmap(Span) = 0;
  virtual int Protect(Span, Protection) = 0;
  // A system call of the program's, made by this thread for it; -errno.
  virtual long CallForProgram(long number, const long* arguments) = 0;
  virtual int Lock(Span) { return 0; }       // mlock, for pages of the library's own; may be refused

  // --- NUMA nodes --------------------------------------------------------------------------------------------------
  // How many there can be: 1 where there are none to be told apart.
  virtual int CountNodes() { return 1; }
  // On which node each of these pages lies, the program's or the library's own; kNoNode for what is absent, also if it has
  // been swapped out, and for zero pages. Touches nothing. 0 or -errno. Some 0.2 µs a page.
  virtual int QueryNodes(const Address* pages, std::size_t count, int* nodes) = 0;
  // What is written into the file from now on takes its memory from the node, as long as that has any; and so do the copies
  // that writers of private mappings get.
  virtual int BindFile(const File&, std::size_t bytes, int node) = 0;
  // The same for what the calling thread makes the kernel allocate; kNoNode: as before.
  virtual void PreferNode(int node) { (void)node; }

  // --- pool files --------------------------------------------------------------------------------------------------
  // A new memfd of that many bytes, sparse. -EFBIG beyond RLIMIT_FSIZE (SIGXFSZ is blocked in our threads), -EMFILE, -ENOMEM.
  virtual int CreateFile(std::size_t bytes, File* out) = 0;
  virtual void CloseFile(const File&) = 0;
  // Copies from the program's memory (a hole or PROT_NONE: fewer bytes) or the library's own into the file.
  virtual Partial WriteFile(const File&, std::uint64_t offset, Address from, std::size_t bytes) = 0;
  // Frees the frames at once for everybody; private mappings that had not copied read zeros from now on.
  virtual int PunchFile(const File&, std::uint64_t offset, std::size_t bytes) = 0;
  // The same for many at once; sets each one's outcome and returns the number that succeeded in full.
  virtual std::size_t PunchFiles(Hole* holes, std::size_t count) {
    std::size_t succeeded = 0;
    for (Hole* hole = holes; hole != holes + count; ++hole) {
      hole->error = PunchFile(hole->file, hole->offset, hole->bytes);
      succeeded += hole->error == 0;
    }
    return succeeded;
  }
  virtual std::size_t WriteFiles(FrameWrite* writes, std::size_t count) {
    std::size_t succeeded = 0;
    for (FrameWrite* write = writes; write != writes + count; ++write) {
      write->result = WriteFile(write->file, write->offset, write->from, write->bytes);
      succeeded += write->result.error == 0;
    }
    return succeeded;
  }
  // A shared read-only mapping of the whole file in the library's own memory, not inherited over fork.
  virtual int MapFile(const File&, std::size_t bytes, const std::byte** out) = 0;
  virtual void UnmapFile(const std::byte*, std::size_t bytes) = 0;

  // --- the process -------------------------------------------------------------------------------------------------
  // Addresses that the kernel writes or reads for threads that cannot wait (robust lists and the words beside them).
  // Calls `each` with single addresses; stops when it returns false.
  virtual void VisitUnwaitableWords(bool (*each)(void* cookie, Address), void* cookie) = 0;
  // Looks afresh each time: some 50 µs, a few for each open file, and 0.7 µs for each mapping of the process.
  virtual Pins PossiblePins() = 0;
  // Whether a request may be under way into pages that are not pinned but only referred to: Move takes those, and what arrives is lost.
  // Some 20 µs, a few for each descriptor.
  virtual bool PossibleReferences() = 0;
  bool NoLongTermPins() { return PossiblePins() != Pins::kForLong; }
  // Free memory for unmerging: MemAvailable + swap, bounded by the cgroup; bytes.
  virtual std::uint64_t AvailableMemory() = 0;
  virtual std::uint64_t NowNanoseconds() = 0;        // monotonic
  virtual std::uint64_t ThreadCpuNanoseconds() = 0;  // of the calling thread
  // While `near`, the thread that waits in WaitEvents runs on the CPU on which this one is running now: a call that waits
  // for it to read an event then costs a switch of threads, not the waking of another CPU. Best effort.
  virtual void KeepEventThreadNear(bool near) { (void)near; }
  // One look at the state of the CPU before a call is repeated: gives way to whoever has to act first.
  virtual void Yield() = 0;

  // --- waiting -----------------------------------------------------------------------------------------------------
  // Waits until a message can be read on one of the contexts, Notify(), or the timeout. The event thread's only wait.
  virtual void WaitEvents(const Context* contexts, std::size_t count, int timeout_ms) = 0;
  // Ends a WaitEvents in progress, or the next one. Any thread, the program's too (it needs no descriptor), and
  // async-signal-safe.
  virtual void Notify() = 0;
};

}  // namespace ksmu::os
