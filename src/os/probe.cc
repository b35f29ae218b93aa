#include "os/probe.h"

#include <cstring>
#include <initializer_list>

#include "os/pool_file.h"
#include "os/own_place.h"
#include "os/raw.h"
#include "os/uapi.h"
#include "os/uffd.h"

namespace ksmu::os {

void ErrorText::Set(const char* sentence, const char* detail) {
  std::size_t size = 0;
  for (const char* part : {sentence, detail}) {
    std::size_t bytes = std::strlen(part);
    if (bytes > sizeof text - 1 - size) bytes = sizeof text - 1 - size;
    std::memcpy(text + size, part, bytes);
    size += bytes;
  }
  text[size] = 0;
}

int CheckFeatures(std::uint64_t offered, ErrorText* error) {
  static constexpr struct {
    std::uint64_t bit;
    const char* what;
  } kNeeded[] = {
      {uapi::kFeatureMove, "UFFDIO_MOVE (Linux 6.8)"},
      {uapi::kFeatureWpAsync, "asynchronous write protection (Linux 6.7)"},
      {uapi::kFeatureWpUnpopulated, "write protection of unpopulated pages (Linux 6.4)"},
      {uapi::kFeatureWpHugetlbfsShmem, "write protection of memory files (Linux 5.19)"},
      {uapi::kFeatureMinorShmem, "minor faults of memory files (Linux 5.14)"},
      {uapi::kFeaturePagefaultFlagWp, "write protection (Linux 5.7, CONFIG_HAVE_ARCH_USERFAULTFD_WP)"},
      {uapi::kFeatureEventRemap, "the remap event (Linux 4.11)"},
      {uapi::kFeatureEventRemove, "the remove event (Linux 4.11)"},
  };
  for (const auto& needed : kNeeded) {
    if (offered & needed.bit) continue;
    error->Set("The kernel is too old; Linux 6.8 or later is needed. Its userfaultfd lacks: ", needed.what);
    return -ENOSYS;
  }
  return 0;
}

namespace {

class Probe {
 public:
  Probe(const ProbeContexts& contexts, const Pagemap& pagemap, std::size_t page_bytes, ErrorText* error)
      : contexts_(contexts), pagemap_(pagemap), page_(page_bytes), error_(error) {}
  ~Probe() {
    for (const Span& span : mapped_) {
      if (span.bytes) raw::Munmap(span.start, span.bytes);
    }
    if (file_.fd >= 0) close(file_.fd);
    if (plain_ >= 0) close(plain_);
  }

  int Run() {
    int error = TrackAndMove();
    if (error == 0) error = ShareAndBreak();
    if (error == 0 && file_.fd >= 0) error = TakePages();
    return error;
  }

 private:
  int Missing(const char* what) {
    error_->Set("This kernel does not do what is needed (Linux 6.8 or later is): ", what);
    return -ENOSYS;
  }
  // Shortage is no verdict on the kernel.
  int Failed(int error, const char* what) {
    if (error == -ENOMEM || error == -EMFILE || error == -ENFILE || error == -EAGAIN) {
      error_->Set("No memory or no descriptors to start with, at: ", what);
      return error;
    }
    return Missing(what);
  }
  int Map(std::size_t pages, int flags, int fd, Address* out) {
    int error = raw::Mmap(LastingPlace(pages * page_), pages * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | flags, fd, 0, out);
    if (error == 0) {
      // Scratch pages are looked at one by one: no huge page may take the place of several.
      raw::Madvise(*out, pages * page_, MADV_NOHUGEPAGE);
      // Another thread's fork would leave an event that nobody reads: the fork would wait, and the calls here say EAGAIN.
      raw::Madvise(*out, pages * page_, MADV_DONTFORK);
      Keep({*out, pages * page_});
    }
    return error;
  }
  void Keep(Span span) {
    for (Span& slot : mapped_) {
      if (slot.bytes == 0) {
        slot = span;
        return;
      }
    }
  }
  volatile char& Byte(Address page) { return *reinterpret_cast<volatile char*>(page); }
  std::uint32_t Categories(Address page) {
    ScanRequest request;
    request.any_of = kPresent | kSwapped | kWritten | kFile | kWpAllowed;
    request.returned = request.any_of | kPfnZero;
    PageRun run;
    ScanResult result = pagemap_.Scan({page, page_}, request, &run, 1);
    return result.runs ? run.categories : 0;
  }

  // Tracker: writes are found and re-armed. Gate and staging: a page is taken out and reads as absent.
  int TrackAndMove() {
    Address memory = 0, staging = 0;
    if (int error = Map(2, MAP_ANONYMOUS, -1, &memory)) return Failed(error, "anonymous memory");
    if (int error = Map(2, MAP_ANONYMOUS, -1, &staging)) return Failed(error, "anonymous memory");
    Byte(memory) = 1;
    Byte(memory + page_) = 2;
    Span both{memory, 2 * page_};
    if (int error = uffd::Register(contexts_.tracker, both, kWriteProtect))
      return Failed(error, "asynchronous write protection");
    if (int error = uffd::WriteProtect(contexts_.tracker, both, true))
      return Failed(error, "asynchronous write protection");
    ScanRequest written;
    written.required = kWritten;
    written.returned = kWritten;
    written.write_protect = true;
    PageRun run;
    if (pagemap_.Scan(both, written, &run, 1).runs != 0) return Missing("PAGEMAP_SCAN of written pages");
    Byte(memory) = 3;
    ScanResult found = pagemap_.Scan(both, written, &run, 1);
    if (found.error || found.runs != 1 || run.start != memory || run.end != memory + page_) {
      return Missing("PAGEMAP_SCAN of written pages");
    }
    if (pagemap_.Scan(both, written, &run, 1).runs != 0) return Missing("PAGEMAP_SCAN re-arming written pages");
    if (int error = uffd::Unregister(contexts_.tracker, both)) return Failed(error, "ending a registration");

    if (int error = uffd::Register(contexts_.gate, {memory, page_}, kMissing)) return Failed(error, "the gate");
    if (int error = uffd::Register(contexts_.staging, {staging, 2 * page_}, kMissing))
      return Failed(error, "the staging");
    Partial moved = uffd::Move(contexts_.staging, staging, memory, page_);
    if (moved.error) return Failed(moved.error, "UFFDIO_MOVE");
    if ((Categories(memory) & kPresent) || !(Categories(staging) & kPresent) || Byte(staging) != 3)
      return Missing("UFFDIO_MOVE");
    if (int error = uffd::Unregister(contexts_.gate, {memory, page_})) return Failed(error, "ending a registration");
    return 0;
  }

