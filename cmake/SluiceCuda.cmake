# Decides whether the CUDA kernels are built (SLUICE_HAS_CUDA) and makes the language ready.
# ON needs nvcc only: machines without a GPU compile and link the kernels all the same.
find_program(SLUICE_NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
mark_as_advanced(SLUICE_NVCC)

set(SLUICE_HAS_CUDA OFF)
if(SLUICE_CUDA STREQUAL "AUTO")
  if(SLUICE_NVCC AND EXISTS /dev/nvidiactl)
    set(SLUICE_HAS_CUDA ON)
  endif()
elseif(SLUICE_CUDA)
  if(NOT SLUICE_NVCC)
    message(FATAL_ERROR "SLUICE_CUDA is ${SLUICE_CUDA} but there is no nvcc; install the CUDA "
                        "toolkit or configure with -DSLUICE_CUDA=OFF")
  endif()
  set(SLUICE_HAS_CUDA ON)
endif()

if(SLUICE_HAS_CUDA)
  # Ampere (A100; 86: its smaller chips), Ada, Hopper (90a: with its matrix instructions) and the
  # small Blackwells, whose code 12.1 takes too. The PTX of 9.0 serves every other chip from 9.0 on,
  # compiled by the driver when it is loaded: the large Blackwells (10.0, 10.3, 11.0) and what comes
  # after 12.x. PTX of 12.0 would not do for the former, and has nothing that our kernels use and
  # 9.0 lacks. Named before the language is enabled: the default of this CMake is an architecture
  # that recent toolkits no longer know.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 120-real 90-virtual)
  endif()
  if(NOT DEFINED CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${SLUICE_NVCC})
  endif()
  enable_language(CUDA)
  if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    # CMake 3.25 does not know yet that nvcc 12 and later compile C++20.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  set(CMAKE_CUDA_STANDARD 20)  # after the language: its compiler test must not ask for it yet
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit REQUIRED)
endif()
message(STATUS "CUDA kernels: ${SLUICE_HAS_CUDA}")
