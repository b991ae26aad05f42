// The fields of the LLaVA families' configuration files, as transformers 4.45 to 5.17 write them,
// for ConfigObject::CheckFields: which are read, which change nothing, and which must have the one
// value that is supported.
#ifndef SLUICE_LLM_FAMILIES_KNOWN_FIELDS_H_
#define SLUICE_LLM_FAMILIES_KNOWN_FIELDS_H_

#include <filesystem>
#include <span>
#include <string>

#include "llm/config_object.h"

namespace sluice {

// Of every part of config.json.
std::span<const KnownField> CommonFields();
// Of config.json itself; those of LLaVA-NeXT-Video besides.
std::span<const KnownField> TopFields();
std::span<const KnownField> VideoPoolFields();
// Of its text_config, and of the rotation in it.
std::span<const KnownField> TextFields();
std::span<const KnownField> RopeFields();
// Of its vision_config, CLIP's or SigLIP's.
std::span<const KnownField> TowerFields();
// Of processor_config.json, and of the settings of one processor.
std::span<const KnownField> ProcessorFields();
std::span<const KnownField> PixelFields();

// tokenizer.json alone says how text becomes ids; what tokenizer_config.json says otherwise is
// refused. Throws InputError; a file that is not there says nothing.
void CheckTokenizerConfig(const std::filesystem::path& directory);

}  // namespace sluice

#endif  // SLUICE_LLM_FAMILIES_KNOWN_FIELDS_H_
