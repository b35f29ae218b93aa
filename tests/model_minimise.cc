#include "model_minimise.h"

#include <algorithm>

namespace ksmu::model {
namespace {

// Leaves out pieces of half the length, a quarter ..., single ones, for as long as that helps.
template <typename T>
bool Shrink(std::vector<T>* whole, const std::function<bool(const std::vector<T>&)>& fails, int* budget) {
  bool any = false;
  for (std::size_t piece = std::max<std::size_t>(whole->size() / 2, 1);; piece = std::max<std::size_t>(piece / 2, 1)) {
    bool smaller = false;
    for (std::size_t at = 0; at < whole->size() && *budget > 0;) {
      std::vector<T> less = *whole;
      const std::size_t n = std::min(piece, less.size() - at);
      less.erase(less.begin() + static_cast<std::ptrdiff_t>(at), less.begin() + static_cast<std::ptrdiff_t>(at + n));
      --*budget;
      if (fails(less)) {
        *whole = std::move(less);
        smaller = any = true;
      } else {
        at += n;
      }
    }
    if (*budget <= 0 || (piece == 1 && !smaller) || whole->empty()) return any;
  }
}

}  // namespace

Trace Minimise(Trace trace, const std::function<bool(const Trace&)>& fails, int budget) {
  for (bool again = true; again && budget > 0;) {
    again = Shrink<Op>(
        &trace.ops,
        [&](const std::vector<Op>& ops) {
          Trace t = trace;
          t.ops = ops;
          return fails(t);
        },
        &budget);
    std::erase_if(trace.actions, [&](const Action& a) {
      return a.op >= 0 && std::none_of(trace.ops.begin(), trace.ops.end(), [&](const Op& op) { return op.id == a.op; });
    });
    again |= Shrink<Action>(
        &trace.actions,
        [&](const std::vector<Action>& actions) {
          Trace t = trace;
          t.actions = actions;
          return fails(t);
        },
        &budget);
  }
  return trace;
}

}  // namespace ksmu::model
