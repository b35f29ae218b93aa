// LinuxSystem::PossiblePins: which descriptors, of whose table, count.
#include <fcntl.h>
#include <liburing.h>
#include <linux/aio_abi.h>
#include <linux/fuse.h>
#include <linux/magic.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

#include "kernel_semantics_system.h"

namespace ksmu::os {
namespace {

using LinuxSystemPins = LinuxSystemTest;

TEST_F(LinuxSystemPins, OrdinaryDescriptorsHoldNoPins) {
  if (!system_->NoLongTermPins()) GTEST_SKIP() << "the test was started with descriptors that are not on the list";
  std::vector<int> fds;
  auto keep = [&](const char* what, int fd) {
    if (fd < 0) return;
    fds.push_back(fd);
    EXPECT_TRUE(system_->NoLongTermPins()) << what;
  };
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  keep("pipe", ends[0]);
  keep("pipe", ends[1]);
  keep("file", open("/proc/self/exe", O_RDONLY));
  keep("directory", open("/", O_RDONLY | O_DIRECTORY));
  keep("path", open("/tmp", O_PATH));
  keep("eventfd", eventfd(0, 0));
  keep("timerfd", timerfd_create(CLOCK_MONOTONIC, 0));
  keep("epoll", epoll_create1(0));
  keep("inotify", inotify_init1(0));
  sigset_t none;
  sigemptyset(&none);
  keep("signalfd", signalfd(-1, &none, 0));
  keep("memfd", memfd_create("plain", 0));
  for (const char* device : {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty",
                             "/dev/ptmx", "/dev/kvm", "/dev/net/tun", "/dev/userfaultfd"}) {
    keep(device, open(device, O_RDWR | O_NOCTTY));
  }
  keep("unix socket", socket(AF_UNIX, SOCK_STREAM, 0));
  keep("udp socket", socket(AF_INET, SOCK_DGRAM, 0));
  keep("tcp socket", socket(AF_INET6, SOCK_STREAM, 0));
  keep("netlink socket", socket(AF_NETLINK, SOCK_RAW, 0));
  keep("packet socket", socket(AF_PACKET, SOCK_RAW, 0));
  keep("userfaultfd", static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC)));
  keep("pidfd", static_cast<int>(syscall(434 /* pidfd_open */, getpid(), 0)));
  for (int fd : fds) close(fd);
}

TEST_F(LinuxSystemPins, UnknownDescriptorsCountAsPins) {
  if (!system_->NoLongTermPins()) GTEST_SKIP() << "the test was started with descriptors that are not on the list";
  std::vector<std::string> missing;
  auto check = [&](const char* what, int fd) {
    if (fd < 0) {
      missing.push_back(what);
      return;
    }
    EXPECT_FALSE(system_->NoLongTermPins()) << what;
    close(fd);
    EXPECT_TRUE(system_->NoLongTermPins()) << what;
  };
  check("AF_XDP", socket(44, SOCK_RAW, 0));
  check("AF_ALG", socket(AF_ALG, SOCK_SEQPACKET, 0));
  check("/dev/mem", open("/dev/mem", O_RDONLY));
  check("/dev/fuse", open("/dev/fuse", O_RDWR));
  check("/dev/loop-control", open("/dev/loop-control", O_RDWR));
  if (missing.size() == 5) GTEST_SKIP() << "none of these devices and sockets is to be had here";
}

struct Ring {
  io_uring ring;
  int error;
  Ring() : ring(), error(io_uring_queue_init(8, &ring, 0)) {}
  ~Ring() {
    if (error == 0) io_uring_queue_exit(&ring);
  }
};

