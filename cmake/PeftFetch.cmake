# Gets what is not on the machine: pinned versions, checked hashes, into
# PEFT_DEPS_DIR, without root. One line says what is being fetched, a second one
# why it failed. Nothing here stops CMake: each function sets <folder> to where
# the thing lies, or to "".

include_guard(GLOBAL)

option(PEFT_FETCH "Download what is missing" ${PROJECT_IS_TOP_LEVEL})
set(PEFT_DEPS_DIR "${PROJECT_BINARY_DIR}/_deps" CACHE PATH
    "Where downloads are kept; build folders may share it")

# sha256 of the Debian packages that are pinned.
set(_peft_sha256_nlohmann-json3-dev_3.11.2-2_all
    ec57940def6b6186c30be0e0ee81d1e58f86d11a54a145b28686a1e3e4aae801)
set(_peft_sha256_catch2_2.13.10-1_amd64
    0b32d3017609fecef1ecb0827729c2f3cda61332dd1f50da73ea9066fb4fc7ca)
set(_peft_sha256_libcli11-dev_2.1.2+ds-1_all
    f1f6ee9ec053e0e0bcec47345e241b6a8ee006321248b4329e9ce88d2b4b64a8)
set(_peft_sha256_libutf8proc-dev_2.8.0-1_amd64
    d95c5a20e169c99aa3d0dbce1502d49593d4398f2642fa718293a71f247e5913)
set(_peft_sha256_wordnet-base_1%3a3.0-37_all
    61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752)
set(_peft_sha256_bible-kjv-text_4.38_all
    d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a)
set(_peft_sha256_dict-jargon_4.4.7-3.1_all
    405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1)

# One process at a time works in PEFT_DEPS_DIR.
macro(_peft_lock)
  file(MAKE_DIRECTORY "${PEFT_DEPS_DIR}")
  file(LOCK "${PEFT_DEPS_DIR}/.lock" GUARD FUNCTION TIMEOUT 1800)
endmacro()

# Prints the last line of what a tool said, as the reason of a failure.
function(_peft_not_downloaded tool said)
  string(STRIP "${said}" said)
  string(REGEX REPLACE "^.*\n" "" said "${said}")
  string(REGEX REPLACE "^(ERROR|E|fatal): " "" said "${said}")
  message(STATUS "  not downloaded, ${tool} says: ${said}")
endfunction()

# Unpacks the wheels that cmake/requirements-<name>.txt pins into
# PEFT_DEPS_DIR/<name>. The wheels are those of one fixed Python version, so one
# list of hashes serves whatever Python 3 runs pip.
function(peft_fetch_wheels name what folder)
  set(${folder} "" PARENT_SCOPE)
  set(pins "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/requirements-${name}.txt")
  set(target "${PEFT_DEPS_DIR}/${name}")
  set(stamp "${target}/.complete")
  file(SHA256 "${pins}" key)
  _peft_lock()
  if(EXISTS "${stamp}")
    file(READ "${stamp}" done)
    if(done STREQUAL key)
      set(${folder} "${target}" PARENT_SCOPE)
      return()
    endif()
  endif()
  if(NOT PEFT_FETCH)
    return()
  endif()

  string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
  string(REGEX REPLACE "^arm64$" "aarch64" processor "${processor}")
  string(REGEX REPLACE "^amd64$" "x86_64" processor "${processor}")
  set(platforms "")
  if(APPLE)
    set(platforms --platform macosx_11_0_arm64)
  elseif(WIN32)
    set(platforms --platform win_amd64)
  else()
    foreach(tag IN ITEMS manylinux_2_28 manylinux_2_25 manylinux_2_17
                         manylinux2014)
      list(APPEND platforms --platform ${tag}_${processor})
    endforeach()
  endif()

  find_program(python NAMES python3 python NO_CACHE)
  if(NOT python)
    message(STATUS "Not downloading ${what}: there is no python3")
    return()
  endif()
  message(STATUS "Downloading ${what}, once")
  file(REMOVE_RECURSE "${target}")
  file(MAKE_DIRECTORY "${target}" "${PEFT_DEPS_DIR}/tmp")
  execute_process(
    COMMAND
      "${CMAKE_COMMAND}" -E env PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
      "TMPDIR=${PEFT_DEPS_DIR}/tmp"
      "${python}" -m pip install --quiet --no-input --retries 2
      --disable-pip-version-check --no-warn-conflicts --root-user-action ignore
      --no-deps --no-compile --only-binary :all: --require-hashes
      --python-version 3.11 --implementation cp --abi cp311 ${platforms}
      --upgrade --target "${target}" --requirement "${pins}"
    OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed)
  file(REMOVE_RECURSE "${PEFT_DEPS_DIR}/tmp")
  if(failed)
    file(REMOVE_RECURSE "${target}")
    _peft_not_downloaded(pip "${said}")
    return()
  endif()
  file(WRITE "${stamp}" "${key}")
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()

