// Typed reading of the JSON objects that describe a checkpoint. Their authors are not trusted:
// every number has a range, every error names file and field.
#ifndef SLUICE_LLM_CONFIG_OBJECT_H_
#define SLUICE_LLM_CONFIG_OBJECT_H_

#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace sluice {

// A field that a file may have. `only`: the values it may have here, as JSON and parted by '|';
// empty: it is read elsewhere, or changes nothing whatever it says. A null is always allowed.
struct KnownField {
  const char* name;
  const char* only = "";
};

// An object of a file, or part of one. A missing key and a null both mean "the default": published
// files are sparse. Keys are given with their aliases; the first that is present counts.
// All getters throw InputError: wrong type, out of range, or missing where there is no default.
class ConfigObject {
 public:
  using Keys = std::initializer_list<const char*>;

  // Throws InputError when the file cannot be read, is not JSON, or holds no object.
  static ConfigObject Read(const std::filesystem::path& file);
  // The file, or nothing when there is none.
  static std::optional<ConfigObject> ReadIfThere(const std::filesystem::path& file);

  bool Has(const char* key) const { return Find({key}) != nullptr; }
  // The key is there and says null.
  bool IsNull(const char* key) const;
  int64_t Int(Keys keys, std::optional<int64_t> fallback, int64_t least, int64_t most) const;
  double Number(Keys keys, double fallback, double least, double most) const;
  bool Bool(Keys keys, bool fallback) const;
  std::string String(Keys keys, const std::string& fallback) const;
  // A token id, a list of them, or nothing.
  std::vector<int32_t> TokenIds(const char* key) const;
  // An object; an empty one when missing.
  ConfigObject Object(const char* key) const;
  const nlohmann::json* Find(Keys keys) const;  // null when missing

  // Throws InputError that names the first field which none of `lists` knows, or which has a value
  // that its list does not allow: what is not understood must not be passed over.
  void CheckFields(std::initializer_list<std::span<const KnownField>> lists) const;
  // An InputError about one field: "[config] FILE: FIELD must be EXPECTED, got FOUND".
  [[noreturn]] void Refuse(const std::string& key, const std::string& expected) const;
  const std::filesystem::path& file() const { return file_; }

 private:
  ConfigObject(std::filesystem::path file, std::string prefix, nlohmann::json object)
      : file_(std::move(file)), prefix_(std::move(prefix)), object_(std::move(object)) {}
  const char* Present(Keys keys) const;

  std::filesystem::path file_;
  std::string prefix_;  // "text_config."
  nlohmann::json object_;
};

}  // namespace sluice

#endif  // SLUICE_LLM_CONFIG_OBJECT_H_
