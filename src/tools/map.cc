// ksmuctl map: a picture of a process's memory, by address. Only looks.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "tools/commands.h"
#include "tools/foreign.h"
#include "tools/output.h"

namespace ksmu::tools {
namespace {

constexpr const char* kUsage =
    "usage: ksmuctl map PID -o FILE.svg\n"
    "Draws what the memory of a process consists of, by address: frames that ksmu shares, zero pages, private pages, huge "
    "pages,\n"
    "files' pages, swapped pages; what is not there is left out. The numbers are printed, too. Nothing of the process is "
    "touched.\n"
    "\n"
    "  -o FILE     the picture\n"
    "  --help      this text\n"
    "\n"
    "exit status: 0; 1 the process is not there, may not be looked at, or has ended meanwhile, or the file cannot be written; 2 "
    "usage.\n";

enum Class : std::uint8_t { kShared, kZero, kPrivate, kHugePage, kFilePage, kSwappedOut, kClasses };
constexpr struct {
  const char *id, *label, *colour;
} kLooks[kClasses] = {
    {"shared", "frames that ksmu shares", "#1f9e5a"}, {"zero", "the kernel's zero page", "#8ec7ee"},
    {"private", "private pages", "#e8853a"},          {"huge", "private, in huge pages", "#8a5aa8"},
    {"file", "files and shared memory", "#b4b4b4"},   {"swapped", "swapped", "#cf3f4f"},
};
constexpr const char *kAbsentId = "absent", *kAbsentLabel = "absent (mapped, and nothing is there)", *kAbsentColour = "#f2f2f2";

// The picture: at most 4,096 cells, of as many pages each as that takes: 2.5 MB in the worst case.
constexpr std::size_t kMostCells = 4096, kCellsARow = 64;
constexpr int kCellWidth = 12, kCellHeight = 14, kRowHeight = 16, kLeft = 130, kTop = 44, kLegendRow = 18;
constexpr std::size_t kLongestName = 80;

using PagesByClass = std::array<std::uint64_t, kClasses>;

std::string Hex(os::Address address) {
  char text[20];
  std::snprintf(text, sizeof text, "%llx", static_cast<unsigned long long>(address));
  return text;
}

// Names are anything but 0: what is no plain ASCII shows as '?', and what is long is cut.
std::string Plain(const std::string& name) {
  std::string plain;
  for (const char c : name.substr(0, kLongestName)) plain += c < 0x20 || c > 0x7e ? '?' : c;
  return name.size() > kLongestName ? plain + "..." : plain;
}

std::string XmlText(const std::string& text) {
  std::string xml;
  for (const char c : text) {
    if (c == '<') xml += "&lt;";
    else if (c == '>') xml += "&gt;";
    else if (c == '&') xml += "&amp;";
    else xml += c;
  }
  return xml;
}

struct Cell {
  std::uint64_t index;  // the address, in cells
  PagesByClass pages{};
  std::size_t mapping;  // the first one in it
};

// Cells that hold something, in the order of addresses. When they are too many, two become one.
class Cells {
 public:
  void Add(std::uint64_t page, std::uint64_t pages, Class what, std::size_t mapping) {
    while (pages) {
      const std::uint64_t index = page / cell_pages_;
      if (cells_.empty() || cells_.back().index != index) {
        if (cells_.size() == kMostCells) {
          Halve();
          continue;
        }
        cells_.push_back({index, {}, mapping});
      }
      const std::uint64_t here = std::min(pages, (index + 1) * cell_pages_ - page);
      cells_.back().pages[what] += here;
      page += here;
      pages -= here;
    }
  }
  const std::vector<Cell>& all() const { return cells_; }
  std::uint64_t cell_pages() const { return cell_pages_; }

 private:
  void Halve() {
    cell_pages_ *= 2;
    std::size_t kept = 0;
    for (const Cell& cell : cells_) {
      if (kept && cells_[kept - 1].index == cell.index / 2) {
        for (int c = 0; c < kClasses; ++c) cells_[kept - 1].pages[c] += cell.pages[c];
      } else {
        cells_[kept] = cell;
        cells_[kept++].index = cell.index / 2;
      }
    }
    cells_.resize(kept);
  }

