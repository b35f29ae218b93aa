// Makes a failing trace smaller: leaves out operations, and what is put in between, while it still fails.
#pragma once

#include <functional>

#include "model_trace.h"

namespace ksmu::model {

Trace Minimise(Trace trace, const std::function<bool(const Trace&)>& fails, int budget);

}  // namespace ksmu::model
