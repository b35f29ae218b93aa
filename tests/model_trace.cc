#include "model_trace.h"

#include <array>
#include <random>
#include <sstream>

namespace ksmu::model {
namespace {

constexpr std::array<const char*, static_cast<std::size_t>(OpKind::kCount)> kOps = {
    "advise",       "unmerge",     "release", "discard", "unmap",     "merge",         "step",
    "housekeeping", "unmerge-all", "events",  "program", "raw-unmap", "map-again",     "unpin",
    "pin-write",    "exit",        "time",    "tunable", "map-limit", "pins-possible", "memory",
    "peer-publish", "peer-offer",  "peer-gives-up", "lose-news", "source-dies", "source-comes"};
constexpr std::array<const char*, static_cast<std::size_t>(ActionKind::kCount)> kActions = {"start", "step",   "fail",
                                                                                            "short", "events", "back"};
constexpr std::array<const char*, static_cast<std::size_t>(ProgramKind::kCount)> kPrograms = {
    "read", "fill", "poke", "direct-poke", "discard", "fork", "pin-write", "pin-read", "swap-out", "protect"};

template <typename Enum, std::size_t n>
bool Find(const std::array<const char*, n>& names, const std::string& name, Enum* out) {
  for (std::size_t i = 0; i < n; ++i) {
    if (name == names[i]) {
      *out = static_cast<Enum>(i);
      return true;
    }
  }
  return false;
}

// The program's operations are written with their names.
template <typename T>
void WriteArguments(std::ostream& out, const T& t, bool program) {
  out << ' ' << t.a << ' ';
  if (program) {
    out << kPrograms[static_cast<std::size_t>(t.b)];
  } else {
    out << t.b;
  }
  out << ' ' << t.c << ' ' << t.d << ' ' << t.e << '\n';
}

template <typename T>
bool ReadArguments(std::istream& in, T* t, bool program) {
  std::string b;
  if (!(in >> t->a >> b >> t->c >> t->d >> t->e)) return false;
  if (!program) {
    t->b = std::stoi(b);
    return true;
  }
  ProgramKind kind;
  if (!Find(kPrograms, b, &kind)) return false;
  t->b = static_cast<int>(kind);
  return true;
}

}  // namespace

std::string Trace::Text() const {
  std::ostringstream out;
  out << "config " << config.seed << ' ' << config.pages << ' ' << config.before_boundary << ' ' << config.fork_events
      << ' ' << config.forks << ' ' << config.raw_discards << ' ' << config.protects << ' ' << config.pins << ' '
      << config.swap << ' ' << (config.refused.empty() ? "-" : config.refused) << ' ' << config.refused_from << ' ' << config.shared << ' '
      << config.by_node << '\n';
  auto write_actions = [&](int id) {
    for (const Action& a : actions) {
      if (a.op != id) continue;
      out << "  " << (a.event_thread ? "event" : "scan") << ' ' << (a.after ? "after" : "before") << ' ' << a.call
          << ' ' << a.occurrence << ' ' << kActions[static_cast<std::size_t>(a.kind)];
      WriteArguments(out, a, a.kind == ActionKind::kStart);
    }
  };
  for (const Op& op : ops) {
    out << op.id << ' ' << kOps[static_cast<std::size_t>(op.kind)];
    WriteArguments(out, op, op.kind == OpKind::kProgram);
    write_actions(op.id);
  }
  out << "-1 end\n";
  write_actions(-1);
  return out.str();
}

bool Trace::Parse(const std::string& text, Trace* out, std::string* error) {
  *out = Trace{};
  std::istringstream lines(text);
  std::string line;
  int current = -1;
  while (std::getline(lines, line)) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream in(line);
    std::string word;
    in >> word;
    bool good = true;
    if (word == "config") {
      Config& c = out->config;
      good = static_cast<bool>(in >> c.seed >> c.pages >> c.before_boundary >> c.fork_events >> c.forks >>
                               c.raw_discards >> c.protects >> c.pins >> c.swap >> c.refused);
      in >> c.refused_from >> c.shared >> c.by_node;
      if (c.refused == "-") c.refused.clear();
    } else if (word == "scan" || word == "event") {
      Action a;
      a.op = current;
      a.event_thread = word == "event";
      std::string when, kind;
      good = static_cast<bool>(in >> when >> a.call >> a.occurrence >> kind) && Find(kActions, kind, &a.kind) &&
             ReadArguments(in, &a, a.kind == ActionKind::kStart);
      a.after = when == "after";
      out->actions.push_back(a);
    } else {
      Op op;
      op.id = current = std::stoi(word);
      std::string kind;
      in >> kind;
      if (kind == "end") continue;
      good = Find(kOps, kind, &op.kind) && ReadArguments(in, &op, op.kind == OpKind::kProgram);
      out->ops.push_back(op);
    }
    if (!good) {
      *error = "cannot read: " + line;
      return false;
    }
  }
  return true;
}

