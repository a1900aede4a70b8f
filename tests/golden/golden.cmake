# The other direction of the golden files: test_golden_lora,
# test_golden_lora_init, test_golden_tuners and test_golden_additive write adapters, HF PEFT and adapters load them. Skipped
# where Python has no peft or no adapters; the two need different versions of
# transformers.

set(PEFT_TEST_PYTHON "" CACHE FILEPATH
    "Python with golden/requirements.txt installed, to check adapters with HF PEFT")
set(_python "${PEFT_TEST_PYTHON}")
if(NOT _python)
  find_program(PEFT_PYTHON3 python3)
  mark_as_advanced(PEFT_PYTHON3)
  set(_python "${PEFT_PYTHON3}")
endif()

set(PEFT_TEST_ADAPTERS_PYTHON "" CACHE FILEPATH
    "Python with golden/requirements_adapter_hub.txt installed")

set(_reverse "${CMAKE_CURRENT_BINARY_DIR}/adapters_for_peft")
foreach(_kind lora lora_init tuners additive)
  set_property(TEST test_golden_${_kind} APPEND PROPERTY
    ENVIRONMENT "PEFT_REVERSE_DIR=${_reverse}/${_kind}")
  set_tests_properties(test_golden_${_kind} PROPERTIES
    FIXTURES_SETUP adapters_for_peft)
endforeach()
if(_python)
  add_test(NAME check_with_peft
    COMMAND "${_python}" "${CMAKE_CURRENT_LIST_DIR}/check_with_peft.py"
            "${_reverse}/lora" "${_reverse}/lora_init" "${_reverse}/tuners"
            "${_reverse}/additive/peft")
  set_tests_properties(check_with_peft PROPERTIES
    FIXTURES_REQUIRED adapters_for_peft
    SKIP_RETURN_CODE 77
    TIMEOUT 600)
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
