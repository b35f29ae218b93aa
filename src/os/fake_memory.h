// Simulated memory: address spaces, page tables, private pages and pool files. Test-only; the base of fake_system.h.
//
// What is modelled is what the merge protocol can see of Linux's memory management: mappings that split, merge and
// move, page table entries with userfaultfd's write-protect bit or marker, the exclusive bit that fork takes away,
// the zero page, private copies of file pages, pins, and pages that are swapped out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "os/os.h"

namespace ksmu::os::fake {

// A private anonymous page. While it is mapped in host memory (the library's own mappings) its bytes lie there.
struct Page {
  std::byte* data = nullptr;
  std::unique_ptr<std::byte[]> own;
  int mappings = 0;  // page table entries of all processes
  int pins = 0;
  std::vector<std::byte> at_fork;  // host memory only: the bytes when it came to be shared, see SyncHost
};
using PageRef = std::shared_ptr<Page>;

// A pool file. Its bytes lie in host memory, so that MapFile can hand out a real pointer.
class PoolFile {
 public:
  PoolFile(std::size_t bytes, std::size_t page_size, std::uint64_t inode);
  ~PoolFile();
  PoolFile(const PoolFile&) = delete;
  PoolFile& operator=(const PoolFile&) = delete;

  std::byte* At(std::uint64_t page) { return host_ + page * page_size_; }
  std::size_t bytes() const { return bytes_; }
  std::uint64_t inode() const { return inode_; }
  bool Cached(std::uint64_t page) const { return cached_.count(page) != 0; }
  void Fill(std::uint64_t page) { cached_.insert(page); }
  void Punch(std::uint64_t page);
  std::size_t cached_pages() const { return cached_.size(); }
  int node = 0;  // from which its pages are taken

 private:
  std::byte* host_;
  std::size_t bytes_, page_size_;
  std::uint64_t inode_;
  std::set<std::uint64_t> cached_;
};

// A page table entry; the absence of one is a pte_none.
struct Pte {
  enum Kind : std::uint8_t { kNone, kMarker, kZero, kAnon, kFile } kind = kNone;
  bool uffd_wp = false;    // a marker always has it
  bool exclusive = false;  // kAnon only
  bool swapped = false;    // kAnon only: not present, the bytes are kept
  PageRef page;            // kAnon only

  bool present() const { return kind >= kZero && !swapped; }
};

struct Vma {
  Address start = 0, end = 0;
  std::shared_ptr<PoolFile> file;  // null: anonymous
  std::uint64_t page_offset = 0;  // anonymous memory: of the address it was made at, as in Linux; decides about merging
  bool readable = true, writable = true, executable = false, shared = false;
  bool stack = false, heap = false, special = false;
  bool host = false;      // the library's own: real memory at the same address
  bool anon_vma = false;  // a private page was or can be in it: fork copies the page tables
  Attributes attributes;
  Context context = -1;
  std::uint32_t modes = 0;

  bool Is(std::uint32_t mode) const { return context >= 0 && (modes & mode) != 0; }
};

class AddressSpace {
 public:
  explicit AddressSpace(std::size_t page_size) : page_size_(page_size) {}
  ~AddressSpace();
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  std::size_t page_size() const { return page_size_; }
  std::size_t count() const { return vmas_.size(); }
  const std::map<Address, Vma>& vmas() const { return vmas_; }
  const std::map<Address, Pte>& ptes() const { return ptes_; }

  Vma* Find(Address);      // the mapping that contains the address
  Vma* FindFrom(Address);  // that, or the first above it
  bool Covers(Span);       // no holes
  bool InOne(Span);        // all in one mapping
  // Mappings that the span intersects, in order; valid until the next change.
  std::vector<Vma*> In(Span);
  // By how many mappings the count grows when the span gets boundaries at both ends.
  std::size_t SplitsFor(Span);

  // Cuts mappings at both ends, calls change(Vma&) for each inside, and joins what can be joined.
  template <typename F>
  void Change(Span span, F change) {
    Split(span.start);
    Split(span.end());
    for (Vma* v : In(span)) change(*v);
    Join(span);
  }
  void Insert(const Vma&);
  void Remove(Span);  // unmaps
  // Real memory, kept until the space goes; mappings made there are the library's own.
  Address ReserveHost(std::size_t bytes);

  Pte Get(Address page) const;
  void Set(Address page, Pte);  // what was there is dropped
  Pte Take(Address page);       // removes without dropping
  // Pages of the span that have an entry.
  std::vector<Address> Entries(Span) const;
  bool AnyEntry(Span) const;

  // madvise(MADV_DONTNEED) of one page: a write-protected entry of a file mapping leaves its mark behind.
  void Zap(const Vma&, Address page);

  void ClearMarks(Span);  // write-protect bits and markers

  // New private page, exclusive, with the bytes of `from` (null: zeros).
  Pte NewPage(const std::byte* from) const;
  // The bytes that a present entry shows; null for the zero page.
  const std::byte* Bytes(const Vma&, Address page) const;

  // The library writes its own memory by plain stores: takes note of pages that came to be, or were copied, by them.
  void SyncHost(Address page);
  // Before a fork.
  void SyncAllHost();
  void RefreshHost(Span);  // after a change of registration
  // Moves `span`, which lies in one mapping, to `to`, where nothing is (mremap).
  void Move(Span, Address to, bool keep_registration, bool leave_mapping);

 private:
  void Split(Address);
  void Join(Span);
  bool Joinable(const Vma& low, const Vma& high) const;
  void Drop(Pte&);
  void LeaveHost(Pte&, Address page);
  void EnterHost(Pte&, Address page);
  void ProtectHost(const Vma&, Address page);

  bool IsHost(Address) const;

  std::size_t page_size_;
  std::vector<Span> host_;
  std::map<Address, Vma> vmas_;
  std::map<Address, Pte> ptes_;
};

}  // namespace ksmu::os::fake
