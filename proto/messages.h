// Between the engine's types and the messages of sluice/v1/service.proto. For the service and its
// clients; protobuf types go no further. Pure functions, safe on any thread.
#ifndef SLUICE_PROTO_MESSAGES_H_
#define SLUICE_PROTO_MESSAGES_H_

#include "llm/kv_policy.h"
#include "llm/vlm.h"
#include "sluice/v1/service.pb.h"
#include "streaming/scheduler.h"
#include "vision/frame.h"

namespace sluice {

// Throws InputError on unknown values of enumerations and what does not go together; ranges are
// checked by whoever uses the options. most: what a memory's store gets, and at most, with its
// directory.
SessionOptions FromProto(const v1::ModelOptions& message, const GenerationDefaults& defaults,
                         const BlockStoreOptions& most);
// With every method's values told, so that it means the same whatever the defaults are; the
// directory of a memory is not.
// REQUIRES: options that flags can express.
v1::ModelOptions ToProto(const SessionOptions& options);

// What `message` tells on top of `otherwise`. Throws InputError on too many stop strings.
GenerateOptions FromProto(const v1::Generation& message, const GenerateOptions& otherwise);

// What is asked for, within `most`. Throws InputError on what no budget can be.
StreamBudget Granted(const v1::Budgets& asked, const StreamBudget& most);
v1::Budgets ToProto(const StreamBudget& budget);

v1::DropReason ToProto(DropReason reason);
v1::StreamAnswer ToProto(const StreamAnswer& answer);
v1::Evidence ToProto(const Evidence& moment);
Evidence FromProto(const v1::Evidence& message);  // throws as MediaTimeOf does
v1::Model ToProto(const Vlm& vlm);

v1::SessionResponse Refused(const char* request, QuestionId question, const std::string& error);

// Of a frame, in nanoseconds. Throws InputError on what is not in [0, 1e9] seconds.
MediaTime MediaTimeOf(double seconds);

// Sets the time and the picture of `frame`. Throws InputError on a picture that is none, is damaged
// or has more than max_pixels.
void FromProto(const v1::Frame& message, int64_t max_pixels, Frame& frame);

}  // namespace sluice

#endif  // SLUICE_PROTO_MESSAGES_H_
