# The other direction of the golden files: the tests listed here write
# adapters, HF PEFT and adapters load them. Skipped where Python has no peft or
# no adapters; the two need different versions of transformers.

set(PEFT_TEST_PYTHON "" CACHE FILEPATH
    "Python with golden/requirements.txt installed, to check adapters with HF PEFT")
set(_python "${PEFT_TEST_PYTHON}")
if(NOT _python)
  find_program(PEFT_PYTHON3 python3)
  mark_as_advanced(PEFT_PYTHON3)
  set(_python "${PEFT_PYTHON3}")
endif()

option(PEFT_TEST_INSTALL_PEFT
       "Let pip install HF PEFT for the tests of files (5 GB)" OFF)
set(_packages "")
if(PEFT_TEST_INSTALL_PEFT AND _python AND NOT PEFT_TEST_PYTHON)
  set(_packages "${PEFT_DEPS_DIR}/test-python")
  add_custom_target(peft_install_peft ALL
    COMMAND "${CMAKE_COMMAND}" "-DFOLDER=${_packages}" "-DPYTHON=${_python}"
            -P "${CMAKE_CURRENT_LIST_DIR}/install_peft.cmake"
    VERBATIM)
endif()

set(PEFT_TEST_ADAPTERS_PYTHON "" CACHE FILEPATH
    "Python with golden/requirements_adapter_hub.txt installed")

set(_reverse "${CMAKE_CURRENT_BINARY_DIR}/adapters_for_peft")
foreach(_test golden_lora golden_lora_init golden_lora_variants
    golden_tuners golden_parameters golden_hosts golden_additive golden_prompts
    golden_adapters weighted convert_to_lora)
  string(REPLACE "golden_" "" _kind ${_test})
  set_property(TEST test_${_test} APPEND PROPERTY
    ENVIRONMENT "PEFT_REVERSE_DIR=${_reverse}/${_kind}")
  set_tests_properties(test_${_test} PROPERTIES
    FIXTURES_SETUP adapters_for_peft)
endforeach()
set_property(TEST test_gguf APPEND PROPERTY
  ENVIRONMENT "PEFT_GGUF_DIR=${_reverse}/gguf")
set_tests_properties(test_gguf PROPERTIES FIXTURES_SETUP adapters_for_gguf)
if(_python)
  add_test(NAME check_with_peft
    COMMAND "${_python}" "${CMAKE_CURRENT_LIST_DIR}/check_with_peft.py"
            "${_reverse}/lora" "${_reverse}/lora_init"
            "${_reverse}/lora_variants" "${_reverse}/tuners"
            "${_reverse}/parameters" "${_reverse}/hosts"
            "${_reverse}/additive/peft" "${_reverse}/prompts"
            "${_reverse}/adapters"
            "${_reverse}/weighted" "${_reverse}/convert_to_lora")
  set_tests_properties(check_with_peft PROPERTIES
    FIXTURES_REQUIRED adapters_for_peft
    SKIP_RETURN_CODE 77
    TIMEOUT 600)
  add_test(NAME check_gguf
    COMMAND "${_python}" "${CMAKE_CURRENT_LIST_DIR}/check_gguf.py"
            "${_reverse}/gguf")
  set_tests_properties(check_gguf PROPERTIES
    FIXTURES_REQUIRED adapters_for_gguf
    SKIP_RETURN_CODE 77
    TIMEOUT 600)
  if(_packages)
    set_tests_properties(check_with_peft check_gguf PROPERTIES
      ENVIRONMENT "PYTHONPATH=${_packages};OMP_NUM_THREADS=1")
  endif()
endif()
if(PEFT_TEST_ADAPTERS_PYTHON)
  add_test(NAME check_with_adapters
    COMMAND "${PEFT_TEST_ADAPTERS_PYTHON}"
            "${CMAKE_CURRENT_LIST_DIR}/check_with_adapters.py"
            "${_reverse}/additive/adapters")
  set_tests_properties(check_with_adapters PROPERTIES
    FIXTURES_REQUIRED adapters_for_peft
    SKIP_RETURN_CODE 77
    TIMEOUT 600)
endif()
