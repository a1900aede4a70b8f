# For working on libpeft itself. Nothing here reaches peft::peft or its users:
# tests, examples and benchmarks link peft_dev privately.

include_guard(GLOBAL)

option(PEFT_PCH "Precompile LibTorch's headers" ON)
option(PEFT_WARNINGS_AS_ERRORS "Stop at warnings" OFF)
option(PEFT_TIDY "Run clang-tidy over the headers (target peft_tidy)" OFF)
set(PEFT_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined")

add_library(peft_dev INTERFACE)
target_link_libraries(peft_dev INTERFACE peft::peft)
if(MSVC)
  target_compile_options(peft_dev INTERFACE /W4 /bigobj /EHsc
                         $<$<BOOL:${PEFT_WARNINGS_AS_ERRORS}>:/WX>)
else()
  target_compile_options(peft_dev INTERFACE -Wall -Wextra -Wshadow
                         $<$<BOOL:${PEFT_WARNINGS_AS_ERRORS}>:-Werror>)
endif()
if(PEFT_SANITIZE)
  # LibTorch is not instrumented, so the vptr check cannot work across it.
  target_compile_options(peft_dev INTERFACE -fsanitize=${PEFT_SANITIZE}
                         -fno-sanitize=vptr -fno-omit-frame-pointer)
  target_link_options(peft_dev INTERFACE -fsanitize=${PEFT_SANITIZE})
endif()

# GCC's collection of garbage costs nearly a tenth of these compilations.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(peft_dev INTERFACE
    "SHELL:--param ggc-min-expand=10000" "SHELL:--param ggc-min-heapsize=4000000")
endif()

# ccache, where it is there; the settings are those that precompiled headers
# need.
find_program(PEFT_CCACHE ccache)
mark_as_advanced(PEFT_CCACHE)
if(PEFT_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER
      "${CMAKE_COMMAND}" -E env
      CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      "${PEFT_CCACHE}")
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    target_compile_options(peft_dev INTERFACE
                           "SHELL:-Xclang -fno-pch-timestamp")
  endif()
endif()

# GCC spends half a minute on every test file, whatever it tests, with the
# templates that libpeft's inline functions use. Where everything is built
# anyway, several files compile as one; each has a namespace of its own for that.
set(PEFT_UNITY 1 CACHE STRING "How many test files compile as one")
mark_as_advanced(PEFT_UNITY)

# A file that includes LibTorch and libpeft takes 2.6 GB to compile, several test
# files as one 3.6 GB. Ninja is told; make gets its number of jobs from the
# preset.
cmake_host_system_information(RESULT _memory QUERY TOTAL_PHYSICAL_MEMORY)
cmake_host_system_information(RESULT _cores QUERY NUMBER_OF_LOGICAL_CORES)
if(PEFT_UNITY GREATER 1)
  math(EXPR _jobs "${_memory} / 3800")
else()
  math(EXPR _jobs "${_memory} / 2800")
endif()
if(_jobs LESS 1)
  set(_jobs 1)
elseif(_jobs GREATER _cores)
  set(_jobs ${_cores})
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS peft_compile=${_jobs})
set(CMAKE_JOB_POOL_COMPILE peft_compile)

# LibTorch's headers are compiled once, for every test, example and benchmark.
# libpeft's own stay out of it, as editing one would rebuild it, except where
# everything is built anyway (PEFT_PCH_ALL): every file then parses less.
option(PEFT_PCH_ALL "Precompile libpeft's headers too" OFF)
mark_as_advanced(PEFT_PCH_ALL)
if(PEFT_PCH AND NOT MSVC)
  file(CONFIGURE OUTPUT peft_pch.cpp
       CONTENT "// Holds the precompiled header.\n" @ONLY)
  add_library(peft_pch OBJECT "${PROJECT_BINARY_DIR}/peft_pch.cpp")
  target_link_libraries(peft_pch PRIVATE peft_dev)
  target_precompile_headers(peft_pch PRIVATE <torch/torch.h>
                            $<$<BOOL:${PEFT_PCH_ALL}>:<peft/peft.h$<ANGLE-R>>)
endif()

# Adds what every private target has: flags and the precompiled header.
function(peft_private_target target)
  target_link_libraries(${target} PRIVATE peft_dev)
  if(TARGET peft_pch)
    target_precompile_headers(${target} REUSE_FROM peft_pch)
  endif()
endfunction()

# Formatting: `format` rewrites, `format_check` complains.
find_program(PEFT_CLANG_FORMAT clang-format)
mark_as_advanced(PEFT_CLANG_FORMAT)
if(PEFT_CLANG_FORMAT)
  file(GLOB_RECURSE _formatted CONFIGURE_DEPENDS
       "${PROJECT_SOURCE_DIR}/include/*.h"
       "${PROJECT_SOURCE_DIR}/tests/*.h" "${PROJECT_SOURCE_DIR}/tests/*.cpp"
       "${PROJECT_SOURCE_DIR}/examples/*.h"
       "${PROJECT_SOURCE_DIR}/examples/*.cpp"
       "${PROJECT_SOURCE_DIR}/benchmarks/*.cpp"
       "${PROJECT_SOURCE_DIR}/benchmarks/*.h")
  add_custom_target(format COMMAND "${PEFT_CLANG_FORMAT}" -i ${_formatted})
  add_custom_target(format_check COMMAND "${PEFT_CLANG_FORMAT}" --dry-run
                    --Werror ${_formatted})
endif()

# peft_tidy: clang-tidy over the headers, one file a folder. The headers are
# reported on; what they include from elsewhere is not.
find_program(PEFT_TIDY_COMMAND clang-tidy)
mark_as_advanced(PEFT_TIDY_COMMAND)
if(PEFT_TIDY AND PEFT_TIDY_COMMAND)
  add_library(peft_tidy OBJECT)
  target_link_libraries(peft_tidy PRIVATE peft_dev)
  # clang's default standard may be older than the compiler's.
  get_target_property(_standard peft::libtorch INTERFACE_COMPILE_FEATURES)
  string(REGEX MATCH "[0-9]+" _standard "${_standard}")
  set_target_properties(peft_tidy PROPERTIES CXX_CLANG_TIDY
    "${PEFT_TIDY_COMMAND};--quiet;--extra-arg-before=-std=c++${_standard}")
  file(GLOB_RECURSE _headers CONFIGURE_DEPENDS RELATIVE
       "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/include/peft/*.h")
  set(_folders "")
  foreach(_header IN LISTS _headers)
    get_filename_component(_folder "${_header}" DIRECTORY)
    string(MAKE_C_IDENTIFIER "${_folder}" _folder)
    list(APPEND _folders ${_folder})
    string(APPEND _includes_${_folder} "#include <${_header}>\n")
  endforeach()
  list(REMOVE_DUPLICATES _folders)
  foreach(_folder IN LISTS _folders)
    file(CONFIGURE OUTPUT "tidy/${_folder}.cpp"
         CONTENT "${_includes_${_folder}}" @ONLY)
    target_sources(peft_tidy PRIVATE "${PROJECT_BINARY_DIR}/tidy/${_folder}.cpp")
  endforeach()
elseif(PEFT_TIDY)
  message(FATAL_ERROR "PEFT_TIDY needs clang-tidy: apt-get install clang-tidy")
endif()
