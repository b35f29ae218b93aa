// What the program's pages must contain. Operations in flight may have taken effect already or not: a page has a set of
// possible contents, which what the program reads narrows down. A read that shows none of them is a wrong byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ksmu::model {

using Content = std::shared_ptr<const std::string>;

struct Change {
  enum Kind : std::uint8_t { kFill, kPoke, kZero } kind = kZero;
  std::size_t offset = 0;
  unsigned char value = 0;

  std::string Apply(const std::string& before) const;
};

class ShadowPage {
 public:
  explicit ShadowPage(std::size_t page_size);

  // A change is under way; `id` is below 32 and not in flight on this page.
  void Begin(int id, const Change& change);
  void End(int id);             // it has taken effect
  void Undo(int id);            // it has not, and will not (the access was refused)
  unsigned char Usual() const;  // the byte that it mostly contains
  void AllowZero();             // it may also read as zeros
  bool InFlight() const { return !flying_.empty(); }
  bool InFlight(Change::Kind kind) const;
  // The program has seen this. False: it cannot be.
  bool See(const std::string& content);
  // As a child sees it that is forked now.
  ShadowPage Fork() const;
  std::string Describe() const;  // possible contents, in short

 private:
  struct State {
    Content content;
    std::uint32_t applied;
  };
  struct Flying {
    int id;
    Change change;
  };
  void Add(std::vector<State>* states, State s) const;
  void Close();  // adds what any of the changes in flight can lead to

  std::vector<State> states_;
  std::vector<Flying> flying_;
};

std::string Short(const std::string& content);

}  // namespace ksmu::model
