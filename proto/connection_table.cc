#include "proto/connection_table.h"

#include <algorithm>
#include <iterator>

namespace sluice {

std::chrono::steady_clock::duration ConnectionTable::Patience() const {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(limits_.token_seconds));
}

ConnectionTable::Admission ConnectionTable::Admit(int id, const PeerAddress& peer, WallTime now) {
  Admission result;
  const PeerAddress network = peer.Network();
  const auto same = of_network_.find(network);
  const bool address_full = same != of_network_.end() && same->second >= limits_.per_address;
  if (address_full || size() >= limits_.all) {
    const auto oldest = std::ranges::find_if(strangers_, [&](int stranger) {
      return !address_full || open_.at(stranger).peer.Network() == network;
    });
    if (oldest == strangers_.end()) return result;
    result.replaced = *oldest;
    Remove(*oldest);
  }
  result.admitted = true;
  strangers_.push_back(id);
  open_[id] = {.peer = peer, .since = now, .stranger = std::prev(strangers_.end())};
  by_peer_[peer] = id;
  ++of_network_[network];
  return result;
}

bool ConnectionTable::ShownToken(const PeerAddress& peer) {
  const auto found = by_peer_.find(peer);
  if (found == by_peer_.end()) return false;
  Entry& entry = open_.at(found->second);
  if (entry.stranger) strangers_.erase(*entry.stranger);
  entry.stranger.reset();
  return true;
}

bool ConnectionTable::Remove(int id) {
  const auto found = open_.find(id);
  if (found == open_.end()) return false;
  const Entry& entry = found->second;
  if (entry.stranger) strangers_.erase(*entry.stranger);
  // A later connection may have the same address, if this one's end was noticed late.
  const auto peer = by_peer_.find(entry.peer);
  if (peer != by_peer_.end() && peer->second == id) by_peer_.erase(peer);
  const auto network = of_network_.find(entry.peer.Network());
  if (--network->second == 0) of_network_.erase(network);
  open_.erase(found);
  return true;
}

std::vector<int> ConnectionTable::TakeOverdue(WallTime now) {
  std::vector<int> overdue;
  while (!strangers_.empty() && now - open_.at(strangers_.front()).since >= Patience()) {
    overdue.push_back(strangers_.front());
    Remove(overdue.back());
  }
  return overdue;
}

std::vector<int> ConnectionTable::Ids() const {
  std::vector<int> ids;
  for (const auto& [id, entry] : open_) ids.push_back(id);
  return ids;
}

std::optional<WallTime> ConnectionTable::next_due() const {
  if (strangers_.empty()) return std::nullopt;
  return open_.at(strangers_.front()).since + Patience();
}

}  // namespace sluice