# Runs apt-get with its lists and caches in PEFT_DEPS_DIR, where anyone may
# write.
function(_peft_private_apt folder failed said)
  set(apt "${PEFT_DEPS_DIR}/apt")
  file(MAKE_DIRECTORY "${apt}/lists/partial" "${apt}/cache/archives/partial")
  execute_process(
    COMMAND apt-get -q -o Dir::State::lists=${apt}/lists
            -o Dir::Cache=${apt}/cache -o APT::Sandbox::User=root
            -o Acquire::Retries=1 ${ARGN}
    WORKING_DIRECTORY "${folder}"
    OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE result
    TIMEOUT 300)
  set(${failed} "${result}" PARENT_SCOPE)
  set(${said} "${text}" PARENT_SCOPE)
endfunction()

# Downloads Debian's <package> and unpacks it into PEFT_DEPS_DIR/<package>. The
# pinned <version> is tried first and its hash checked; another release of
# Debian or Ubuntu gives its own version, which apt checks by signature.
function(peft_fetch_debian package version folder)
  set(${folder} "" PARENT_SCOPE)
  set(target "${PEFT_DEPS_DIR}/${package}")
  _peft_lock()
  if(EXISTS "${target}/.complete")
    set(${folder} "${target}" PARENT_SCOPE)
    return()
  endif()
  if(NOT PEFT_FETCH)
    return()
  endif()
  find_program(apt apt-get NO_CACHE)
  find_program(dpkg dpkg-deb NO_CACHE)
  if(NOT apt OR NOT dpkg)
    return()
  endif()

  message(STATUS "Downloading ${package} ${version}, once")
  file(REMOVE_RECURSE "${target}")
  file(MAKE_DIRECTORY "${target}")
  set(said "")
  foreach(lists IN ITEMS system private)
    set(options "")
    if(lists STREQUAL "private")
      get_property(update GLOBAL PROPERTY peft_apt_update)
      if(NOT update)
        _peft_private_apt("${target}" failed said
                          -o APT::Update::Error-Mode=any update)
        set(update done)
        if(failed)
          set(update "failed: ${said}")
        endif()
        set_property(GLOBAL PROPERTY peft_apt_update "${update}")
      endif()
      if(NOT update STREQUAL "done")
        set(said "${update}")
        break()
      endif()
    else()
      # An absolute path in place of the private lists above.
      set(options -o Dir::State::lists=/var/lib/apt/lists)
    endif()
    foreach(wanted IN ITEMS "${package}=${version}" "${package}")
      _peft_private_apt("${target}" failed said ${options} download "${wanted}")
      file(GLOB deb "${target}/${package}_*.deb")
      if(deb AND NOT failed)
        break()
      endif()
    endforeach()
    if(deb AND NOT failed)
      break()
    endif()
  endforeach()
  if(NOT deb OR failed)
    file(REMOVE_RECURSE "${target}")
    _peft_not_downloaded(apt-get "${said}")
    return()
  endif()

  get_filename_component(name "${deb}" NAME)
  string(REGEX REPLACE "\\.deb$" "" name "${name}")
  file(SHA256 "${deb}" hash)
  if(_peft_sha256_${name} AND NOT _peft_sha256_${name} STREQUAL hash)
    file(REMOVE_RECURSE "${target}")
    _peft_not_downloaded(sha256 "${name}.deb is ${hash}, not what is pinned")
    return()
  endif()
  execute_process(COMMAND dpkg-deb -x "${deb}" "${target}"
                  ERROR_VARIABLE said RESULT_VARIABLE failed)
  file(REMOVE "${deb}")
  if(failed)
    file(REMOVE_RECURSE "${target}")
    _peft_not_downloaded(dpkg-deb "${said}")
    return()
  endif()
  file(WRITE "${target}/.complete" "${name}")
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()

