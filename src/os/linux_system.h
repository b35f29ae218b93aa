// The contract of os.h on Linux (6.8 and later).
#pragma once

#include <sched.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "os/child_contexts.h"
#include "os/io_batch.h"
#include "os/mappings.h"
#include "os/move_watch.h"
#include "os/nodes.h"
#include "os/os.h"
#include "os/pagemap.h"
#include "os/pins.h"
#include "os/probe.h"
#include "os/process.h"
#include "os/refusals.h"

namespace ksmu::os {

struct LinuxOptions {
  // Where kernel-mode faults may not be handled, go on with user-mode ones only: a system call that writes into a shut
  // gate then fails with EFAULT.
  bool user_mode_only = false;
  // Do not even try to have kernel-mode faults handled (with user_mode_only; to test that rung on any machine).
  bool refuse_kernel_faults = false;
  // Batches through io_uring; slower than plain calls as measured (io_batch.h).
  bool io_uring_batches = false;
  PinPolicy pins;
};

class LinuxSystem final : public System {
 public:
  // Opens everything, with the calling thread's descriptor table: call UnshareDescriptors (process.h) first. Probes the
  // kernel on scratch memory. -EPERM: no right to userfaultfd; -ENOSYS: the kernel is too old; others: out of memory or
  // descriptors. *error then holds a sentence that says what is missing and what to do.
  static int Open(const LinuxOptions& options, LinuxSystem** out, ErrorText* error);
  // Closes all descriptors; the program's memory has to be registered with nothing of ours by then.
  static void Close(LinuxSystem* system);

  LinuxSystem(const LinuxSystem&) = delete;
  LinuxSystem& operator=(const LinuxSystem&) = delete;

  // The library's own threads are told apart from the program's by their ids. Each registers itself first of all.
  bool RegisterOwnThread(int thread) { return own_threads_.Add(thread); }
  // The calling thread is the one that waits in WaitEvents.
  void RegisterEventThread();
  void ForgetOwnThread(int thread) { own_threads_.Remove(thread); }

  const Refusals& refusals() const { return refusals_; }
  // Bits by ContextHandle: contexts that were closed because a filter refuses what somebody waits for.
  std::uint32_t given_up() const { return given_up_.load(std::memory_order_acquire); }

  std::size_t PageSize() const override { return page_bytes_; }
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
  std::size_t MaxMappings() override;
  HugePages TransparentHugePages() override { return Mappings::TransparentHugePages(); }
  int MapFrames(Address at, std::size_t bytes, const File&, std::uint64_t offset, Protection, Address* out) override;
  int MapAnonymous(Address at, std::size_t bytes, Protection, Address* out) override;
  int MapApart(std::size_t bytes, bool no_reserve, Address* out) override;
  int MoveMapping(Address from, std::size_t bytes, Address to) override;
  int TakePages(Span, Address* out) override;
  int Unmap(Span) override;
  long CallForProgram(long number, const long* arguments) override;
  int Protect(Span, Protection) override;
  int Lock(Span) override;

  int CountNodes() override;
  int QueryNodes(const Address* pages, std::size_t count, int* nodes) override;
  int BindFile(const File&, std::size_t bytes, int node) override;
  void PreferNode(int node) override;

  int CreateFile(std::size_t bytes, File* out) override;
  void CloseFile(const File&) override;
  Partial WriteFile(const File&, std::uint64_t offset, Address from, std::size_t bytes) override;
  int PunchFile(const File&, std::uint64_t offset, std::size_t bytes) override;
  std::size_t PunchFiles(Hole* holes, std::size_t count) override;
  std::size_t WriteFiles(FrameWrite* writes, std::size_t count) override;
  int MapFile(const File&, std::size_t bytes, const std::byte** out) override;
  void UnmapFile(const std::byte*, std::size_t bytes) override;

  void VisitUnwaitableWords(bool (*each)(void* cookie, Address), void* cookie) override;
  Pins PossiblePins() override;
  bool PossibleReferences() override;
  std::uint64_t AvailableMemory() override;
  std::uint64_t NowNanoseconds() override;
  std::uint64_t ThreadCpuNanoseconds() override;
  void KeepEventThreadNear(bool near) override;
  void Yield() override;

  void WaitEvents(const Context* contexts, std::size_t count, int timeout_ms) override;
  void Notify() override;

 private:
  static constexpr int kNamedContexts = kFirstChild;
  static constexpr int kBellSignal = 23;  // SIGURG: ignored by default, and blocked in the thread it is sent to

  LinuxSystem() = default;
  ~LinuxSystem() = default;
  int OpenAll(const LinuxOptions& options, ErrorText* error);
  int OpenDescriptor(const LinuxOptions& options, ErrorText* error);
  int OpenContext(const LinuxOptions& options, std::uint64_t features, int* out, ErrorText* error);
  void CloseAll();
  static bool Refused(int error) { return error == -EPERM || error == -EACCES || error == -ENOSYS; }
  void GiveUp(Context context);
  Partial Noted(Refusals::Call call, Partial partial) {
    refusals_.Note(call, partial.error);
    return partial;
  }
  bool GiveUpSpare();

  // A context's descriptor for the length of a call.
  class Use;

  std::size_t page_bytes_ = 4096;
  int pid_ = 0;
  Features features_;
  int contexts_[kNamedContexts] = {-1, -1, -1, -1, -1};
  ChildContexts children_;
  MoveWatch move_watch_;
  Pagemap pagemap_;
  Mappings mappings_;
  IoBatch batch_;
  MemoryBudget memory_;
  ThreadPolicy thread_policy_;
  OwnThreads own_threads_;
  PinPolicy pins_;
  Refusals refusals_;
  std::atomic<int> event_thread_{0};
  cpu_set_t event_cpus_{};  // where it may run; written before event_thread_
  int event_cpu_ = -1;      // where it is kept; scanner
  std::atomic<std::uint32_t> given_up_{0};
  Address idle_page_ = 0;  // registered with nothing, for ever

  std::atomic<int> spare_fd_{-1};
  int bell_fd_ = -1;  // a signalfd: see Notify
  std::atomic<bool> rung_{false};
  std::atomic<int> waiter_{0};
};

}  // namespace ksmu::os
