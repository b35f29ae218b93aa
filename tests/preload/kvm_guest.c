/*
 * A guest without an operating system under /dev/kvm: kvm_guest [ROUNDS]
 *
 * Its memory is advised as mergeable. In 32-bit mode without paging it goes through it again and again: reads what a page must
 * hold, counts what is wrong, and writes what it must hold next; so pages are taken, merged and broken under it through the
 * second-level page tables. This program looks at the same memory from its side, and merges it meanwhile.
 *
 * Preloaded with the shim, or linked with nothing: what it prints and its status are the same. Exit 77: no machine is to be had.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
  kPage = 4096, kPages = 1024, kBytes = kPages * kPage, /* 4 MiB, as guest-physical addresses from 0 on */
  kCode = 0x1000, kTold = 0x2000, kFirst = 16,          /* the pages from kFirst on are written and read */
  kPort = 0x10, kApart = 64, kWords = kPage / kApart    /* a word in each 64 bytes: some machines emulate this guest */
};

/* What guest and host tell each other, at kTold. */
struct told {
  uint32_t round; /* a page holds, in each of its words, round * 8 + (page's number & 7) */
  uint32_t wrong; /* words that did not */
};

/*
 * esi: the address; ebp: what is expected, of the round before; edx: what is written. Each page: its words are compared, and
 * written. At the end of all pages, a port is written, and the host has its turn.
 *
 *   start: mov ebx, kTold
 *   next:  mov esi, first
 *   page:  mov eax, esi; shr eax, 12; and eax, 7
 *          mov edx, [ebx]; shl edx, 3; add edx, eax         ; to be written
 *          lea ebp, [edx-8]                                 ; expected
 *          mov ecx, kWords
 *   word:  cmp [esi], ebp; je same; inc dword [ebx+4]
 *   same:  mov [esi], edx; add esi, kApart; dec ecx; jnz word
 *          cmp esi, end; jb page
 *          out kPort, al; jmp next
 */
static const uint8_t kProgram[] = {
    0xbb, kTold & 0xff, kTold >> 8, 0, 0,                                     /* 00 mov ebx, kTold */
    0xbe, 0, (kFirst * kPage >> 8) & 0xff, (kFirst * kPage) >> 16, 0,         /* 05 mov esi, first */
    0x89, 0xf0, 0xc1, 0xe8, 12, 0x83, 0xe0, 7,                                /* 0a mov eax, esi; shr eax, 12; and eax, 7 */
    0x8b, 0x13, 0xc1, 0xe2, 3, 0x01, 0xc2,                                    /* 12 mov edx, [ebx]; shl edx, 3; add edx, eax */
    0x8d, 0x6a, 0xf8,                                                         /* 19 lea ebp, [edx-8] */
    0xb9, kWords, 0, 0, 0,                                                    /* 1c mov ecx, kWords */
    0x39, 0x2e, 0x74, 3, 0xff, 0x43, 4,                                       /* 21 cmp [esi], ebp; je +3; inc dword [ebx+4] */
    0x89, 0x16, 0x83, 0xc6, kApart, 0x49, 0x75, 0xf1,                              /* 28 mov [esi], edx; add esi, kApart; dec ecx; jnz 21 */
    0x81, 0xfe, 0, (kBytes >> 8) & 0xff, (kBytes >> 16) & 0xff, kBytes >> 24, /* 30 cmp esi, end */
    0x72, 0xd2,                                                               /* 36 jb 0a */
    0xe6, kPort, 0xeb, 0xc9,                                                  /* 38 out kPort, al; jmp 05 */
};

static void skip(const char *why) {
  printf("skipped: %s: %s\n", why, strerror(errno));
  exit(77);
}
static void fail(const char *why) {
  printf("%s: %s\n", why, strerror(errno));
  exit(1);
}
static uint32_t *page_of(unsigned char *memory, int page) { return (uint32_t *)(void *)(memory + (size_t)page * kPage); }

/* From the host's side. Returns the words that are wrong. */
static long look(unsigned char *memory, uint32_t round) {
  long wrong = 0;
  for (int page = kFirst; page < kPages; page++) {
    const uint32_t *words = page_of(memory, page);
    for (int i = 0; i < kPage / 4; i++) wrong += words[i] != (i % (kApart / 4) ? 0 : round * 8 + (unsigned)(page & 7));
  }
  return wrong;
}

