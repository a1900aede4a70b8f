# What only the benchmarks use: Google Benchmark, and the Python that runs HF
# PEFT for the comparison.

include_guard(GLOBAL)

option(PEFT_BENCH_COMPARE "Build the comparison with HF PEFT" OFF)
set(PEFT_BENCH_PYTHON "" CACHE FILEPATH
    "A Python with benchmarks/requirements.txt installed")
set(PEFT_BENCH_ARGUMENTS "" CACHE STRING
    "More arguments for the comparison, as a list")

# sha256 of the Debian packages that are pinned.
set(_peft_sha256_libbenchmark-dev_1.7.1-1_amd64
    82c9048e75f3d83b3b8a349144d5ca55487eb370b34167ffe12f8060300ed462)
set(_peft_sha256_libbenchmark1debian_1.7.1-1_amd64
    59f0902a880853ef0fc658ecee85da35dd2ab03485a7cf305cad233e8b607621)

# peft_benchmark: Google Benchmark.
function(peft_find_benchmark problem)
  set(${problem} "" PARENT_SCOPE)
  add_library(peft_benchmark INTERFACE)
  find_package(benchmark CONFIG QUIET)
  if(TARGET benchmark::benchmark)
    target_link_libraries(peft_benchmark INTERFACE benchmark::benchmark)
    return()
  endif()
  peft_fetch_debian(libbenchmark-dev 1.7.1-1 headers)
  peft_fetch_debian(libbenchmark1debian 1.7.1-1 library)
  file(GLOB file "${library}/usr/lib/*/libbenchmark.so.1debian")
  if(headers AND library AND file)
    target_include_directories(peft_benchmark SYSTEM INTERFACE
                               "${headers}/usr/include")
    target_link_libraries(peft_benchmark INTERFACE "${file}")
    return()
  endif()
  peft_fetch_git(benchmark https://github.com/google/benchmark.git v1.7.1
                 d572f4777349d43653b21d6c2fc63020ab326db2 folder)
  if(folder)
    set(BENCHMARK_ENABLE_TESTING OFF)
    set(BENCHMARK_ENABLE_INSTALL OFF)
    set(BENCHMARK_ENABLE_WERROR OFF)
    set(CMAKE_POLICY_DEFAULT_CMP0077 NEW)
    set(CMAKE_POLICY_VERSION_MINIMUM 3.5) # for CMake 4
    add_subdirectory("${folder}" "${CMAKE_BINARY_DIR}/benchmark" EXCLUDE_FROM_ALL)
    target_link_libraries(peft_benchmark INTERFACE benchmark::benchmark)
    return()
  endif()
  set(${problem} "Google Benchmark (Debian: apt-get install libbenchmark-dev)"
      PARENT_SCOPE)
endfunction()

# Sets <result> to what <code> prints in <python>, or to "".
function(_peft_bench_ask python code result)
  execute_process(COMMAND "${python}" -c "${code}"
                  OUTPUT_VARIABLE said OUTPUT_STRIP_TRAILING_WHITESPACE
                  ERROR_QUIET RESULT_VARIABLE failed TIMEOUT 60)
  if(failed)
    set(said "")
  endif()
  set(${result} "${said}" PARENT_SCOPE)
endfunction()

