// One connection of the call Caption: a source, described at an interval.
#ifndef SLUICE_PROTO_CAPTION_CALL_H_
#define SLUICE_PROTO_CAPTION_CALL_H_

#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/server_callback.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "proto/open_call.h"
#include "proto/stream_hub.h"

namespace sluice {

// Runs on a thread of its own. A recording waits for the model, so that nothing of it is left out;
// of a live source frames are dropped and a caption that takes too long is waited for alone.
// To gRPC it is a stream both ways, as in unary_call.h.
class CaptionCall final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                          public OpenCall,
                          public std::enable_shared_from_this<CaptionCall> {
 public:
  static CaptionCall* Begin(StreamHub& hub, std::shared_ptr<Account> account);
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  const Account* account() const override { return account_.get(); }
  std::optional<WallTime> waiting_since() const override;
  void End(const grpc::Status& status) override;

 private:
  class Events;
  CaptionCall(StreamHub& hub, std::shared_ptr<Account> account);
  void Run();
  bool Pause();  // until its account may have another frame, perhaps. False: it was cancelled
  void Play(Source& source, const StreamId& stream, MediaTime interval);
  bool Write(const v1::CaptionResponse& caption);  // waits; false: the call has ended

  StreamHub& hub_;
  const WallTime begun_;
  const std::shared_ptr<Account> account_;
  v1::CaptionRequest request_;         // before Run
  std::shared_ptr<CaptionCall> self_;  // until OnDone
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool running_ = false, writing_ = false, cancelled_ = false, finished_ = false;
  std::optional<grpc::Status> end_;  // set by End; Run passes it on
  grpc::ByteBuffer in_, out_;
  std::shared_ptr<Events> events_;
  std::shared_ptr<Source> source_;
};

}  // namespace sluice

#endif  // SLUICE_PROTO_CAPTION_CALL_H_