  std::vector<Cell> cells_;
  std::uint64_t cell_pages_ = 1;
};

Class ClassOf(const ForeignMapping& mapping, std::uint32_t categories) {
  if (!(categories & os::kPresent)) return kSwappedOut;
  if (categories & os::kPfnZero) return kZero;
  if (categories & os::kFile) return mapping.frames ? kShared : kFilePage;
  return categories & os::kHuge ? kHugePage : kPrivate;
}

class Map {
 public:
  bool Look(int pid, std::string* why) {
    Foreign process;
    if (!process.Open(pid, why) || !process.ReadMappings(&mappings_, why)) return false;
    pid_ = pid;
    std::vector<os::PageRun> runs;
    for (std::size_t i = 0; i < mappings_.size(); ++i) {
      const os::Mapping& mapping = mappings_[i].mapping;
      absent_ += (mapping.end - mapping.start) / page_;
      for (os::Address at = mapping.start; at < mapping.end;) {
        process.NextRuns(&at, mapping.end, &runs);
        for (const os::PageRun& run : runs) {
          const Class what = ClassOf(mappings_[i], run.categories);
          const std::uint64_t pages = (run.end - run.start) / page_;
          totals_[what] += pages;
          absent_ -= pages;
          cells_.Add(run.start / page_, pages, what, i);
        }
      }
    }
    std::ifstream comm("/proc/" + std::to_string(pid) + "/comm");
    std::getline(comm, name_);
    return !process.HasEnded(why);
  }

  std::string Draw() const {
    const std::size_t rows = (cells_.all().size() + kCellsARow - 1) / kCellsARow;
    const int legend = kTop + static_cast<int>(rows) * kRowHeight + 24;
    const int width = kLeft + static_cast<int>(kCellsARow) * kCellWidth + 12, height = legend + (kClasses + 1) * kLegendRow + 8;
    std::string svg = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" +
                      std::to_string(width) + "\" height=\"" + std::to_string(height) + "\" viewBox=\"0 0 " +
                      std::to_string(width) + " " + std::to_string(height) + "\">\n<style>\n" +
                      "text { font: 12px monospace; fill: #222 }\n.gap { stroke: #222; stroke-width: 2 }\n." + kAbsentId +
                      " { fill: " + kAbsentColour + " }\n";
    for (const auto& look : kLooks) svg += std::string(".") + look.id + " { fill: " + look.colour + " }\n";
    svg += "</style>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n";
    svg += Text(12, 18, Title());
    svg += Text(12, 34, "a cell: " + Grouped(cells_.cell_pages()) + " pages (" + Grouped(cells_.cell_pages() * page_ / 1024) +
                            " KiB); a black line: addresses are left out, since nothing is there");
    for (std::size_t i = 0; i < cells_.all().size(); ++i) DrawCell(i, &svg);
    for (int c = 0; c < kClasses; ++c)
      svg += LegendRow(legend + c * kLegendRow, kLooks[c].id, kLooks[c].label, totals_[static_cast<std::size_t>(c)]);
    svg += LegendRow(legend + kClasses * kLegendRow, kAbsentId, kAbsentLabel, absent_);
    return svg + "</svg>\n";
  }

  void Print() const {
    std::printf("%s\n", Title().c_str());
    const auto line = [&](const char* id, std::uint64_t pages, const char* label) {
      std::printf("%-8s %18s pages %16s MiB  %s\n", id, Grouped(pages).c_str(), MiB(pages * page_).c_str(), label);
    };
    for (int c = 0; c < kClasses; ++c) line(kLooks[c].id, totals_[static_cast<std::size_t>(c)], kLooks[c].label);
    line(kAbsentId, absent_, kAbsentLabel);
  }

