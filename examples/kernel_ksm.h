// The kernel's KSM: its settings, its counters, and the thread that does its work.
#ifndef KSMU_EXAMPLES_KERNEL_KSM_H_
#define KSMU_EXAMPLES_KERNEL_KSM_H_

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace examples::ksm {

bool Available();                                        // the kernel has KSM
bool InUse();                                            // somebody runs it, or something is merged
pid_t Thread();                                          // ksmd; -1: not found
int64_t Read(const char* name);                          // -1: cannot be read
uint64_t SavedPages();                                   // by sharing, and zero pages
bool Write(const char* name, const std::string& value);  // false: errno

// Keeps others that use this away from KSM for as long as this one lives. False: there is one.
bool Claim();

// Unmerges everything and leaves KSM stopped.
bool Reset();

// The settings of the comparison: flat out over `pages` pages in a batch.
bool SetFlatOut(uint64_t pages);
// The kernel's own defaults.
bool SetDefaults();

// Everything that can be set in /sys/kernel/mm/ksm and vm.max_map_count: read once, put back by Restore or at the end.
class Settings {
 public:
  Settings() = default;
  ~Settings() { Restore(); }
  Settings(const Settings&) = delete;
  bool Save(std::string* error);
  bool Restore();  // says on stderr what could not be put back; false then
  // Remembers the present limit the first time. False: errno.
  bool SetMaxMapCount(uint64_t value);
  bool RestoreMaxMapCount();

 private:
  std::vector<std::pair<std::string, std::string>> saved_;
  int64_t max_map_count_ = -1;
};

}  // namespace examples::ksm

#endif  // KSMU_EXAMPLES_KERNEL_KSM_H_
