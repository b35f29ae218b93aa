// One request of HTTP/1.x, and what is answered to it: no more than a scrape takes.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "tools/metrics_text.h"

namespace ksmu::tools {

inline constexpr std::size_t kMostOfRequest = 8192;  // bytes, of its line and headers

// Whether it has come as a whole; or cannot become one, and need not be waited for.
bool IsWhole(std::string_view request);

struct HttpRequest {
  int status = 400;  // 200: metrics are asked for, in this form
  MetricsForm form = MetricsForm::kPrometheus;
};
// As far as it has come. OpenMetrics is what those get who ask for it, as other exporters do it.
HttpRequest ParseRequest(std::string_view request);

// With headers. `body` is what goes with 200; with others goes a line that says what they mean.
std::string HttpAnswer(int status, MetricsForm form, const std::string& body);

}  // namespace ksmu::tools