// A ring: by default always, because provided-buffer rings in the program's memory are pinned and shown nowhere; where
// rings are trusted, if it has registered buffers.
TEST_F(LinuxSystemPins, IoUringRings) {
  LinuxOptions trusting;
  trusting.pins.trust_ring_without_buffers = true;
  SystemPointer trust = OpenSystem(trusting);
  if (!system_->NoLongTermPins()) GTEST_SKIP() << "the test was started with descriptors that are not on the list";
  Memory memory(2);
  memory.Fill();
  {
    Ring ring;
    if (ring.error) GTEST_SKIP() << "no io_uring here: " << std::strerror(-ring.error);
    EXPECT_FALSE(system_->NoLongTermPins());
    EXPECT_TRUE(trust->NoLongTermPins());
    iovec buffer{memory.Pointer(0), kPage};
    if (int error = io_uring_register_buffers(&ring.ring, &buffer, 1)) {
      GTEST_SKIP() << "no buffer can be registered here: " << std::strerror(-error);
    }
    EXPECT_FALSE(trust->NoLongTermPins());
    ASSERT_EQ(io_uring_unregister_buffers(&ring.ring), 0);
    EXPECT_TRUE(WaitFor([&] { return trust->NoLongTermPins(); }));
    // The descriptor closed, the ring alive through its mapping: the kernel's account of pinned memory tells.
    ASSERT_EQ(io_uring_register_buffers(&ring.ring, &buffer, 1), 0);
    int number = ring.ring.ring_fd;
    int spare = memfd_create("spare", 0);
    ASSERT_EQ(dup2(spare, number), number);
    close(spare);
    EXPECT_FALSE(trust->NoLongTermPins());
    EXPECT_FALSE(system_->NoLongTermPins());
  }
  EXPECT_TRUE(WaitFor([&] { return system_->NoLongTermPins(); }));
}

// What the default rests on. A kernel that shows such rings would let the default change.
TEST_F(LinuxSystemPins, ProvidedBufferRingPinsUnseen) {
  LinuxOptions trusting;
  trusting.pins.trust_ring_without_buffers = true;
  SystemPointer trust = OpenSystem(trusting);
  if (!system_->NoLongTermPins()) GTEST_SKIP() << "the test was started with descriptors that are not on the list";
  Ring ring;
  if (ring.error) GTEST_SKIP() << "no io_uring here: " << std::strerror(-ring.error);
  Memory memory(2), aside(1);
  memory.Fill();
  io_uring_buf_reg request{};
  request.ring_addr = memory.at(0);
  request.ring_entries = 8;
  request.bgid = 1;
  if (int error = io_uring_register_buf_ring(&ring.ring, &request, 0)) {
    GTEST_SKIP() << "no provided-buffer ring here: " << std::strerror(-error);
  }
  ASSERT_EQ(system_->Register(kStaging, aside.all(), kMissing), 0);
  EXPECT_EQ(system_->Move(kStaging, aside.at(0), memory.at(0), kPage).error, -EBUSY);  // pinned it is
  EXPECT_TRUE(trust->NoLongTermPins());                                                // and nothing says so
  EXPECT_FALSE(system_->NoLongTermPins());
}

// Every thread's table is looked at, not only the first one's; and the library's own is not.
TEST_F(LinuxSystemPins, TablesOfAllThreads) {
  if (!system_->NoLongTermPins()) GTEST_SKIP() << "the test was started with descriptors that are not on the list";
  std::atomic<int> step{0};
  int thread_id = 0;
  bool has_ring = false, has_socket = false;
  Worker apart([&] {
    thread_id = static_cast<int>(syscall(SYS_gettid));
    if (unshare(CLONE_FILES) != 0) return;
    int plain = socket(AF_INET, SOCK_DGRAM, 0);
    step = 1;
    while (step != 2) SleepMilliseconds(1);
    int odd = socket(44 /* AF_XDP */, SOCK_RAW, 0);
    has_socket = odd >= 0;
    step = 3;
    while (step != 4) SleepMilliseconds(1);
    close(odd);
    close(plain);
    {
      Ring ring;
      has_ring = ring.error == 0;
      step = 5;
      while (step != 6) SleepMilliseconds(1);
    }
  });
  ASSERT_TRUE(WaitFor([&] { return step == 1; }));
  int probe = static_cast<int>(syscall(434 /* pidfd_open */, thread_id, uapi::kPidfdThread));
  bool can_look = probe >= 0;
  close(probe);
  EXPECT_EQ(system_->NoLongTermPins(), can_look);  // before 6.9 another table's sockets cannot be asked
  step = 2;
  ASSERT_TRUE(WaitFor([&] { return step == 3; }));
  EXPECT_EQ(system_->NoLongTermPins(), can_look && !has_socket);
  step = 4;
  ASSERT_TRUE(WaitFor([&] { return step == 5; }));
  EXPECT_EQ(system_->NoLongTermPins(), !has_ring);
  step = 6;
  apart.Join();
  EXPECT_TRUE(WaitFor([&] { return system_->NoLongTermPins(); }));
}