# Clones <tag> of a project's git into PEFT_DEPS_DIR/<name>-git and checks that
# it is <commit>.
function(peft_fetch_git name url tag commit folder)
  set(${folder} "" PARENT_SCOPE)
  set(target "${PEFT_DEPS_DIR}/${name}-git")
  _peft_lock()
  if(EXISTS "${target}/.complete")
    set(${folder} "${target}" PARENT_SCOPE)
    return()
  endif()
  if(NOT PEFT_FETCH)
    return()
  endif()
  find_program(git git NO_CACHE)
  if(NOT git)
    message(STATUS "Not downloading ${name}: there is no git")
    return()
  endif()
  message(STATUS "Downloading ${name} ${tag}, once")
  file(REMOVE_RECURSE "${target}")
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -E env GIT_TERMINAL_PROMPT=0
            "${git}" -c http.lowSpeedLimit=1000 -c http.lowSpeedTime=20
            -c advice.detachedHead=false clone --quiet --depth 1
            --branch ${tag} ${url} "${target}"
    OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed
    TIMEOUT 600)
  if(NOT failed)
    execute_process(COMMAND "${git}" -C "${target}" rev-parse HEAD
                    OUTPUT_VARIABLE head OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT head STREQUAL commit)
      set(failed TRUE)
      set(said "${tag} is ${head}, not the pinned ${commit}")
    endif()
  endif()
  if(failed)
    file(REMOVE_RECURSE "${target}")
    _peft_not_downloaded(git "${said}")
    return()
  endif()
  file(WRITE "${target}/.complete" "${commit}")
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()

# From Debian's package, else from the project's git. Sets <folder> to the one
# that holds include/.
function(peft_fetch_package package version name url tag commit folder)
  peft_fetch_debian(${package} ${version} target)
  if(target)
    set(target "${target}/usr")
  else()
    peft_fetch_git(${name} ${url} ${tag} ${commit} target)
  endif()
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()

# What PeftLibTorch.cmake and PeftDependencies.cmake ask for.

function(peft_fetch_libtorch folder)
  peft_fetch_wheels(libtorch "LibTorch 2.11.0 (550 MB, 1.2 GB unpacked)" target)
  if(target)
    set(target "${target}/torch")
  endif()
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()

function(peft_fetch_json folder)
  peft_fetch_package(
    nlohmann-json3-dev 3.11.2-2
    nlohmann-json https://github.com/nlohmann/json.git v3.11.2
    bc889afb4c5bf1c0d8ee29ef35eaaf4c8bef8a5d target)
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()

function(peft_fetch_fmt folder)
  peft_fetch_package(
    libfmt-dev 9.1.0+ds1-2
    fmt https://github.com/fmtlib/fmt.git 9.1.0
    a33701196adfad74917046096bf5a2aa0ab0bb50 target)
  set(${folder} "${target}" PARENT_SCOPE)
endfunction()
