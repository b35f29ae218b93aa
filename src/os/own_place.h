// Where the library's own mappings go: far from the program's. The kernel would put them into the first gap that is large
// enough, which may be one that the program has made for itself: a part that it has unmapped of what it reserved, and maps again
// with MAP_FIXED, or unmaps together with the rest. It may do so as long as it is alone, and does not know that it is not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ksmu::os {

// Hints for mmap: where something is already, the kernel chooses after all. 0 under sanitizers, which have their own idea of the
// address space. For what stays, and for what is moved or unmapped again in a moment.
std::uintptr_t LastingPlace(std::size_t bytes);
std::uintptr_t PassingPlace();

}  // namespace ksmu::os
