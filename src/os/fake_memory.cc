#include "os/fake_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ksmu::os::fake {

namespace {
const std::size_t kHostPage = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
constexpr int kPoison = 0xDB;

void* MapHost(std::size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("fake: mmap");
    std::abort();
  }
  return p;
}
}  // namespace

PoolFile::PoolFile(std::size_t bytes, std::size_t page_size, std::uint64_t inode)
    : host_(static_cast<std::byte*>(MapHost(bytes))), bytes_(bytes), page_size_(page_size), inode_(inode) {}

PoolFile::~PoolFile() { munmap(host_, bytes_); }

void PoolFile::Punch(std::uint64_t page) {
  if (cached_.erase(page) != 0) std::memset(At(page), 0, page_size_);
}

AddressSpace::~AddressSpace() {
  while (!vmas_.empty()) {
    const Vma& v = vmas_.begin()->second;
    Remove({v.start, v.end - v.start});
  }
  for (Span s : host_) munmap(reinterpret_cast<void*>(s.start), s.bytes);
}

Address AddressSpace::ReserveHost(std::size_t bytes) {
  host_.push_back({reinterpret_cast<Address>(MapHost(bytes)), bytes});
  return host_.back().start;
}

bool AddressSpace::IsHost(Address a) const {
  for (Span s : host_) {
    if (s.contains(a)) return true;
  }
  return false;
}

Vma* AddressSpace::Find(Address a) {
  Vma* v = FindFrom(a);
  return v != nullptr && v->start <= a ? v : nullptr;
}

Vma* AddressSpace::FindFrom(Address a) {
  auto it = vmas_.upper_bound(a);
  if (it != vmas_.begin()) {
    auto before = std::prev(it);
    if (before->second.end > a) return &before->second;
  }
  return it == vmas_.end() ? nullptr : &it->second;
}

bool AddressSpace::Covers(Span span) {
  Address a = span.start;
  while (a < span.end()) {
    Vma* v = Find(a);
    if (v == nullptr) return false;
    a = v->end;
  }
  return true;
}

bool AddressSpace::InOne(Span span) {
  Vma* v = Find(span.start);
  return v != nullptr && v->end >= span.end();
}

std::vector<Vma*> AddressSpace::In(Span span) {
  std::vector<Vma*> out;
  for (Vma* v = FindFrom(span.start); v != nullptr && v->start < span.end(); v = FindFrom(v->end)) out.push_back(v);
  return out;
}

std::size_t AddressSpace::SplitsFor(Span span) {
  std::size_t n = 0;
  for (Address a : {span.start, span.end()}) {
    Vma* v = Find(a);
    if (v != nullptr && v->start != a) ++n;
  }
  return n;
}

void AddressSpace::Split(Address a) {
  Vma* v = Find(a);
  if (v == nullptr || v->start == a) return;
  Vma high = *v;
  high.start = a;
  high.page_offset += (a - v->start) / page_size_;
  v->end = a;
  vmas_[a] = high;
}

bool AddressSpace::Joinable(const Vma& low, const Vma& high) const {
  const Attributes &a = low.attributes, &b = high.attributes;
  return low.end == high.start && low.file == high.file && low.readable == high.readable &&
         low.writable == high.writable && low.executable == high.executable && low.shared == high.shared &&
         low.stack == high.stack && low.heap == high.heap && !low.special && !high.special && low.host == high.host &&
         low.context == high.context && low.modes == high.modes &&
         low.page_offset + (low.end - low.start) / page_size_ == high.page_offset && a.dont_fork == b.dont_fork &&
         a.dont_dump == b.dont_dump && a.huge_page == b.huge_page && a.no_huge_page == b.no_huge_page &&
         a.wipe_on_fork == b.wipe_on_fork && a.locked == b.locked && a.mergeable == b.mergeable &&
         a.sealed == b.sealed && a.hugetlb == b.hugetlb && a.pfn_map == b.pfn_map && a.grows_down == b.grows_down &&
         a.protection_key == b.protection_key;
}

void AddressSpace::Join(Span span) {
  auto it = vmas_.upper_bound(span.start);
  if (it != vmas_.begin()) --it;
  if (it != vmas_.begin()) --it;
  while (it != vmas_.end() && it->second.start <= span.end()) {
    auto next = std::next(it);
    if (next != vmas_.end() && Joinable(it->second, next->second)) {
      it->second.end = next->second.end;
      it->second.anon_vma |= next->second.anon_vma;
      vmas_.erase(next);
    } else {
      it = next;
    }
  }
}

void AddressSpace::Insert(const Vma& vma) {
  assert(In({vma.start, vma.end - vma.start}).empty());
  Vma& v = vmas_[vma.start] = vma;
  v.host = IsHost(v.start);
  if (v.host) RefreshHost({v.start, v.end - v.start});
  Join({vma.start, vma.end - vma.start});
}

