#include <vector>

#include "llm/tokenizer.h"
#include "tests/fuzz/scratch_file.h"
#include "tests/fuzz/targets.h"

namespace sluice {

void FuzzTokenizer(std::string_view bytes) {
  static const ScratchFile file("tokenizer.json");
  const auto tokenizer = Tokenizer::Load(file.Holding(bytes));
  for (const char* text : {"Is the door's light on?  12345\n", " <|im_end|>\xE4\xBD\xA0 \xFF"}) {
    for (const SpecialTokens special : {SpecialTokens::kMatch, SpecialTokens::kAsText}) {
      std::vector<int32_t> ids = tokenizer->Encode(text, special, true);
      ids.insert(ids.end(), {-1, 0, 1, tokenizer->vocab_size()});
      tokenizer->Decode(ids, false);
      const auto stream = tokenizer->NewStream();
      for (const int32_t id : ids) stream->Push(id);
      stream->Finish();
    }
  }
}

}  // namespace sluice
