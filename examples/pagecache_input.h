// Real files, and how the page caches of several guests hold them.
#ifndef KSMU_EXAMPLES_PAGECACHE_INPUT_H_
#define KSMU_EXAMPLES_PAGECACHE_INPUT_H_

#include <sys/stat.h>

#include <cstdint>
#include <string>
#include <vector>

namespace examples {

// A regular file as it was when the list was made.
struct InputFile {
  std::string path;
  struct stat status = {};
  bool changed = false;  // since then: its pages can no longer be checked

  uint64_t pages() const;
  bool SameAs(const struct stat& now) const;
};

// All readable, non-empty regular files under the directories (or files) of a colon-separated list, in order of their
// paths; of a file with several links the first one. Symbolic links are not followed.
std::vector<InputFile> ListFiles(const std::string& paths, uint64_t* unreadable);

// Consecutive pages of a file in consecutive pages of a guest.
struct Extent {
  uint32_t file;
  uint32_t pages;
  uint64_t first_page;  // in the file
  uint64_t position;    // in the guest, in pages
};

struct LayoutOptions {
  uint64_t seed = 1;
  uint64_t guests = 4;
  uint64_t pages_per_guest = 0;   // at most; fewer if there are not files enough
  uint64_t overlap_percent = 80;  // of the common set is in each guest; the rest of a guest is files of its own
  uint64_t chunk_pages = 32;      // files are cut into pieces of this size, which lie in any order; 0: whole files
};

// The extents of each guest, ordered by position, without gaps.
std::vector<std::vector<Extent>> LayOut(const std::vector<InputFile>& files, const LayoutOptions& options);

// Gives the pages of a file, one by one, as a page cache would hold them.
class FileReader {
 public:
  explicit FileReader(std::vector<InputFile>* files) : files_(files) {}
  ~FileReader() { Close(); }
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Reads into a page that is zeros, so that the tail of the last page is. False: the file has changed (and is marked).
  bool ReadPage(uint32_t file, uint64_t page, unsigned char* destination);

  // Looks whether the file, the last one read, is still what it was.
  bool StillTheSame(uint32_t file);

 private:
  bool Open(uint32_t file);
  void Close();

  std::vector<InputFile>* files_;
  int fd_ = -1;
  uint32_t open_file_ = 0;
};

}  // namespace examples

#endif  // KSMU_EXAMPLES_PAGECACHE_INPUT_H_