void AddressSpace::Remove(Span span) {
  Split(span.start);
  Split(span.end());
  for (Vma* v : In(span)) {
    const Vma gone = *v;
    for (Address a : Entries({gone.start, gone.end - gone.start})) Set(a, Pte{});
    vmas_.erase(gone.start);
    if (gone.host && page_size_ % kHostPage == 0) {
      madvise(reinterpret_cast<void*>(gone.start), gone.end - gone.start, MADV_DONTNEED);
      mprotect(reinterpret_cast<void*>(gone.start), gone.end - gone.start, PROT_NONE);
    }
  }
}

Pte AddressSpace::Get(Address page) const {
  auto it = ptes_.find(page);
  return it == ptes_.end() ? Pte{} : it->second;
}

void AddressSpace::Drop(Pte& pte) {
  if (pte.kind == Pte::kAnon) --pte.page->mappings;
  pte = Pte{};
}

Pte AddressSpace::Take(Address page) {
  auto it = ptes_.find(page);
  if (it == ptes_.end()) return {};
  Pte pte = it->second;
  ptes_.erase(it);
  if (pte.kind == Pte::kAnon) --pte.page->mappings;
  Vma* v = Find(page);
  if (v != nullptr && v->host) {
    LeaveHost(pte, page);
    ProtectHost(*v, page);
  }
  return pte;
}

void AddressSpace::Set(Address page, Pte pte) {
  Pte old = Take(page);
  Vma* v = Find(page);
  if (pte.kind == Pte::kNone) return;
  if (pte.kind == Pte::kAnon) {
    ++pte.page->mappings;
    if (v != nullptr) v->anon_vma = true;
  }
  ptes_[page] = pte;
  if (v != nullptr && v->host) {
    ProtectHost(*v, page);
    EnterHost(pte, page);
  }
}

std::vector<Address> AddressSpace::Entries(Span span) const {
  std::vector<Address> out;
  for (auto it = ptes_.lower_bound(span.start); it != ptes_.end() && it->first < span.end(); ++it)
    out.push_back(it->first);
  return out;
}

bool AddressSpace::AnyEntry(Span span) const {
  auto it = ptes_.lower_bound(span.start);
  return it != ptes_.end() && it->first < span.end();
}

void AddressSpace::Zap(const Vma& vma, Address page) {
  const Pte old = Get(page);
  if (old.kind == Pte::kNone) return;
  // zap_install_uffd_wp_if_needed(): anonymous mappings drop everything, file mappings keep the mark.
  const bool keep = vma.file != nullptr && (old.kind == Pte::kMarker || (old.uffd_wp && vma.Is(kWriteProtect)));
  Pte marker;
  if (keep) {
    marker.kind = Pte::kMarker;
    marker.uffd_wp = true;
  }
  Set(page, marker);
}

void AddressSpace::ClearMarks(Span span) {
  for (Address a : Entries(span)) {
    Pte pte = Get(a);
    if (!pte.uffd_wp) continue;
    pte.uffd_wp = false;
    Set(a, pte.kind == Pte::kMarker ? Pte{} : pte);
  }
}

Pte AddressSpace::NewPage(const std::byte* from) const {
  Pte pte;
  pte.kind = Pte::kAnon;
  pte.exclusive = true;
  pte.page = std::make_shared<Page>();
  pte.page->own = std::make_unique<std::byte[]>(page_size_);  // zeros
  pte.page->data = pte.page->own.get();
  if (from != nullptr) std::memcpy(pte.page->data, from, page_size_);
  return pte;
}

const std::byte* AddressSpace::Bytes(const Vma& vma, Address page) const {
  auto it = ptes_.find(page);
  assert(it != ptes_.end());
  if (it->second.kind == Pte::kAnon) return it->second.page->data;
  if (it->second.kind == Pte::kFile) return vma.file->At(vma.page_offset + (page - vma.start) / page_size_);
  return nullptr;
}

// --- host memory ----------------------------------------------------------------------------------------------------

void AddressSpace::ProtectHost(const Vma& vma, Address page) {
  // A page that is not there would stop the library for ever (MISSING): make that a crash at the place of the mistake.
  const bool there = ptes_.count(page) != 0;
  const bool blocked = !vma.readable || (!there && vma.Is(kMissing));
  if (page_size_ % kHostPage == 0) {
    mprotect(reinterpret_cast<void*>(page), page_size_, blocked ? PROT_NONE : PROT_READ | PROT_WRITE);
  } else if (blocked) {
    std::memset(reinterpret_cast<void*>(page), kPoison, page_size_);
  }
}