namespace {

// What happens around a domain, put in between the operations of a run without one.
void AddDomain(Trace* t) {
  std::mt19937_64 rng(t->config.seed * 0xD1B54A32D192ED03u + 1);
  auto pick = [&](int n) { return static_cast<int>(rng() % static_cast<std::uint64_t>(n)); };
  t->config.shared = true;
  std::vector<Op> mixed;
  const auto add = [&](OpKind kind, int a = 0, int b = 0) { mixed.push_back({0, kind, a, b}); };
  const bool late = pick(4) == 0;
  if (!late) add(OpKind::kSourceComes);
  for (const Op& op : t->ops) {
    mixed.push_back(op);
    const int r = pick(100);
    if (r < 8) add(OpKind::kPeerPublish, pick(6), pick(4) == 0);
    else if (r < 14) add(OpKind::kPeerOffer, pick(6));
    else if (r < 18) add(OpKind::kPeerGivesUp, pick(3));
    else if (r < 19) add(OpKind::kLoseNews);
    else if (r < 21) add(OpKind::kSourceDies, 1 + pick(3));
    else if (r >= 94) add(OpKind::kSourceSlow, pick(2));
    else if (r < 24 || (late && r < 30)) add(OpKind::kSourceComes, pick(2));
    else if (r < 34) add(OpKind::kStep, 1 + pick(3));
  }
  for (std::size_t i = 0; i < mixed.size(); ++i) mixed[i].id = static_cast<int>(i);
  t->ops = mixed;
}

Trace GenerateAlone(std::uint64_t seed) {
  std::mt19937_64 rng(seed * 0x9E3779B97F4A7C15u + 1);
  auto pick = [&](int n) { return static_cast<int>(rng() % static_cast<std::uint64_t>(n)); };
  Trace t;
  Config& c = t.config;
  c.seed = seed;
  c.pages = 4 + pick(5) * 7;
  c.before_boundary = pick(3) == 0 ? 512 : pick(c.pages);
  c.fork_events = pick(4) != 0;
  c.forks = pick(3) != 0;
  c.raw_discards = pick(4) != 0;
  c.pins = pick(2) != 0;
  c.swap = pick(3) == 0;
  const int rates[] = {0, 3, 10, 25, 50};
  c.act_percent = rates[pick(5)];
  const int fails[] = {0, 0, 3, 10, 30};
  c.fail_percent = fails[pick(5)];

  auto add = [&](OpKind kind, int a = 0, int b = 0, int cc = 0, int d = 0, int e = 0) {
    t.ops.push_back({static_cast<int>(t.ops.size()), kind, a, b, cc, d, e});
  };
  auto span = [&](OpKind kind, int flags = 0) {
    const bool whole = pick(3) == 0;
    const int first = whole ? 0 : pick(c.pages);
    add(kind, first, whole ? c.pages : 1 + pick(c.pages - first), flags);
  };
  auto program = [&](ProgramKind kind) {
    const int page = pick(c.pages);
    add(OpKind::kProgram, pick(8), static_cast<int>(kind), page, 1 + pick(std::min(6, c.pages - page)), pick(5));
  };
  const int contents = 1 + pick(4);  // few contents: long runs of duplicates
  for (int page = 0; page < c.pages; ++page) {
    if (pick(6) != 0) add(OpKind::kProgram, 0, static_cast<int>(ProgramKind::kFill), page, 1, pick(contents + 1));
  }
  const int flags = pick(4) == 0 ? pick(4) : 0;
  add(OpKind::kAdvise, 0, c.pages, flags);
  const int remerge_seconds = pick(3) == 0 ? 60 : 0;
  add(OpKind::kTunable, 3, remerge_seconds);
  if (pick(4) == 0) add(OpKind::kTunable, 1, 2 + pick(3));
  const int n = 10 + pick(50);
  for (int i = 0; i < n; ++i) {
    const int r = pick(100);
    if (r < 4) {
      // Written, and written back: it can be merged again in place.
      const int page = pick(c.pages);
      for (int again = 0; again < 2; ++again) {
        add(OpKind::kProgram, pick(4), static_cast<int>(again == 0 ? ProgramKind::kPoke : ProgramKind::kFill), page, 1,
            again == 0 ? pick(5) : -1);
        add(OpKind::kStep, 2 + pick(2));
      }
    } else if (r < 30) {
      static constexpr ProgramKind kinds[] = {ProgramKind::kFill,    ProgramKind::kFill,       ProgramKind::kPoke,
                                              ProgramKind::kRead,    ProgramKind::kDirectPoke, ProgramKind::kDiscard,
                                              ProgramKind::kFork,    ProgramKind::kPinWrite,   ProgramKind::kPinRead,
                                              ProgramKind::kSwapOut, ProgramKind::kFill};
      program(kinds[pick(11)]);
    } else if (r < 55) {
      add(OpKind::kStep, 1 + pick(4));
    } else if (r < 63) {
      span(OpKind::kMerge);
    } else if (r < 68) {
      add(OpKind::kEvents);
    } else if (r < 72) {
      span(OpKind::kDiscard);
    } else if (r < 75) {
      span(OpKind::kAdvise, pick(4) == 0 ? pick(4) : flags);
    } else if (r < 78) {
      span(OpKind::kUnmerge);
    } else if (r < 81) {
      const int first = pick(c.pages), count = 1 + pick(c.pages - first);
      add(pick(3) == 0 ? OpKind::kUnmap : OpKind::kRelease, first, count);
      if (pick(2) == 0) add(OpKind::kStep, 1);
      add(OpKind::kRawUnmap, first, count);
      if (pick(2) == 0) add(OpKind::kStep, 1);
      add(OpKind::kMapAgain, first, count);
      if (pick(2) == 0) add(OpKind::kAdvise, 0, c.pages, flags);
    } else if (r < 83) {
      add(OpKind::kHousekeeping);
    } else if (r < 84) {
      add(OpKind::kUnmergeAll);
      if (pick(2) == 0) add(OpKind::kAdvise, 0, c.pages, flags);
    } else if (r < 87) {
      add(OpKind::kTime, 1 + pick(100));
    } else if (r < 89) {
      add(OpKind::kExit, 1 + pick(4));
    } else if (r < 92) {
      add(OpKind::kUnpin, pick(4));
    } else if (r < 94) {
      add(OpKind::kPinWrite, pick(4), 1 + pick(200));
    } else if (r < 96) {
      const int which = pick(6);
      static constexpr int values[6][2] = {{0, 1}, {2, 256}, {0, 1}, {0, 60}, {0, 1}, {0, 1}};
      add(OpKind::kTunable, which, values[which][pick(2)]);
    } else if (r < 98) {
      add(OpKind::kMapLimit, pick(3) == 0 ? 0 : 1 + pick(8));
    } else if (r < 99) {
      add(OpKind::kPinsPossible, pick(2));
    } else {
      add(OpKind::kMemory, pick(2) == 0 ? 0 : 4096);
    }
  }
  return t;
}

}  // namespace

Trace Generate(std::uint64_t seed) {
  Trace t = GenerateAlone(seed & ~(kSharedSeeds | kNodeSeeds));
  t.config.seed = seed;
  if (seed & kSharedSeeds) AddDomain(&t);
  t.config.by_node = seed & kNodeSeeds;
  return t;
}

}  // namespace ksmu::model
