# Builds go through ccache where it is installed and nobody chose otherwise. Paths below the sources
# count as relative ones, so that several checkouts share what one of them has compiled (a debugger
# then knows the directory of the first).
find_program(SLUICE_CCACHE ccache)
mark_as_advanced(SLUICE_CCACHE)
foreach(language CXX CUDA)
  if(SLUICE_CCACHE AND NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
    set(CMAKE_${language}_COMPILER_LAUNCHER
        env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${SLUICE_CCACHE})
  endif()
endforeach()
