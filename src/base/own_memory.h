// Memory of the library's own: mapped directly, never advised, never taken from the program's heap.
//
// The library's threads run while a gate is shut, when the program's allocator may be stopped with its lock held by a
// thread that waits at that gate: so nothing here may come from malloc. Mappings are not inherited over fork
// (MADV_DONTFORK): a child never looks at its parent's tables.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

namespace ksmu::base {

// Zeroed pages, or nullptr. Defined by the os layer (the only place with system calls). Any thread. `bytes` is rounded
// up to pages; untouched pages cost nothing.
void* MapOwnPages(std::size_t bytes);
void UnmapOwnPages(void* pages, std::size_t bytes);
// The same, aligned to 2 MiB and huge where transparent huge pages are to be had. `bytes` is rounded up to 2 MiB.
void* MapOwnHugePages(std::size_t bytes);
// Gives the memory back; the pages stay mapped, zeroed.
void ForgetOwnPages(void* pages, std::size_t bytes);
// Zeroed pages that a forked child has too; for as long as the process lives. Untouched pages cost nothing.
void* MapInheritedPages(std::size_t bytes);
// Bytes now mapped by MapOwnPages, touched or not.
std::size_t OwnBytesMapped();

// A growable array of trivially copyable elements. Growing moves it: nobody else may hold pointers into it.
template <typename T>
class OwnVector {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  OwnVector() = default;
  OwnVector(const OwnVector&) = delete;
  OwnVector& operator=(const OwnVector&) = delete;
  ~OwnVector() { Reset(); }

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  T& back() { return data_[size_ - 1]; }
  void clear() { size_ = 0; }
  void pop_back() { --size_; }

  // False: no memory, nothing changed.
  bool reserve(std::size_t n) {
    if (n * sizeof(T) <= bytes_) return true;
    std::size_t bytes = bytes_ ? bytes_ : 4096;
    while (bytes < n * sizeof(T)) bytes *= 2;
    auto* grown = static_cast<T*>(MapOwnPages(bytes));
    if (!grown) return false;
    if (size_) std::memcpy(static_cast<void*>(grown), data_, size_ * sizeof(T));
    if (data_) UnmapOwnPages(data_, bytes_);
    data_ = grown;
    bytes_ = bytes;
    return true;
  }
  bool push_back(const T& value) {
    if (!reserve(size_ + 1)) return false;
    data_[size_++] = value;
    return true;
  }
  bool insert(std::size_t at, const T& value) {
    if (!reserve(size_ + 1)) return false;
    std::memmove(static_cast<void*>(data_ + at + 1), data_ + at, (size_ - at) * sizeof(T));
    data_[at] = value;
    ++size_;
    return true;
  }
  void erase(std::size_t at) {
    std::memmove(static_cast<void*>(data_ + at), data_ + at + 1, (size_ - at - 1) * sizeof(T));
    --size_;
  }
  void Reset() {
    if (data_) UnmapOwnPages(data_, bytes_);
    data_ = nullptr;
    size_ = bytes_ = 0;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t bytes_ = 0;
};

// Objects of one size, from chunks of own pages, with a free list. One thread at a time.
template <typename T>
class OwnSlab {
 public:
  OwnSlab() = default;
  OwnSlab(const OwnSlab&) = delete;
  OwnSlab& operator=(const OwnSlab&) = delete;
  ~OwnSlab() {
    while (chunks_) {
      Chunk* next = chunks_->next;
      UnmapOwnPages(chunks_, kChunkBytes);
      chunks_ = next;
    }
  }
  // Value-initialised, or nullptr.
  T* Make() {
    void* place = free_;
    if (place) {
      free_ = *static_cast<void**>(place);
    } else {
      if (!chunks_ || used_ + kStride > kChunkBytes) {
        auto* chunk = static_cast<Chunk*>(MapOwnPages(kChunkBytes));
        if (!chunk) return nullptr;
        chunk->next = chunks_;
        chunks_ = chunk;
        used_ = kHeader;
      }
      place = reinterpret_cast<std::byte*>(chunks_) + used_;
      used_ += kStride;
    }
    ++live_;
    return new (place) T();
  }
  void Free(T* object) {
    object->~T();
    *reinterpret_cast<void**>(object) = free_;
    free_ = object;
    --live_;
  }
  std::size_t live() const { return live_; }
  std::size_t bytes() const { return live_ * kStride; }

 private:
  struct Chunk { Chunk* next; };
  static constexpr std::size_t kAlign = alignof(T) < 16 ? 16 : alignof(T);
  static constexpr std::size_t kStride = (sizeof(T) + kAlign - 1) / kAlign * kAlign;
  static constexpr std::size_t kHeader = (sizeof(Chunk) + kAlign - 1) / kAlign * kAlign;
  static constexpr std::size_t kChunkBytes = kStride * 8 < 256 * 1024 ? 256 * 1024 : kStride * 8 + 4096;
  Chunk* chunks_ = nullptr;
  std::size_t used_ = 0;
  void* free_ = nullptr;
  std::size_t live_ = 0;
};

}  // namespace ksmu::base
