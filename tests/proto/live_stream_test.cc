#include "proto/live_stream.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

namespace sluice {
namespace {

struct Connection : LiveStream::Listener {
  void Wake() override { ++wakes; }
  void Replaced() override { ++replaced; }
  int wakes = 0, replaced = 0;
};

std::shared_ptr<LiveStream> NewStream(int64_t max_bytes = 1 << 20) {
  const auto account = Access({}).Find("", {});
  return std::make_shared<LiveStream>(LiveStream::Terms{.max_bytes = max_bytes,
                                                        .budget = {},
                                                        .generate = {},
                                                        .lease = Account::Open(account),
                                                        .attend = [] {}});
}

v1::SessionResponse Opened() {
  v1::SessionResponse message;
  message.mutable_opened()->set_stream_id("x");
  return message;
}

TEST(LiveStreamTest, OnlyThePresentListenerIsToldAnything) {
  const auto stream = NewStream();
  const auto first = std::make_shared<Connection>(), second = std::make_shared<Connection>();
  stream->Attach(first, Opened());
  stream->Attach(second, Opened());
  EXPECT_EQ(first->replaced, 1);
  stream->OnWarning("a line");
  // The first one may not know yet that it was replaced.
  EXPECT_FALSE(stream->Take(first.get()));
  int opened = 0;
  std::string warning;
  while (const auto message = stream->Take(second.get())) {
    if (message->has_opened()) ++opened;
    if (message->has_warning()) warning = message->warning().line();
  }
  EXPECT_EQ(opened, 2);
  EXPECT_EQ(warning, "a line");
  EXPECT_EQ(first->wakes, 0);
  EXPECT_GT(second->wakes, 0);
}

TEST(LiveStreamTest, AMessageThatWasNotDeliveredComesFirstAfterTheNextOpened) {
  const auto stream = NewStream();
  const auto first = std::make_shared<Connection>(), second = std::make_shared<Connection>();
  stream->Attach(first, Opened());
  stream->Take(first.get());
  stream->OnWarning("lost on the way");
  auto unsent = stream->Take(first.get());
  ASSERT_TRUE(unsent);
  stream->OnWarning("later");
  stream->Detach(first.get(), std::move(unsent), {});
  EXPECT_TRUE(stream->away_since());
  stream->Attach(second, Opened());
  EXPECT_FALSE(stream->away_since());
  EXPECT_TRUE(stream->Take(second.get())->has_opened());
  EXPECT_EQ(stream->Take(second.get())->warning().line(), "lost on the way");
  EXPECT_EQ(stream->Take(second.get())->warning().line(), "later");
}

TEST(LiveStreamTest, AnAwaitedAnswerIsToldAgainOnlyIfItIsNotOnItsWay) {
  const auto stream = NewStream();
  const auto first = std::make_shared<Connection>(), second = std::make_shared<Connection>();
  stream->Attach(first, Opened());
  const auto answer = [&](QuestionId id) {
    EXPECT_TRUE(stream->QuestionBegins(id, false));
    StreamAnswer told;
    told.id = id;
    stream->OnAnswer(told);
  };
  for (QuestionId id = 1; id <= 17; ++id) answer(id);  // the first is one too many to keep
  while (stream->Take(first.get())) continue;          // and lost on the way
  stream->Detach(first.get(), {}, {});
  answer(18);
  EXPECT_TRUE(stream->QuestionBegins(19, false));  // under way
  const std::vector<QuestionId> awaited{17, 18, 19, 1, 2};
  stream->Attach(second, Opened(), awaited);
  EXPECT_TRUE(stream->Take(second.get())->has_opened());
  EXPECT_EQ(stream->Take(second.get())->answer().question_id(), 18u);
  EXPECT_EQ(stream->Take(second.get())->answer().question_id(), 17u);
  for (const QuestionId gone : {1, 2}) {
    const auto refused = stream->Take(second.get());
    EXPECT_EQ(refused->refused().question_id(), gone);
    EXPECT_EQ(refused->refused().request(), "open");
  }
  EXPECT_FALSE(stream->Take(second.get()));
}

TEST(LiveStreamTest, WhatWaitsForNobodyIsBoundedAndItsLossIsTold) {
  const auto stream = NewStream(2000);
  const auto connection = std::make_shared<Connection>();
  stream->Attach(connection, Opened());
  stream->Detach(connection.get(), {}, {});
  for (int i = 0; i < 1000; ++i) stream->OnFrame(i, MediaTime::FromSeconds(i));
  const auto back = std::make_shared<Connection>();
  stream->Attach(back, Opened());
  EXPECT_TRUE(stream->Take(back.get())->has_opened());
  EXPECT_NE(stream->Take(back.get())->warning().line().find("given up"), std::string::npos);
  uint64_t last = 0;
  int frames = 0;
  while (const auto message = stream->Take(back.get())) {
    if (!message->has_frame_ack()) continue;
    last = message->frame_ack().number();
    ++frames;
  }
  EXPECT_EQ(last, 999u);  // the newest are kept
  EXPECT_GT(frames, 0);
  EXPECT_LT(frames, 500);
}

}  // namespace
}  // namespace sluice
