# One static library per folder of the street. `sluice_library(name DEPENDS ... )` takes every
# source below the folder; adding a file needs no edit here.
function(sluice_library name)
  cmake_parse_arguments(ARG "" "" "DEPENDS" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS *.cc)
  add_library(${name} STATIC ${sources})
  add_library(sluice::${name} ALIAS ${name})
  target_include_directories(${name} PUBLIC $<BUILD_INTERFACE:${CMAKE_SOURCE_DIR}>
                                            $<INSTALL_INTERFACE:include/sluice>)
  target_link_libraries(${name} PUBLIC ${ARG_DEPENDS})
  sluice_warnings(${name})
endfunction()

function(sluice_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  if(SLUICE_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
endfunction()