void AddressSpace::EnterHost(Pte& pte, Address page) {
  auto* host = reinterpret_cast<std::byte*>(page);
  if (pte.kind == Pte::kAnon && pte.page->data != host) {
    std::memcpy(host, pte.page->data, page_size_);
    if (pte.page->mappings == 1 && pte.page->pins == 0) {
      pte.page->data = host;
      pte.page->own.reset();
    }
  } else if (pte.kind == Pte::kZero) {
    std::memset(host, 0, page_size_);
  }
}

void AddressSpace::LeaveHost(Pte& pte, Address page) {
  auto* host = reinterpret_cast<std::byte*>(page);
  if (pte.kind == Pte::kAnon && pte.page->data == host) {
    pte.page->own = std::make_unique<std::byte[]>(page_size_);
    std::memcpy(pte.page->own.get(), host, page_size_);
    pte.page->data = pte.page->own.get();
  }
  if (page_size_ % kHostPage == 0) {
    mprotect(host, page_size_, PROT_READ | PROT_WRITE);
    madvise(host, page_size_, MADV_DONTNEED);
  } else {
    std::memset(host, 0, page_size_);
  }
}

void AddressSpace::RefreshHost(Span span) {
  for (Vma* v : In(span)) {
    if (!v->host) continue;
    const Address from = std::max(v->start, span.start), to = std::min(v->end, span.end());
    if (page_size_ % kHostPage == 0) {
      const bool blocked = !v->readable || v->Is(kMissing);
      mprotect(reinterpret_cast<void*>(from), to - from, blocked ? PROT_NONE : PROT_READ | PROT_WRITE);
      for (Address a : Entries({from, to - from})) ProtectHost(*v, a);
    }
  }
}

void AddressSpace::SyncHost(Address page) {
  Vma* v = Find(page);
  if (v == nullptr || !v->host) return;
  auto* host = reinterpret_cast<std::byte*>(page);
  Pte pte = Get(page);
  if (pte.kind == Pte::kNone) {
    if (v->Is(kMissing)) return;
    bool zero = true;
    for (std::size_t i = 0; i < page_size_ && zero; ++i) zero = host[i] == std::byte{0};
    if (zero) return;  // never written, as far as anybody can tell
    Pte fresh = NewPage(host);
    Set(page, fresh);
    return;
  }
  if (pte.kind == Pte::kAnon && pte.page->mappings > 1 && pte.page->data == host && !pte.page->at_fork.empty() &&
      std::memcmp(host, pte.page->at_fork.data(), page_size_) != 0) {
    // Written since the fork: the writer has got its own copy, the child keeps what it saw.
    Pte fresh = NewPage(host);
    pte.page->own = std::make_unique<std::byte[]>(page_size_);
    std::memcpy(pte.page->own.get(), pte.page->at_fork.data(), page_size_);
    pte.page->data = pte.page->own.get();
    Set(page, fresh);
  }
}

void AddressSpace::SyncAllHost() {
  std::vector<Vma> host;
  for (auto& [start, v] : vmas_) {
    if (v.host && !v.attributes.dont_fork) host.push_back(v);
  }
  for (const Vma& v : host) {
    if (v.Is(kMissing)) continue;
    for (Address a = v.start; a < v.end; a += page_size_) {
      SyncHost(a);
      Pte pte = Get(a);
      if (pte.kind == Pte::kAnon && pte.page->data == reinterpret_cast<std::byte*>(a))
        pte.page->at_fork.assign(pte.page->data, pte.page->data + page_size_);
    }
  }
}

// --- mremap ---------------------------------------------------------------------------------------------------------

void AddressSpace::Move(Span span, Address to, bool keep_registration, bool leave_mapping) {
  if (Find(span.start)->host) {
    for (Address a = span.start; a < span.end(); a += page_size_) SyncHost(a);
  }
  Vma moved = *Find(span.start);
  moved.page_offset += (span.start - moved.start) / page_size_;
  // Anonymous memory without pages gets the offset of its new address, and so joins its new neighbours.
  if (moved.file == nullptr && !moved.anon_vma) moved.page_offset = to / page_size_;
  moved.start = to;
  moved.end = to + span.bytes;
  if (!keep_registration) {
    moved.context = -1;
    moved.modes = 0;
  }
  std::vector<std::pair<Address, Pte>> entries;
  for (Address a : Entries(span)) entries.emplace_back(a - span.start + to, Take(a));
  if (!leave_mapping) Remove(span);
  Insert(moved);
  for (auto& [a, pte] : entries) {
    if (!keep_registration) {
      pte.uffd_wp = false;
      if (pte.kind == Pte::kMarker) continue;
    }
    Set(a, pte);
  }
}

}  // namespace ksmu::os::fake
