#include "tools/metrics_http.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace ksmu::tools {
namespace {

// What can be part of neither a line nor its end; UTF-8 in a header's value may be.
bool IsGarbage(char c) {
  const auto byte = static_cast<unsigned char>(c);
  return (byte < 0x20 && c != '\r' && c != '\n' && c != '\t') || byte == 0x7f;
}

bool IsToken(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
  });
}

std::string_view Trimmed(std::string_view text) {
  const auto first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// What comes before the separator is cut off `rest`, and returned trimmed.
std::string_view Next(std::string_view* rest, char separator) {
  const auto at = rest->find(separator);
  const std::string_view first = rest->substr(0, at);
  rest->remove_prefix(at == std::string_view::npos ? rest->size() : at + 1);
  return Trimmed(first);
}

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower;
}

// By one value of Accept: whatever of the two it wants more, and can be had.
void Weigh(std::string_view accept, double* open, double* plain) {
  while (!accept.empty()) {
    std::string_view range = Next(&accept, ',');
    const std::string kind = Lower(Next(&range, ';'));
    double weight = 1;
    bool can = true;
    while (!range.empty()) {
      std::string_view parameter = Next(&range, ';');
      const std::string name = Lower(Next(&parameter, '='));
      const std::string value(Trimmed(parameter));
      if (name == "q") weight = std::strtod(value.c_str(), nullptr);
      if (name == "version" && kind == "application/openmetrics-text") can = value == "1.0.0" || value == "0.0.1";
    }
    double* const to = kind == "application/openmetrics-text" ? open : kind == "text/plain" ? plain : nullptr;
    if (to && can) *to = std::max(*to, weight);
  }
}

const char* ReasonOf(int status) {
  switch (status) {
    case 200: return "OK";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 505: return "HTTP Version Not Supported";
    default: return "Bad Request";
  }
}

const char* WordsOf(int status) {
  switch (status) {
    case 404: return "there is /metrics, and nothing else";
    case 405: return "only GET";
    case 408: return "the request did not come to its end in time";
    case 431: return "the request is too long";
    case 500: return "no broker can be looked for: the log says why";
    case 505: return "only HTTP/1.x";
    default: return "this is no request of HTTP/1.x";
  }
}

}  // namespace

bool IsWhole(std::string_view request) {
  return request.size() > kMostOfRequest || request.find("\r\n\r\n") != std::string_view::npos || request.find("\n\n") != std::string_view::npos ||
         std::any_of(request.begin(), request.end(), IsGarbage);
}

HttpRequest ParseRequest(std::string_view request) {
  HttpRequest parsed;
  // A body is of no interest.
  const auto end = std::min(request.find("\r\n\r\n"), request.find("\n\n"));
  const bool too_long = request.size() > kMostOfRequest && end == std::string_view::npos;
  const std::string_view head = request.substr(0, end);
  if (std::any_of(head.begin(), head.end(), IsGarbage)) return parsed;
  if (too_long) return parsed.status = 431, parsed;
  if (end == std::string_view::npos) return parsed;
  std::string_view rest = head;
  const auto line_of = [&rest] {
    const auto at = rest.find('\n');
    std::string_view line = rest.substr(0, at);
    rest.remove_prefix(at == std::string_view::npos ? rest.size() : at + 1);
    if (line.ends_with('\r')) line.remove_suffix(1);
    return line;
  };
  // METHOD target HTTP/1.x, a space between.
  const std::string_view line = line_of();
  const auto one = line.find(' '), two = line.rfind(' ');
  if (one == std::string_view::npos || one == two) return parsed;
  const std::string_view method = line.substr(0, one), version = line.substr(two + 1);
  std::string_view target = line.substr(one + 1, two - one - 1);
  if (!IsToken(method) || target.empty() || target.find_first_of(" \t\r") != std::string_view::npos) return parsed;
  if (version.size() != 8 || !version.starts_with("HTTP/") || !std::isdigit(static_cast<unsigned char>(version[5])) || version[6] != '.' ||
      !std::isdigit(static_cast<unsigned char>(version[7]))) {
    return parsed;
  }
  double open = 0, plain = 0;
  while (!rest.empty()) {
    std::string_view value = line_of();
    const auto colon = value.find(':');
    if (colon == std::string_view::npos || !IsToken(value.substr(0, colon)) || value.find('\r') != std::string_view::npos) return parsed;
    const std::string name = Lower(value.substr(0, colon));
    value.remove_prefix(colon + 1);
    if (name == "accept") Weigh(value, &open, &plain);
  }
  parsed.form = open > 0 && open >= plain ? MetricsForm::kOpenMetrics : MetricsForm::kPrometheus;
  // http://host/path is a request's right as well.
  if (Lower(target.substr(0, 7)) == "http://") {
    const auto path = target.find('/', 7);
    target = path == std::string_view::npos ? "/" : target.substr(path);
  }
  target = target.substr(0, target.find('?'));
  if (version[5] != '1') parsed.status = 505;
  else if (method != "GET") parsed.status = 405;
  else parsed.status = target == "/metrics" || target == "/" ? 200 : target[0] == '/' ? 404 : 400;
  return parsed;
}

std::string HttpAnswer(int status, MetricsForm form, const std::string& body) {
  const std::string text = status == 200 ? body : WordsOf(status) + std::string("\n");
  const char* type = "text/plain; charset=utf-8";
  if (status == 200) type = form == MetricsForm::kOpenMetrics ? "application/openmetrics-text; version=1.0.0; charset=utf-8" : "text/plain; version=0.0.4; charset=utf-8";
  return "HTTP/1.1 " + std::to_string(status) + " " + ReasonOf(status) + "\r\nContent-Type: " + type + "\r\nContent-Length: " + std::to_string(text.size()) +
         (status == 405 ? "\r\nAllow: GET" : "") + "\r\nConnection: close\r\n\r\n" + text;
}

}  // namespace ksmu::tools
