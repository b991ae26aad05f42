#include "proto/unary_call.h"

#include <utility>

namespace sluice {

std::shared_ptr<UnaryCall> UnaryCall::Begin(StreamHub& hub, std::shared_ptr<Account> account,
                                            Answer answer) {
  auto call = std::shared_ptr<UnaryCall>(
      new UnaryCall(hub.clock.Now(), std::move(account), std::move(answer)));
  call->self_ = call;
  call->StartRead(&call->in_);
  hub.LookAfter(call);
  return call;
}

UnaryCall::UnaryCall(WallTime now, std::shared_ptr<Account> account, Answer answer)
    : begun_(now), account_(std::move(account)), answer_(std::move(answer)) {}

void UnaryCall::OnReadDone(bool ok) {
  if (!ok) {
    return End({grpc::StatusCode::INVALID_ARGUMENT, "[call] expected a request, got none"});
  }
  const grpc::Status status = answer_(in_, out_);
  if (!status.ok()) return End(status);
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(answered_, true)) return;
  }
  StartWriteAndFinish(&out_, grpc::WriteOptions(), status);
}

void UnaryCall::End(const grpc::Status& status) {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(answered_, true)) return;
  }
  Finish(status);
}

void UnaryCall::OnDone() { const auto self = std::move(self_); }

std::optional<WallTime> UnaryCall::waiting_since() const {
  const std::lock_guard lock(mutex_);
  return answered_ ? std::nullopt : std::optional(begun_);
}

}  // namespace sluice
