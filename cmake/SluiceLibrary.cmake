# One static library per folder of the street. `sluice_library(name DEPENDS ... )` takes every
# source below the folder (CUDA sources where CUDA is built); adding a file needs no edit here.
# A folder that holds only headers so far becomes an interface. HOPPER names CUDA sources of Hopper's
# own instructions, which are compiled for that architecture alone. WITHOUT names folders below that
# are no part of it.
function(sluice_library name)
  cmake_parse_arguments(ARG "" "" "DEPENDS;HOPPER;WITHOUT" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS *.cc)
  foreach(folder ${ARG_WITHOUT})
    list(FILTER sources EXCLUDE REGEX "^${CMAKE_CURRENT_SOURCE_DIR}/${folder}/")
  endforeach()
  file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS *.cu)
  if(SLUICE_HAS_CUDA)
    list(APPEND sources ${cuda_sources})
    if(ARG_HOPPER)
      list(TRANSFORM ARG_HOPPER PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
      list(REMOVE_ITEM sources ${ARG_HOPPER})
      add_library(${name}_hopper OBJECT ${ARG_HOPPER})
      set_target_properties(${name}_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real)
      target_compile_definitions(${name}_hopper PRIVATE SLUICE_HAS_CUDA=1)
      target_include_directories(${name}_hopper PRIVATE ${PROJECT_SOURCE_DIR})
      sluice_warnings(${name}_hopper)
      list(APPEND sources $<TARGET_OBJECTS:${name}_hopper>)
    endif()
  endif()
  set(scope PUBLIC)
  if(sources)
    add_library(${name} STATIC ${sources})
    sluice_warnings(${name})
    if(SLUICE_HAS_CUDA AND cuda_sources)
      target_compile_definitions(${name} PRIVATE SLUICE_HAS_CUDA=1)
      target_link_libraries(${name} PRIVATE CUDA::cudart_static CUDA::cublasLt)
    endif()
  else()
    set(scope INTERFACE)
    add_library(${name} INTERFACE)
  endif()
  add_library(sluice::${name} ALIAS ${name})
  target_include_directories(${name} ${scope} $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
                                              $<INSTALL_INTERFACE:include/sluice>)
  target_compile_features(${name} ${scope} cxx_std_20)
  target_link_libraries(${name} ${scope} ${ARG_DEPENDS})
  set_property(GLOBAL APPEND PROPERTY SLUICE_LIBRARIES ${name})
endfunction()

function(sluice_warnings target)
  # GCC 12 sees overlapping copies inside std::string where there are none (its bug 105329).
  target_compile_options(${target} PRIVATE
                         $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
                         $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)
  if(SLUICE_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endfunction()
