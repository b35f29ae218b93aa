// What a service tells the service manager that has started it.
#pragma once

#include <string>

namespace ksmu::tools {

// sd_notify(3): a datagram to NOTIFY_SOCKET. 0, also where nobody is to be told; else an errno.
int Notify(const std::string& state);

}  // namespace ksmu::tools
