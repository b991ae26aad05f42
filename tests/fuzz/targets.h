// What outside bytes can reach, one function a format. Each takes any bytes and returns, or throws
// Error, which counts as refused; everything else is a finding. Used by the fuzzers and by
// corpus_test. For one thread.
#ifndef SLUICE_TESTS_FUZZ_TARGETS_H_
#define SLUICE_TESTS_FUZZ_TARGETS_H_

#include <string_view>

namespace sluice {

// A checkpoint's model.safetensors, all tensors read.
void FuzzSafetensors(std::string_view bytes);
// A tokenizer.json; then text to ids and back.
void FuzzTokenizer(std::string_view bytes);
// One file of a whole checkpoint: the first byte tells which one of which checkpoint.
void FuzzConfig(std::string_view bytes);
// A stream's file. Its last four bytes are replaced with the right checksum.
void FuzzSessionFile(std::string_view bytes);
// A picture's file.
void FuzzJpeg(std::string_view bytes);
void FuzzPng(std::string_view bytes);
void FuzzWebp(std::string_view bytes);
// A SessionRequest as it comes from the network.
void FuzzRequest(std::string_view bytes);
// The URL of a source: what we accept GLib and GStreamer read the same way.
void FuzzSourceUrl(std::string_view bytes);
// A playlist that a source plays.
void FuzzPlaylist(std::string_view bytes);

// A client's whole call of Session: steps of one byte that tells the kind, by its remainder of 8
// (one of those below, else a message: its size in 16 bits, little-endian, and its bytes).
void FuzzCall(std::string_view bytes);
enum CallStep { kCallHalfClose = 4, kCallCancel = 5, kCallBreakWrite = 6, kCallLoseToken = 7 };

struct FuzzTarget {
  const char* name;  // of its corpus and its program
  void (*run)(std::string_view bytes);
  int damaged = 8;  // how often corpus_test cuts and changes each seed
};

inline constexpr FuzzTarget kFuzzTargets[] = {
    {"safetensors", FuzzSafetensors},
    {"tokenizer", FuzzTokenizer},
    {"config", FuzzConfig},
    {"session_file", FuzzSessionFile},
    {"jpeg", FuzzJpeg},
    {"png", FuzzPng},
    {"webp", FuzzWebp},
    {"request", FuzzRequest},
    {"source_url", FuzzSourceUrl},
    {"playlist", FuzzPlaylist, 1},
    {"call", FuzzCall},
};

// The choices of FuzzConfig's first byte: file number `byte % 8` of checkpoint `byte / 8 % 5`.
inline constexpr const char* kConfigCheckpoints[] = {"tiny_tied", "tiny_untied", "tiny_llava15",
                                                     "tiny_next_mistral", "tiny_next_video"};
inline constexpr const char* kConfigFiles[] = {
    "config.json",           "generation_config.json",      "preprocessor_config.json",
    "processor_config.json", "chat_template.json",          "chat_template.jinja",
    "tokenizer_config.json", "model.safetensors.index.json"};

}  // namespace sluice

#endif  // SLUICE_TESTS_FUZZ_TARGETS_H_
