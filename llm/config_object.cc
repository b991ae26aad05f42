#include "llm/config_object.h"

#include <cmath>
#include <sstream>
#include <utility>

#include "llm/json_file.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr uint64_t kMaxConfigBytes = uint64_t{16} << 20;
constexpr uint64_t kMostIds = uint64_t{1} << 22;  // of any vocabulary

std::string Printed(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

const KnownField* FindField(std::initializer_list<std::span<const KnownField>> lists,
                            const std::string& name) {
  for (const std::span<const KnownField> list : lists) {
    for (const KnownField& field : list) {
      if (name == field.name) return &field;
    }
  }
  return nullptr;
}

bool Allows(const std::string& only, const nlohmann::json& value) {
  if (only.empty() || value.is_null()) return true;
  std::istringstream values(only);
  for (std::string one; std::getline(values, one, '|');) {
    if (value == nlohmann::json::parse(one)) return true;
  }
  return false;
}

std::string Shown(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

}  // namespace

ConfigObject ConfigObject::Read(const std::filesystem::path& file) {
  ConfigObject config(file, "", ReadJsonFile("config", file, kMaxConfigBytes));
  if (!config.object_.is_object()) {
    throw InputError("[config] " + file.string() + ": must be a JSON object, got " +
                     config.object_.type_name());
  }
  return config;
}

std::optional<ConfigObject> ConfigObject::ReadIfThere(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error)) return std::nullopt;
  return Read(file);
}

const char* ConfigObject::Present(Keys keys) const {
  for (const char* key : keys) {
    const auto found = object_.find(key);
    if (found != object_.end() && !found->is_null()) return key;
  }
  return nullptr;
}

bool ConfigObject::IsNull(const char* key) const {
  const auto found = object_.find(key);
  return found != object_.end() && found->is_null();
}

const nlohmann::json* ConfigObject::Find(Keys keys) const {
  const char* key = Present(keys);
  return key ? &*object_.find(key) : nullptr;
}

int64_t ConfigObject::Int(Keys keys, std::optional<int64_t> fallback, int64_t least,
                          int64_t most) const {
  const std::string expected =
      "an integer in " + std::to_string(least) + ".." + std::to_string(most);
  const char* key = Present(keys);
  if (!key) {
    if (!fallback) Refuse(*keys.begin(), expected);
    return *fallback;
  }
  const nlohmann::json& value = *object_.find(key);
  const bool in_range =
      value.is_number_unsigned()
          ? most >= 0 && value.get<uint64_t>() <= static_cast<uint64_t>(most) &&
                (least < 0 || value.get<uint64_t>() >= static_cast<uint64_t>(least))
          : value.is_number_integer() && value.get<int64_t>() >= least &&
                value.get<int64_t>() <= most;
  if (!in_range) Refuse(key, expected);
  return value.get<int64_t>();
}

double ConfigObject::Number(Keys keys, double fallback, double least, double most) const {
  const char* key = Present(keys);
  if (!key) return fallback;
  const nlohmann::json& value = *object_.find(key);
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= least && number <= most)) {
    Refuse(key, "a number in " + Printed(least) + ".." + Printed(most));
  }
  return number;
}

bool ConfigObject::Bool(Keys keys, bool fallback) const {
  const char* key = Present(keys);
  if (!key) return fallback;
  const nlohmann::json& value = *object_.find(key);
  if (!value.is_boolean()) Refuse(key, "true or false");
  return value.get<bool>();
}

std::string ConfigObject::String(Keys keys, const std::string& fallback) const {
  const char* key = Present(keys);
  if (!key) return fallback;
  const nlohmann::json& value = *object_.find(key);
  if (!value.is_string()) Refuse(key, "a string");
  return value.get<std::string>();
}

std::vector<int32_t> ConfigObject::TokenIds(const char* key) const {
  std::vector<int32_t> ids;
  const nlohmann::json* value = Find({key});
  if (!value) return ids;
  const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
  for (const nlohmann::json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMostIds) {
      Refuse(key, "a token id or a list of them");
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

ConfigObject ConfigObject::Object(const char* key) const {
  const nlohmann::json* value = Find({key});
  if (value && !value->is_object()) Refuse(key, "an object");
  return ConfigObject(file_, prefix_ + key + ".", value ? *value : nlohmann::json::object());
}

void ConfigObject::CheckFields(std::initializer_list<std::span<const KnownField>> lists) const {
  for (const auto& [name, value] : object_.items()) {
    const KnownField* field = FindField(lists, name);
    if (field == nullptr && !value.is_null()) {
      throw InputError("[config] " + file_.string() + ": " + prefix_ + name +
                       " is not known here and might change the model, got " + Shown(value) +
                       "; remove it if it does not");
    }
    if (field != nullptr && !Allows(field->only, value)) {
      std::string expected = field->only;
      for (size_t at = 0; (at = expected.find('|', at)) != std::string::npos; at += 4) {
        expected.replace(at, 1, " or ");
      }
      Refuse(name, (expected == "null" ? "absent" : expected) + " (nothing else is supported)");
    }
  }
}

void ConfigObject::Refuse(const std::string& key, const std::string& expected) const {
  const auto found = object_.find(key);
  const std::string got = found == object_.end() ? "nothing" : Shown(*found);
  throw InputError("[config] " + file_.string() + ": " + prefix_ + key + " must be " + expected +
                   ", got " + got);
}

}  // namespace sluice
