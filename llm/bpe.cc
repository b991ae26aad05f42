#include "llm/bpe.h"

#include <algorithm>
#include <cstdio>
#include <queue>

#include "llm/unicode.h"
#include "runtime/error.h"

namespace sluice {

size_t Bpe::PairHash::operator()(uint64_t pair) const {
  // The finaliser of MurmurHash3: ids are small, so the plain value would fill few buckets.
  pair = (pair ^ pair >> 33) * 0xFF51AFD7ED558CCDu;
  pair = (pair ^ pair >> 33) * 0xC4CEB9FE1A85EC53u;
  return pair ^ pair >> 33;
}

Bpe::Bpe(std::vector<std::string> tokens,
         const std::vector<std::pair<std::string, std::string>>& merges, Options options)
    : tokens_(std::move(tokens)), options_(std::move(options)) {
  ids_.reserve(tokens_.size());
  for (size_t id = 0; id < tokens_.size(); ++id) {
    if (!tokens_[id].empty()) ids_.emplace(tokens_[id], static_cast<int32_t>(id));
  }
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const std::string &left = merges[rank].first, &right = merges[rank].second;
    const auto id = [&](const std::string& token) {
      const std::optional<int32_t> found = TokenToId(token);
      if (!found) {
        throw InputError("model.merges[" + std::to_string(rank) + "] (\"" + left + "\", \"" +
                         right + "\") needs \"" + token + "\" in model.vocab, it is not there");
      }
      return static_cast<uint32_t>(*found);
    };
    const uint64_t pair = static_cast<uint64_t>(id(left)) << 32 | id(right);
    // A pair listed twice counts at its last place, as in the reference.
    merges_[pair] = {static_cast<int32_t>(rank), static_cast<int32_t>(id(left + right))};
  }
  if (options_.unk_token) {
    const std::optional<int32_t> id = TokenToId(*options_.unk_token);
    if (!id) {
      throw InputError("model.unk_token \"" + *options_.unk_token +
                       "\" must be in model.vocab, it is not there");
    }
    unk_id_ = *id;
  }
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", byte);
    byte_ids_[byte] = TokenToId(name).value_or(-1);
  }
}

std::optional<int32_t> Bpe::TokenToId(std::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

const Bpe::Merge* Bpe::FindMerge(int32_t left, int32_t right) const {
  const uint64_t pair =
      static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  const auto found = merges_.find(pair);
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::Encode(std::string_view piece, std::vector<int32_t>* ids) const {
  if (options_.ignore_merges) {
    if (const std::optional<int32_t> id = TokenToId(piece)) {
      ids->push_back(*id);
      return;
    }
  }
  std::vector<Symbol> symbols;
  Split(piece, &symbols);
  ApplyMerges(&symbols);
  for (const Symbol& symbol : symbols) {
    if (!symbol.merged_away) ids->push_back(symbol.id);
  }
}

void Bpe::Split(std::string_view piece, std::vector<Symbol>* symbols) const {
  const auto add = [&](int32_t id) {
    const int32_t index = static_cast<int32_t>(symbols->size());
    if (index > 0) symbols->back().next = index;
    symbols->push_back({id, index - 1, -1, false});
  };
  bool unknown_waits = false;
  for (size_t i = 0; i < piece.size();) {
    const size_t begin = i;
    unicode::Next(piece, &i);
    const std::string_view c = piece.substr(begin, i - begin);
    if (const std::optional<int32_t> id = TokenToId(c)) {
      if (unknown_waits) add(unk_id_);
      unknown_waits = false;
      add(*id);
      continue;
    }
    const auto byte_id = [this](char byte) { return byte_ids_[static_cast<uint8_t>(byte)]; };
    if (options_.byte_fallback &&
        std::all_of(c.begin(), c.end(), [&](char byte) { return byte_id(byte) >= 0; })) {
      // An unknown symbol that waits stays behind these bytes. The reference does so, and it shows
      // only with vocabularies that have some byte tokens but not all.
      for (const char byte : c) add(byte_id(byte));
      continue;
    }
    if (unk_id_ < 0) continue;
    if (unknown_waits && !options_.fuse_unk) add(unk_id_);
    unknown_waits = true;
  }
  if (unknown_waits) add(unk_id_);
}

void Bpe::ApplyMerges(std::vector<Symbol>* word) const {
  std::vector<Symbol>& symbols = *word;
  struct Candidate {
    int32_t rank;
    int32_t left;  // index of its left symbol
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  std::vector<Candidate> found;
  for (size_t i = 0; i + 1 < symbols.size(); ++i) {
    if (const Merge* merge = FindMerge(symbols[i].id, symbols[i + 1].id)) {
      found.push_back({merge->rank, static_cast<int32_t>(i)});
    }
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates(
      std::greater<>(), std::move(found));
  const auto propose = [&](int32_t left) {
    if (const Merge* merge = FindMerge(symbols[left].id, symbols[symbols[left].next].id)) {
      candidates.push({merge->rank, left});
    }
  };
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = symbols[best.left];
    if (left.merged_away || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // A candidate goes stale when one of its symbols was merged meanwhile; ranks name pairs.
    const Merge* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->rank != best.rank) continue;
    left.id = merge->result;
    left.next = right.next;
    right.merged_away = true;
    if (left.next >= 0) symbols[left.next].previous = best.left;
    if (left.previous >= 0) propose(left.previous);
    if (left.next >= 0) propose(best.left);
  }
}

}  // namespace sluice
