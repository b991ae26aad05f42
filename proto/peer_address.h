// The address of the other end of a connection, comparable.
#ifndef SLUICE_PROTO_PEER_ADDRESS_H_
#define SLUICE_PROTO_PEER_ADDRESS_H_

#include <sys/socket.h>

#include <array>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace sluice {

struct PeerAddress {
  std::array<uint8_t, 16> bytes = {};  // IPv6; an IPv4 address is mapped into it
  uint16_t port = 0;

  auto operator<=>(const PeerAddress&) const = default;
  // Who is likely one and the same: an IPv4 address, or a network of 64 bits of IPv6, which one
  // host has to itself. With port 0.
  PeerAddress Network() const;
  bool IsLoopback() const;
  std::string ToString() const;  // without the port
};

// None: another family than IPv4 and IPv6.
std::optional<PeerAddress> PeerAddressOf(const sockaddr_storage& address);
// As gRPC names a call's peer: "ipv4:127.0.0.1:4711", "ipv6:%5B::1%5D:4711", "ipv6:[::1]:4711".
std::optional<PeerAddress> ParsePeer(std::string_view peer);

}  // namespace sluice

#endif  // SLUICE_PROTO_PEER_ADDRESS_H_
