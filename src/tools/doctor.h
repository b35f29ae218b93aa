// What ksmuctl doctor looks at, in parts: each check adds one finding, which names the cause and the command that mends it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ksmu::tools {

enum class Level : std::uint8_t { kOk, kWarning, kProblem };

struct Finding {
  const char* name;
  Level level;
  std::string cause;
  std::string mend;  // "" where there is nothing to mend
};

// The system's files: of this machine, or of a copy of them under another directory, as sosreport makes one.
class Tree {
 public:
  explicit Tree(std::string root) : root_(std::move(root)) {}
  bool is_copy() const { return !root_.empty(); }
  std::string Path(std::string_view path) const { return root_ + std::string(path); }
  // Without the newlines at its end. Nothing: it is not there, or cannot be read.
  std::optional<std::string> Read(std::string_view path) const;
  std::optional<std::uint64_t> ReadNumber(std::string_view path) const;
  // What stands behind "NAME=" in /etc/os-release, or behind "NAME:" and "NAME " in files of /proc.
  std::string Field(std::string_view path, std::string_view name) const;
  std::string Release() const;  // as `uname -r`; "" if it cannot be told

 private:
  std::string root_;
};

struct Capabilities {
  std::uint64_t effective = 0;
  bool Has(int capability) const { return effective >> capability & 1; }
};
Capabilities ReadCapabilities(const Tree& tree);

using Findings = std::vector<Finding>;

// doctor_kernel.cc: the kernel, its configuration, its limits, its KSM.
void CheckKernel(const Tree& tree, Findings* findings);
void CheckConfig(const Tree& tree, Findings* findings);
void CheckMaps(const Tree& tree, Findings* findings);
void CheckKsm(const Tree& tree, Findings* findings);
// doctor_process.cc: what this process, and so a program that is started from here, may do.
void CheckRights(const Tree& tree, Findings* findings);  // and which calls are refused
void CheckLimits(const Tree& tree, Findings* findings);
void CheckTrial(Findings* findings);
// doctor_broker.cc. Empty: as the library takes them, from the environment.
void CheckBroker(const std::string& socket, const std::string& domain, Findings* findings);

}  // namespace ksmu::tools
