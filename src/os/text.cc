#include "os/text.h"

#include <fcntl.h>

#include <cstring>

#include "os/raw.h"

namespace ksmu::os {

bool LineReader::Fill() {
  ssize_t got = raw::Repeat([&] { return read(fd_, buffer_ + end_, capacity_ - end_); });
  if (got < 0) error_ = static_cast<int>(got);
  if (got <= 0) return false;
  end_ += static_cast<std::size_t>(got);
  return true;
}

bool LineReader::Next(std::string_view* line) {
  for (;;) {
    char* newline = static_cast<char*>(std::memchr(buffer_ + begin_, '\n', end_ - begin_));
    if (newline) {
      *line = {buffer_ + begin_, static_cast<std::size_t>(newline - (buffer_ + begin_))};
      begin_ = static_cast<std::size_t>(newline - buffer_) + 1;
      if (!cut_) return true;
      cut_ = false;  // that was the rest of a line whose beginning has been returned
      continue;
    }
    if (cut_) begin_ = end_;
    if (begin_ > 0) {
      std::memmove(buffer_, buffer_ + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    if (end_ == capacity_) {
      *line = {buffer_, end_};
      begin_ = end_;
      cut_ = true;
      return true;
    }
    if (!Fill()) {
      if (begin_ == end_ || cut_ || error_) return false;
      *line = {buffer_ + begin_, end_ - begin_};
      begin_ = end_;
      return true;
    }
  }
}

bool TakeHex(std::string_view* text, std::uint64_t* value) {
  std::uint64_t result = 0;
  std::size_t used = 0;
  for (; used < text->size() && used < 16; ++used) {
    char c = (*text)[used];
    unsigned digit;
    if (c >= '0' && c <= '9')
      digit = static_cast<unsigned>(c - '0');
    else if (c >= 'a' && c <= 'f')
      digit = static_cast<unsigned>(c - 'a') + 10;
    else
      break;
    result = result * 16 + digit;
  }
  text->remove_prefix(used);
  *value = result;
  return used > 0;
}

bool TakeDecimal(std::string_view* text, std::uint64_t* value) {
  std::uint64_t result = 0;
  std::size_t used = 0;
  for (; used < text->size() && (*text)[used] >= '0' && (*text)[used] <= '9'; ++used) {
    result = result * 10 + static_cast<unsigned>((*text)[used] - '0');
  }
  text->remove_prefix(used);
  *value = result;
  return used > 0;
}

void SkipSpaces(std::string_view* text) {
  while (!text->empty() && (text->front() == ' ' || text->front() == '\t')) text->remove_prefix(1);
}

std::string_view TakeWord(std::string_view* text) {
  std::size_t space = text->find(' ');
  std::string_view word = text->substr(0, space);
  text->remove_prefix(space == std::string_view::npos ? text->size() : space + 1);
  return word;
}

bool TakePrefix(std::string_view* text, std::string_view prefix) {
  if (text->substr(0, prefix.size()) != prefix) return false;
  text->remove_prefix(prefix.size());
  return true;
}

std::int64_t ReadSmallFile(int directory, const char* path, char* buffer, std::size_t capacity) {
  int fd = raw::Repeat([&] { return openat(directory, path, O_RDONLY | O_CLOEXEC); });
  if (fd < 0) return fd;
  std::size_t size = 0;
  ssize_t got = 0;
  while (size < capacity) {
    got = raw::Repeat([&] { return read(fd, buffer + size, capacity - size); });
    if (got <= 0) break;
    size += static_cast<std::size_t>(got);
  }
  close(fd);
  return got < 0 ? got : static_cast<std::int64_t>(size);
}

PathBuffer& PathBuffer::Add(std::string_view part) {
  if (size_ + part.size() >= sizeof text_) {
    ok_ = false;
    return *this;
  }
  std::memcpy(text_ + size_, part.data(), part.size());
  text_[size_ += part.size()] = 0;
  return *this;
}

PathBuffer& PathBuffer::Add(std::uint64_t number) {
  char digits[20];
  std::size_t at = sizeof digits;
  do {
    digits[--at] = static_cast<char>('0' + number % 10);
    number /= 10;
  } while (number);
  return Add(std::string_view(digits + at, sizeof digits - at));
}

}  // namespace ksmu::os
