#include "engine/log.h"

#include <charconv>
#include <cstring>

#include "os/thread.h"

namespace ksmu::engine {

Sentence& Sentence::operator<<(const char* text) {
  while (*text && size_ + 1 < sizeof text_) text_[size_++] = *text++;
  text_[size_] = 0;
  return *this;
}

Sentence& Sentence::operator<<(std::int64_t number) {
  char digits[24] = {};
  std::to_chars(digits, digits + sizeof digits - 1, number);
  return *this << digits;
}

int Log::Start(Callback callback, void* cookie) {
  if (!callback) return 0;
  callback_ = callback;
  cookie_ = cookie;
  const int error = os::StartThread(&thread_, &Log::Main, this);
  if (error) callback_ = nullptr;
  return error;
}

void Log::Stop() {
  if (!callback_) return;
  ending_.store(true, std::memory_order_release);
  bell_.fetch_add(1, std::memory_order_release);
  os::FutexWake(&bell_, 1);
  os::JoinThread(thread_);
  callback_ = nullptr;
}

bool Log::May(Kind kind, std::uint64_t now) const {
  const Slot& slot = slots_[kind];
  return callback_ && !slot.full.load(std::memory_order_acquire) && (!slot.said_at || now - slot.said_at >= kOncePerNs);
}

void Log::Say(Kind kind, int level, const Sentence& sentence, std::uint64_t now) {
  if (!May(kind, now)) return;
  Slot& slot = slots_[kind];
  slot.level = level;
  slot.said_at = now;
  slot.sentence = sentence;
  slot.full.store(true, std::memory_order_release);
  bell_.fetch_add(1, std::memory_order_release);
  os::FutexWake(&bell_, 1);
}

void Log::Deliver() {
  for (Slot& slot : slots_) {
    if (!slot.full.load(std::memory_order_acquire)) continue;
    callback_(slot.level, slot.sentence.text(), cookie_);
    slot.full.store(false, std::memory_order_release);
  }
}

void* Log::Main(void* self) {
  auto& log = *static_cast<Log*>(self);
  os::NameThisThread("ksmu-log");
  for (;;) {
    const std::uint32_t seen = log.bell_.load(std::memory_order_acquire);
    const bool last = log.ending_.load(std::memory_order_acquire);
    log.Deliver();
    if (last) return nullptr;
    os::FutexWait(&log.bell_, seen, -1);
  }
}

}  // namespace ksmu::engine