 private:
  static std::string Text(int x, int y, const std::string& text) {
    return "<text x=\"" + std::to_string(x) + "\" y=\"" + std::to_string(y) + "\">" + XmlText(text) + "</text>\n";
  }
  static std::string Box(int x, int y, int width, int height, const char* id) {
    return std::string("<path class=\"") + id + "\" d=\"M" + std::to_string(x) + " " + std::to_string(y) + "h" +
           std::to_string(width) + "v" + std::to_string(height) + "h-" + std::to_string(width) + "z\"/>";
  }
  std::string LegendRow(int y, const char* id, const char* label, std::uint64_t pages) const {
    return std::string("<g id=\"legend-") + id + "\">" + Box(kLeft, y, kCellWidth, kCellHeight, id) +
           Text(kLeft + 20, y + 11, std::string(label) + ": " + Grouped(pages) + " pages, " + MiB(pages * page_) + " MiB") +
           "</g>\n";
  }
  std::string Title() const {
    return "process " + std::to_string(pid_) + (name_.empty() ? "" : " (" + Plain(name_) + ")") + ": " +
           Grouped(mappings_.size()) + " mappings";
  }

  // What is in it, side by side by its share; but whatever is in it at all can be seen.
  void DrawCell(std::size_t number, std::string* svg) const {
    const Cell& cell = cells_.all()[number];
    const int x = kLeft + static_cast<int>(number % kCellsARow) * kCellWidth,
              y = kTop + static_cast<int>(number / kCellsARow) * kRowHeight;
    const os::Address start = cell.index * cells_.cell_pages() * page_;
    if (number % kCellsARow == 0) *svg += Text(12, y + 11, Hex(start));
    std::string title =
        Hex(start) + "-" + Hex(start + cells_.cell_pages() * page_) + " " + Plain(mappings_[cell.mapping].name) + ":";
    *svg += "<g>" + Box(x, y, kCellWidth, kCellHeight, kAbsentId);
    int left = kCellWidth, kinds = 0;
    for (int c = 0; c < kClasses; ++c) kinds += cell.pages[c] != 0;
    for (int c = 0; c < kClasses; ++c) {
      if (!cell.pages[c]) continue;
      --kinds;
      const auto share = static_cast<int>(cell.pages[c] * kCellWidth / cells_.cell_pages());
      const int width = std::min(std::max(share, 1), left - kinds);
      *svg += Box(x + kCellWidth - left, y, width, kCellHeight, kLooks[c].id);
      left -= width;
      title += " " + std::string(kLooks[c].id) + " " + std::to_string(cell.pages[c]);
    }
    if (number && cells_.all()[number - 1].index + 1 != cell.index) {
      *svg +=
          "<path class=\"gap\" d=\"M" + std::to_string(x) + " " + std::to_string(y) + "v" + std::to_string(kCellHeight) + "\"/>";
    }
    *svg += "<title>" + XmlText(title) + "</title></g>\n";
  }

  const std::size_t page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  int pid_ = 0;
  std::string name_;
  std::vector<ForeignMapping> mappings_;
  Cells cells_;
  PagesByClass totals_{};
  std::uint64_t absent_ = 0;
};

int Usage(const std::string& what) {
  std::fprintf(stderr, "ksmuctl map: %s\n%s", what.c_str(), kUsage);
  return 2;
}

int Fail(const std::string& what) {
  std::fprintf(stderr, "ksmuctl map: %s\n", what.c_str());
  return 1;
}

}  // namespace

int RunMap(int argc, char** argv) {
  int pid = 0;
  std::string file, why;
  for (int i = 0; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help") {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (argument == "-o") {
      if (++i == argc || !argv[i][0]) return Usage("-o wants a file");
      file = argv[i];
    } else if (argument.size() > 1 && argument[0] == '-' && !std::isdigit(static_cast<unsigned char>(argument[1]))) {
      return Usage("unknown option " + argument);
    } else if (pid) {
      return Usage("one process at a time");
    } else if (!ParsePid(argv[i], &pid, &why)) {
      return Usage(why);
    }
  }
  if (!pid) return Usage("no process is named");
  if (file.empty()) return Usage("where to draw it is not said: -o FILE.svg");
  Map map;
  if (!map.Look(pid, &why)) return Fail(why);
  const std::string svg = map.Draw();
  FILE* const out = std::fopen(file.c_str(), "we");
  if (!out) return Fail(file + ": " + std::strerror(errno));
  bool written = std::fwrite(svg.data(), 1, svg.size(), out) == svg.size();
  written = std::fclose(out) == 0 && written;
  if (!written) return Fail(file + ": " + std::strerror(errno));
  map.Print();
  return 0;
}

}  // namespace ksmu::tools