  // Breaker: a private mapping of a memory file is filled write-protected; a write is copied by the kernel and leaves
  // the file's bytes; a page that is not there can be made zero.
  int ShareAndBreak() {
    Address page = 0;
    if (int error = CreatePoolFile(2 * page_, &file_)) {
      // RLIMIT_FSIZE leaves no room for a file: there will be no pool, and each page says so. That is no missing feature.
      return error == -EFBIG ? 0 : Failed(error, "memfd_create");
    }
    if (int error = Map(1, MAP_ANONYMOUS, -1, &page)) return Failed(error, "anonymous memory");
    Byte(page) = 7;
    for (int i = 0; i < 2; ++i) {
      if (Partial written = WritePoolFile(file_, static_cast<std::uint64_t>(i) * page_, page, page_); written.error) {
        return Failed(written.error, "writing to a memory file");
      }
    }
    if (int error = Map(2, MAP_NORESERVE, file_.fd, &shared_)) return Failed(error, "mapping a memory file");
    if (int error = uffd::Register(contexts_.breaker, {shared_, 2 * page_}, kWriteProtect | kMinor)) {
      return Failed(error, "write protection of private file mappings");
    }
    Partial filled = uffd::Continue(contexts_.breaker, {shared_, page_}, true);
    if (filled.error) return Failed(filled.error, "UFFDIO_CONTINUE");
    constexpr std::uint32_t kMapped = kPresent | kFile;
    if ((Categories(shared_) & kMapped) != kMapped || Byte(shared_) != 7) return Missing("UFFDIO_CONTINUE");
    Byte(shared_) = 8;
    char kept = 0;
    if ((Categories(shared_) & kMapped) != kPresent) return Missing("copy on write under asynchronous protection");
    if (raw::Repeat([&] { return pread(file_.fd, &kept, 1, 0); }) != 1 || kept != 7) {
      return Missing("copy on write under asynchronous protection");
    }
    Partial zeroed = uffd::ZeroPage(contexts_.breaker, {shared_ + page_, page_});
    if (zeroed.error) return Failed(zeroed.error, "UFFDIO_ZEROPAGE in a private file mapping");
    if (!(Categories(shared_ + page_) & kPresent) || Byte(shared_ + page_) != 0) {
      return Missing("UFFDIO_ZEROPAGE in a private file mapping");
    }
    if (int error = raw::Madvise(shared_, page_, uapi::kMadvPopulateWrite)) return Failed(error, "MADV_POPULATE_WRITE");
    return uffd::Unregister(contexts_.breaker, {shared_, 2 * page_});
  }

  // MREMAP_DONTUNMAP: the pages leave, the place stays mapped and registered. On a context without events, because an
  // event would wait here for its reader.
  int TakePages() {
    uffd::Door door;
    plain_ = uffd::Open(contexts_.allow_user_mode_only, contexts_.refuse_kernel_faults, &door);
    if (plain_ < 0) return Failed(plain_, "another userfaultfd");
    constexpr std::uint64_t kFeatures = uapi::kFeatureWpAsync | uapi::kFeatureWpHugetlbfsShmem |
                                        uapi::kFeatureMinorShmem | uapi::kFeaturePagefaultFlagWp;
    if (int error = uffd::Enable(plain_, kFeatures)) return Failed(error, "another userfaultfd");
    if (int error = uffd::Register(plain_, {shared_, 2 * page_}, kWriteProtect | kMinor))
      return Failed(error, "registration");
    Address taken = 0;
    if (int error = raw::Mremap(shared_, 2 * page_, MREMAP_MAYMOVE | uapi::kMremapDontUnmap, 0, &taken)) {
      return Failed(error, "MREMAP_DONTUNMAP of a private file mapping");
    }
    Keep({taken, 2 * page_});
    // Protecting succeeds only where the range is registered still.
    if ((Categories(shared_) & kPresent) || Byte(taken) != 8 ||
        uffd::WriteProtect(plain_, {shared_, page_}, true) != 0) {
      return Missing("MREMAP_DONTUNMAP keeping the registration");
    }
    return 0;
  }

  const ProbeContexts& contexts_;
  const Pagemap& pagemap_;
  const std::size_t page_;
  ErrorText* error_;
  Span mapped_[8];
  Address shared_ = 0;
  File file_;
  int plain_ = -1;
};

}  // namespace

int ProbeKernel(const ProbeContexts& contexts, const Pagemap& pagemap, std::size_t page_bytes, ErrorText* error) {
  return Probe(contexts, pagemap, page_bytes, error).Run();
}

}  // namespace ksmu::os
