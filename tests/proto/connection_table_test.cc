#include "proto/connection_table.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>

#include "proto/connections.h"
#include "runtime/error.h"

namespace sluice {
namespace {

using std::chrono::seconds;

const WallTime kNow{seconds(1000)};

PeerAddress Peer(int host, int port) {
  return *ParsePeer("ipv4:10.0.0." + std::to_string(host) + ":" + std::to_string(port));
}

TEST(PeerAddressTest, AllWaysInWhichGrpcNamesAPeerAreRead) {
  const auto v4 = ParsePeer("ipv4:127.0.0.1:4711");
  ASSERT_TRUE(v4);
  EXPECT_EQ(v4->ToString(), "127.0.0.1");
  EXPECT_EQ(v4->port, 4711);
  EXPECT_TRUE(v4->IsLoopback());
  for (const char* name : {"ipv6:[::1]:4711", "ipv6:%5B::1%5D:4711"}) {
    const auto v6 = ParsePeer(name);
    ASSERT_TRUE(v6) << name;
    EXPECT_TRUE(v6->IsLoopback());
    EXPECT_EQ(v6->port, 4711);
  }
  EXPECT_EQ(ParsePeer("ipv6:%5Bfe80::1%25eth0%5D:7")->ToString(), "fe80::1");
  for (const char* none : {"", "unix:", "ipv4:127.0.0.1", "ipv4:x:1", "ipv4:127.0.0.1:99999"}) {
    EXPECT_FALSE(ParsePeer(none)) << none;
  }
}

TEST(PeerAddressTest, AnIpv4AddressIsTheSameWhenMappedIntoIpv6) {
  EXPECT_EQ(ParsePeer("ipv4:1.2.3.4:5"), ParsePeer("ipv6:[::ffff:1.2.3.4]:5"));
}

TEST(PeerAddressTest, OneHostHasANetworkOfSixtyFourBits) {
  const auto network = [](const char* peer) { return ParsePeer(peer)->Network(); };
  EXPECT_EQ(network("ipv6:[2001:db8::1]:5"), network("ipv6:[2001:db8::ffff:2]:6"));
  EXPECT_NE(network("ipv6:[2001:db8::1]:5"), network("ipv6:[2001:db8:0:1::1]:5"));
  EXPECT_NE(network("ipv4:10.0.0.1:5"), network("ipv4:10.0.0.2:5"));
}

TEST(ConnectionTableTest, ANewcomerTakesThePlaceOfTheOldestWithoutAToken) {
  ConnectionTable table({.all = 3, .per_address = 3, .token_seconds = 10});
  for (int id = 0; id < 3; ++id) EXPECT_TRUE(table.Admit(id, Peer(id, 1), kNow).admitted);
  EXPECT_TRUE(table.ShownToken(Peer(0, 1)));
  const auto admission = table.Admit(3, Peer(3, 1), kNow);
  EXPECT_TRUE(admission.admitted);
  EXPECT_EQ(admission.replaced, 1);
  EXPECT_EQ(table.size(), 3);
}

TEST(ConnectionTableTest, WhoHasShownATokenIsNeverReplaced) {
  ConnectionTable table({.all = 2, .per_address = 2, .token_seconds = 10});
  for (int id = 0; id < 2; ++id) {
    table.Admit(id, Peer(id, 1), kNow);
    EXPECT_TRUE(table.ShownToken(Peer(id, 1)));
  }
  const auto admission = table.Admit(2, Peer(2, 1), kNow);
  EXPECT_FALSE(admission.admitted);
  EXPECT_FALSE(admission.replaced);
  EXPECT_TRUE(table.TakeOverdue(kNow + seconds(1000)).empty());
}

TEST(ConnectionTableTest, AnAddressThatHasItsShareCostsOthersNothing) {
  ConnectionTable table({.all = 100, .per_address = 2, .token_seconds = 10});
  table.Admit(0, Peer(1, 1), kNow);  // another address, and the oldest
  table.Admit(1, Peer(2, 1), kNow);
  table.Admit(2, Peer(2, 2), kNow);
  EXPECT_EQ(table.Admit(3, Peer(2, 3), kNow).replaced, 1);
  table.ShownToken(Peer(2, 2));
  table.ShownToken(Peer(2, 3));
  EXPECT_FALSE(table.Admit(4, Peer(2, 4), kNow).admitted);
  EXPECT_TRUE(table.Admit(5, Peer(3, 1), kNow).admitted);
  EXPECT_TRUE(table.Remove(2));
  EXPECT_TRUE(table.Admit(6, Peer(2, 5), kNow).admitted);
}

TEST(ConnectionTableTest, WithoutATokenAConnectionLastsForItsTimeOnly) {
  ConnectionTable table({.all = 9, .per_address = 9, .token_seconds = 10});
  table.Admit(0, Peer(0, 1), kNow);
  table.Admit(1, Peer(1, 1), kNow + seconds(4));
  table.Admit(2, Peer(2, 1), kNow + seconds(5));
  EXPECT_EQ(table.next_due(), kNow + seconds(10));
  table.ShownToken(Peer(1, 1));
  EXPECT_EQ(table.TakeOverdue(kNow + seconds(10)), std::vector<int>{0});
  EXPECT_EQ(table.next_due(), kNow + seconds(15));
  EXPECT_EQ(table.TakeOverdue(kNow + seconds(20)), std::vector<int>{2});
  EXPECT_EQ(table.size(), 1);
  EXPECT_FALSE(table.Remove(0));
  EXPECT_FALSE(table.ShownToken(Peer(0, 1)));
}

TEST(ConnectionTableTest, AnEndThatIsNoticedLateDoesNotHideTheNextOfThatAddress) {
  ConnectionTable table({.all = 9, .per_address = 9, .token_seconds = 10});
  table.Admit(0, Peer(0, 1), kNow);
  table.Admit(1, Peer(0, 1), kNow);
  EXPECT_TRUE(table.Remove(0));
  EXPECT_TRUE(table.ShownToken(Peer(0, 1)));
  EXPECT_TRUE(table.TakeOverdue(kNow + seconds(20)).empty());
}

TEST(ConnectionLimitsTest, FitIntoHalfOfTheDescriptors) {
  EXPECT_EQ(FittingInto({}, 64).all, 16);
  EXPECT_EQ(FittingInto({}, 64).per_address, 16);
  EXPECT_EQ(FittingInto({}, 1 << 20).all, ConnectionLimits().all);
  EXPECT_EQ(FittingInto({}, 0).all, 1);
}

TEST(ListenAddressTest, AHostAndAPortAreExpected) {
  EXPECT_EQ(ParseListen("listen", "[::1]:7").host, "::1");
  EXPECT_EQ(ParseListen("listen", "localhost:0").port, 0);
  EXPECT_EQ(ParseListen("listen", "127.0.0.1:65535").port, 65535);
  for (const char* wrong : {"", ":", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1",
                            "127.0.0.1:1x", "::1:7", "::1", ":50051", "unix:/tmp/x"}) {
    EXPECT_THROW(ParseListen("listen", wrong), InputError) << wrong;
  }
}

TEST(ListenAddressTest, OnlyLoopbackIsClosedToOthers) {
  for (const char* own : {"127.0.0.1:1", "127.1.2.3:1", "[::1]:1"}) {
    EXPECT_FALSE(IsOpenToOthers(ParseListen("listen", own))) << own;
  }
  for (const char* open : {"0.0.0.0:1", "[::]:1", "192.0.2.1:1"}) {
    EXPECT_TRUE(IsOpenToOthers(ParseListen("listen", open))) << open;
  }
}

}  // namespace
}  // namespace sluice
