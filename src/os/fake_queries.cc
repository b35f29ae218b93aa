// FakeSystem: page tables, mappings and pool files, as the library asks for them.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "os/fake_scope.h"
#include "os/fake_system.h"

namespace ksmu::os {

using fake::Pte;
using fake::Vma;

namespace {
constexpr std::size_t kTablePages = 512;  // a page of page table entries: a hole, or all of it is there
constexpr std::uint64_t kDevice = 0x1d;
constexpr Address kVirtualEnd = Address{1} << 47;
}  // namespace

// --- page tables ----------------------------------------------------------------------------------------------------

ScanResult FakeSystem::Scan(Span span, const ScanRequest& request, PageRun* runs, std::size_t capacity) {
  Scope scope(*this, "Scan", -1, span);
  if (scope.error != 0) return {scope.error, 0, span.start};
  auto& space = program().space;
  ScanResult result{0, 0, span.start};
  std::size_t found = 0;
  // The kernel's fast path: asked for nothing but WRITTEN, an entry that is none counts as written.
  const bool written_only =
      request.required == kWritten && request.returned == kWritten && request.inverted == 0 && request.any_of == 0;
  for (Vma* v : space.In(span)) {
    const Address from = std::max(v->start, span.start), to = std::min(v->end, span.end());
    const bool async = v->Is(kWriteProtect) && contexts_[static_cast<std::size_t>(v->context)]->wp_async &&
                       (v->file != nullptr || contexts_[static_cast<std::size_t>(v->context)]->wp_unpopulated);
    if (request.write_protect && !async) continue;  // passed over
    const std::uint32_t base = async ? static_cast<std::uint32_t>(kWpAllowed) : 0;
    auto matches = [&](std::uint32_t categories) {
      categories ^= request.inverted;
      return (categories & request.required) == request.required &&
             (request.any_of == 0 || (categories & request.any_of) != 0);
    };
    const bool holes = matches(base);
    Address a = from;
    while (a < to) {
      const Address table = a / (kTablePages * page_size_) * (kTablePages * page_size_);
      const Address table_end = std::min(to, table + kTablePages * page_size_);
      const bool hole = !space.AnyEntry({table, kTablePages * page_size_});
      if (hole && !holes) {
        a = table_end;
        continue;
      }
      for (; a < table_end; a += page_size_) {
        Pte pte = space.Get(a);
        std::uint32_t categories = base;
        if (pte.present()) {
          categories |= kPresent;
          if (!pte.uffd_wp) categories |= kWritten;
          if (pte.kind == Pte::kFile) categories |= kFile;
          if (pte.kind == Pte::kZero) categories |= kPfnZero;
        } else if (pte.kind != Pte::kNone) {
          categories |= kSwapped;
          if (!pte.uffd_wp) categories |= kWritten;
        } else if (written_only && !hole) {
          categories |= kWritten;
        }
        if (lies.written_is_never_set) categories &= ~static_cast<std::uint32_t>(kWritten);
        if (!matches(categories)) continue;
        const std::uint32_t shown = categories & request.returned;
        PageRun* last = result.runs != 0 ? &runs[result.runs - 1] : nullptr;
        if (last != nullptr && last->end == a && last->categories == shown) {
          last->end = a + page_size_;
        } else if (runs != nullptr) {
          if (result.runs == capacity) {
            result.walked_to = a;
            return result;
          }
          runs[result.runs++] = {a, a + page_size_, shown};
        }
        if (request.write_protect) {
          if (pte.kind == Pte::kNone) pte.kind = Pte::kMarker;
          pte.uffd_wp = true;
          space.Set(a, pte);
        }
        if (++found == request.max_pages) {
          result.walked_to = a + page_size_;
          return result;
        }
      }
    }
  }
  result.walked_to = span.end();
  return result;
}

int FakeSystem::FileMappings(const fake::PoolFile& file, std::uint64_t page, bool present_only, bool count_all) const {
  int n = 0;
  for (const auto& p : processes_) {
    for (const auto& [start, v] : p->space.vmas()) {
      if (v.file.get() != &file || page < v.page_offset || page >= v.page_offset + (v.end - v.start) / page_size_)
        continue;
      if (present_only && p->space.Get(start + (page - v.page_offset) * page_size_).kind != Pte::kFile) continue;
      if (++n > 1 && !count_all) return n;
    }
  }
  return n;
}

int FakeSystem::ReadSharing(Address start, Sharing* out, std::size_t pages) {
  Scope scope(*this, "ReadSharing", -1, {start, pages * page_size_});
  if (scope.error != 0) return scope.error;
  auto& space = program().space;
  for (std::size_t i = 0; i < pages; ++i) {
    const Address a = start + i * page_size_;
    const Vma* v = space.Find(a);
    if (v != nullptr && v->host) space.SyncHost(a);
    const Pte pte = space.Get(a);
    out[i] = Sharing::kShared;
    if (v == nullptr || !pte.present()) {
      out[i] = Sharing::kAbsent;
    } else if (lies.sharing_is_exclusive) {
      out[i] = Sharing::kExclusive;
    } else if (pte.kind == Pte::kAnon) {
      if (pte.page->mappings == 1) out[i] = Sharing::kExclusive;
    } else if (pte.kind == Pte::kFile) {
      if (FileMappings(*v->file, v->page_offset + (a - v->start) / page_size_, true, false) == 1)
        out[i] = Sharing::kExclusive;
    }
  }
  return 0;
}

int FakeSystem::QueryNodes(const Address* pages, std::size_t count, int* out) {
  Scope scope(*this, "QueryNodes");
  if (scope.error != 0) return scope.error;
  for (std::size_t i = 0; i < count; ++i) {
    const Pte pte = program().space.Get(pages[i]);
    const fake::Vma* const v = program().space.Find(pages[i]);
    const fake::PoolFile* file = pte.kind == Pte::kFile ? v->file.get() : nullptr;
    for (const auto& [fd, f] : files_) {
      const Address base = reinterpret_cast<Address>(f->At(0));
      if (pages[i] >= base && pages[i] < base + f->bytes()) file = f.get();
    }
    if (file) {
      out[i] = file->node == full_node ? 0 : file->node;
    } else if (pte.kind == Pte::kAnon && pte.present()) {
      const auto known = node_of.find(pages[i]);
      out[i] = known == node_of.end() ? 0 : known->second;
    } else {
      out[i] = kNoNode;
    }
  }
  return 0;
}

int FakeSystem::BindFile(const File& file, std::size_t bytes, int node) {
  Scope scope(*this, "BindFile", -1, {0, bytes}, static_cast<Address>(node));
  if (scope.error != 0) return scope.error;
  const auto it = files_.find(file.fd);
  if (it == files_.end()) return -EBADF;
  if (node < 0 || node >= nodes) return -EINVAL;
  it->second->node = node;
  return 0;
}

// --- the program's memory -------------------------------------------------------------------------------------------

std::size_t FakeSystem::ReadProgram(Address from, void* to, std::size_t bytes) {
  Scope scope(*this, "ReadProgram", -1, {from, bytes});
  if (scope.error != 0) bytes = std::min(bytes, scope.call.do_first);
  auto& space = program().space;
  std::size_t done = 0;
  while (done < bytes) {
    const Address a = from + done, page = a / page_size_ * page_size_;
    if (!FaultIn(program(), page, Access::kRead, "ReadProgram")) break;
    const std::size_t n = std::min(bytes - done, page + page_size_ - a);
    const std::byte* source = space.Bytes(*space.Find(page), page);
    if (source != nullptr) {
      std::memcpy(static_cast<std::byte*>(to) + done, source + (a - page), n);
    } else {
      std::memset(static_cast<std::byte*>(to) + done, 0, n);
    }
    done += n;
  }
  return done;
}

int FakeSystem::Discard(Span span) {
  Scope scope(*this, "Discard", -1, span);
  if (scope.error != 0) return scope.error;
  Thread t;
  t.busy = true;
  t.cursor = span.start;
  t.op.kind = FakeOperation::kDiscard;
  t.op.address = span.start;
  t.op.bytes = span.bytes;
  for (int i = 0; t.busy;) {
    if (t.waiter.state == Waiter::kRunning) {
      StepDiscard(t);
    } else if (++i < 4096 && hooks.other_thread) {
      hooks.other_thread();
    } else {
      Violation("Discard waits for ever for its event to be read");
      auto& events = contexts_[static_cast<std::size_t>(t.waiter.context)]->events;
      std::erase_if(events, [&](const Raised& r) { return r.waiter == &t.waiter; });
      t.waiter.state = Waiter::kRunning;
    }
  }
  return t.outcome.error;
}

int FakeSystem::PopulateWrite(Span span) {
  Scope scope(*this, "PopulateWrite", -1, span);
  if (scope.error != 0) return scope.error;
  for (Address a = span.start; a < span.end(); a += page_size_) {
    const Vma* v = program().space.Find(a);
    if (v == nullptr) return -ENOMEM;
    if (!v->writable || v->attributes.pfn_map) return -EINVAL;
    if (!FaultIn(program(), a, Access::kWrite, "PopulateWrite")) return -EFAULT;
  }
  return 0;
}

int FakeSystem::ApplyAttributes(Span span, const Attributes& a) {
  Scope scope(*this, "ApplyAttributes", -1, span);
  if (scope.error != 0) return scope.error;
  auto& space = program().space;
  if (!space.Covers(span)) return -ENOMEM;
  if (space.count() + space.SplitsFor(span) > max_mappings) return -ENOMEM;
  int error = 0;
  space.Change(span, [&](Vma& v) {
    v.attributes.dont_fork |= a.dont_fork;
    v.attributes.dont_dump |= a.dont_dump;
    v.attributes.huge_page |= a.huge_page;
    v.attributes.no_huge_page |= a.no_huge_page;
    v.attributes.mergeable |= a.mergeable;
    if (a.wipe_on_fork) {
      if (v.file) {
        error = -EINVAL;
      } else {
        v.attributes.wipe_on_fork = true;
      }
    }
  });
  return error;
}

// --- mappings -------------------------------------------------------------------------------------------------------

void FakeSystem::FillMapping(const Vma& v, Mapping* out) const {
  *out = Mapping{};
  out->start = v.start;
  out->end = v.end;
  out->readable = v.readable;
  out->writable = v.writable;
  out->executable = v.executable;
  out->shared = v.shared;
  out->anonymous = v.file == nullptr;
  out->stack = v.stack;
  out->heap = v.heap;
  out->special = v.special;
  if (v.file) {
    out->offset = v.page_offset * page_size_;
    out->device = kDevice;
    out->inode = v.file->inode();
  }
}

int FakeSystem::QueryMapping(Address address, Mapping* out) {
  Scope scope(*this, "QueryMapping", -1, {address, page_size_});
  if (scope.error != 0) return scope.error;
  const Vma* v = program().space.FindFrom(address);
  if (v == nullptr) return -ENOENT;
  FillMapping(*v, out);
  return 0;
}

int FakeSystem::ReadAttributes(Span span, void (*each)(void* cookie, const AttributedMapping&), void* cookie) {
  Scope scope(*this, "ReadAttributes", -1, span);
  if (scope.error != 0) return scope.error;
  int n = 0;
  for (const Vma* v : program().space.In(span)) {
    AttributedMapping m;
    FillMapping(*v, &m.mapping);
    m.attributes = v->attributes;
    m.attributes.userfault = v->context >= 0;
    each(cookie, m);
    ++n;
  }
  return n;
}

std::size_t FakeSystem::CountMappings() {
  Scope scope(*this, "CountMappings");
  return program().space.count();
}

Address FakeSystem::FreeAddress(std::size_t bytes) {
  const Address at = next_free_;
  next_free_ += (bytes + 4 * page_size_) / page_size_ * page_size_;
  return at;
}

int FakeSystem::MapRange(Process& p, const Vma& v) {
  const Span span{v.start, v.end - v.start};
  if (v.end > kVirtualEnd) return -ENOMEM;
  std::size_t removed = 0;
  for (const Vma* old : p.space.In(span)) {
    if (old->attributes.sealed) return -EPERM;
    if (old->start >= span.start && old->end <= span.end()) ++removed;
  }
  if (p.space.count() + p.space.SplitsFor(span) + 1 - removed > max_mappings) return -ENOMEM;
  p.space.Remove(span);
  p.space.Insert(v);
  return 0;
}

int FakeSystem::UnmapRange(Process& p, Span span) {
  for (const Vma* v : p.space.In(span)) {
    if (v->attributes.sealed) return -EPERM;
    if (v->start < span.start && v->end > span.end() && p.space.count() + 1 > max_mappings) return -ENOMEM;
  }
  p.space.Remove(span);
  return 0;
}

int FakeSystem::ProtectRange(Process& p, Span span, Protection protection) {
  if (!p.space.Covers(span)) return -ENOMEM;
  const bool readable = protection != Protection::kNone, writable = protection == Protection::kReadWrite;
  bool same = true;
  for (const Vma* v : p.space.In(span)) {
    if (v->attributes.sealed) return -EPERM;
    same &= v->readable == readable && v->writable == writable;
  }
  if (!same && p.space.count() + p.space.SplitsFor(span) > max_mappings) return -ENOMEM;
  p.space.Change(span, [&](Vma& v) {
    v.readable = readable;
    v.writable = writable;
  });
  p.space.RefreshHost(span);
  return 0;
}

int FakeSystem::MapFrames(Address at, std::size_t bytes, const File& file, std::uint64_t offset, Protection protection,
                          Address* out) {
  Scope scope(*this, "MapFrames", -1, {at, bytes});
  if (scope.error != 0) return scope.error;
  auto it = files_.find(file.fd);
  if (it == files_.end()) return -EBADF;
  if (offset + bytes > it->second->bytes()) {
    Violation("MapFrames beyond the end of the file");
    return -EINVAL;
  }
  Vma v;
  v.start = at != 0 ? at : FreeAddress(bytes);
  v.end = v.start + bytes;
  v.file = it->second;
  v.page_offset = offset / page_size_;
  v.readable = protection != Protection::kNone;
  v.writable = protection == Protection::kReadWrite;
  if (int error = MapRange(program(), v)) return error;
  *out = v.start;
  return 0;
}

int FakeSystem::MapAnonymous(Address at, std::size_t bytes, Protection protection, Address* out) {
  Scope scope(*this, "MapAnonymous", -1, {at, bytes});
  if (scope.error != 0) return scope.error;
  Vma v;
  v.start = at;
  if (at == 0) {
    if (program().space.count() + 1 > max_mappings) return -ENOMEM;
    v.start = program().space.ReserveHost(bytes);
  }
  v.end = v.start + bytes;
  v.page_offset = v.start / page_size_;
  v.readable = protection != Protection::kNone;
  v.writable = protection == Protection::kReadWrite;
  if (int error = MapRange(program(), v)) return error;
  *out = v.start;
  return 0;
}

int FakeSystem::MapApart(std::size_t bytes, bool, Address* out) {
  Scope scope(*this, "MapApart", -1, {0, bytes});
  if (scope.error != 0) return scope.error;
  Vma v;
  v.start = FreeAddress(bytes);
  v.end = v.start + bytes;
  v.page_offset = v.start / page_size_;
  if (int error = MapRange(program(), v)) return error;
  *out = v.start;
  return 0;
}

int FakeSystem::MoveMapping(Address from, std::size_t bytes, Address to) {
  Scope scope(*this, "MoveMapping", -1, {from, bytes}, to);
  if (scope.error != 0) return scope.error;
  auto& space = program().space;
  const Span source{from, bytes}, target{to, bytes};
  if (from < to + bytes && to < from + bytes) return -EINVAL;
  if (!space.InOne(source)) return -EFAULT;
  if (space.count() + 2 + 3 > max_mappings) return -ENOMEM;
  for (Span s : {source, target}) {
    for (const Vma* v : space.In(s)) {
      if (v->attributes.sealed) return -EPERM;
    }
  }
  std::vector<Raised> raised;
  if (!lies.move_mapping_loses_registration) RaiseRemap(program(), source, to, &raised);
  space.Remove(target);
  space.Move(source, to, !raised.empty(), false);
  WaitRaised(raised, "MoveMapping");
  return 0;
}

int FakeSystem::TakePages(Span span, Address* out) {
  Scope scope(*this, "TakePages", -1, span);
  if (scope.error != 0) return scope.error;
  auto& space = program().space;
  if (!space.InOne(span)) return -EFAULT;
  if (space.count() + 2 + 3 > max_mappings) return -ENOMEM;
  if (space.Find(span.start)->attributes.sealed) return -EPERM;
  *out = FreeAddress(span.bytes);
  std::vector<Raised> raised;
  RaiseRemap(program(), span, *out, &raised);
  space.Move(span, *out, !raised.empty(), true);
  WaitRaised(raised, "TakePages");
  return 0;
}

int FakeSystem::Unmap(Span span) {
  Scope scope(*this, "Unmap", -1, span);
  if (scope.error != 0) return scope.error;
  return UnmapRange(program(), span);
}

int FakeSystem::Protect(Span span, Protection protection) {
  Scope scope(*this, "Protect", -1, span);
  if (scope.error != 0) return scope.error;
  return ProtectRange(program(), span, protection);
}

// --- pool files -----------------------------------------------------------------------------------------------------

int FakeSystem::CreateFile(std::size_t bytes, File* out) {
  Scope scope(*this, "CreateFile", -1, {0, bytes});
  if (scope.error != 0) return scope.error;
  if (bytes > file_size_limit) return -EFBIG;
  auto file = std::make_shared<fake::PoolFile>(bytes, page_size_, next_inode_++);
  *out = {next_fd_, kDevice, file->inode()};
  files_[next_fd_++] = file;
  return 0;
}

void FakeSystem::CloseFile(const File& file) {
  Scope scope(*this, "CloseFile");
  files_.erase(file.fd);
}

int FakeSystem::ReopenFile(const File& file, File* out) {
  Scope scope(*this, "ReopenFile");
  if (scope.error != 0) return scope.error;
  const auto it = files_.find(file.fd);
  if (it == files_.end()) return -EBADF;
  *out = {next_fd_, kDevice, file.inode};
  files_[next_fd_++] = it->second;
  return 0;
}

Partial FakeSystem::WriteFile(const File& file, std::uint64_t offset, Address from, std::size_t bytes) {
  Scope scope(*this, "WriteFile", -1, {from, bytes}, offset);
  return scope.Do(bytes, [&](std::size_t limit) -> Partial {
    auto it = files_.find(file.fd);
    if (it == files_.end()) return {-EBADF, 0};
    fake::PoolFile& f = *it->second;
    Partial result;
    for (; result.done < limit; result.done += page_size_) {
      const std::uint64_t at = offset + result.done;
      if (at + page_size_ > std::min<std::uint64_t>(f.bytes(), file_size_limit)) {
        result.error = -EFBIG;
        break;
      }
      const Address a = from + result.done;
      const std::byte* source = reinterpret_cast<const std::byte*>(a);
      if (program().space.Find(a) != nullptr) {
        if (!FaultIn(program(), a, Access::kRead, "WriteFile")) break;
        source = program().space.Bytes(*program().space.Find(a), a);
      } else if (a >= kProgramBase && a < kProgramBase + (Address{1} << 40)) {
        break;  // a hole
      }
      const std::uint64_t page = at / page_size_;
      if (FileMappings(f, page, false, false) != 0) {
        char text[100];
        std::snprintf(text, sizeof text, "frame %llu is written while a mapping covers it",
                      static_cast<unsigned long long>(page));
        Violation(text);
      }
      f.Fill(page);
      if (source != nullptr) {
        std::memcpy(f.At(page), source, page_size_);
      } else {
        std::memset(f.At(page), 0, page_size_);
      }
    }
    if (result.done == 0 && result.error == 0 && limit != 0) result.error = -EFAULT;
    return result;
  });
}

int FakeSystem::PunchFile(const File& file, std::uint64_t offset, std::size_t bytes) {
  Scope scope(*this, "PunchFile", -1, {offset, bytes});
  if (scope.error != 0) return scope.error;
  auto it = files_.find(file.fd);
  if (it == files_.end()) return -EBADF;
  const std::uint64_t first = offset / page_size_, end = (offset + bytes) / page_size_;
  for (auto& p : processes_) {
    for (const auto& [start, v] : p->space.vmas()) {
      if (v.file != it->second) continue;
      for (Address a : p->space.Entries({v.start, v.end - v.start})) {
        const std::uint64_t page = v.page_offset + (a - v.start) / page_size_;
        if (page >= first && page < end && p->space.Get(a).kind == Pte::kFile) p->space.Zap(v, a);
      }
    }
  }
  for (std::uint64_t page = first; page < end; ++page) it->second->Punch(page);
  return 0;
}

int FakeSystem::MapFile(const File& file, std::size_t bytes, const std::byte** out) {
  Scope scope(*this, "MapFile", -1, {0, bytes});
  if (scope.error != 0) return scope.error;
  auto it = files_.find(file.fd);
  if (it == files_.end()) return -EBADF;
  *out = it->second->At(0);
  return 0;
}

void FakeSystem::UnmapFile(const std::byte*, std::size_t) { Scope scope(*this, "UnmapFile"); }

void FakeSystem::VisitUnwaitableWords(bool (*each)(void* cookie, Address), void* cookie) {
  Scope scope(*this, "VisitUnwaitableWords");
  for (Address a : unwaitable_words) {
    if (!each(cookie, a)) return;
  }
}

Pins FakeSystem::PossiblePins() {
  Scope scope(*this, "PossiblePins");
  const bool held = std::any_of(pins_.begin(), pins_.end(), [](const PinState& p) { return p.live; });
  if (!no_long_term_pins || (held && !lies.pins_are_never_held)) return Pins::kForLong;
  return direct_io ? Pins::kRequests : Pins::kBrief;
}

bool FakeSystem::PossibleReferences() {
  Scope scope(*this, "PossibleReferences");
  return direct_io_refers;
}

// --- looking at it --------------------------------------------------------------------------------------------------

std::size_t FakeSystem::RegisteredPages(Context c) const {
  std::size_t n = 0;
  for (const auto& p : processes_) {
    for (const auto& [start, v] : p->space.vmas()) {
      if (v.context == c) n += (v.end - v.start) / page_size_;
    }
  }
  return n;
}

std::size_t FakeSystem::PrivatePages(ProcessId id) const {
  std::set<const fake::Page*> pages;
  const auto& space = processes_[static_cast<std::size_t>(id)]->space;
  for (const auto& [a, pte] : space.ptes()) {
    if (pte.kind == Pte::kAnon) pages.insert(pte.page.get());
  }
  return pages.size();
}

std::size_t FakeSystem::FramePages() const {
  std::size_t n = 0;
  for (const auto& [fd, f] : files_) n += f->cached_pages();
  return n;
}

}  // namespace ksmu::os