int main(int argc, char **argv) {
  const uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 20;
  ssize_t (*merge)(void *, size_t) = (ssize_t(*)(void *, size_t))dlsym(RTLD_DEFAULT, "ksmu_merge");
  int (*get)(const char *, int64_t *) = (int (*)(const char *, int64_t *))dlsym(RTLD_DEFAULT, "ksmu_get");
  int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (kvm < 0) skip("/dev/kvm");
  if (ioctl(kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION) skip("/dev/kvm has another interface");
  int machine = ioctl(kvm, KVM_CREATE_VM, 0);
  if (machine < 0) skip("/dev/kvm gives no machine");
  /* Intel's processors without unrestricted guests take these pages for real mode. Refused elsewhere, to no harm. */
  ioctl(machine, KVM_SET_TSS_ADDR, 0xfffbd000ul);

  unsigned char *memory = mmap(NULL, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  madvise(memory, kBytes, MADV_NOHUGEPAGE);
  if (madvise(memory, kBytes, MADV_MERGEABLE)) fail("MADV_MERGEABLE");
  memcpy(memory + kCode, kProgram, sizeof kProgram);
  volatile struct told *told = (volatile struct told *)(void *)(memory + kTold);
  for (int page = kFirst; page < kPages; page++) {
    for (int i = 0; i < kPage / 4; i += kApart / 4) page_of(memory, page)[i] = 1 * 8 + (unsigned)(page & 7);
  }
  struct kvm_userspace_memory_region region = {0, 0, 0, kBytes, (uintptr_t)memory};
  if (ioctl(machine, KVM_SET_USER_MEMORY_REGION, &region)) fail("KVM_SET_USER_MEMORY_REGION");
  int cpu = ioctl(machine, KVM_CREATE_VCPU, 0);
  if (cpu < 0) skip("/dev/kvm gives no processor");
  int bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  struct kvm_run *run = bytes > 0 ? mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0) : MAP_FAILED;
  if (run == MAP_FAILED) fail("the processor's page");

  /* Protected mode, flat, without paging. */
  struct kvm_sregs special;
  if (ioctl(cpu, KVM_GET_SREGS, &special)) fail("KVM_GET_SREGS");
  struct kvm_segment code = {.base = 0, .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1}, data = code;
  data.type = 3, data.selector = 16;
  special.cs = code;
  special.ds = special.es = special.fs = special.gs = special.ss = data;
  special.cr0 |= 1;
  if (ioctl(cpu, KVM_SET_SREGS, &special)) fail("KVM_SET_SREGS");
  struct kvm_regs registers = {.rip = kCode, .rflags = 2, .rsp = kCode};
  if (ioctl(cpu, KVM_SET_REGS, &registers)) fail("KVM_SET_REGS");

  long wrong = 0;
  for (uint32_t round = 2; round < rounds + 2; round++) {
    told->round = round;
    if (merge && merge(memory, kBytes) < 0) fail("ksmu_merge"); /* what the guest writes next is merged: it breaks */
    do {
      if (ioctl(cpu, KVM_RUN, 0) && errno != EINTR && errno != EAGAIN) fail("KVM_RUN");
    } while (run->exit_reason == KVM_EXIT_INTR);
    if (run->exit_reason != KVM_EXIT_IO || run->io.port != kPort) {
      printf("the guest has ended: reason %u\n", run->exit_reason);
      return 1;
    }
    wrong += look(memory, round);
    /* Written from this side, for the guest to read: a few pages, with what they hold already. */
    for (int page = kFirst + (int)(round % 7); page < kPages; page += 7) page_of(memory, page)[round % kWords * (kApart / 4)] = round * 8 + (unsigned)(page & 7);
  }
  printf("%u rounds of %d pages; wrong in the guest %u, outside %ld\n", rounds, kPages - kFirst, told->wrong, wrong);
  if (get) {
    int64_t merged = 0, broken = 0;
    get("pages_merged_total", &merged), get("cow_breaks", &broken);
    fprintf(stderr, "merged %ld broken %ld\n", (long)merged, (long)broken);
    if (merged < 1000 || broken < 100) wrong++;
  }
  return told->wrong || wrong;
}
