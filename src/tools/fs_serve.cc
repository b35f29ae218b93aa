#include "tools/fs_serve.h"

#define FUSE_USE_VERSION 314
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <fcntl.h>
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
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "os/channel.h"
#include "tools/fs_tree.h"

namespace ksmu::tools {
namespace {

constexpr int kRoundMs = 1000, kWaitingRoundMs = 100;
// Of what is kept for handles. Anybody may open as many as he likes: beyond this all of it is forgotten, and read anew.
constexpr std::size_t kMostKeptBytes = std::size_t{16} << 20, kHandleBytes = 128;

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

fuse_in_header HeaderOf(const ServeState& state) {
  fuse_in_header header{};
  std::memcpy(&header, state.question.data(), sizeof header);
  return header;
}
void PutAway(ServeState* state) { std::memset(state->question.data(), 0, sizeof(fuse_in_header)); }

Serving& Of(fuse_req_t request) { return *static_cast<Serving*>(fuse_req_userdata(request)); }

int Fill(Serving& serving, fuse_ino_t node, struct stat* to) {
  Tree::About about;
  if (const int error = serving.tree.Look(node, &about)) return error;
  *to = {};
  to->st_ino = node;
  to->st_mode = (about.directory ? S_IFDIR : S_IFREG) | about.mode;
  to->st_nlink = 1;  // of a directory: not known
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
  const auto bytes = [](std::size_t sum, const auto& one) { return sum + kHandleBytes + one.second.size() * kHandleBytes; };
  if (std::accumulate(serving.listings.begin(), serving.listings.end(), std::size_t{0}, bytes) > kMostKeptBytes) serving.listings.clear();
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
  Serving& serving = Of(request);
  const auto bytes = [](std::size_t sum, const auto& one) { return sum + kHandleBytes + one.second.capacity(); };
  if (offset == 0 && std::accumulate(serving.texts.begin(), serving.texts.end(), std::size_t{0}, bytes) > kMostKeptBytes) serving.texts.clear();
  std::string& text = serving.texts[file->fh];
  if (offset == 0 || text.empty()) {
    if (const int error = serving.tree.Read(node, fuse_req_ctx(request)->uid, &text)) {
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
    serving.state->waiting[i] = HeaderOf(*serving.state).unique;
    PutAway(serving.state);
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

// Questions come as bytes, not as a pipe that they lie in, and as many as there is room for.
void Initialised(void*, fuse_conn_info* connection) {
  connection->want &= ~static_cast<unsigned>(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
  connection->max_write = Tree::kFileBytes;
}

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

void KeepGreeting(ServeState* state) {
  const fuse_in_header header = HeaderOf(*state);
  if (header.len > state->greeting.size()) return;
  std::memcpy(state->greeting.data(), state->question.data(), header.len);
  state->greeting_bytes = header.len;
}

// What the one before has taken and not answered: whoever asked would wait for ever.
void AnswerForTheDead(int fuse, ServeState* state) {
  const auto answer = [&](std::uint64_t question) {
    fuse_out_header header{};
    header.unique = question;
    if (header.unique == 0) return;
    header.len = sizeof header;
    header.error = -EIO;
    // ENOENT: it had been answered after all, or nobody waits any more.
    [[maybe_unused]] const ssize_t written = write(fuse, &header, sizeof header);
  };
  // An error in answer to the greeting would be the end of the mount.
  if (HeaderOf(*state).opcode == FUSE_INIT) KeepGreeting(state);
  else answer(HeaderOf(*state).unique);
  PutAway(state);
  for (auto& one : state->waiting) answer(one.exchange(0));
}

// libfuse does nothing before it has been greeted, which the kernel does once a mount: the greeting is played to it again; if it has been
// answered before, under a number that the kernel does not use, so that it takes no notice of the answer.
void GreetAgain(fuse_session* session, ServeState* state) {
  auto greeting = state->greeting;
  fuse_in_header header;
  std::memcpy(&header, greeting.data(), sizeof header);
  if (state->greeted) header.unique = ~std::uint64_t{0} - 3;
  std::memcpy(greeting.data(), &header, sizeof header);
  fuse_buf buffer{};
  buffer.size = state->greeting_bytes;
  buffer.mem = greeting.data();
  fuse_session_process_buf(session, &buffer);
  state->greeted = true;
}

// The next question. EAGAIN: there is none; ENODEV: and there will be none any more; or what is wrong.
int Take(int fuse, fuse_session* session, ServeState* state) {
  const ssize_t bytes = read(fuse, state->question.data(), state->question.size());
  // ENOENT: whoever has asked has gone meanwhile.
  if (bytes < 0) return errno == EINTR || errno == ENOENT ? EAGAIN : errno == ECONNABORTED ? ENODEV : errno;
  const fuse_in_header header = HeaderOf(*state);
  if (static_cast<std::size_t>(bytes) < sizeof header || header.len != static_cast<std::size_t>(bytes)) return EIO;
  if (header.opcode == FUSE_INIT) KeepGreeting(state);
  fuse_buf buffer{};
  buffer.size = static_cast<std::size_t>(bytes);
  buffer.mem = state->question.data();
  fuse_session_process_buf(session, &buffer);
  if (header.opcode == FUSE_INIT) state->greeted = true;
  PutAway(state);
  return 0;
}

}  // namespace

int Serve(int fuse, const OperatorOptions& options, std::uint32_t uid, ServeState* state) {
  Serving serving{Tree(options, uid, &state->kept), state, {}, {}, {}, {}};
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
  // Whoever has asked can be killed between poll and read, which would wait for the next question then.
  if (fcntl(fuse, F_SETFL, O_NONBLOCK) != 0) return errno;
  int error = 0;
  bool waiting = false;
  while (!g_ended && !error && !fuse_session_exited(session)) {
    state->alive_at_ms = os::MonotonicMs();
    pollfd question{fuse, POLLIN, 0};
    const int ready = poll(&question, 1, waiting ? kWaitingRoundMs : kRoundMs);
    if (ready > 0) error = Take(fuse, session, state);
    if (error == EAGAIN) error = 0;
    waiting = TendWaiting(serving);
  }
  fuse_session_destroy(session);
  return error == ENODEV ? 0 : error;
}

}  // namespace ksmu::tools
