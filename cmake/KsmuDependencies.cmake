set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(LIBURING REQUIRED IMPORTED_TARGET liburing)
pkg_check_modules(LIBXXHASH REQUIRED IMPORTED_TARGET libxxhash)

include(CheckIncludeFileCXX)
check_include_file_cxx(sys/sdt.h KSMU_HAVE_SDT)
if(NOT KSMU_HAVE_SDT)
  message(STATUS "sys/sdt.h not found (systemtap-sdt-dev): built without USDT probes")
endif()

# Of the broker alone: the library and the shim make their few calls themselves.
pkg_check_modules(FUSE3 IMPORTED_TARGET fuse3>=3.10)
if(NOT FUSE3_FOUND)
  message(STATUS "fuse3 not found (libfuse3-dev): ksmu-fs is not built")
endif()
pkg_check_modules(LIBNUMA IMPORTED_TARGET numa)
if(LIBNUMA_FOUND)
  set(KSMU_LIBNUMA_LINK PkgConfig::LIBNUMA)
else()
  message(STATUS "numa.h not found (libnuma-dev): ksmud is built without --merge-across-nodes 0")
endif()

# A library that is preloaded should drag in as few others as it can. Debian's liburing.a is position-independent;
# others' may not be, so try.
set(KSMU_LIBURING_LINK PkgConfig::LIBURING)
if(KSMU_STATIC_LIBURING)
  find_library(KSMU_LIBURING_ARCHIVE liburing.a HINTS ${LIBURING_LIBRARY_DIRS})
  if(KSMU_LIBURING_ARCHIVE)
    if(NOT DEFINED KSMU_LIBURING_ARCHIVE_IS_PIC)
      set(probe "${CMAKE_BINARY_DIR}/CMakeFiles/liburing_pic")
      file(WRITE "${probe}/probe.c" "#include <liburing.h>\nint probe(struct io_uring *r) { return io_uring_queue_init(4, r, 0) + io_uring_submit_and_wait(r, 1); }\n")
      execute_process(
        COMMAND ${CMAKE_C_COMPILER} -D_GNU_SOURCE -fPIC -shared "${probe}/probe.c" -o "${probe}/probe.so"
                "${KSMU_LIBURING_ARCHIVE}" -Wl,-z,defs
        RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
      if(failed)
        set(pic OFF)
      else()
        set(pic ON)
      endif()
      set(KSMU_LIBURING_ARCHIVE_IS_PIC ${pic} CACHE INTERNAL "liburing.a links into a shared library")
    endif()
    if(KSMU_LIBURING_ARCHIVE_IS_PIC)
      set(KSMU_LIBURING_LINK "${KSMU_LIBURING_ARCHIVE}")
    endif()
  endif()
endif()
