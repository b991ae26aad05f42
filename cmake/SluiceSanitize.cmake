# Sanitizers for everything of ours; what the distribution ships stays uninstrumented.
if(SLUICE_SANITIZE)
  # Instrumented code confuses GCC's look-out for uninitialised variables (std::regex, for one);
  # the release build keeps it.
  add_compile_options(-fsanitize=${SLUICE_SANITIZE} -fno-omit-frame-pointer
                      -fno-sanitize-recover=all)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options(-Wno-maybe-uninitialized)
  endif()
  add_link_options(-fsanitize=${SLUICE_SANITIZE})
  if(SLUICE_SANITIZE MATCHES "thread")
    # libgomp synchronises with futexes that the thread sanitizer does not see, so every parallel
    # region would be reported. Our loops then run their ranges one after the other (the pragma is
    # ignored, the result is the same): what is checked are the threads we start ourselves. The
    # library stays linked for oneDNN and for calls such as omp_get_max_threads.
    set_target_properties(OpenMP::OpenMP_CXX PROPERTIES INTERFACE_COMPILE_OPTIONS
                                                        -Wno-unknown-pragmas)
  endif()
endif()

# Looking at every pointer before it is used doubles what the build takes. The address sanitizer sees
# what is done through a wrong one, so only their alignment is left to look at, and that where bytes
# are taken for numbers: in the engine. Fuzzers look for everything.
if(SLUICE_SANITIZE MATCHES "address" AND SLUICE_SANITIZE MATCHES "undefined" AND NOT SLUICE_FUZZ)
  add_compile_options(-fno-sanitize=null,vptr,object-size,pointer-overflow)
endif()

# For what surrounds the engine: the service, the program, the tests. They take longer to compile
# than to run, so the address sanitizer's checks are calls of functions there.
function(sluice_sanitize_lightly target)
  if(SLUICE_SANITIZE MATCHES "address" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE
                           -fno-sanitize=alignment
                           "SHELL:--param asan-instrumentation-with-call-threshold=0")
  endif()
endfunction()

if(SLUICE_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "SLUICE_FUZZ needs clang (libFuzzer), got ${CMAKE_CXX_COMPILER_ID}; "
                        "use the preset fuzz")
  endif()
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()
