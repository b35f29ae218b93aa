// The library's threads, and waiting in other people's threads.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "os/os.h"
#include "os/text.h"

namespace ksmu::os {

// Starts a thread with all signals blocked (glibc keeps those that setuid needs), free of the creator's real-time class,
// priority and CPU pinning. 0 or -errno. Calls the program's calloc (glibc does, for the thread's vectors).
int StartThread(pthread_t* thread, void* (*body)(void*), void* argument);
const char* WhyNoThread(int error);  // a sentence about StartThread's result
void JoinThread(pthread_t thread);
// To be called by the new thread itself. `cpus`: a list like "0-3,8", or nullptr for all that the process may use.
void NameThisThread(const char* name);
int PinThisThread(const char* cpus);  // -EINVAL: malformed, or no such CPU
void SetThisThreadNice(int nice);

// Waits while *word == expected, up to `timeout_ns` (< 0: for ever). 0, -ETIMEDOUT, -EAGAIN (it was not), or -EINTR
// where a signal handler of the program ran.
int FutexWait(const std::atomic<std::uint32_t>* word, std::uint32_t expected, std::int64_t timeout_ns);
void FutexWake(const std::atomic<std::uint32_t>* word, int count);

void YieldThread();

int ProcessId();             // not cached: a raw clone does not tell anybody
std::size_t SystemPageSize();
std::uint64_t Entropy();
// The kernel's release, like "6.12.1", cut to fit.
void KernelRelease(char* text, std::size_t capacity);

// For a child made by a raw clone, in which nothing of the library may be used but the kernel: discards the range, and
// puts anonymous memory where pool mappings of the parent's library would show frames again. 0 or -errno.
int DiscardWithoutEngine(Span span);
// The same in a process whose library has been stopped: on a thread with a descriptor table of its own, since the
// program's may be in any state.
int DiscardAfterStop(Span span);
// Just madvise, where there has never been an engine.
int DiscardPlainly(Span span);
// Private anonymous memory for the program, and munmap; plain.
int MapForProgram(std::size_t bytes, Address* out);
int UnmapWithoutEngine(Span span);

}  // namespace ksmu::os
