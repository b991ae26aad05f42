#include "proto/access.h"

#include <gtest/gtest.h>

#include "runtime/error.h"

namespace sluice {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

const CalendarTime kNow{seconds(1'000'000)};

AccessToken Token(const std::string& secret) {
  return {.name = "t", .sha256 = Sha256Hex(secret), .expires = {}};
}

TEST(AccessTest, HashesAreThoseOfSha256sum) {
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(AccessTest, OnlyAKnownTokenBehindBearerIsFound) {
  const Access access({Token("secret")});
  EXPECT_NE(access.Find("Bearer secret", kNow), nullptr);
  EXPECT_NE(access.Find("bearer secret", kNow), nullptr);
  EXPECT_NE(access.Find("BEARER secret", kNow), nullptr);
  for (const char* wrong : {"", "secret", "bearer", "bearersecret", "Bearer ", "Bearer secre",
                            "Bearer secret ", "Basic secret"}) {
    EXPECT_EQ(access.Find(wrong, kNow), nullptr) << wrong;
  }
  EXPECT_EQ(access.Find("Bearer " + Sha256Hex("secret"), kNow), nullptr);
}

TEST(AccessTest, WithoutTokensEverybodySharesOneAccount) {
  const Access access({});
  EXPECT_NE(access.Find("", kNow), nullptr);
  EXPECT_EQ(access.Find("", kNow), access.Find("Bearer x", kNow));
}

TEST(AccessTest, ATokenEndsAtTheMomentItExpires) {
  AccessToken token = Token("secret");
  token.expires = kNow;
  const Access access({token});
  EXPECT_NE(access.Find("Bearer secret", kNow - seconds(1)), nullptr);
  EXPECT_EQ(access.Find("Bearer secret", kNow), nullptr);
}

TEST(AccessTest, HashesThatAreNoneOrComeTwiceAreRefused) {
  AccessToken token = Token("secret");
  EXPECT_THROW(Access({token, token}), InputError);
  token.sha256 = "abc";
  EXPECT_THROW(Access({token}), InputError);
  token.sha256 = std::string(64, 'G');
  EXPECT_THROW(Access({token}), InputError);
}

TEST(AccessTest, SessionsAreCountedAsLongAsTheyLive) {
  AccessToken token = Token("secret");
  token.sessions = 2;
  const Access access({token});
  const auto account = access.Find("Bearer secret", kNow);
  auto first = Account::Open(account);
  const auto second = Account::Open(account);
  EXPECT_THROW(Account::Open(account), ResourceExhausted);
  first.reset();
  EXPECT_NO_THROW(first = Account::Open(account));
}

TEST(AccessTest, FramesAreTakenAtTheirRateAfterASecondsWorthAtOnce) {
  AccessToken token = Token("secret");
  token.frames_per_second = 4;
  Account account(token);
  WallTime now{seconds(50)};
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(account.TakeFrame(1, now)) << i;
  EXPECT_FALSE(account.TakeFrame(1, now));
  now += milliseconds(260);
  EXPECT_TRUE(account.TakeFrame(1, now));
  EXPECT_FALSE(account.TakeFrame(1, now));
  now += seconds(100);  // no more than a second's worth is saved up
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(account.TakeFrame(1, now)) << i;
  EXPECT_FALSE(account.TakeFrame(1, now));
}

TEST(AccessTest, BytesAreTakenAtTheirRateAndALargeFrameLeavesADebt) {
  AccessToken token = Token("secret");
  token.bytes_per_second = 1000;
  Account account(token);
  WallTime now{seconds(50)};
  EXPECT_TRUE(account.TakeFrame(3000, now));  // the bucket is full
  now += milliseconds(2500);                  // -2000 + 2500 = 500 of 1000
  EXPECT_FALSE(account.TakeFrame(1000, now));
  EXPECT_TRUE(account.TakeFrame(400, now));
}

}  // namespace
}  // namespace sluice
