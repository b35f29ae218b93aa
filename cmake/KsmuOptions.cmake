# Flags that every target of the project is compiled with. Not exported: a consumer inherits none of them.
add_library(ksmu_flags INTERFACE)
target_compile_options(ksmu_flags INTERFACE
  -Wall -Wextra -Wpointer-arith -Wvla -Wundef -Wmissing-declarations
  $<$<COMPILE_LANGUAGE:CXX>:-Wnon-virtual-dtor -Woverloaded-virtual>
  # Each of these has been a wrong program, never a matter of taste.
  -Werror=return-type -Werror=format -Werror=switch -Werror=unused-result -Werror=vla -Werror=uninitialized
  -Werror=implicit-fallthrough
  $<$<COMPILE_LANGUAGE:C>:-Werror=implicit-function-declaration>
  # The stacks in a hung test's report come from frame pointers.
  -fno-omit-frame-pointer)
if(KSMU_WERROR)
  target_compile_options(ksmu_flags INTERFACE -Werror)
endif()

if(KSMU_SANITIZE STREQUAL "address")
  set(ksmu_sanitizer_flags -fsanitize=address,undefined -fno-sanitize-recover=undefined)
elseif(KSMU_SANITIZE STREQUAL "thread")
  set(ksmu_sanitizer_flags -fsanitize=thread)
  # g++ warns that it cannot model atomic_thread_fence; the code that uses one says so where it does.
  target_compile_options(ksmu_flags INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
elseif(NOT KSMU_SANITIZE STREQUAL "")
  message(FATAL_ERROR "KSMU_SANITIZE is address, thread or empty, not '${KSMU_SANITIZE}'")
endif()
if(ksmu_sanitizer_flags)
  target_compile_options(ksmu_flags INTERFACE ${ksmu_sanitizer_flags})
  target_link_options(ksmu_flags INTERFACE ${ksmu_sanitizer_flags})
endif()
