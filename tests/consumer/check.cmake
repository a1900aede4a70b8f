# What libpeft must not force on its users: flags, and targets of its own tests.
foreach(property IN ITEMS INTERFACE_COMPILE_OPTIONS INTERFACE_LINK_OPTIONS
                          INTERFACE_PRECOMPILE_HEADERS)
  get_target_property(value peft::peft ${property})
  if(value)
    message(FATAL_ERROR "peft::peft has ${property} ${value}")
  endif()
endforeach()
foreach(name IN ITEMS peft_dev peft_tests peft_catch2 demo format)
  if(TARGET ${name})
    message(FATAL_ERROR "the target ${name} reached a user")
  endif()
endforeach()
