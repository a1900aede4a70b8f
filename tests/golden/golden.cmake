# The other direction of the golden files: test_golden_lora writes adapters,
# HF PEFT loads them. Skipped where Python has no peft.

set(PEFT_TEST_PYTHON "" CACHE FILEPATH
    "Python with golden/requirements.txt installed, to check adapters with HF PEFT")
set(_python "${PEFT_TEST_PYTHON}")
if(NOT _python)
  find_program(PEFT_PYTHON3 python3)
  mark_as_advanced(PEFT_PYTHON3)
  set(_python "${PEFT_PYTHON3}")
endif()

set(_reverse "${CMAKE_CURRENT_BINARY_DIR}/adapters_for_peft")
set_property(TEST test_golden_lora APPEND PROPERTY
  ENVIRONMENT "PEFT_REVERSE_DIR=${_reverse}")
set_tests_properties(test_golden_lora PROPERTIES
  FIXTURES_SETUP adapters_for_peft)
if(_python)
  add_test(NAME check_with_peft
    COMMAND "${_python}" "${CMAKE_CURRENT_LIST_DIR}/check_with_peft.py"
            "${_reverse}")
  set_tests_properties(check_with_peft PROPERTIES
    FIXTURES_REQUIRED adapters_for_peft
    SKIP_RETURN_CODE 77
    TIMEOUT 600)
endif()
