// ksmuctl doctor: can ksmu work here? Changes nothing.
#include "tools/doctor.h"

#include <sys/stat.h>
#include <sys/utsname.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>

#include "os/text.h"
#include "tools/commands.h"
#include "tools/output.h"

namespace ksmu::tools {
namespace {

constexpr const char* kUsage =
    "usage: ksmuctl doctor [option...]\n"
    "Looks for what keeps ksmu from working, for a program that is started from here as this user, and changes nothing. A line\n"
    "for each check, with the cause; below what is wrong, the command that mends it.\n"
    "\n"
    "  --socket PATH   the broker's socket; KSMU_BROKER, or the default one, unless told otherwise\n"
    "  --domain NAME   a named domain: NAME.sock beside that; can be repeated\n"
    "  --root DIR      read the system's files under DIR, a copy of another machine's (sosreport): what only the machine itself\n"
    "                  can answer (rights, limits, filters, a trial, the broker) is left out\n"
    "  --json          {\"checks\": [{\"name\", \"level\", \"cause\", \"mend\"}...], \"warnings\", \"problems\"}\n"
    "  --help          this text\n"
    "\n"
    "exit status: 0 no problems (there may be warnings); 1 problems; 2 usage.\n";

constexpr const char* kLevels[] = {"ok", "warning", "problem"};

int Usage(const std::string& what) {
  std::fprintf(stderr, "ksmuctl doctor: %s\n%s", what.c_str(), kUsage);
  return 2;
}

void Print(const Findings& findings) {
  for (const Finding& finding : findings) {
    std::printf("%-8s %-10s %s\n", kLevels[static_cast<int>(finding.level)], finding.name, finding.cause.c_str());
    if (!finding.mend.empty()) std::printf("%-8s %-10s mend: %s\n", "", "", finding.mend.c_str());
  }
}

void PrintJson(const Findings& findings, const std::size_t (&counts)[3]) {
  std::printf("{\"checks\": [");
  const char* separator = "\n";
  for (const Finding& finding : findings) {
    std::printf("%s  {\"name\": %s, \"level\": \"%s\", \"cause\": %s, \"mend\": %s}", separator, JsonString(finding.name).c_str(),
                kLevels[static_cast<int>(finding.level)], JsonString(finding.cause).c_str(), JsonString(finding.mend).c_str());
    separator = ",\n";
  }
  std::printf("\n], \"warnings\": %zu, \"problems\": %zu}\n", counts[1], counts[2]);
}

}  // namespace

// --- files -----------------------------------------------------------------------------------------------------------

std::optional<std::string> Tree::Read(std::string_view path) const {
  std::ifstream file(Path(path), std::ios::binary);
  if (!file) return std::nullopt;
  std::ostringstream content;
  content << file.rdbuf();
  // A directory opens, and reads as nothing.
  if (!content && file.peek() != std::ifstream::traits_type::eof()) return std::nullopt;
  std::string text = content.str();
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

std::optional<std::uint64_t> Tree::ReadNumber(std::string_view path) const {
  const auto text = Read(path);
  std::uint64_t number;
  std::string_view rest = text ? std::string_view(*text) : std::string_view();
  return os::TakeDecimal(&rest, &number) ? std::optional(number) : std::nullopt;
}

std::string Tree::Field(std::string_view path, std::string_view name) const {
  std::istringstream lines(Read(path).value_or(""));
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, name.size(), name) != 0 || line.size() == name.size() || !std::strchr(":= ", line[name.size()])) continue;
    const std::size_t start = line.find_first_not_of(":= \t\"", name.size());
    const std::size_t end = line.find_last_not_of(" \t\"");
    return start == line.npos ? "" : line.substr(start, end + 1 - start);
  }
  return "";
}

std::string Tree::Release() const {
  if (auto release = Read("/proc/sys/kernel/osrelease"); release && !release->empty()) return *release;
  if (!is_copy()) {
    utsname name{};
    return uname(&name) == 0 ? name.release : "";
  }
  // "Linux version 6.1.0-18-amd64 (…": in copies that hold no /proc/sys.
  std::string rest = Read("/proc/version").value_or("");
  constexpr std::string_view kBefore = "Linux version ";
  return rest.compare(0, kBefore.size(), kBefore) == 0
             ? rest.substr(kBefore.size(), rest.find(' ', kBefore.size()) - kBefore.size())
             : "";
}

Capabilities ReadCapabilities(const Tree& tree) {
  const std::string field = tree.Field("/proc/self/status", "CapEff");
  std::string_view text = field;
  Capabilities capabilities;
  os::TakeHex(&text, &capabilities.effective);
  return capabilities;
}

// --- the command -----------------------------------------------------------------------------------------------------

int RunDoctor(int argc, char** argv) {
  std::string socket, root;
  std::vector<std::string> domains;
  bool json = false;
  for (int i = 0; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help") {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (option == "--json") {
      json = true;
      continue;
    }
    if (option != "--socket" && option != "--domain" && option != "--root") return Usage("unknown option " + option);
    if (i + 1 == argc || !argv[i + 1][0]) return Usage(option + " wants a value");
    const std::string value = argv[++i];
    if (option == "--socket") socket = value;
    if (option == "--domain") domains.push_back(value);
    if (option == "--root") root = value;
  }
  struct stat about {};
  if (!root.empty() && (stat(root.c_str(), &about) != 0 || !S_ISDIR(about.st_mode))) return Usage(root + " is no directory");
  const Tree tree(root);
  Findings findings;
  CheckKernel(tree, &findings);
  CheckConfig(tree, &findings);
  CheckRights(tree, &findings);
  if (!tree.is_copy()) CheckLimits(tree, &findings);
  CheckMaps(tree, &findings);
  CheckKsm(tree, &findings);
  if (!tree.is_copy()) {
    CheckTrial(&findings);
    if (domains.empty()) domains.emplace_back();
    for (const std::string& domain : domains) CheckBroker(socket, domain, &findings);
  }
  std::size_t counts[3] = {};
  for (const Finding& finding : findings) ++counts[static_cast<int>(finding.level)];
  json ? PrintJson(findings, counts) : Print(findings);
  return counts[static_cast<int>(Level::kProblem)] ? 1 : 0;
}

}  // namespace ksmu::tools
