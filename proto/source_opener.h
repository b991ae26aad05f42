// Opens what clients ask for, where the rules allow it, each in a decoder of its own. Thread-safe.
#ifndef SLUICE_PROTO_SOURCE_OPENER_H_
#define SLUICE_PROTO_SOURCE_OPENER_H_

#include <memory>
#include <string>

#include "proto/source_rules.h"
#include "streaming/metrics.h"

namespace sluice {

class SourceOpener {
 public:
  // Throws InputError on rules that are none, on elements that are none of a source's, and where
  // there are rules but no decoder to run.
  static void Check(const SourceRules& rules, const ApartOptions& decoder);
  SourceOpener(const SourceRules& rules, const ApartOptions& decoder, Metrics& metrics);

  // Logs and counts how it is decoded, or that it was refused. Throws as CheckSource and OpenApart.
  std::shared_ptr<Source> Open(const std::string& url, const SourceOptions& options);

 private:
  Counter& Sources(const char* result);

  const SourceRules rules_;
  const ApartOptions decoder_;
  Metrics& metrics_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_SOURCE_OPENER_H_
