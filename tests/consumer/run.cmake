# Installs the build into its own tree, then configures, builds and runs the consumer against what
# was installed: the model that comes with it answers about the first seconds of a clip.
# cmake -DBUILD=... -DSOURCE=... -DCLIP=... -DQUESTION=... -DANSWER=... -DCXX=... -DFLAGS=... -P run.cmake
function(step)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(prefix ${BUILD}/consumer/prefix)
file(REMOVE_RECURSE ${BUILD}/consumer)
step(${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
step(${CMAKE_COMMAND} -S ${SOURCE} -B ${BUILD}/consumer/build -G Ninja
     -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${FLAGS}
     -DCMAKE_BUILD_TYPE=Release)
step(${CMAKE_COMMAND} --build ${BUILD}/consumer/build)
execute_process(
  COMMAND ${BUILD}/consumer/build/consumer ${prefix}/share/sluice/models/sluice-mini ${CLIP} ${QUESTION} 2
  COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY OUTPUT_VARIABLE printed)
message("${printed}")
if(NOT printed MATCHES "\n${ANSWER}\n$")
  message(FATAL_ERROR "expected the answer '${ANSWER}', got: ${printed}")
endif()
