#include "llm/json_file.h"

#include <algorithm>
#include <fstream>
#include <system_error>

#include "runtime/error.h"

namespace sluice {

namespace {

// Real files nest less than ten deep. One byte of nesting costs the parser about a hundred.
constexpr int kMaxDepth = 64;

int Depth(const std::string& bytes) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const char c = bytes[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

std::string ReadSmallFile(const std::string& place, const std::filesystem::path& file,
                          uint64_t max_bytes) {
  const std::string head = "[" + place + "] " + file.string();
  std::error_code error;
  const uint64_t size = std::filesystem::file_size(file, error);
  if (error) throw InputError(head + ": cannot be read: " + error.message());
  if (size > max_bytes) {
    throw InputError(head + ": must have at most " + std::to_string(max_bytes) + " bytes, has " +
                     std::to_string(size));
  }
  std::ifstream in(file, std::ios::binary);
  std::string bytes(size, '\0');
  if (!in.read(bytes.data(), static_cast<std::streamsize>(size))) {
    throw InputError(head + ": expected " + std::to_string(size) + " bytes, could not read them");
  }
  return bytes;
}

nlohmann::json ReadJsonFile(const std::string& place, const std::filesystem::path& file,
                            uint64_t max_bytes) {
  const std::string bytes = ReadSmallFile(place, file, max_bytes);
  if (Depth(bytes) > kMaxDepth) {
    throw InputError("[" + place + "] " + file.string() + ": must nest at most " +
                     std::to_string(kMaxDepth) + " deep");
  }
  try {
    return nlohmann::json::parse(bytes);
  } catch (const nlohmann::json::parse_error& error) {
    throw InputError("[" + place + "] " + file.string() + ": not JSON at byte " +
                     std::to_string(error.byte) + "; is the file complete?");
  }
}

namespace {

// The field, or nullptr when it is missing or null.
const nlohmann::json* Find(const nlohmann::json& object, const std::string& where,
                           const char* name) {
  if (!object.is_object()) {
    throw InputError(where + " must be an object, is " + object.type_name());
  }
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

[[noreturn]] void ThrowType(const std::string& where, const char* name, const char* expected,
                            const nlohmann::json& value) {
  throw InputError(where + "." + name + " must be " + expected + ", is " + value.type_name());
}

}  // namespace

const nlohmann::json& AnyField(const nlohmann::json& object, const std::string& where,
                               const char* name) {
  const nlohmann::json* value = Find(object, where, name);
  if (value == nullptr) throw InputError(where + "." + name + " is missing");
  return *value;
}

std::string StringField(const nlohmann::json& object, const std::string& where, const char* name) {
  const nlohmann::json& value = AnyField(object, where, name);
  if (!value.is_string()) ThrowType(where, name, "a string", value);
  return value.get<std::string>();
}

std::optional<std::string> OptionalStringField(const nlohmann::json& object,
                                               const std::string& where, const char* name) {
  if (Find(object, where, name) == nullptr) return std::nullopt;
  return StringField(object, where, name);
}

bool BoolField(const nlohmann::json& object, const std::string& where, const char* name,
               std::optional<bool> fallback) {
  if (fallback && Find(object, where, name) == nullptr) return *fallback;
  const nlohmann::json& value = AnyField(object, where, name);
  if (!value.is_boolean()) ThrowType(where, name, "true or false", value);
  return value.get<bool>();
}

int64_t IntField(const nlohmann::json& object, const std::string& where, const char* name,
                 int64_t min, int64_t max) {
  const nlohmann::json& value = AnyField(object, where, name);
  const std::string range = std::to_string(min) + " to " + std::to_string(max);
  if (!value.is_number_integer()) {
    ThrowType(where, name, ("an integer from " + range).c_str(), value);
  }
  // Integers above int64 would wrap; they are the only unsigned values this large.
  const bool fits = !value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX;
  if (!fits || value.get<int64_t>() < min || value.get<int64_t>() > max) {
    throw InputError(where + "." + name + " must be from " + range + ", is " + value.dump());
  }
  return value.get<int64_t>();
}

const nlohmann::json& ArrayField(const nlohmann::json& object, const std::string& where,
                                 const char* name) {
  const nlohmann::json& value = AnyField(object, where, name);
  if (!value.is_array()) ThrowType(where, name, "an array", value);
  return value;
}

std::string Quoted(const std::string& text) {
  constexpr size_t kMaxBytes = 60;
  std::string shown = text.substr(0, kMaxBytes);
  if (shown.size() < text.size()) {
    // Not half a character.
    while (!shown.empty() && (static_cast<unsigned char>(text[shown.size()]) & 0xC0) == 0x80) {
      shown.pop_back();
    }
    shown += "...";
  }
  std::string out = "\"";
  for (const char c : shown) out += c == '\n' ? std::string("\\n") : std::string(1, c);
  return out + "\"";
}

}  // namespace sluice
