# What only the tests and examples use: Catch2, CLI11, utf8proc.

include_guard(GLOBAL)

# peft_catch2: Catch2 2.13 or 3.
function(peft_find_catch2 problem)
  set(${problem} "" PARENT_SCOPE)
  add_library(peft_catch2 INTERFACE)
  find_package(Catch2 CONFIG QUIET)
  if(TARGET Catch2::Catch2 AND Catch2_VERSION VERSION_GREATER_EQUAL 2.13)
    target_link_libraries(peft_catch2 INTERFACE Catch2::Catch2)
    return()
  endif()
  peft_fetch_debian(catch2 2.13.10-1 folder)
  if(folder)
    find_package(Catch2 CONFIG QUIET NO_DEFAULT_PATH PATHS "${folder}/usr"
                 PATH_SUFFIXES lib/${CMAKE_LIBRARY_ARCHITECTURE}/cmake/Catch2)
    if(TARGET Catch2::Catch2)
      target_link_libraries(peft_catch2 INTERFACE Catch2::Catch2)
      return()
    endif()
    set(folder "${folder}/usr/include")
  else()
    peft_fetch_git(catch2 https://github.com/catchorg/Catch2.git v2.13.10
                   182c910b4b63ff587a3440e08f84f70497e49a81 folder)
    if(folder)
      set(folder "${folder}/single_include")
    endif()
  endif()
  if(folder)
    target_include_directories(peft_catch2 SYSTEM INTERFACE "${folder}")
  else()
    set(${problem} "Catch2 2.13 or later (Debian: apt-get install catch2), or \
-DPEFT_BUILD_TESTS=OFF" PARENT_SCOPE)
  endif()
endfunction()

# peft_cli11: command lines of the examples.
function(peft_find_cli11 problem)
  set(${problem} "" PARENT_SCOPE)
  add_library(peft_cli11 INTERFACE)
  find_path(PEFT_CLI11_INCLUDE_DIR CLI/CLI.hpp)
  mark_as_advanced(PEFT_CLI11_INCLUDE_DIR)
  set(folder "")
  if(PEFT_CLI11_INCLUDE_DIR)
    set(folder "${PEFT_CLI11_INCLUDE_DIR}")
  else()
    peft_fetch_package(
      libcli11-dev 2.1.2+ds-1
      cli11 https://github.com/CLIUtils/CLI11.git v2.1.2
      70f8072f9dd2292fd0b9f9e5f58e279f60483ed3 target)
    if(target)
      set(folder "${target}/include")
    endif()
  endif()
  if(folder)
    target_include_directories(peft_cli11 SYSTEM INTERFACE "${folder}")
  else()
    set(${problem} "CLI11 (Debian: apt-get install libcli11-dev), or \
-DPEFT_BUILD_EXAMPLES=OFF" PARENT_SCOPE)
  endif()
endfunction()

# peft_utf8proc: Unicode for the examples' tokenizer and its test, linked statically
# where it is fetched.
function(peft_find_utf8proc problem)
  set(${problem} "" PARENT_SCOPE)
  add_library(peft_utf8proc INTERFACE)
  find_path(PEFT_UTF8PROC_INCLUDE_DIR utf8proc.h)
  find_library(PEFT_UTF8PROC_LIBRARY utf8proc)
  mark_as_advanced(PEFT_UTF8PROC_INCLUDE_DIR PEFT_UTF8PROC_LIBRARY)
  if(PEFT_UTF8PROC_INCLUDE_DIR AND PEFT_UTF8PROC_LIBRARY)
    target_include_directories(peft_utf8proc SYSTEM INTERFACE
                               "${PEFT_UTF8PROC_INCLUDE_DIR}")
    target_link_libraries(peft_utf8proc INTERFACE "${PEFT_UTF8PROC_LIBRARY}")
    return()
  endif()
  peft_fetch_debian(libutf8proc-dev 2.8.0-1 folder)
  if(folder)
    file(GLOB library "${folder}/usr/lib/*/libutf8proc.a")
    target_include_directories(peft_utf8proc SYSTEM INTERFACE
                               "${folder}/usr/include")
    target_link_libraries(peft_utf8proc INTERFACE "${library}")
    return()
  endif()
  peft_fetch_git(utf8proc https://github.com/JuliaStrings/utf8proc.git v2.8.0
                 1cb28a66ca79a0845e99433fd1056257456cef8b folder)
  if(folder)
    set(UTF8PROC_INSTALL OFF)
    set(UTF8PROC_ENABLE_TESTING OFF)
    set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
    set(CMAKE_POLICY_VERSION_MINIMUM 3.5) # for CMake 4
    add_subdirectory("${folder}" "${CMAKE_BINARY_DIR}/utf8proc" EXCLUDE_FROM_ALL)
    target_link_libraries(peft_utf8proc INTERFACE utf8proc)
    return()
  endif()
  set(${problem} "utf8proc (Debian: apt-get install libutf8proc-dev), or \
-DPEFT_BUILD_TESTS=OFF -DPEFT_BUILD_EXAMPLES=OFF" PARENT_SCOPE)
endfunction()
