#include "runtime/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "runtime/error.h"

static_assert(std::endian::native == std::endian::little,
              "safetensors are little-endian, and tensors are used as they lie in the file");

namespace sluice {
namespace {

// The limit of the format's own library. A header describes a tensor in some 100 bytes.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr uint64_t kMaxIndexBytes = 100'000'000;
constexpr int kMaxFileRank = 8;

[[noreturn]] void Fail(const std::filesystem::path& path, const std::string& what) {
  throw InputError("[safetensors] " + path.string() + ": " + what);
}

std::string Quoted(const std::string& name) {
  // Names come from outside and land in a terminal: printable, and of reasonable length.
  std::string text = "'";
  for (char c : name.substr(0, 200)) text += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
  if (name.size() > 200) text += "...";
  return text + "'";
}

struct FileType {
  const char* name;
  uint64_t size;               // bytes of an element
  std::optional<DType> dtype;  // of those we compute with
};
constexpr FileType kFileTypes[] = {
    {"F32", 4, DType::kF32},   {"F16", 2, DType::kF16},      {"BF16", 2, DType::kBF16},
    {"I8", 1, DType::kI8},     {"U8", 1, DType::kU8},        {"I32", 4, DType::kI32},
    {"BOOL", 1, std::nullopt}, {"I16", 2, std::nullopt},     {"U16", 2, std::nullopt},
    {"U32", 4, std::nullopt},  {"I64", 8, std::nullopt},     {"U64", 8, std::nullopt},
    {"F64", 8, std::nullopt},  {"F8_E4M3", 1, std::nullopt}, {"F8_E5M2", 1, std::nullopt}};

const FileType* FindType(const std::string& name) {
  for (const FileType& type : kFileTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

const char* FileName(DType dtype) {
  for (const FileType& type : kFileTypes) {
    if (type.dtype == dtype) return type.name;
  }
  return "?";
}

// One tensor as the header tells it, not yet checked against the file.
struct Description {
  std::optional<std::string> dtype;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> offsets;
};

// Reads the header event by event, so that nothing is built that the format does not know:
//   {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ...,
//    "__metadata__": {"key": "value", ...}}
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(const std::filesystem::path& path) : path_(path) {}

  std::map<std::string, Description> tensors;
  std::map<std::string, std::string> metadata;

  bool start_object(size_t) override {
    if (list_ || depth_ == 2) Unexpected("an object");
    ++depth_;
    return true;
  }
  bool end_object() override {
    --depth_;
    field_.clear();
    return true;
  }
  bool key(std::string& name) override {
    if (depth_ == 1) {
      name_ = name;
      in_metadata_ = name == "__metadata__";
      const bool first = in_metadata_ ? !std::exchange(metadata_seen_, true)
                                      : tensors.emplace(name, Description{}).second;
      if (!first) Fail(path_, "tensor " + Quoted(name) + ": names must differ, got it twice");
      return true;
    }
    field_ = name;
    if (in_metadata_) {
      if (metadata.count(name))
        Fail(path_, "metadata " + Quoted(name) + " must come once, got two");
      return true;
    }
    const Description& tensor = tensors[name_];
    const bool twice = (name == "dtype" && tensor.dtype) || (name == "shape" && tensor.shape) ||
                       (name == "data_offsets" && tensor.offsets);
    if (twice || (name != "dtype" && name != "shape" && name != "data_offsets")) {
      Fail(path_, "tensor " + Quoted(name_) +
                      ": fields must be dtype, shape and data_offsets, once each, got " +
                      (twice ? "a second " : "") + Quoted(name));
    }
    return true;
  }
  bool string(std::string& value) override {
    if (depth_ == 2 && in_metadata_) {
      metadata[field_] = value;
    } else if (depth_ == 2 && !list_ && field_ == "dtype") {
      tensors[name_].dtype = value;
    } else {
      Unexpected("a string");
    }
    return true;
  }
  bool start_array(size_t) override {
    Description* tensor = depth_ == 2 && !in_metadata_ && !list_ ? &tensors[name_] : nullptr;
    if (tensor && field_ == "shape") {
      list_ = &tensor->shape.emplace();
    } else if (tensor && field_ == "data_offsets") {
      list_ = &tensor->offsets.emplace();
    } else {
      Unexpected("a list");
    }
    return true;
  }
  bool end_array() override {
    list_ = nullptr;
    return true;
  }
  bool number_unsigned(uint64_t value) override {
    if (!list_) Unexpected("a number");
    if (list_->size() == 64) Fail(path_, "tensor " + Quoted(name_) + ": lists must be short");
    list_->push_back(value);
    return true;
  }
  bool number_integer(int64_t) override { return Unexpected("a negative number"); }
  bool number_float(double, const std::string& text) override {
    return Unexpected("the number " + text.substr(0, 40));
  }
  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a truth value"); }
  bool binary(nlohmann::json::binary_t&) override { return Unexpected("binary data"); }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    Fail(path_, "header must be JSON, it breaks at byte " + std::to_string(position) + " of it");
  }

 private:
  bool Unexpected(const std::string& what) {
    if (depth_ == 0) Fail(path_, "header must be a JSON object, got " + what);
    Fail(path_, (in_metadata_ ? "metadata must be strings by name, got "
                              : "tensor " + Quoted(name_) +
                                    ": must be {dtype: string, shape: [sizes], data_offsets: "
                                    "[begin, end]}, got ") +
                    what + (field_.empty() ? "" : " at " + Quoted(field_)));
  }

  const std::filesystem::path& path_;
  int depth_ = 0;
  std::string name_, field_;
  bool in_metadata_ = false, metadata_seen_ = false;
  std::vector<uint64_t>* list_ = nullptr;  // the list being read
};

std::string ShapeText(const std::vector<uint64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// Closes the descriptor whatever happens; the mapping lives on without it.
class OpenFile {
 public:
  explicit OpenFile(const std::filesystem::path& path)
      : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~OpenFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

}  // namespace

std::shared_ptr<const SafetensorsFile> SafetensorsFile::Open(const std::filesystem::path& path) {
  const OpenFile descriptor(path);
  if (descriptor.get() < 0) Fail(path, std::string("cannot be opened: ") + std::strerror(errno));
  struct stat status;
  if (::fstat(descriptor.get(), &status) != 0) {
    Fail(path, std::string("cannot be examined: ") + std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) Fail(path, "must be a regular file");
  const uint64_t file_bytes = static_cast<uint64_t>(status.st_size);
  if (file_bytes < 8) {
    Fail(path,
         "file must hold the 8 bytes of its header's length, got " + std::to_string(file_bytes));
  }

  std::shared_ptr<SafetensorsFile> file(new SafetensorsFile());
  file->path_ = path;
  void* map = ::mmap(nullptr, file_bytes, PROT_READ, MAP_PRIVATE, descriptor.get(), 0);
  if (map == MAP_FAILED) Fail(path, std::string("cannot be mapped: ") + std::strerror(errno));
  file->map_ = map;
  file->map_bytes_ = file_bytes;
  const char* bytes = static_cast<const char*>(map);

  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes, 8);
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_bytes - 8) {
    Fail(path, "header must fit the file of " + std::to_string(file_bytes) + " bytes and " +
                   std::to_string(kMaxHeaderBytes) + " bytes, got a length of " +
                   std::to_string(header_bytes) + "; the file is truncated or no safetensors");
  }
  HeaderReader header(path);
  nlohmann::json::sax_parse(bytes + 8, bytes + 8 + header_bytes, &header);
  file->metadata_ = std::move(header.metadata);

  const char* data = bytes + 8 + header_bytes;
  const uint64_t data_bytes = file_bytes - 8 - header_bytes;
  struct Range {
    uint64_t begin, end;
    const std::string* name;
  };
  std::vector<Range> ranges;
  for (const auto& [name, tensor] : header.tensors) {
    const std::string place = "tensor " + Quoted(name) + ": ";
    if (!tensor.dtype || !tensor.shape || !tensor.offsets) {
      Fail(path, place + "must have dtype, shape and data_offsets, got no " +
                     (!tensor.dtype   ? "dtype"
                      : !tensor.shape ? "shape"
                                      : "data_offsets"));
    }
    const FileType* type = FindType(*tensor.dtype);
    if (!type) Fail(path, place + "dtype is unknown: " + Quoted(*tensor.dtype));
    const std::vector<uint64_t>& dims = *tensor.shape;
    if (dims.size() > kMaxFileRank) {
      Fail(path, place + "rank must be at most " + std::to_string(kMaxFileRank) + ", got " +
                     ShapeText(dims));
    }
    uint64_t size = type->size;
    for (uint64_t dim : dims) {
      if (__builtin_mul_overflow(size, dim, &size) ||
          dim > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        Fail(path, place + "size must fit 64 bits, got " + ShapeText(dims) + " " + type->name);
      }
    }
    if (tensor.offsets->size() != 2) {
      Fail(path, place + "data_offsets must be [begin, end], got " + ShapeText(*tensor.offsets));
    }
    const uint64_t begin = (*tensor.offsets)[0], end = (*tensor.offsets)[1];
    if (begin > end || end > data_bytes) {
      Fail(path, place + "data_offsets must lie in the " + std::to_string(data_bytes) +
                     " bytes of data, got " + ShapeText(*tensor.offsets) +
                     "; the file is truncated or damaged");
    }
    if (end - begin != size) {
      Fail(path, place + ShapeText(dims) + " " + type->name + " must take " + std::to_string(size) +
                     " bytes, got " + std::to_string(end - begin));
    }
    ranges.push_back({begin, end, &name});
    if (!type->dtype) {
      file->other_tensors_[name] = type->name;
      continue;
    }
    Shape shape;
    int64_t merged = 1;
    for (size_t axis = Shape::kMaxRank - 1; axis < dims.size(); ++axis) merged *= dims[axis];
    const auto dim = [&](size_t axis) { return static_cast<int64_t>(dims[axis]); };
    switch (dims.size()) {
      case 0:
        break;
      case 1:
        shape = {dim(0)};
        break;
      case 2:
        shape = {dim(0), dim(1)};
        break;
      case 3:
        shape = {dim(0), dim(1), dim(2)};
        break;
      default:
        shape = {dim(0), dim(1), dim(2), merged};
    }
    file->tensors_[name] = ConstTensorView(data + begin, *type->dtype, shape);
  }

  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const Range& range : ranges) {
    if (range.begin != covered) {
      Fail(path, "tensor " + Quoted(*range.name) + ": data must begin at byte " +
                     std::to_string(covered) + ", where the one before ends, got " +
                     std::to_string(range.begin) +
                     (range.begin < covered ? " (they overlap)" : " (there is a hole)"));
    }
    covered = range.end;
  }
  if (covered != data_bytes) {
    Fail(path, "tensors must cover all " + std::to_string(data_bytes) + " bytes of data, got " +
                   std::to_string(covered));
  }
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (map_) ::munmap(map_, map_bytes_);
}

void SafetensorsFile::ReleasePages(ConstTensorView tensor) const {
  const uintptr_t page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  // Rounded outwards: a neighbour's half page is read again from the page cache if it is needed.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.raw()) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(tensor.raw()) + tensor.SizeBytes();
  if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

Checkpoint Checkpoint::Open(const std::filesystem::path& directory) {
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  const std::filesystem::path single = directory / "model.safetensors";
  const std::filesystem::path index_path = directory / "model.safetensors.index.json";
  const auto add = [&](const std::string& shard) {
    const auto file = SafetensorsFile::Open(directory / shard);
    for (const auto& [name, view] : file->tensors()) {
      const auto [entry, first] = checkpoint.tensors_.emplace(name, Entry{view, file});
      if (!first) {
        Fail(file->path(), "tensor " + Quoted(name) + " must be in one file, got it also in " +
                               entry->second.file->path().string());
      }
    }
    for (const auto& [name, dtype] : file->other_tensors()) checkpoint.other_tensors_[name] = dtype;
  };
  std::error_code ignored;
  if (std::filesystem::exists(single, ignored)) {
    add(single.filename());
    return checkpoint;
  }
  if (!std::filesystem::exists(index_path, ignored)) {
    Fail(directory,
         "expected model.safetensors or model.safetensors.index.json, found neither; "
         "give the directory of a Hugging Face checkpoint");
  }
  const uint64_t index_bytes = std::filesystem::file_size(index_path, ignored);
  if (ignored || index_bytes > kMaxIndexBytes) {
    Fail(index_path,
         "index must be a file of at most " + std::to_string(kMaxIndexBytes) + " bytes");
  }
  std::ifstream stream(index_path, std::ios::binary);
  // Anything deeper than {"weight_map": {name: file}} is dropped while it is read.
  const nlohmann::json index = nlohmann::json::parse(
      stream, [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) { return depth < 4; },
      /*allow_exceptions=*/false);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    Fail(index_path, "must be JSON with an object weight_map from tensor to file, got " +
                         std::string(index.is_discarded() ? "no JSON" : index.type_name()));
  }
  std::set<std::string> shards;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    const std::string file = shard.is_string() ? shard.get<std::string>() : "";
    // An index must not lead out of its directory.
    if (file.empty() || std::filesystem::path(file).filename() != file || file == "..") {
      Fail(index_path, "tensor " + Quoted(name) + ": must name a file beside the index, got " +
                           (shard.is_string() ? Quoted(file) : shard.type_name()));
    }
    shards.insert(file);
  }
  for (const std::string& shard : shards) add(shard);
  for (const auto& [name, shard] : index["weight_map"].items()) {
    if (checkpoint.other_tensors_.count(name)) continue;
    const auto found = checkpoint.tensors_.find(name);
    if (found == checkpoint.tensors_.end()) {
      checkpoint.absent_tensors_[name] = shard.get<std::string>();
    } else if (found->second.file->path().filename() != shard.get<std::string>()) {
      Fail(index_path, "tensor " + Quoted(name) + " must be in " + shard.get<std::string>() +
                           ", as the index says, got it in " +
                           found->second.file->path().filename().string());
    }
  }
  return checkpoint;
}

