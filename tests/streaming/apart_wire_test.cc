#include <gtest/gtest.h>
#include <sys/socket.h>

#include <cerrno>
#include <string>
#include <utility>

#include "streaming/apart/wire.h"

namespace sluice::apart {
namespace {

std::pair<UniqueFd, UniqueFd> Ends() {
  int ends[2] = {-1, -1};
  EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

TEST(ApartWireTest, WhatWasSentLastArrivesThoughTheOtherEndLeftMessagesUnread) {
  auto [ours, theirs] = Ends();
  ASSERT_TRUE(Send(ours.get(), Released{7}));  // nobody reads it
  Report last = {};
  last.kind = Report::Kind::kEnded;
  SetText(last.text, "two pictures are damaged");
  ASSERT_TRUE(Send(theirs.get(), last));
  theirs.Reset();

  Report report = {};
  ASSERT_TRUE(Receive(ours.get(), report)) << "the unread message hides the last one";
  EXPECT_EQ(report.kind, Report::Kind::kEnded);
  EXPECT_EQ(TextOf(report.text), "two pictures are damaged");
  EXPECT_FALSE(Receive(ours.get(), report)) << "nothing follows";
  EXPECT_EQ(errno, ECONNRESET);
}

TEST(ApartWireTest, AMessageOfAnotherSizeIsNone) {
  auto [ours, theirs] = Ends();
  const std::string longer(sizeof(Report) + 1, 'x');
  ASSERT_TRUE(SendBytes(theirs.get(), longer.data(), longer.size()));
  Report report = {};
  EXPECT_FALSE(Receive(ours.get(), report));
  EXPECT_EQ(errno, EMSGSIZE);
}

}  // namespace
}  // namespace sluice::apart
