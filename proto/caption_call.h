// One connection of the call Caption: a source, described at an interval.
#ifndef SLUICE_PROTO_CAPTION_CALL_H_
#define SLUICE_PROTO_CAPTION_CALL_H_

#include <grpcpp/support/server_callback.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "proto/stream_hub.h"

namespace sluice {

// Runs on a thread of its own. A recording waits for the model, so that nothing of it is left out;
// of a live source frames are dropped and a caption that takes too long is waited for alone.
class CaptionCall final : public grpc::ServerWriteReactor<v1::CaptionResponse>,
                          public std::enable_shared_from_this<CaptionCall> {
 public:
  static CaptionCall* Begin(StreamHub& hub, std::shared_ptr<Account> account,
                            const v1::CaptionRequest& request);
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  class Events;
  CaptionCall(StreamHub& hub, std::shared_ptr<Account> account, const v1::CaptionRequest& request);
  void Run();
  void Play(Source& source, const StreamId& stream, Events& events);
  bool Write(const v1::CaptionResponse& caption);  // waits; false: the call has ended

  StreamHub& hub_;
  const std::shared_ptr<Account> account_;
  const v1::CaptionRequest request_;
  std::shared_ptr<CaptionCall> self_;  // until OnDone
  std::mutex mutex_;
  std::condition_variable changed_;
  bool writing_ = false, cancelled_ = false;
  std::shared_ptr<Events> events_;
  std::shared_ptr<Source> source_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_CAPTION_CALL_H_
