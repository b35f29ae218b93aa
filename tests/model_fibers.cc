#include "model_fibers.h"

#include <dlfcn.h>
#include <pthread.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define START_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define FINISH_SWITCH(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#else
#define START_SWITCH(save, bottom, size) ((void)0)
#define FINISH_SWITCH(save, bottom, size) ((void)0)
#endif

namespace ksmu::model {

Fibers* Fibers::current = nullptr;

Fibers::Fibers(std::function<void()> events) : events_(std::move(events)), stack_(std::size_t{512} << 10) {
  getcontext(&event_);
  event_.uc_stack.ss_sp = stack_.data();
  event_.uc_stack.ss_size = stack_.size();
  event_.uc_link = nullptr;
  const auto self = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&event_, reinterpret_cast<void (*)()>(&Fibers::Enter), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
  current = this;
}

Fibers::~Fibers() {
  if (current == this) current = nullptr;
}

void Fibers::Enter(unsigned high, unsigned low) {
  reinterpret_cast<Fibers*>(static_cast<std::uintptr_t>(high) << 32 | low)->Main();
}

void Fibers::Main() {
  FINISH_SWITCH(nullptr, &scanner_bottom_, &scanner_size_);
  for (;;) {
    half_done_ = true;
    try {
      events_();
    } catch (const Livelock& e) {
      failure_ = std::string("event thread: ") + e.what();
    }
    half_done_ = false;
    Interrupt();
  }
}

void Fibers::RunEvents() {
  in_events_ = true;
  START_SWITCH(&scanner_stack_, stack_.data(), stack_.size());
  swapcontext(&scanner_, &event_);
  FINISH_SWITCH(scanner_stack_, nullptr, nullptr);
  in_events_ = false;
}

void Fibers::Interrupt() {
  START_SWITCH(&event_stack_, scanner_bottom_, scanner_size_);
  swapcontext(&event_, &scanner_);
  FINISH_SWITCH(event_stack_, &scanner_bottom_, &scanner_size_);
}

bool Fibers::Other() {
  if (in_events_) {
    Interrupt();
  } else {
    RunEvents();
  }
  return true;
}

}  // namespace ksmu::model

#if !defined(__SANITIZE_THREAD__)
extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) {
  for (int i = 0; ksmu::model::Fibers::current != nullptr; ++i) {
    const int error = pthread_mutex_trylock(mutex);
    if (error != EBUSY) return error;
    if (i == 100000) {  // no exception may pass through here
      std::fprintf(stderr, "model: the library's two threads wait for each other\n%s\n",
                   ksmu::model::Fibers::current->description.c_str());
      std::abort();
    }
    ksmu::model::Fibers::current->Other();
  }
  static const auto real = reinterpret_cast<int (*)(pthread_mutex_t*)>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
  return real(mutex);
}
#endif
