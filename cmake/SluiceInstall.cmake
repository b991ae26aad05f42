# `cmake --install`: the libraries with their headers, a find_package(sluice) configuration and,
# with the service, the program and the model it ships with.
include(CMakePackageConfigHelpers)

get_property(libraries GLOBAL PROPERTY SLUICE_LIBRARIES)
add_library(sluice_all INTERFACE)
add_library(sluice::sluice ALIAS sluice_all)
target_link_libraries(sluice_all INTERFACE ${libraries})
set_target_properties(sluice_all PROPERTIES EXPORT_NAME sluice)

install(TARGETS sluice_all ${libraries} EXPORT sluiceTargets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
foreach(library ${libraries})
  string(REPLACE "sluice_" "" folder ${library})
  if(IS_DIRECTORY ${PROJECT_SOURCE_DIR}/${folder})  # not of sluice_messages, which are generated
    install(DIRECTORY ${PROJECT_SOURCE_DIR}/${folder}
            DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/sluice FILES_MATCHING PATTERN "*.h")
  endif()
endforeach()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sluice)
install(EXPORT sluiceTargets NAMESPACE sluice:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/sluiceConfig.cmake.in
                              ${PROJECT_BINARY_DIR}/sluiceConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/sluiceConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/sluiceConfig.cmake ${PROJECT_BINARY_DIR}/sluiceConfigVersion.cmake
        DESTINATION ${package_dir})

install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/models/sluice-mini
        DESTINATION ${CMAKE_INSTALL_DATADIR}/sluice/models)
