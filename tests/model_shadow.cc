#include "model_shadow.h"

#include <algorithm>
#include <cstdio>
#include <map>

namespace ksmu::model {

std::string Change::Apply(const std::string& before) const {
  switch (kind) {
    case kFill:
      return std::string(before.size(), static_cast<char>(value));
    case kZero:
      return std::string(before.size(), '\0');
    case kPoke:
      break;
  }
  std::string after = before;
  after[offset] = static_cast<char>(value);
  return after;
}

ShadowPage::ShadowPage(std::size_t page_size) {
  states_.push_back({std::make_shared<const std::string>(page_size, '\0'), 0});
}

void ShadowPage::Add(std::vector<State>* states, State s) const {
  for (const State& old : *states) {
    if (old.applied == s.applied && (old.content == s.content || *old.content == *s.content)) return;
  }
  states->push_back(std::move(s));
}

void ShadowPage::Close() {
  for (std::size_t i = 0; i < states_.size(); ++i) {
    for (const Flying& f : flying_) {
      const std::uint32_t bit = 1u << f.id;
      // A discard in flight may zero the page more than once: the library may, at its event, and then the kernel.
      if ((states_[i].applied & bit) != 0 && f.change.kind != Change::kZero) continue;
      const State s = states_[i];
      Add(&states_, {std::make_shared<const std::string>(f.change.Apply(*s.content)), s.applied | bit});
    }
  }
}

void ShadowPage::Begin(int id, const Change& change) {
  flying_.push_back({id, change});
  Close();
}

void ShadowPage::End(int id) {
  const std::uint32_t bit = 1u << id;
  std::vector<State> left;
  for (State& s : states_) {
    if ((s.applied & bit) != 0) Add(&left, {s.content, s.applied & ~bit});
  }
  states_ = std::move(left);
  std::erase_if(flying_, [&](const Flying& f) { return f.id == id; });
  Close();
}

void ShadowPage::Undo(int id) {
  const std::uint32_t bit = 1u << id;
  std::erase_if(states_, [&](const State& s) { return (s.applied & bit) != 0; });
  std::erase_if(flying_, [&](const Flying& f) { return f.id == id; });
}

unsigned char ShadowPage::Usual() const {
  const std::string& content = *states_[0].content;
  return static_cast<unsigned char>(content[content.size() / 2 + 3]);  // no poke goes there
}

void ShadowPage::AllowZero() {
  const std::size_t n = states_.size();
  for (std::size_t i = 0; i < n; ++i) {
    const State s = states_[i];
    Add(&states_, {std::make_shared<const std::string>(s.content->size(), '\0'), s.applied});
  }
}

bool ShadowPage::InFlight(Change::Kind kind) const {
  return std::any_of(flying_.begin(), flying_.end(), [&](const Flying& f) { return f.change.kind == kind; });
}

bool ShadowPage::See(const std::string& content) {
  std::vector<State> left;
  for (const State& s : states_) {
    if (*s.content == content) Add(&left, s);
  }
  if (left.empty()) return false;
  states_ = std::move(left);
  Close();
  return true;
}

ShadowPage ShadowPage::Fork() const {
  ShadowPage child = *this;
  child.flying_.clear();
  std::vector<State> states;
  for (const State& s : states_) Add(&states, {s.content, 0});
  child.states_ = std::move(states);
  return child;
}

std::string Short(const std::string& content) {
  std::map<char, std::size_t> count;
  for (char c : content) ++count[c];
  auto most = std::max_element(count.begin(), count.end(), [](auto& a, auto& b) { return a.second < b.second; });
  char text[64];
  std::snprintf(text, sizeof text, "[%d", static_cast<unsigned char>(most->first));
  std::string out = text;
  int shown = 0;
  for (std::size_t i = 0; i < content.size() && shown < 4; ++i) {
    if (content[i] == most->first) continue;
    std::snprintf(text, sizeof text, " @%zu=%d", i, static_cast<unsigned char>(content[i]));
    out += text;
    ++shown;
  }
  return out + "]";
}

std::string ShadowPage::Describe() const {
  std::string out;
  for (const State& s : states_) out += (out.empty() ? "" : " or ") + Short(*s.content);
  return out;
}

}  // namespace ksmu::model
