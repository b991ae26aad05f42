// Errors carry one line that begins with the place and shows both sides:
// "[rms_norm] weight must be [2048], got [1024]". Inside we throw; the program's main, a worker's
// loop and the network border catch.
#ifndef SLUICE_RUNTIME_ERROR_H_
#define SLUICE_RUNTIME_ERROR_H_

#include <stdexcept>
#include <string>

namespace sluice {

// Something failed at run time that the caller could not have known (exit code 1).
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& line) : std::runtime_error(line) {}
};

// What was given is wrong: a file, a flag, a shape, a checkpoint (exit code 2).
class InputError : public Error {
 public:
  using Error::Error;
};

// A byte budget would be exceeded; whatever was asked for did not happen.
class ResourceExhausted : public Error {
 public:
  using Error::Error;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_ERROR_H_