// Direct I/O has a device write to the program's pages for the time of a request; buffered I/O has nobody do so.
TEST_F(LinuxSystemPins, DirectIoIsToldFromBuffered) {
  if (system_->PossiblePins() != Pins::kBrief) GTEST_SKIP() << "the test was started with descriptors that allow direct I/O";
  const int memory = memfd_create("file", 0);
  ASSERT_GE(memory, 0);
  EXPECT_EQ(system_->PossiblePins(), Pins::kBrief) << "a file on tmpfs";
  // tmpfs takes the flag since 6.6.
  if (fcntl(memory, F_SETFL, O_DIRECT) == 0) {
    EXPECT_EQ(system_->PossiblePins(), Pins::kRequests) << "O_DIRECT";
    ASSERT_EQ(fcntl(memory, F_SETFL, 0), 0);
    EXPECT_EQ(system_->PossiblePins(), Pins::kBrief);
  }
  close(memory);
  char name[] = "/var/tmp/ksmu_pins_XXXXXX";
  const int file = mkstemp(name);
  ASSERT_GE(file, 0);
  unlink(name);
  struct statfs status {};
  ASSERT_EQ(fstatfs(file, &status), 0);
  if (status.f_type == EXT4_SUPER_MAGIC || status.f_type == XFS_SUPER_MAGIC || status.f_type == BTRFS_SUPER_MAGIC) {
    EXPECT_EQ(system_->PossiblePins(), Pins::kBrief) << "a file of a block device's";
  } else if (status.f_type == OVERLAYFS_SUPER_MAGIC) {
    EXPECT_EQ(system_->PossiblePins(), Pins::kRequests) << "what lies below is not known";
  }
  if (fcntl(file, F_SETFL, O_DIRECT) == 0) {
    EXPECT_EQ(system_->PossiblePins(), Pins::kRequests) << "O_DIRECT";
  }
  close(file);
  EXPECT_EQ(system_->PossiblePins(), Pins::kBrief);
  // A queue outlives the descriptors that its requests were made through.
  aio_context_t queue = 0;
  if (syscall(SYS_io_setup, 1, &queue) == 0) {
    EXPECT_EQ(system_->PossiblePins(), Pins::kRequests) << "AIO";
    syscall(SYS_io_destroy, queue);
    EXPECT_EQ(system_->PossiblePins(), Pins::kBrief);
  }
}

// A file system of which one file can be opened, and whose server then says nothing more.
class SilentFileSystem {
 public:
  SilentFileSystem() {
    const int device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (device < 0 || !mkdtemp(path_)) return;
    char options[128];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=%u,group_id=%u", device, getuid(), getgid());
    if (mount("silent", path_, "fuse", MS_NOSUID | MS_NODEV, options) == 0 && (server_ = fork()) == 0) Serve(device);
    close(device);
  }
  ~SilentFileSystem() {
    End();
    umount2(path_, MNT_DETACH);
    rmdir(path_);
  }
  bool mounted() const { return server_ > 0; }
  int Open() const { return open((std::string(path_) + "/file").c_str(), O_RDONLY | O_CLOEXEC); }
  // Whoever waits for an answer gets an error.
  void End() {
    if (server_ <= 0) return;
    kill(server_, SIGKILL);
    waitpid(server_, nullptr, 0);
    server_ = 0;
  }

