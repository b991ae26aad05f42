#include "proto/peer_address.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <algorithm>
#include <charconv>
#include <cstring>

namespace sluice {
namespace {

constexpr std::array<uint8_t, 12> kMapped = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};

bool IsMapped(const std::array<uint8_t, 16>& bytes) {
  return std::equal(kMapped.begin(), kMapped.end(), bytes.begin());
}

void Map(const in_addr& address, std::array<uint8_t, 16>& bytes) {
  std::copy(kMapped.begin(), kMapped.end(), bytes.begin());
  std::memcpy(bytes.data() + kMapped.size(), &address, sizeof address);
}

}  // namespace

PeerAddress PeerAddress::Network() const {
  PeerAddress network{.bytes = bytes, .port = 0};
  if (!IsMapped(bytes)) std::fill(network.bytes.begin() + 8, network.bytes.end(), uint8_t{0});
  return network;
}

bool PeerAddress::IsLoopback() const {
  if (IsMapped(bytes)) return bytes[kMapped.size()] == 127;
  return std::memcmp(bytes.data(), &in6addr_loopback, bytes.size()) == 0;
}

std::string PeerAddress::ToString() const {
  char text[INET6_ADDRSTRLEN] = "";
  if (IsMapped(bytes)) {
    inet_ntop(AF_INET, bytes.data() + kMapped.size(), text, sizeof text);
  } else {
    inet_ntop(AF_INET6, bytes.data(), text, sizeof text);
  }
  return text;
}

std::optional<PeerAddress> PeerAddressOf(const sockaddr_storage& address) {
  PeerAddress peer;
  if (address.ss_family == AF_INET) {
    const auto& in = reinterpret_cast<const sockaddr_in&>(address);
    Map(in.sin_addr, peer.bytes);
    peer.port = ntohs(in.sin_port);
  } else if (address.ss_family == AF_INET6) {
    const auto& in = reinterpret_cast<const sockaddr_in6&>(address);
    std::memcpy(peer.bytes.data(), &in.sin6_addr, peer.bytes.size());
    peer.port = ntohs(in.sin6_port);
  } else {
    return std::nullopt;
  }
  return peer;
}

std::optional<PeerAddress> ParsePeer(std::string_view peer) {
  const bool v6 = peer.starts_with("ipv6:");
  if (!v6 && !peer.starts_with("ipv4:")) return std::nullopt;
  peer.remove_prefix(5);
  const size_t colon = peer.rfind(':');
  if (colon == peer.npos) return std::nullopt;
  PeerAddress address;
  const std::string_view port = peer.substr(colon + 1);
  const auto parsed = std::from_chars(port.data(), port.data() + port.size(), address.port);
  if (parsed.ec != std::errc() || parsed.ptr != port.data() + port.size()) return std::nullopt;

  std::string_view host = peer.substr(0, colon);
  for (const std::string_view bracket : {"[", "%5B"}) {
    if (host.starts_with(bracket)) host.remove_prefix(bracket.size());
  }
  for (const std::string_view bracket : {"]", "%5D"}) {
    if (host.ends_with(bracket)) host.remove_suffix(bracket.size());
  }
  const std::string text(host.substr(0, host.find('%')));  // without the interface
  if (in_addr v4; !v6 && inet_pton(AF_INET, text.c_str(), &v4) == 1) {
    Map(v4, address.bytes);
    return address;
  }
  if (v6 && inet_pton(AF_INET6, text.c_str(), address.bytes.data()) == 1) return address;
  return std::nullopt;
}

}  // namespace sluice
