# Run by CPack between staging and packing: what Debian's policy wants in each package (10.1, 12.1, 12.5, 12.7) and no other install does.
cmake_minimum_required(VERSION 3.25)
# Of when it was made, or of SOURCE_DATE_EPOCH.
string(TIMESTAMP date "%a, %d %b %Y %H:%M:%S +0000" UTC)
file(GLOB packages LIST_DIRECTORIES true "${CPACK_TEMPORARY_DIRECTORY}/*")
foreach(package IN LISTS packages)
  get_filename_component(name "${package}" NAME)
  if(NOT name IN_LIST CPACK_COMPONENTS_ALL)
    continue()
  endif()
  set(doc "${package}${CPACK_INSTALL_PREFIX}/share/doc/${name}")
  file(MAKE_DIRECTORY "${doc}")
  configure_file("${CPACK_KSMU_SOURCE_DIR}/packaging/debian/copyright" "${doc}/copyright" COPYONLY)
  configure_file("${CPACK_KSMU_SOURCE_DIR}/CHANGELOG.md" "${doc}/changelog" COPYONLY)
  file(WRITE "${doc}/changelog.Debian"
    "ksmu (${CPACK_KSMU_VERSION}) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- ${CPACK_PACKAGE_CONTACT}  ${date}\n")
  # Of the licence there is one copy in every Debian.
  file(REMOVE "${doc}/LICENSE" "${doc}/CHANGELOG.md")
  # CMake strips programs and shared libraries only.
  file(GLOB archives "${package}${CPACK_INSTALL_PREFIX}/lib/*/*.a" "${package}${CPACK_INSTALL_PREFIX}/lib/*.a")
  foreach(archive IN LISTS archives)
    execute_process(COMMAND strip --strip-debug --enable-deterministic-archives "${archive}" COMMAND_ERROR_IS_FATAL ANY)
  endforeach()
  file(GLOB pages "${package}${CPACK_INSTALL_PREFIX}/share/man/man*/*")
  foreach(page IN LISTS pages ITEMS "${doc}/changelog" "${doc}/changelog.Debian")
    execute_process(COMMAND gzip -9nf "${page}" COMMAND_ERROR_IS_FATAL ANY)
  endforeach()
endforeach()
