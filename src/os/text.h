// Reading the kernel's text files without allocating: a line at a time through a buffer of the caller's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace ksmu::os {

// Lines of an open file, from its present position. A line longer than the buffer is cut: its beginning is returned,
// the rest skipped (only a mapping's path can be that long, and nobody here needs its end).
class LineReader {
 public:
  LineReader(int fd, char* buffer, std::size_t capacity) : fd_(fd), buffer_(buffer), capacity_(capacity) {}
  // Without the newline; valid until the next call. False: end of the file, or an error (see error()).
  bool Next(std::string_view* line);
  int error() const { return error_; }

 private:
  bool Fill();

  int fd_;
  char* buffer_;
  std::size_t capacity_;
  std::size_t begin_ = 0, end_ = 0;
  bool cut_ = false;
  int error_ = 0;
};

// Take a number (or a word) off the front. False where there is none.
bool TakeHex(std::string_view* text, std::uint64_t* value);
bool TakeDecimal(std::string_view* text, std::uint64_t* value);
void SkipSpaces(std::string_view* text);
std::string_view TakeWord(std::string_view* text);  // up to a space, which is skipped
bool TakePrefix(std::string_view* text, std::string_view prefix);

// Opens relative to a directory (or AT_FDCWD), reads up to `capacity` bytes, closes. The bytes, or -errno.
std::int64_t ReadSmallFile(int directory, const char* path, char* buffer, std::size_t capacity);

// A path put together in a fixed buffer; `ok()` is false if it did not fit.
class PathBuffer {
 public:
  PathBuffer& Add(std::string_view part);
  PathBuffer& Add(std::uint64_t number);
  const char* c_str() const { return text_; }
  std::string_view view() const { return {text_, size_}; }
  bool ok() const { return ok_; }
  void Truncate(std::size_t size) {
    if (size < size_) text_[size_ = size] = 0;
  }

 private:
  char text_[512] = {};
  std::size_t size_ = 0;
  bool ok_ = true;
};

}  // namespace ksmu::os
