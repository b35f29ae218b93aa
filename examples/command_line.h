// Long options from one table: name, value, help, and what to do with the value.
#ifndef KSMU_EXAMPLES_COMMAND_LINE_H_
#define KSMU_EXAMPLES_COMMAND_LINE_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace examples {

class CommandLine {
 public:
  enum class Result { kRun, kHelp, kUsage };

  CommandLine(const char* program, const char* what_it_does, const char* exit_statuses)
      : program_(program), about_(what_it_does), exits_(exit_statuses) {}

  void Flag(const char* name, bool* value, const char* help, bool set_to = true) {
    options_.push_back({name, "", help, [value, set_to](const char*) { return *value = set_to, true; }});
  }
  void Number(const char* name, const char* unit, uint64_t* value, uint64_t low, uint64_t high, const char* help) {
    options_.push_back({name, unit, std::string(help) + " (" + std::to_string(*value) + ")", [=](const char* text) {
                          char* end;
                          errno = 0;
                          const unsigned long long number = strtoull(text, &end, 10);
                          if (errno != 0 || *end != 0 || *text < '0' || *text > '9') return false;
                          *value = number;
                          return number >= low && number <= high;
                        }});
  }
  void Text(const char* name, const char* unit, std::string* value, const char* help) {
    options_.push_back({name, unit, std::string(help) + (value->empty() ? "" : " (" + *value + ")"),
                        [value](const char* text) { return *value = text, *text != 0; }});
  }

  // Takes --name=VALUE and --name VALUE. Explains itself on stdout (--help) or the mistake on stderr.
  Result Parse(int argc, char** argv) const {
    for (int i = 1; i < argc; ++i) {
      const char* argument = argv[i];
      if (strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0) return Help(), Result::kHelp;
      const char* equals = strchr(argument, '=');
      const std::string name(argument, equals != nullptr ? static_cast<size_t>(equals - argument) : strlen(argument));
      const Option* option = Find(name);
      if (option == nullptr) return Mistake("unknown option " + name);
      const char* value = equals != nullptr ? equals + 1 : "";
      if (option->unit[0] == 0 && equals != nullptr) return Mistake(name + " takes no value");
      if (option->unit[0] != 0 && equals == nullptr) {
        if (++i == argc) return Mistake(name + " needs a value");
        value = argv[i];
      }
      if (!option->set(value)) return Mistake(name + ": " + value + " is no value for it");
    }
    return Result::kRun;
  }

 private:
  struct Option {
    std::string name;
    const char* unit;
    std::string help;
    std::function<bool(const char*)> set;
  };

  const Option* Find(const std::string& name) const {
    for (const Option& option : options_) {
      if ("--" + option.name == name) return &option;
    }
    return nullptr;
  }
  Result Mistake(const std::string& what) const {
    fprintf(stderr, "%s: %s; see %s --help\n", program_, what.c_str(), program_);
    return Result::kUsage;
  }
  void Help() const {
    printf("usage: %s [option...]\n%s\n\n", program_, about_);
    for (const Option& option : options_) {
      printf("  --%-22s %s\n", (option.name + (option.unit[0] != 0 ? " " : "") + option.unit).c_str(),
             option.help.c_str());
    }
    printf("  --%-22s %s\n\n%s\n", "help", "this text", exits_);
  }

  const char* program_;
  const char* about_;
  const char* exits_;
  std::vector<Option> options_;
};

}  // namespace examples

#endif  // KSMU_EXAMPLES_COMMAND_LINE_H_
