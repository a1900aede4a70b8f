# Installs what check_with_peft.py and check_gguf.py import into FOLDER, once:
# 5 GB. Where pip cannot, the two say that they were skipped.
#
#   cmake -DFOLDER=... -DPYTHON=... -P install_peft.cmake

set(pins "${CMAKE_CURRENT_LIST_DIR}/requirements.txt")
set(stamp "${FOLDER}/.complete")
file(SHA256 "${pins}" key)
if(EXISTS "${stamp}")
  file(READ "${stamp}" done)
  if(done STREQUAL key)
    return()
  endif()
endif()
execute_process(COMMAND "${PYTHON}" -c "import gguf, peft, torch, transformers"
                OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE failed)
if(NOT failed)
  return()
endif()
message(STATUS "Installing HF PEFT and torch for the tests of files, once: 5 GB "
               "(-DPEFT_TEST_PYTHON=FILE names a Python that has them)")
file(REMOVE_RECURSE "${FOLDER}" "${FOLDER}.tmp")
file(MAKE_DIRECTORY "${FOLDER}" "${FOLDER}.tmp")
execute_process(
  COMMAND
    "${CMAKE_COMMAND}" -E env PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
    "TMPDIR=${FOLDER}.tmp"
    "${PYTHON}" -m pip install --quiet --no-input --retries 2
    --disable-pip-version-check --no-warn-conflicts --root-user-action ignore
    --no-compile --no-cache-dir --only-binary :all:
    --target "${FOLDER}" --requirement "${pins}"
  OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE failed TIMEOUT 1500)
file(REMOVE_RECURSE "${FOLDER}.tmp")
if(failed)
  file(REMOVE_RECURSE "${FOLDER}")
  string(STRIP "${said}" said)
  string(REGEX REPLACE "^.*\n" "" said "${said}")
  message(STATUS "  not installed (${failed}), pip says: ${said}")
else()
  file(WRITE "${stamp}" "${key}")
endif()
