# What makes a fault harder to use: bounds of the C library's copies, a guard before return
# addresses, pages of the stack touched one by one, targets of jumps marked, addresses unknown,
# nothing that is both written and run. scripts/check_hardening.py reads the program for it.
option(SLUICE_HARDENING "Compile and link with what makes a fault harder to exploit" ON)
if(SLUICE_HARDENING AND NOT SLUICE_SANITIZE)
  include(CheckCXXCompilerFlag)
  include(CheckPIESupported)
  check_pie_supported(LANGUAGES CXX)  # CMake then links what CMAKE_POSITION_INDEPENDENT_CODE says
  foreach(flag -fstack-protector-strong -fstack-clash-protection -fcf-protection)
    string(MAKE_C_IDENTIFIER has${flag} variable)
    check_cxx_compiler_flag(${flag} ${variable})  # -fcf-protection: of x86 alone
    if(${variable})
      add_compile_options($<$<COMPILE_LANGUAGE:CXX>:${flag}>)
    endif()
  endforeach()
  # It needs an optimiser that knows sizes. Some distributions define it themselves.
  add_compile_options("$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<NOT:$<CONFIG:Debug>>>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=3>")
  if(has_fcf_protection AND NOT SLUICE_HAS_CUDA)
    # Debian's start files have no jumps to mark and do not say so; CUDA's library has some.
    add_link_options(LINKER:-z,ibt,-z,shstk)
  endif()
  add_link_options(LINKER:-z,relro LINKER:-z,now LINKER:-z,noexecstack)
endif()
