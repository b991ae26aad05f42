// Byte-pair encoding (Sennrich et al. 2016): a piece of text to ids by a ranked list of merges.
// Immutable after construction; safe for many threads.
#ifndef SLUICE_LLM_BPE_H_
#define SLUICE_LLM_BPE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sluice {

class Bpe {
 public:
  struct Options {
    // Stands for a symbol that is not in the vocabulary; without it such symbols vanish.
    std::optional<std::string> unk_token;
    bool fuse_unk = false;       // neighbouring unknown symbols become one token
    bool byte_fallback = false;  // unknown symbols become tokens <0xHH>, if all of theirs exist
    bool ignore_merges = false;  // a piece that is a token itself needs no merges
  };

  // tokens: content by id, an empty string where an id has none. merges: pairs of contents, best
  // first. Throws InputError on a merge whose parts or result are not in the vocabulary, and on an
  // unk_token that is not.
  Bpe(std::vector<std::string> tokens,
      const std::vector<std::pair<std::string, std::string>>& merges, Options options);
  Bpe(const Bpe&) = delete;  // ids_ looks into tokens_
  Bpe& operator=(const Bpe&) = delete;

  // Appends the ids of `piece`. O(n log n) in its length. REQUIRES: `piece` is valid UTF-8.
  void Encode(std::string_view piece, std::vector<int32_t>* ids) const;

  std::optional<int32_t> TokenToId(std::string_view token) const;
  // Content by id, an empty string where an id has none.
  const std::vector<std::string>& tokens() const { return tokens_; }

 private:
  struct Merge {
    int32_t rank;
    int32_t result;
  };
  struct PairHash {
    size_t operator()(uint64_t pair) const;
  };
  struct Symbol {
    int32_t id;
    int32_t previous;  // index into the word's symbols, -1 at the ends
    int32_t next;
    bool merged_away;
  };

  const Merge* FindMerge(int32_t left, int32_t right) const;
  void Split(std::string_view piece, std::vector<Symbol>* symbols) const;
  void ApplyMerges(std::vector<Symbol>* symbols) const;

  std::vector<std::string> tokens_;
  std::unordered_map<std::string_view, int32_t> ids_;
  std::unordered_map<uint64_t, Merge, PairHash> merges_;
  Options options_;
  int32_t unk_id_ = -1;
  std::array<int32_t, 256> byte_ids_;  // of <0xHH>, -1 where it is missing
};

}  // namespace sluice

#endif  // SLUICE_LLM_BPE_H_
