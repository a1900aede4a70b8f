# Finds LibTorch and makes the target peft::libtorch, without needing a CUDA
# toolkit. Used by the build and, installed, by find_package(peft).
#
# Looked at in this order, the first usable one is taken and remembered:
#   1. -DPEFT_LIBTORCH=DIR   an unzipped LibTorch, or a wheel's torch folder
#   2. the LibTorch that the project has already found with find_package(Torch)
#   3. Torch_ROOT, Torch_DIR, CMAKE_PREFIX_PATH
#   4. the active Python environment, then python3
#   5. the places where find_package looks
#   6. peft_fetch_libtorch(), where the build provides it
#
# Options: PEFT_CUDA=AUTO|ON|OFF, whether LibTorch's CUDA backend is linked.

include_guard(GLOBAL)

set(PEFT_LIBTORCH_MINIMUM 2.7)
set(PEFT_LIBTORCH "" CACHE PATH
    "An unzipped LibTorch or the torch folder of a Python wheel")
set(PEFT_CUDA AUTO CACHE STRING "Link LibTorch's CUDA backend: AUTO, ON, OFF")
set_property(CACHE PEFT_CUDA PROPERTY STRINGS AUTO ON OFF)

# Sets <result> to the path of library <name> under <root>, or to "".
function(_peft_libtorch_library root name result)
  unset(found)
  find_library(found NAMES ${name} NO_CACHE NO_DEFAULT_PATH PATHS "${root}"
               PATH_SUFFIXES lib lib64 lib/${CMAKE_LIBRARY_ARCHITECTURE})
  if(found)
    set(${result} "${found}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

# Sets <result> to the version of the LibTorch in <root>, or to "" when it does
# not hold the headers and libraries of one.
function(_peft_libtorch_version root result)
  set(${result} "" PARENT_SCOPE)
  _peft_libtorch_library("${root}" torch_cpu library)
  if(NOT library)
    return()
  endif()
  foreach(header IN ITEMS torch/headeronly/version.h
                          torch/csrc/api/include/torch/version.h)
    set(file "${root}/include/${header}")
    if(EXISTS "${file}")
      file(STRINGS "${file}" lines
           REGEX "^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) +[0-9]+")
      list(TRANSFORM lines REPLACE "^.* ([0-9]+) *$" "\\1")
      list(JOIN lines "." version)
      if(version)
        set(${result} "${version}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

# Sets <result> to the torch folder that <python> would import, without
# importing it (that fails on a wheel without its dependencies), or to "".
function(_peft_libtorch_of_python python result)
  set(${result} "" PARENT_SCOPE)
  set(code "import importlib.util as u
s = u.find_spec('torch')
print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')")
  execute_process(
    COMMAND "${python}" -c "${code}"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET RESULT_VARIABLE failed TIMEOUT 60)
  if(NOT failed AND folder)
    file(TO_CMAKE_PATH "${folder}" folder)
    set(${result} "${folder}" PARENT_SCOPE)
  endif()
endfunction()

# Takes <root> as peft_libtorch_root when it is usable; says so when it is a
# LibTorch but too old. A macro: it sets the caller's variable.
macro(_peft_libtorch_try root)
  if(NOT peft_libtorch_root AND NOT "${root}" STREQUAL "")
    _peft_libtorch_version("${root}" _version)
    if(_version AND _version VERSION_LESS PEFT_LIBTORCH_MINIMUM)
      message(STATUS "LibTorch ${_version} in ${root} is not used: libpeft "
                     "needs ${PEFT_LIBTORCH_MINIMUM} or later")
    elseif(_version)
      set(peft_libtorch_root "${root}")
    endif()
  endif()
endmacro()

# As above, for the folder that holds TorchConfig.cmake.
macro(_peft_libtorch_try_config config)
  if(NOT "${config}" STREQUAL "")
    foreach(_up IN ITEMS ../../.. ../../../..)
      get_filename_component(_root "${config}/${_up}" ABSOLUTE)
      _peft_libtorch_try("${_root}")
    endforeach()
  endif()
endmacro()

# Sets peft_libtorch_root (steps 2 to 5 of the list above) in the caller.
function(_peft_libtorch_search)
  set(peft_libtorch_root "")
  if(DEFINED TORCH_INSTALL_PREFIX)
    _peft_libtorch_try("${TORCH_INSTALL_PREFIX}")
  endif()

  _peft_libtorch_try("${Torch_ROOT}")
  _peft_libtorch_try("$ENV{Torch_ROOT}")
  if(Torch_DIR)
    _peft_libtorch_try_config("${Torch_DIR}")
  endif()
  set(suffixes share/cmake/Torch lib/cmake/Torch share/torch)
  find_path(config TorchConfig.cmake PATH_SUFFIXES ${suffixes} NO_CACHE
            NO_CMAKE_SYSTEM_PATH NO_SYSTEM_ENVIRONMENT_PATH)
  if(config)
    _peft_libtorch_try_config("${config}")
  endif()

  foreach(environment IN ITEMS "$ENV{VIRTUAL_ENV}" "$ENV{CONDA_PREFIX}")
    if(environment AND NOT peft_libtorch_root)
      _peft_libtorch_try("${environment}") # conda's libtorch package
      find_program(python NAMES python3 python NO_CACHE NO_DEFAULT_PATH
                   PATHS "${environment}" PATH_SUFFIXES bin Scripts)
      if(python)
        _peft_libtorch_of_python("${python}" folder)
        _peft_libtorch_try("${folder}")
      endif()
      unset(python)
    endif()
  endforeach()
  if(NOT peft_libtorch_root)
    find_program(python NAMES python3 python NO_CACHE)
    if(python)
      _peft_libtorch_of_python("${python}" folder)
      _peft_libtorch_try("${folder}")
    endif()
  endif()

  if(NOT peft_libtorch_root)
    unset(config)
    find_path(config TorchConfig.cmake PATH_SUFFIXES ${suffixes} NO_CACHE)
    if(config)
      _peft_libtorch_try_config("${config}")
    endif()
  endif()
  set(peft_libtorch_root "${peft_libtorch_root}" PARENT_SCOPE)
endfunction()

# Sets <result> to whether every library that LibTorch's CUDA backend needs can
# be loaded: from the CUDA toolkit, from NVIDIA's wheels or from LibTorch itself.
function(_peft_libtorch_cuda_loads library result)
  set(${result} FALSE PARENT_SCOPE)
  find_program(ldd ldd NO_CACHE)
  if(ldd)
    execute_process(COMMAND "${ldd}" "${library}" OUTPUT_VARIABLE needs
                    ERROR_QUIET RESULT_VARIABLE failed TIMEOUT 60)
    if(NOT failed AND NOT needs MATCHES "not found")
      set(${result} TRUE PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Makes peft::libtorch from the LibTorch in <root>.
function(_peft_libtorch_target root version)
  _peft_libtorch_library("${root}" torch_cpu torch_cpu)
  _peft_libtorch_library("${root}" c10 c10)
  set(links "${torch_cpu}" "${c10}")

  # Nothing calls into libtorch_cuda by name: it registers itself when loaded,
  # so the linker has to be told to keep it.
  set(backend CPU)
  _peft_libtorch_library("${root}" torch_cuda torch_cuda)
  _peft_libtorch_library("${root}" c10_cuda c10_cuda)
  if(PEFT_CUDA AND torch_cuda AND c10_cuda)
    set(loads TRUE)
    if(PEFT_CUDA STREQUAL "AUTO" AND NOT WIN32)
      _peft_libtorch_cuda_loads("${torch_cuda}" loads)
    endif()
    if(loads)
      set(backend "CPU and CUDA")
      if(WIN32)
        list(APPEND links "${torch_cuda}" "${c10_cuda}"
             "-INCLUDE:?warp_size@cuda@at@@YAHXZ")
      else()
        get_filename_component(folder "${torch_cuda}" DIRECTORY)
        list(APPEND links
             "-Wl,--push-state,--no-as-needed,\"${torch_cuda}\",\"${c10_cuda}\",--pop-state"
             "-Wl,-rpath-link,\"${folder}\"")
      endif()
    endif()
  elseif(PEFT_CUDA AND NOT PEFT_CUDA STREQUAL "AUTO")
    message(WARNING "PEFT_CUDA is ON, but ${root} has no CUDA backend")
  endif()

  # What LibTorch's own headers ask for: C++20 since 2.12 or so, else C++17.
  set(standard 17)
  set(all_h "${root}/include/torch/csrc/api/include/torch/all.h")
  if(EXISTS "${all_h}")
    file(STRINGS "${all_h}" asks REGEX "C\\+\\+20 or later")
    if(asks)
      set(standard 20)
    endif()
  endif()

  set(definitions "")
  if(NOT MSVC AND NOT APPLE)
    set(definitions _GLIBCXX_USE_CXX11_ABI=1)
  endif()
  if(NOT TARGET Threads::Threads)
    set(THREADS_PREFER_PTHREAD_FLAG ON)
    find_package(Threads REQUIRED)
    set_target_properties(Threads::Threads PROPERTIES IMPORTED_GLOBAL TRUE)
  endif()

  # Imported, so its include folders are system ones: no warnings from them.
  add_library(peft::libtorch INTERFACE IMPORTED GLOBAL)
  set_target_properties(peft::libtorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES
      "${root}/include;${root}/include/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "${definitions}"
    INTERFACE_COMPILE_FEATURES cxx_std_${standard}
    INTERFACE_LINK_LIBRARIES "${links};Threads::Threads;${CMAKE_DL_LIBS}")
  set(summary "LibTorch ${version} (${backend}, C++${standard}): ${root}")
  if(NOT PEFT_LIBTORCH_SUMMARY STREQUAL summary)
    message(STATUS "${summary}")
    set(PEFT_LIBTORCH_SUMMARY "${summary}" CACHE INTERNAL "said once")
  endif()
endfunction()

# Last resort for layouts that are not LibTorch's own (static builds, package
# managers): LibTorch's package file. It stops CMake on a CUDA build without a
# CUDA toolkit, so that case is left out beforehand.
function(_peft_libtorch_from_package result)
  set(${result} FALSE PARENT_SCOPE)
  find_path(config TorchConfig.cmake NO_CACHE HINTS "${Torch_DIR}"
            PATH_SUFFIXES share/cmake/Torch lib/cmake/Torch share/torch
                          lib/${CMAKE_LIBRARY_ARCHITECTURE}/cmake/Torch)
  if(NOT config)
    return()
  endif()
  set(version "")
  if(EXISTS "${config}/TorchConfigVersion.cmake")
    file(STRINGS "${config}/TorchConfigVersion.cmake" version
         REGEX "PACKAGE_VERSION \"[0-9.]+" LIMIT_COUNT 1)
    string(REGEX MATCH "[0-9]+[0-9.]*" version "${version}")
  endif()
  if(version VERSION_LESS PEFT_LIBTORCH_MINIMUM)
    message(STATUS "LibTorch ${version} in ${config} is not used: libpeft "
                   "needs ${PEFT_LIBTORCH_MINIMUM} or later")
    return()
  endif()
  set(caffe2 "${config}/../Caffe2/Caffe2Config.cmake")
  if(EXISTS "${caffe2}")
    file(STRINGS "${caffe2}" cuda REGEX "public/cuda.cmake|find_package\\(CUDA")
    find_package(CUDAToolkit QUIET)
    if(cuda AND NOT CUDAToolkit_FOUND)
      return()
    endif()
  endif()
  find_package(Torch QUIET CONFIG PATHS "${config}" NO_DEFAULT_PATH)
  if(Torch_FOUND)
    add_library(peft::libtorch INTERFACE IMPORTED GLOBAL)
    set_target_properties(peft::libtorch PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE_DIRS}"
      INTERFACE_COMPILE_FEATURES cxx_std_17
      INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES};${CMAKE_DL_LIBS}")
    foreach(imported IN LISTS TORCH_LIBRARIES ITEMS torch_cpu c10)
      if(TARGET ${imported})
        set_target_properties(${imported} PROPERTIES IMPORTED_GLOBAL TRUE)
      endif()
    endforeach()
    set(${result} TRUE PARENT_SCOPE)
    message(STATUS "LibTorch ${version} through find_package: ${config}")
  endif()
endfunction()

# Makes peft::libtorch, or sets <problem> to a text that says what to do.
function(peft_find_libtorch problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET peft::libtorch)
    return()
  endif()

  # What an earlier run found holds as long as it is there and the wish is old.
  set(key "${PEFT_LIBTORCH}|${Torch_DIR}|${Torch_ROOT}|${CMAKE_PREFIX_PATH}")
  set(root "")
  if(PEFT_LIBTORCH_ROOT AND PEFT_LIBTORCH_KEY STREQUAL key)
    _peft_libtorch_version("${PEFT_LIBTORCH_ROOT}" version)
    if(version)
      set(root "${PEFT_LIBTORCH_ROOT}")
    endif()
  endif()

  if(NOT root AND PEFT_LIBTORCH)
    get_filename_component(root "${PEFT_LIBTORCH}" ABSOLUTE
                           BASE_DIR "${CMAKE_BINARY_DIR}")
    _peft_libtorch_version("${root}" version)
    if(NOT version)
      set(${problem} "PEFT_LIBTORCH=${PEFT_LIBTORCH} does not hold a LibTorch: \
include/torch and lib/libtorch_cpu are expected there" PARENT_SCOPE)
      return()
    elseif(version VERSION_LESS PEFT_LIBTORCH_MINIMUM)
      set(${problem} "PEFT_LIBTORCH=${PEFT_LIBTORCH} is LibTorch ${version}, \
${PEFT_LIBTORCH_MINIMUM} or later is needed" PARENT_SCOPE)
      return()
    endif()
  endif()
  if(NOT root)
    _peft_libtorch_search()
    set(root "${peft_libtorch_root}")
  endif()
  if(NOT root)
    _peft_libtorch_from_package(found)
    if(found)
      return()
    endif()
  endif()
  if(NOT root AND COMMAND peft_fetch_libtorch)
    peft_fetch_libtorch(root)
  endif()
  if(NOT root AND PEFT_LIBTORCH_BUILT_WITH)
    set(root "${PEFT_LIBTORCH_BUILT_WITH}")
  endif()
  if(root)
    _peft_libtorch_version("${root}" version)
  endif()
  if(NOT root OR NOT version)
    set(${problem} "LibTorch ${PEFT_LIBTORCH_MINIMUM} or later: unzip one and \
pass -DPEFT_LIBTORCH=DIR, or activate a Python environment that has torch"
        PARENT_SCOPE)
    return()
  endif()

  set(PEFT_LIBTORCH_ROOT "${root}" CACHE INTERNAL "the LibTorch in use")
  set(PEFT_LIBTORCH_KEY "${key}" CACHE INTERNAL "what it was chosen for")
  _peft_libtorch_target("${root}" "${version}")
endfunction()
