// What is mapped where: PROCMAP_QUERY where the kernel has it (6.11), else /proc/self/maps; attributes from smaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "os/os.h"

namespace ksmu::os {

// One line of /proc/self/maps. False: not such a line. `name` is the last column.
bool ParseMapsLine(std::string_view line, Mapping* out, std::string_view* name);
// The fields of an smaps entry that follow its maps line: folds one line into the attributes.
void ParseSmapsLine(std::string_view line, Attributes* attributes);

class Mappings {
 public:
  int Open();
  void Close();
  bool has_query() const { return has_query_; }
  void ForgetQuery() { has_query_ = false; }  // for tests of the fall-back

  int Query(Address address, Mapping* out) const;
  // As Query, and whether the mapping is one of a pool file, of this process's library or of its parent's: by its name.
  int QueryFrames(Address address, Mapping* out, bool* frames) const;
  int ReadAttributes(Span span, void (*each)(void* cookie, const AttributedMapping&), void* cookie) const;
  std::size_t Count() const;
  static std::size_t Max();
  static HugePages TransparentHugePages();

 private:
  int QueryKernel(Address address, Mapping* out) const;
  int QueryText(Address address, Mapping* out) const;

  int fd_ = -1;
  bool has_query_ = false;
};

// As QueryFrames, for a caller that has no descriptor of its own: with one of the program's table, which another thread of the
// program may be closing, and then it is tried again. -ENOENT: nothing is mapped from there on, and nothing else; where it cannot be
// looked at (no descriptor, no /proc), another error.
int QueryFramesOnce(Address address, Mapping* out, bool* frames);

}  // namespace ksmu::os
