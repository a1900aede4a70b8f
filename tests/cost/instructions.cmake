# cmake -DVALGRIND=... -DPROGRAM=... -P instructions.cmake
#
# Counts the instructions of every call that step.cpp makes, prints them beside
# the frozen layer's, and fails where an adapter costs more than it may.
# valgrind knows no AVX-512: MKL and libpeft's kernels take their AVX2 paths.

if(NOT VALGRIND)
  message("SKIPPED: there is no valgrind on this machine")
  return()
endif()

set(calls 100) # kCalls in step.cpp
set(counts callgrind.cost)
# With room in malloc's own cache no count depends on the heap's history.
set(ENV{GLIBC_TUNABLES} "glibc.malloc.tcache_count=65535")
set(ENV{OMP_NUM_THREADS} 1)
execute_process(
  COMMAND "${VALGRIND}" --tool=callgrind --collect-atstart=no
          --toggle-collect=counted --dump-after=counted --combine-dumps=yes
          "--callgrind-out-file=${counts}" "${PROGRAM}"
  RESULT_VARIABLE result OUTPUT_VARIABLE names ERROR_VARIABLE errors)
if(result)
  message(FATAL_ERROR "callgrind: ${result}\n${errors}")
endif()

# One name and one total for each call of `counted`, in order.
string(REGEX MATCHALL "[a-z0-9_]+" names "${names}")
file(STRINGS "${counts}" totals REGEX "^totals: [1-9]")
list(LENGTH names expected)
list(LENGTH totals found)
if(NOT expected EQUAL found OR expected EQUAL 0)
  message(FATAL_ERROR "${expected} calls were made, ${found} were counted")
endif()
foreach(name total IN ZIP_LISTS names totals)
  string(REGEX REPLACE "^totals: " "" total "${total}")
  math(EXPR ${name} "${total} / ${calls}")
endforeach()

# The quotient of two counts in thousandths.
function(thousandths result a b)
  math(EXPR value "(1000 * ${${a}} + ${${b}} / 2) / ${${b}}")
  set(${result} ${value} PARENT_SCOPE)
endfunction()
# The same as a decimal.
function(ratio result a b)
  thousandths(value ${a} ${b})
  math(EXPR whole "${value} / 1000")
  math(EXPR rest "1000 + ${value} % 1000")
  string(SUBSTRING "${rest}" 1 3 rest)
  set(${result} "${whole}.${rest}" PARENT_SCOPE)
endfunction()

message("Instructions of a call, Linear(64, 64), r 8, and over the frozen layer")
foreach(name IN LISTS names)
  string(REGEX REPLACE "^([a-z]+_[0-9]+)_.*" "\\1_base" base "${name}")
  ratio(over ${name} ${base})
  message("  ${name}: ${${name}} (${over})")
endforeach()

set(failures "")
# a <= limit/1000 · b
macro(expect a b limit)
  math(EXPR scaled "1000 * ${${a}}")
  math(EXPR bound "${limit} * ${${b}}")
  if(scaled GREATER bound)
    ratio(over ${a} ${b})
    string(APPEND failures "\n  ${a} / ${b} = ${over}, more than ${limit}/1000")
  endif()
endmacro()
foreach(rows 1 16)
  foreach(kind step forward)
    # Never slower than the formula written by hand.
    expect(${kind}_${rows}_adapted ${kind}_${rows}_composed 1000)
  endforeach()
  # Merged, the network is the frozen one; a whole step differs by some 300
  # instructions between two equal layers, either way.
  expect(forward_${rows}_merged forward_${rows}_base 1001)
  expect(step_${rows}_merged step_${rows}_base 1005)
  expect(step_${rows}_adapted_dropout step_${rows}_composed_dropout 1000)
endforeach()
# Measured 1.70; by hand 3.4. Another CPU has other matrix products.
expect(step_16_adapted step_16_base 1800)
if(failures)
  message(FATAL_ERROR "An adapter costs more than it may:${failures}")
endif()
