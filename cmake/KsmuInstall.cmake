if(NOT TARGET ksmu)
  return()
endif()
include(CMakePackageConfigHelpers)
# What names no component.
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME ksmu)

# Components are the Debian packages (packaging/debian); a plain install takes them all.
install(DIRECTORY include/ksmu DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT libksmu-dev FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(TARGETS ksmu EXPORT ksmuTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT libksmu0 NAMELINK_COMPONENT libksmu-dev
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
# Apart, because only who links the archive needs liburing's development files.
install(TARGETS ksmu_static EXPORT ksmuStaticTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT libksmu-dev INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(TARGET ksmu_preload)
  install(TARGETS ksmu_preload LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT libksmu0)
  install(TARGETS ksmuctl ksmud RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT ksmu)
  if(TARGET ksmu-fs)
    install(TARGETS ksmu-fs RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT ksmu)
  endif()
endif()

set(ksmu_cmake_dir "${CMAKE_INSTALL_LIBDIR}/cmake/ksmu")
install(EXPORT ksmuTargets NAMESPACE ksmu:: DESTINATION "${ksmu_cmake_dir}" COMPONENT libksmu-dev)
install(EXPORT ksmuStaticTargets NAMESPACE ksmu:: DESTINATION "${ksmu_cmake_dir}" COMPONENT libksmu-dev)
configure_package_config_file(cmake/ksmuConfig.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/ksmuConfig.cmake"
  INSTALL_DESTINATION "${ksmu_cmake_dir}")
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/ksmuConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/ksmuConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/ksmuConfigVersion.cmake"
  DESTINATION "${ksmu_cmake_dir}" COMPONENT libksmu-dev)

# The prefix is found from where ksmu.pc lies, so that an installed tree can be moved; an absolute directory cannot.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}" OR IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(KSMU_PC_PREFIX "${CMAKE_INSTALL_PREFIX}")
  set(KSMU_PC_LIBDIR "${CMAKE_INSTALL_FULL_LIBDIR}")
  set(KSMU_PC_INCLUDEDIR "${CMAKE_INSTALL_FULL_INCLUDEDIR}")
else()
  file(RELATIVE_PATH up "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
  string(REGEX REPLACE "/$" "" up "${up}")
  set(KSMU_PC_PREFIX "\${pcfiledir}/${up}")
  set(KSMU_PC_LIBDIR "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
  set(KSMU_PC_INCLUDEDIR "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file(cmake/ksmu.pc.in "${CMAKE_CURRENT_BINARY_DIR}/ksmu.pc" @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/ksmu.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig" COMPONENT libksmu-dev)
install(FILES LICENSE README.md CHANGELOG.md DESTINATION "${CMAKE_INSTALL_DOCDIR}" COMPONENT ksmu)
# Where the header and the README name them: docs/ beside the README.
install(DIRECTORY docs DESTINATION "${CMAKE_INSTALL_DOCDIR}" COMPONENT ksmu FILES_MATCHING PATTERN "*.md" PATTERN man EXCLUDE)
install(FILES docs/man/libksmu.3 docs/man/ksmu_advise.3 DESTINATION "${CMAKE_INSTALL_MANDIR}/man3" COMPONENT libksmu-dev)