std::string Checkpoint::Fingerprint() const {
  constexpr size_t kSample = 4096;  // from the beginning and from the middle
  uLong crc = crc32_z(0, nullptr, 0), adler = adler32_z(1, nullptr, 0);
  const auto add = [&](const void* data, size_t size) {
    crc = crc32_z(crc, static_cast<const Bytef*>(data), size);
    adler = adler32_z(adler, static_cast<const Bytef*>(data), size);
  };
  for (const auto& [name, entry] : tensors_) {
    const std::string line =
        name + " " + Name(entry.view.dtype()) + " " + entry.view.shape().ToString() + "\n";
    add(line.data(), line.size());
    const size_t size = entry.view.SizeBytes(), sample = std::min(size, kSample);
    add(entry.view.raw(), sample);
    add(static_cast<const char*>(entry.view.raw()) + (size - sample) / 2, sample);
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%08lx%08lx", crc & 0xffffffff, adler & 0xffffffff);
  return text;
}

int64_t Checkpoint::TotalBytes() const {
  int64_t bytes = 0;
  for (const auto& [name, entry] : tensors_) bytes += entry.view.SizeBytes();
  return bytes;
}

void WriteSafetensors(const std::filesystem::path& path,
                      const std::map<std::string, ConstTensorView>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  // Wide elements first, so that every tensor is aligned to its elements.
  std::vector<const std::pair<const std::string, ConstTensorView>*> order;
  for (const auto& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return SizeOf(a->second.dtype()) > SizeOf(b->second.dtype());
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  size_t offset = 0;
  for (const auto* tensor : order) {
    const ConstTensorView& view = tensor->second;
    std::vector<int64_t> dims;
    for (int axis = 0; axis < view.shape().rank(); ++axis) dims.push_back(view.dim(axis));
    header[tensor->first] = {{"dtype", FileName(view.dtype())},
                             {"shape", dims},
                             {"data_offsets", {offset, offset + view.SizeBytes()}}};
    offset += view.SizeBytes();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');

  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  const uint64_t header_bytes = text.size();
  file.write(reinterpret_cast<const char*>(&header_bytes), 8);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const auto* tensor : order) {
    const ConstTensorView& view = tensor->second;
    if (view.contiguous()) {
      file.write(static_cast<const char*>(view.raw()), view.SizeBytes());
      continue;
    }
    const int64_t row_bytes = view.SizeBytes() / view.dim(0);
    const int64_t stride_bytes = view.stride0() * static_cast<int64_t>(SizeOf(view.dtype()));
    for (int64_t i = 0; i < view.dim(0); ++i) {
      file.write(static_cast<const char*>(view.raw()) + i * stride_bytes, row_bytes);
    }
  }
  file.close();
  if (!file) {
    throw Error("[safetensors] " + path.string() + ": cannot be written: " + std::strerror(errno));
  }
}

}  // namespace sluice
