// Files that keep the state of something: named fields in order, versioned and checksummed.
//
// One function describes a class both ways, so that what is written and what is read cannot drift
// apart:
//   void Window::Persist(Archive& archive) {
//     archive.Number("next", next_, int64_t{0}, kMost);
//     archive.Array("rows", rows_);
//   }
// Layout: "SLUICE01", then fields, then "end" with the CRC-32 of all before it. A field is its
// name's length (1 byte), its name, a type (1 byte), a count (8 bytes, little-endian) and the
// values. Numbers are as the machine has them: little-endian, IEEE 754.
#ifndef SLUICE_RUNTIME_ARCHIVE_H_
#define SLUICE_RUNTIME_ARCHIVE_H_

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "runtime/tensor.h"

namespace sluice {

// Of a file's bytes before the sum itself.
uint32_t ArchiveChecksum(std::string_view bytes);

// Used by one thread. All errors are InputError while reading and Error while writing, and name the
// file, the field, what was expected and what was found.
class Archive {
 public:
  // Writes beside `file`, which is replaced as a whole by Finish and untouched without it. Only its
  // owner can read it. Links are not followed, here and in FromFile.
  static Archive ToFile(const std::filesystem::path& file);
  // Reads the file once to verify its checksum; fields are read after that.
  static Archive FromFile(const std::filesystem::path& file);
  Archive(Archive&&) = default;
  ~Archive();

  bool loading() const { return loading_; }
  const std::filesystem::path& file() const { return file_; }

  // A loaded value outside of [min, max] is an error.
  template <typename T>
  void Number(std::string_view field, T& value, T min = std::numeric_limits<T>::lowest(),
              T max = std::numeric_limits<T>::max()) {
    static_assert(std::is_arithmetic_v<T>);
    Value(field, TypeOf<T>(), &value, sizeof(T));
    // So that NaN is none, either.
    if (loading_ && !(value >= min && value <= max)) {
      Refuse(field, std::to_string(min) + " to " + std::to_string(max), std::to_string(value));
    }
  }
  void Flag(std::string_view field, bool& value);
  template <typename E>
  void Enum(std::string_view field, E& value, E last) {
    auto number = static_cast<int32_t>(value);
    Number(field, number, 0, static_cast<int32_t>(last));
    value = static_cast<E>(number);
  }
  void Text(std::string_view field, std::string& value);
  // Any number of values; `most` bounds what is accepted.
  template <typename T>
  void Array(std::string_view field, std::vector<T>& values,
             uint64_t most = std::numeric_limits<uint64_t>::max()) {
    static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>);
    if (loading_) values.resize(BeginRead(field, TypeOf<T>(), sizeof(T), most));
    if (!loading_) BeginWrite(field, TypeOf<T>(), values.size());
    Transfer(values.data(), values.size() * sizeof(T));
  }
  // How many items follow: the size of a list whose items are one or more fields of their own.
  // More than the rest of the file could hold is an error.
  template <typename T>
  void Resize(std::string_view field, std::vector<T>& list, uint64_t most) {
    uint64_t size = list.size();
    Number(field, size, uint64_t{0}, most);
    if (!loading_) return;
    CheckRoom(field, size, kLeastFieldBytes);
    list.resize(size);
  }
  // Exactly `size` bytes of memory that is there already.
  void Bytes(std::string_view field, void* data, uint64_t size);
  // With dtype and shape; empty ones stay empty.
  void Value(std::string_view field, Tensor& tensor);
  // Throws InputError unless the rest of a file that is read could hold `count` items of
  // `item_bytes` each: to be asked before memory is taken for them.
  void CheckRoom(std::string_view field, uint64_t count, uint64_t item_bytes) const;
  // Ends it: writes the checksum and puts the file in place, or makes sure that nothing is left.
  void Finish();

  // Ends with an error about a field that is out of its bounds.
  [[noreturn]] void Refuse(std::string_view field, const std::string& expected,
                           const std::string& found) const;

 private:
  static constexpr uint64_t kLeastFieldBytes = 11;  // with a name of one letter and no values
  struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  Archive(const std::filesystem::path& file, bool loading);

  // One letter a type.
  template <typename T>
  static constexpr char TypeOf() {
    if (std::is_floating_point_v<T>) return sizeof(T) == 4 ? 'f' : 'd';
    constexpr char kSigned[] = {'b', 'h', 'i', 'q'}, kUnsigned[] = {'B', 'H', 'I', 'Q'};
    constexpr int kLog2 = sizeof(T) == 8 ? 3 : sizeof(T) == 4 ? 2 : sizeof(T) == 2 ? 1 : 0;
    return std::is_signed_v<T> ? kSigned[kLog2] : kUnsigned[kLog2];
  }
  void Value(std::string_view field, char type, void* value, size_t size);
  void BeginWrite(std::string_view field, char type, uint64_t count);
  uint64_t BeginRead(std::string_view field, char type, size_t item, uint64_t most);
  void Transfer(void* data, uint64_t size);
  void Verify();

  std::filesystem::path file_, temporary_;
  bool loading_;
  std::unique_ptr<std::FILE, CloseFile> stream_;
  uint64_t left_ = 0;  // bytes of fields still to be read
  uint32_t checksum_ = 0;
};

}  // namespace sluice

#endif  // SLUICE_RUNTIME_ARCHIVE_H_
