// Tries each thing that the protocol leans on, on scratch memory, at start: what a kernel does counts, not its version.
#pragma once

#include <cstddef>
#include <cstdint>

#include "os/os.h"
#include "os/pagemap.h"

namespace ksmu::os {

// A sentence for the administrator, of fixed size: nothing here may allocate.
struct ErrorText {
  char text[400] = {};
  void Set(const char* sentence, const char* detail = "");
};

struct ProbeContexts {
  int tracker, gate, staging, breaker;
  bool allow_user_mode_only, refuse_kernel_faults;
};

// The features that are missing from what the kernel offers, named in *error. 0 or -ENOSYS.
int CheckFeatures(std::uint64_t offered, ErrorText* error);

// Does it: arm and scan, move, fill and break and zero a private mapping of a memfd, take its pages, heal. 0, -ENOSYS
// with a sentence that names what failed, or another -errno where memory or descriptors are short.
int ProbeKernel(const ProbeContexts& contexts, const Pagemap& pagemap, std::size_t page_bytes, ErrorText* error);

}  // namespace ksmu::os
