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

// No signal of another's interrupts this thread until the mask that it had is restored. What it raises itself comes through: to a
// thread that has them blocked the kernel makes them deadly, and some programs live by them (SIGSYS in a sandbox that emulates
// calls, SIGSEGV in a collector). Past libc: glibc's own two are blocked as well. errno is left alone.
std::uint64_t BlockSignals();
void RestoreSignals(std::uint64_t mask);

int ProcessId();             // not cached: a raw clone does not tell anybody
std::size_t SystemPageSize();
std::uint64_t Entropy();
// The kernel's release, like "6.12.1", cut to fit.
void KernelRelease(char* text, std::size_t capacity);

}  // namespace ksmu::os
