// Whether a pidfd is this process's own.
#pragma once

namespace ksmu::preload {
bool IsOwnPidfd(int pidfd);
}
