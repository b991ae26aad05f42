// The small JSON files beside a checkpoint's weights, and their fields.
#ifndef SLUICE_LLM_JSON_FILE_H_
#define SLUICE_LLM_JSON_FILE_H_

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace sluice {

// The bytes of `file`. Throws InputError naming `place` and the file when it cannot be read or has
// more than `max_bytes`.
std::string ReadSmallFile(const std::string& place, const std::filesystem::path& file,
                          uint64_t max_bytes);

// The same, parsed. Throws InputError when it is not JSON.
nlohmann::json ReadJsonFile(const std::string& place, const std::filesystem::path& file,
                            uint64_t max_bytes);

// Field `name` of `object`, which the file calls `where`. All throw InputError "where.name must be
// ..., is ..." on another type; without a fallback also when the field is missing. A null counts as
// missing. The caller adds the place and the file.
const nlohmann::json& AnyField(const nlohmann::json& object, const std::string& where,
                               const char* name);
std::string StringField(const nlohmann::json& object, const std::string& where, const char* name);
std::optional<std::string> OptionalStringField(const nlohmann::json& object,
                                               const std::string& where, const char* name);
bool BoolField(const nlohmann::json& object, const std::string& where, const char* name,
               std::optional<bool> fallback = std::nullopt);
int64_t IntField(const nlohmann::json& object, const std::string& where, const char* name,
                 int64_t min, int64_t max);
const nlohmann::json& ArrayField(const nlohmann::json& object, const std::string& where,
                                 const char* name);

// `text` with quotes, shortened to what fits into an error's one line.
std::string Quoted(const std::string& text);

}  // namespace sluice

#endif  // SLUICE_LLM_JSON_FILE_H_
