// Merging without being asked (KSMU_AUTO, prctl(PR_SET_MEMORY_MERGE)): a thread advises what the shim saw being mapped. It
// is started when the shim is loaded, or by the prctl, never by a call that an allocator may be making.
#pragma once

#include "preload/regions.h"

namespace ksmu::preload {

void StartAuto();   // starts the thread where it is wanted: automatic merging, or statistics
void WakeAuto();    // there may be something to advise. Any moment, no lock, no allocation
// The engine, with the log that the configuration asks for. 0 or errno. Starts threads: not for an allocator's calls.
int StartEngine();

// prctl(PR_SET_MEMORY_MERGE, on) and (PR_GET_MEMORY_MERGE).
int SetMemoryMerge(bool on);
bool MemoryMerge();

// What was advised while it was locked is advised again.
void ReadviseUnlocked(Span span);
void NoteLockedAdvice(Span span, int advice);
void ForgetLocked(Span span);

// In a forked child, before anything else of the shim's.
void AutoInChild();
void WriteStats();

}  // namespace ksmu::preload
