#include "pagecache_input.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <random>
#include <set>
#include <sstream>

#include "pages.h"

namespace examples {
namespace {

// The first so many pages of a file.
struct Slice {
  uint32_t file;
  uint64_t pages;
};

// std::shuffle may differ between standard libraries; the same seed is to give the same guests everywhere.
template <typename T>
void Shuffle(std::vector<T>* items, std::mt19937_64* random) {
  for (size_t i = items->size(); i > 1; --i) std::swap((*items)[i - 1], (*items)[(*random)() % i]);
}

// Takes slices from *next on until there are so many pages; the last one may be cut short.
std::vector<Slice> Take(const std::vector<Slice>& from, size_t* next, uint64_t pages) {
  std::vector<Slice> taken;
  while (pages > 0 && *next < from.size()) {
    Slice slice = from[(*next)++];
    slice.pages = std::min(slice.pages, pages);
    pages -= slice.pages;
    taken.push_back(slice);
  }
  return taken;
}

std::vector<Extent> CutAndShuffle(const std::vector<Slice>& slices, uint64_t chunk_pages, std::mt19937_64* random) {
  constexpr uint64_t kMaxExtentPages = 1u << 30;
  const uint64_t chunk = chunk_pages == 0 ? kMaxExtentPages : chunk_pages;
  std::vector<Extent> extents;
  for (const Slice& slice : slices) {
    for (uint64_t page = 0; page < slice.pages; page += chunk) {
      extents.push_back({slice.file, static_cast<uint32_t>(std::min(chunk, slice.pages - page)), page, 0});
    }
  }
  Shuffle(&extents, random);
  uint64_t position = 0;
  for (Extent& extent : extents) {
    extent.position = position;
    position += extent.pages;
  }
  return extents;
}

}  // namespace

uint64_t InputFile::pages() const { return (static_cast<uint64_t>(status.st_size) + PageSize() - 1) / PageSize(); }

bool InputFile::SameAs(const struct stat& now) const {
  const auto same_time = [](const timespec& a, const timespec& b) {
    return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
  };
  return status.st_dev == now.st_dev && status.st_ino == now.st_ino && status.st_size == now.st_size &&
         same_time(status.st_mtim, now.st_mtim) && same_time(status.st_ctim, now.st_ctim);
}

std::vector<InputFile> ListFiles(const std::string& paths, uint64_t* unreadable) {
  namespace fs = std::filesystem;
  std::vector<std::string> names;
  std::istringstream list(paths);
  for (std::string path; std::getline(list, path, ':');) {
    std::error_code error;
    // A root that is a link itself (/lib on a merged /usr) is followed, links below it are not.
    const fs::path root = fs::canonical(path, error);
    if (error) continue;
    if (!fs::is_directory(root, error)) names.push_back(root);
    fs::recursive_directory_iterator entry(root, fs::directory_options::skip_permission_denied, error);
    for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error))
      names.push_back(entry->path());
  }
  std::sort(names.begin(), names.end());

  std::vector<InputFile> files;
  std::set<std::pair<dev_t, ino_t>> seen;
  *unreadable = 0;
  for (std::string& name : names) {
    InputFile file{.path = std::move(name)};
    if (lstat(file.path.c_str(), &file.status) != 0 || !S_ISREG(file.status.st_mode) || file.status.st_size == 0)
      continue;
    if (!seen.emplace(file.status.st_dev, file.status.st_ino).second) continue;
    if (access(file.path.c_str(), R_OK) != 0) {
      ++*unreadable;
      continue;
    }
    files.push_back(std::move(file));
  }
  return files;
}

std::vector<std::vector<Extent>> LayOut(const std::vector<InputFile>& files, const LayoutOptions& options) {
  std::mt19937_64 random(Mix(options.seed, 0));
  std::vector<Slice> all;
  uint64_t total = 0;
  for (const InputFile& file : files) {
    all.push_back({static_cast<uint32_t>(all.size()), file.pages()});
    total += file.pages();
  }
  Shuffle(&all, &random);

  // A guest of n pages takes p % of the common set, which has n pages, and (100 - p) % of n from files of its own.
  const uint64_t own_percent = 100 - options.overlap_percent;
  const uint64_t pages = std::min(options.pages_per_guest, total * 100 / (100 + options.guests * own_percent));
  size_t next = 0;
  const std::vector<Slice> common = Take(all, &next, pages);

  std::vector<std::vector<Extent>> guests;
  for (uint64_t guest = 0; guest < options.guests; ++guest) {
    std::mt19937_64 guest_random(Mix(options.seed, guest + 1));
    std::vector<Slice> shuffled = common;
    Shuffle(&shuffled, &guest_random);
    size_t first = 0;
    std::vector<Slice> slices = Take(shuffled, &first, pages * options.overlap_percent / 100);
    const std::vector<Slice> own = Take(all, &next, pages * own_percent / 100);
    slices.insert(slices.end(), own.begin(), own.end());
    guests.push_back(CutAndShuffle(slices, options.chunk_pages, &guest_random));
  }
  return guests;
}

void FileReader::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

bool FileReader::Open(uint32_t file) {
  if (fd_ >= 0 && open_file_ == file) return true;
  Close();
  fd_ = open((*files_)[file].path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  open_file_ = file;
  if (fd_ >= 0 && StillTheSame(file)) return true;
  (*files_)[file].changed = true;
  Close();
  return false;
}

bool FileReader::StillTheSame(uint32_t file) {
  struct stat now;
  if (fstat(fd_, &now) != 0 || !(*files_)[file].SameAs(now)) (*files_)[file].changed = true;
  return !(*files_)[file].changed;
}

bool FileReader::ReadPage(uint32_t file, uint64_t page, unsigned char* destination) {
  InputFile& input = (*files_)[file];
  if (input.changed || !Open(file)) return false;
  const uint64_t offset = page * PageSize();
  const size_t wanted = std::min<uint64_t>(PageSize(), static_cast<uint64_t>(input.status.st_size) - offset);
  size_t got = 0;
  while (got < wanted) {
    const ssize_t n = pread(fd_, destination + got, wanted - got, static_cast<off_t>(offset + got));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      input.changed = true;  // shorter than it was, or no longer readable
      return false;
    }
    got += static_cast<size_t>(n);
  }
  return true;
}

}  // namespace examples