 private:
  template <class Body>
  static void Answer(int device, std::uint64_t unique, const Body& body) {
    struct {
      fuse_out_header header;
      Body body;
    } answer{};
    answer.header = {static_cast<std::uint32_t>(sizeof(fuse_out_header) + sizeof body), 0, unique};
    std::memcpy(&answer.body, &body, sizeof body);
    [[maybe_unused]] const ssize_t written = write(device, &answer, answer.header.len);
  }
  [[noreturn]] static void Serve(int device) {
    alignas(8) static char request[1 << 17];
    for (bool open = false; read(device, request, sizeof request) > 0;) {
      fuse_in_header header;
      std::memcpy(&header, request, sizeof header);
      if (header.opcode == FUSE_INIT) {
        fuse_init_out out{};
        out.major = FUSE_KERNEL_VERSION;
        out.minor = 31;
        out.max_write = 4096;
        Answer(device, header.unique, out);
      } else if (header.opcode == FUSE_LOOKUP && !open) {
        fuse_entry_out out{};
        out.nodeid = 2;
        out.attr.ino = 2;
        out.attr.mode = S_IFREG | 0644;
        out.attr.nlink = 1;
        Answer(device, header.unique, out);
      } else if (header.opcode == FUSE_OPEN) {
        Answer(device, header.unique, fuse_open_out{});
        open = true;
      }
    }
    _exit(0);
  }

  char path_[32] = "/tmp/ksmu_silent_XXXXXX";
  pid_t server_ = 0;
};

// The look waits for nobody's server: the program's own calls wait for the scanner.
TEST_F(LinuxSystemPins, ASilentServerIsNotAsked) {
  const Pins before = system_->PossiblePins();
  SilentFileSystem silent;
  if (!silent.mounted()) GTEST_SKIP() << "no FUSE here, or no right to mount it";
  const int file = silent.Open();
  ASSERT_GE(file, 0) << std::strerror(errno);
  std::atomic<int> seen{-1};
  Worker look([&] {
    const Pins pins = system_->PossiblePins();
    const bool references = system_->PossibleReferences();
    seen = static_cast<int>(pins) + (references ? 100 : 0);
  });
  EXPECT_TRUE(WaitFor([&] { return seen != -1; })) << "it waits for an answer";
  silent.End();
  look.Join();
  close(file);
  if (before == Pins::kBrief) {
    EXPECT_EQ(seen, static_cast<int>(Pins::kRequests)) << "FUSE may have its server write to the program's pages, which it pins";
  }
}

// Where direct I/O does not pin pages.
TEST_F(LinuxSystemPins, OrdinaryDescriptorsHoldNoReferences) {
  if (system_->PossibleReferences()) GTEST_SKIP() << "the test was started with descriptors of a network file system";
  const int memory = memfd_create("file", 0);
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_DIRECT), 0);
  const int device = open("/dev/zero", O_RDWR | O_DIRECT);
  char name[] = "/var/tmp/ksmu_pins_XXXXXX";
  const int file = mkstemp(name);
  ASSERT_GE(file, 0);
  unlink(name);
  struct statfs status {};
  ASSERT_EQ(fstatfs(file, &status), 0);
  fcntl(memory, F_SETFL, O_DIRECT);
  EXPECT_FALSE(system_->PossibleReferences());
  if (fcntl(file, F_SETFL, O_DIRECT) == 0) {
    EXPECT_EQ(system_->PossibleReferences(), status.f_type == OVERLAYFS_SUPER_MAGIC) << "what lies below is not known";
  }
  for (int fd : {memory, ends[0], ends[1], device, file}) close(fd);
}

// Called from a thread with a table of its own, as the library does: what is in that table is no matter.
TEST_F(LinuxSystemPins, OwnTableIsNotLookedAt) {
  if (!system_->NoLongTermPins()) GTEST_SKIP() << "the test was started with descriptors that are not on the list";
  int opened = -1;
  bool free_of_pins = false, odd = false;
  Worker library([&] {
    if (UnshareDescriptors() != 0) return;
    LinuxSystem* system = nullptr;
    ErrorText error;
    opened = LinuxSystem::Open({}, &system, &error);
    if (opened != 0) return;
    system->RegisterOwnThread(CurrentThread());
    int strange = socket(44 /* AF_XDP */, SOCK_RAW, 0);
    if (strange < 0) strange = open("/dev/mem", O_RDONLY);
    odd = strange >= 0;
    free_of_pins = system->NoLongTermPins();
    close(strange);
    LinuxSystem::Close(system);
  });
  library.Join();
  EXPECT_EQ(opened, 0);
  EXPECT_TRUE(free_of_pins);
  if (!odd) GTEST_SKIP() << "neither AF_XDP nor /dev/mem to be had here, to put into it";
}

}  // namespace
}  // namespace ksmu::os
