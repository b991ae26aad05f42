# Builds go through ccache where it is installed and nobody chose otherwise.
find_program(SLUICE_CCACHE ccache)
mark_as_advanced(SLUICE_CCACHE)
foreach(language CXX CUDA)
  if(SLUICE_CCACHE AND NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
    set(CMAKE_${language}_COMPILER_LAUNCHER ${SLUICE_CCACHE})
  endif()
endforeach()
