// Every token compressor by name. A new method is its own file and a line in registry.cc.
#ifndef SLUICE_COMPRESSION_REGISTRY_H_
#define SLUICE_COMPRESSION_REGISTRY_H_

#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "compression/token_compressor.h"

namespace sluice {

struct CompressorEntry {
  std::string_view name;       // "stc-pruner"
  std::string_view summary;    // one line for a help text
  std::string_view parameter;  // what the number after '=' means
  double default_value;        // of the parameter
  std::unique_ptr<TokenCompressor> (*make)(double parameter);
};

// All of them; none is on by default.
std::span<const CompressorEntry> TokenCompressors();

// `spec`: "NAME" or "NAME=NUMBER", e.g. "stc-pruner=0.5". Throws InputError on an unknown
// name, telling those that exist, and on a number that is malformed or out of the method's range.
std::unique_ptr<TokenCompressor> MakeTokenCompressor(std::string_view spec);

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_REGISTRY_H_