# Makes a virtual environment with benchmarks/requirements.txt in PEFT_DEPS_DIR
# and sets <result> to its Python, or to "".
function(_peft_bench_environment result)
  set(${result} "" PARENT_SCOPE)
  set(pins "${PROJECT_SOURCE_DIR}/benchmarks/requirements.txt")
  set(target "${PEFT_DEPS_DIR}/bench-python")
  set(stamp "${target}/.complete")
  set(made "${target}/bin/python")
  if(WIN32)
    set(made "${target}/Scripts/python.exe")
  endif()
  file(SHA256 "${pins}" key)
  _peft_lock()
  if(EXISTS "${stamp}")
    file(READ "${stamp}" done)
    if(done STREQUAL key)
      set(${result} "${made}" PARENT_SCOPE)
      return()
    endif()
  endif()
  find_program(python NAMES python3 python NO_CACHE)
  if(NOT PEFT_FETCH OR NOT python)
    return()
  endif()
  message(STATUS "Installing HF PEFT and torch for the comparison, once: 5 GB "
                 "(-DPEFT_BENCH_PYTHON=FILE names a Python that has them)")
  file(REMOVE_RECURSE "${target}")
  execute_process(COMMAND "${python}" -m venv "${target}"
                  OUTPUT_VARIABLE said ERROR_VARIABLE said
                  RESULT_VARIABLE failed)
  if(NOT failed)
    file(MAKE_DIRECTORY "${target}/tmp")
    execute_process(
      COMMAND "${CMAKE_COMMAND}" -E env PIP_USER=0 "TMPDIR=${target}/tmp"
              "${made}" -m pip install --quiet --no-input --retries 2
              --disable-pip-version-check --no-cache-dir --requirement "${pins}"
      OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
    file(REMOVE_RECURSE "${target}/tmp")
  endif()
  if(failed)
    file(REMOVE_RECURSE "${target}")
    _peft_not_downloaded(pip "${said}")
    return()
  endif()
  file(WRITE "${stamp}" "${key}")
  set(${result} "${made}" PARENT_SCOPE)
endfunction()

# Sets PEFT_BENCH_INTERPRETER, and PEFT_LIBTORCH to the LibTorch in it: both
# sides of the comparison live in one process. A macro: it sets the caller's.
macro(peft_use_bench_python)
  set(PEFT_BENCH_INTERPRETER "${PEFT_BENCH_PYTHON}")
  if(NOT PEFT_BENCH_INTERPRETER)
    _peft_bench_environment(PEFT_BENCH_INTERPRETER)
  endif()
  if(NOT PEFT_BENCH_INTERPRETER)
    message(FATAL_ERROR
      "The comparison with HF PEFT needs a Python: -DPEFT_BENCH_PYTHON=FILE, "
      "where benchmarks/requirements.txt is installed")
  endif()
  _peft_bench_ask("${PEFT_BENCH_INTERPRETER}" "import peft, transformers
print(peft.__version__)" _peft_bench_hf)
  _peft_libtorch_of_python("${PEFT_BENCH_INTERPRETER}" _peft_bench_torch)
  if(NOT _peft_bench_hf OR NOT _peft_bench_torch)
    message(FATAL_ERROR
      "${PEFT_BENCH_INTERPRETER} cannot import peft and transformers: install "
      "benchmarks/requirements.txt there")
  endif()
  set(PEFT_LIBTORCH "${_peft_bench_torch}")
  message(STATUS "HF PEFT ${_peft_bench_hf}: ${PEFT_BENCH_INTERPRETER}")
endmacro()

# Adds <target>, a Python module of libpeft made of the other arguments.
function(peft_add_python_module target)
  _peft_bench_ask("${PEFT_BENCH_INTERPRETER}"
    "import sysconfig as s; print(s.get_path('include'))" headers)
  _peft_bench_ask("${PEFT_BENCH_INTERPRETER}"
    "import sysconfig as s; print(s.get_config_var('EXT_SUFFIX'))" suffix)
  if(NOT EXISTS "${headers}/Python.h")
    message(FATAL_ERROR "The comparison needs Python's headers in ${headers} "
                        "(Debian: apt-get install python3-dev)")
  endif()
  _peft_libtorch_library("${PEFT_LIBTORCH_ROOT}" torch_python torch_python)
  add_library(${target} MODULE ${ARGN})
  target_link_libraries(${target} PRIVATE peft_dev "${torch_python}")
  target_include_directories(${target} SYSTEM PRIVATE "${headers}")
  target_compile_definitions(${target} PRIVATE TORCH_EXTENSION_NAME=${target})
  set_target_properties(${target} PROPERTIES
    PREFIX "" SUFFIX "${suffix}" CXX_VISIBILITY_PRESET hidden)
endfunction()

if(PEFT_BENCH_COMPARE)
  peft_use_bench_python()
endif()
