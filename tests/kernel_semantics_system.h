// A LinuxSystem for each test, with the descriptor table of the test itself.
#pragma once

#include <memory>

#include "kernel_semantics.h"
#include "os/linux_system.h"

namespace ksmu::os {

struct Closer {
  void operator()(LinuxSystem* system) const { LinuxSystem::Close(system); }
};
using SystemPointer = std::unique_ptr<LinuxSystem, Closer>;

inline SystemPointer OpenSystem(const LinuxOptions& options = {}) {
  LinuxSystem* system = nullptr;
  ErrorText error;
  EXPECT_EQ(LinuxSystem::Open(options, &system, &error), 0) << error.text;
  return SystemPointer(system);
}

class LinuxSystemTest : public KernelTest {
 protected:
  void SetUp() override {
    KernelTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    system_ = OpenSystem();
    ASSERT_TRUE(system_);
  }
  SystemPointer system_;
};

}  // namespace ksmu::os
