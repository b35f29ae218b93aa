#include "tools/fs_serve.h"

#define FUSE_USE_VERSION 314
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "os/channel.h"
#include "tools/fs_tree.h"

namespace ksmu::tools {
namespace {

constexpr int kRoundMs = 1000, kWaitingRoundMs = 100;

volatile std::sig_atomic_t g_ended = 0;

// What the operations of one session share.
struct Serving {
  Tree tree;
  ServeState* state;
  timespec started{};
  // Of what is open, by its handle. One that is not here was given out before the last death: it is begun anew.
  std::unordered_map<std::uint64_t, std::string> texts;
  std::unordered_map<std::uint64_t, std::vector<std::pair<std::string, Tree::Node>>> listings;
  // Writes that are answered when everything has been unmerged.
  struct Waiting {
    fuse_req_t request = nullptr;
    std::size_t bytes = 0;
    bool interrupted = false;
  };
  std::array<Waiting, ServeState::kMostWaiting> waiting{};
};

Serving& Of(fuse_req_t request) { return *static_cast<Serving*>(fuse_req_userdata(request)); }

int Fill(Serving& serving, fuse_ino_t node, struct stat* to) {
  Tree::About about;
  if (const int error = serving.tree.Look(node, &about)) return error;
  *to = {};
  to->st_ino = node;
  to->st_mode = (about.directory ? S_IFDIR : S_IFREG) | about.mode;
  to->st_nlink = about.directory ? 2 : 1;
  to->st_uid = to->st_gid = about.uid;
  to->st_size = about.directory ? 0 : static_cast<off_t>(Tree::kFileBytes);
  to->st_blksize = 4096;
  to->st_atim = to->st_mtim = to->st_ctim = serving.started;
  return 0;
}

void Lookup(fuse_req_t request, fuse_ino_t parent, const char* name) {
  Serving& serving = Of(request);
  fuse_entry_param entry{};
  Tree::Node node = 0;
  int error = serving.tree.Find(parent, name, &node);
  if (!error) error = Fill(serving, node, &entry.attr);
  if (error) {
    fuse_reply_err(request, error);
    return;
  }
  entry.ino = node;
  fuse_reply_entry(request, &entry);  // nothing is remembered: members come and go
}

void GetAttributes(fuse_req_t request, fuse_ino_t node, fuse_file_info*) {
  struct stat about {};
  if (const int error = Fill(Of(request), node, &about)) fuse_reply_err(request, error);
  else fuse_reply_attr(request, &about, 0);
}

// A file is cut to nothing before it is written (`echo 1 > run`), which changes nothing here. Nothing else can be changed.
void SetAttributes(fuse_req_t request, fuse_ino_t node, struct stat*, int what, fuse_file_info* file) {
  constexpr int kTimes = FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_CTIME | FUSE_SET_ATTR_ATIME_NOW | FUSE_SET_ATTR_MTIME_NOW;
  if (what & ~(FUSE_SET_ATTR_SIZE | kTimes)) fuse_reply_err(request, EPERM);
  else GetAttributes(request, node, file);
}

// --- directories -----------------------------------------------------------------------------------------------------

int ListAnew(Serving& serving, fuse_ino_t node, std::uint64_t handle) {
  auto& entries = serving.listings[handle];
  const int error = serving.tree.List(node, &entries);
  if (error) {
    serving.listings.erase(handle);
    return error;
  }
  entries.emplace(entries.begin(), "..", node);
  entries.emplace(entries.begin(), ".", node);
  return 0;
}

// As it was when it was opened, so that a listing in parts hangs together.
void OpenDirectory(fuse_req_t request, fuse_ino_t node, fuse_file_info* file) {
  Serving& serving = Of(request);
  file->fh = ++serving.state->last_handle;
  if (const int error = ListAnew(serving, node, file->fh)) fuse_reply_err(request, error);
  else if (fuse_reply_open(request, file) != 0) serving.listings.erase(file->fh);
}

void ReadDirectory(fuse_req_t request, fuse_ino_t node, std::size_t size, off_t offset, fuse_file_info* file) {
  Serving& serving = Of(request);
  if (serving.listings.count(file->fh) == 0) {
    if (const int error = ListAnew(serving, node, file->fh)) {
      fuse_reply_err(request, error);
      return;
    }
  }
  const auto& entries = serving.listings[file->fh];
  std::vector<char> buffer(size);
  std::size_t used = 0;
  for (auto i = static_cast<std::size_t>(offset); i < entries.size(); ++i) {
    struct stat about {};
    about.st_ino = entries[i].second;
    const std::size_t bytes = fuse_add_direntry(request, buffer.data() + used, size - used, entries[i].first.c_str(), &about, static_cast<off_t>(i + 1));
    if (bytes > size - used) break;
    used += bytes;
  }
  fuse_reply_buf(request, buffer.data(), used);
}

void ReleaseDirectory(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
  Of(request).listings.erase(file->fh);
  fuse_reply_err(request, 0);
}

// --- files -----------------------------------------------------------------------------------------------------------

void Open(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
  file->direct_io = 1;  // each reading is of then, and a writing goes through at once
  file->fh = ++Of(request).state->last_handle;
  fuse_reply_open(request, file);
}

void Release(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
  Of(request).texts.erase(file->fh);
  fuse_reply_err(request, 0);
}

// As sysfs: what is read from the beginning is of now, and what follows is of the same moment.
void Read(fuse_req_t request, fuse_ino_t node, std::size_t size, off_t offset, fuse_file_info* file) {
  std::string& text = Of(request).texts[file->fh];
  if (offset == 0 || text.empty()) {
    if (const int error = Of(request).tree.Read(node, &text)) {
      fuse_reply_err(request, error);
      return;
    }
  }
  const std::size_t from = std::min(static_cast<std::size_t>(offset), text.size());
  fuse_reply_buf(request, text.data() + from, std::min(size, text.size() - from));
}

void Interrupted(fuse_req_t, void* waiting) { static_cast<Serving::Waiting*>(waiting)->interrupted = true; }

// The answer comes when everything has been unmerged, as KSM's does. Whoever does not want to wait is told so by EINTR.
void Wait(Serving& serving, fuse_req_t request, std::size_t bytes) {
  for (std::size_t i = 0; i < serving.waiting.size(); ++i) {
    Serving::Waiting& free = serving.waiting[i];
    if (free.request) continue;
    free = {request, bytes, false};
    serving.state->waiting[i] = serving.state->in_hand.load();
    serving.state->in_hand = 0;
    fuse_req_interrupt_func(request, Interrupted, &free);
    return;
  }
  fuse_reply_err(request, EAGAIN);
}

void Write(fuse_req_t request, fuse_ino_t node, const char* text, std::size_t size, off_t, fuse_file_info*) {
  Serving& serving = Of(request);
  const int error = serving.tree.Write(node, {text, size});
  if (error == EINPROGRESS) Wait(serving, request, size);
  else if (error) fuse_reply_err(request, error);
  else fuse_reply_write(request, size);
}

// False: nobody waits any more.
bool TendWaiting(Serving& serving) {
  const auto waits = [](const Serving::Waiting& w) { return w.request != nullptr; };
  if (std::none_of(serving.waiting.begin(), serving.waiting.end(), waits)) return false;
  const int error = serving.tree.Unmerging();
  bool left = false;
  for (std::size_t i = 0; i < serving.waiting.size(); ++i) {
    Serving::Waiting& one = serving.waiting[i];
    if (!one.request) continue;
    if (!one.interrupted && error == EINPROGRESS) {
      left = true;
      continue;
    }
    fuse_req_interrupt_func(one.request, nullptr, nullptr);
    if (one.interrupted) fuse_reply_err(one.request, EINTR);
    else if (error) fuse_reply_err(one.request, error);
    else fuse_reply_write(one.request, one.bytes);
    one.request = nullptr;
    serving.state->waiting[i] = 0;
  }
  return left;
}

// Questions come as bytes, not as a pipe that they lie in: their numbers are read before libfuse sees them.
void Initialised(void*, fuse_conn_info* connection) { connection->want &= ~static_cast<unsigned>(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE); }

fuse_lowlevel_ops Operations() {
  fuse_lowlevel_ops ops{};
  ops.init = Initialised;
  ops.lookup = Lookup;
  ops.getattr = GetAttributes;
  ops.setattr = SetAttributes;
  ops.opendir = OpenDirectory;
  ops.readdir = ReadDirectory;
  ops.releasedir = ReleaseDirectory;
  ops.open = Open;
  ops.read = Read;
  ops.write = Write;
  ops.release = Release;
  return ops;
}

// --- after a death ---------------------------------------------------------------------------------------------------

// What the one before has taken and not answered: whoever asked would wait for ever.
void AnswerForTheDead(int fuse, ServeState* state) {
  const auto answer = [&](std::atomic<std::uint64_t>& question) {
    fuse_out_header header{};
    header.unique = question.exchange(0);
    if (header.unique == 0) return;
    header.len = sizeof header;
    header.error = -EIO;
    // ENOENT: it had been answered after all, or nobody waits any more.
    [[maybe_unused]] const ssize_t written = write(fuse, &header, sizeof header);
  };
  answer(state->in_hand);
  for (auto& one : state->waiting) answer(one);
}

// libfuse does nothing before it has been greeted, which the kernel does once a mount: the greeting is played to it again, under a number
// that the kernel does not use, so that it takes no notice of the answer.
void GreetAgain(fuse_session* session, ServeState* state) {
  std::array<std::byte, sizeof state->greeting> greeting = state->greeting;
  fuse_in_header header;
  std::memcpy(&header, greeting.data(), sizeof header);
  header.unique = ~std::uint64_t{0} - 3;
  std::memcpy(greeting.data(), &header, sizeof header);
  fuse_buf buffer{};
  buffer.size = state->greeting_bytes;
  buffer.mem = greeting.data();
  fuse_session_process_buf(session, &buffer);
}

}  // namespace

int Serve(int fuse, const OperatorOptions& options, std::uint32_t uid, ServeState* state) {
  Serving serving{Tree(options, uid), state, {}, {}, {}, {}};
  clock_gettime(CLOCK_REALTIME, &serving.started);
  struct sigaction end {};
  end.sa_handler = [](int) { g_ended = 1; };
  sigaction(SIGTERM, &end, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  char name[] = "ksmu-fs";
  char* arguments[] = {name, nullptr};
  fuse_args args = FUSE_ARGS_INIT(1, arguments);
  const fuse_lowlevel_ops ops = Operations();
  fuse_session* const session = fuse_session_new(&args, &ops, sizeof ops, &serving);
  fuse_opt_free_args(&args);
  if (!session) return ENOMEM;
  const std::string place = "/dev/fd/" + std::to_string(fuse);
  if (fuse_session_mount(session, place.c_str()) != 0) {
    fuse_session_destroy(session);
    return EINVAL;
  }
  AnswerForTheDead(fuse, state);
  if (state->greeting_bytes) GreetAgain(session, state);
  fuse_buf buffer{};
  bool waiting = false;
  while (!g_ended && !fuse_session_exited(session)) {
    state->alive_at_ms = os::MonotonicMs();
    pollfd question{fuse, POLLIN, 0};
    const int ready = poll(&question, 1, waiting ? kWaitingRoundMs : kRoundMs);
    if (ready > 0) {
      const int bytes = fuse_session_receive_buf(session, &buffer);
      if (bytes == -EINTR || bytes == -EAGAIN) continue;
      if (bytes <= 0) break;
      fuse_in_header header{};
      std::memcpy(&header, buffer.mem, std::min(sizeof header, static_cast<std::size_t>(bytes)));
      if (header.opcode == FUSE_INIT && static_cast<std::size_t>(bytes) <= state->greeting.size()) {
        std::memcpy(state->greeting.data(), buffer.mem, static_cast<std::size_t>(bytes));
        state->greeting_bytes = static_cast<std::uint32_t>(bytes);
      }
      state->in_hand = header.unique;
      fuse_session_process_buf(session, &buffer);
      state->in_hand = 0;
    }
    waiting = TendWaiting(serving);
  }
  std::free(buffer.mem);
  fuse_session_destroy(session);
  return 0;
}

}  // namespace ksmu::tools
