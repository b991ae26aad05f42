#include "runtime/archive.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "runtime/error.h"
#include "runtime/transfer.h"

namespace sluice {
namespace {

constexpr std::string_view kMagic = "SLUICE01", kEnd = "end";
constexpr char kText = 't', kBytes = 'x', kChecksum = 'c';
constexpr size_t kMostName = 255;
constexpr uint64_t kPiece = 1 << 20;

// Name's length, name, type and count around the name.
constexpr uint64_t HeadBytes(std::string_view field) { return 1 + field.size() + 1 + 8; }
constexpr uint64_t kTailBytes = HeadBytes(kEnd) + 4;

std::string SystemError() { return std::strerror(errno); }

// A new file that nobody else can read, never one that is there or that a link leads to; null and
// errno if that cannot be.
std::FILE* Create(const std::filesystem::path& file) {
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  int descriptor = open(file.c_str(), kFlags, S_IRUSR | S_IWUSR);
  // A process that was killed has left one.
  if (descriptor < 0 && errno == EEXIST && unlink(file.c_str()) == 0) {
    descriptor = open(file.c_str(), kFlags, S_IRUSR | S_IWUSR);
  }
  return descriptor < 0 ? nullptr : fdopen(descriptor, "wb");
}

// A file, but no link to one and nothing else; O_NONBLOCK, since opening a pipe would wait.
std::FILE* OpenExisting(const std::filesystem::path& file) {
  const int descriptor = open(file.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) return nullptr;
  struct stat info = {};
  if (fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode)) return fdopen(descriptor, "rb");
  close(descriptor);
  errno = EINVAL;
  return nullptr;
}

}  // namespace

uint32_t ArchiveChecksum(std::string_view bytes) {
  return crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size());
}

Archive::Archive(const std::filesystem::path& file, bool loading) : file_(file), loading_(loading) {
  temporary_ = file_;
  temporary_ += ".partial";
  stream_.reset(loading ? OpenExisting(file_) : Create(temporary_));
  if (stream_) return;
  if (loading) throw InputError("[archive] cannot open " + file_.string() + ": " + SystemError());
  throw Error("[archive] cannot write " + temporary_.string() + ": " + SystemError());
}

Archive Archive::ToFile(const std::filesystem::path& file) {
  Archive archive(file, false);
  archive.Transfer(const_cast<char*>(kMagic.data()), kMagic.size());
  return archive;
}

Archive Archive::FromFile(const std::filesystem::path& file) {
  Archive archive(file, true);
  archive.Verify();
  return archive;
}

Archive::~Archive() {
  if (!stream_ || loading_) return;
  stream_.reset();
  std::error_code ignored;
  std::filesystem::remove(temporary_, ignored);
}

void Archive::Verify() {
  struct stat info = {};
  if (fstat(fileno(stream_.get()), &info) != 0) {
    throw InputError("[archive] cannot read " + file_.string() + ": " + SystemError());
  }
  const auto size = static_cast<uint64_t>(info.st_size);
  const std::string name = "[archive] " + file_.string() + ": ";
  std::string magic(kMagic.size(), '\0');
  if (size < kMagic.size() + kTailBytes ||
      std::fread(magic.data(), 1, magic.size(), stream_.get()) != magic.size() || magic != kMagic) {
    throw InputError(name + "expected a file that begins with \"" + std::string(kMagic) +
                     "\", this one is of another kind or version");
  }
  uint32_t sum = ArchiveChecksum(magic);
  std::vector<Bytef> piece(std::min(kPiece, size));
  for (uint64_t left = size - kMagic.size() - 4; left > 0;) {
    const auto bytes = static_cast<size_t>(std::min<uint64_t>(left, piece.size()));
    if (std::fread(piece.data(), 1, bytes, stream_.get()) != bytes) {
      throw InputError(name + "cannot be read: " + SystemError());
    }
    sum = crc32_z(sum, piece.data(), bytes);
    left -= bytes;
  }
  uint32_t expected = 0;
  if (std::fread(&expected, 1, 4, stream_.get()) != 4 || sum != expected) {
    throw InputError(name + "its checksum does not fit: the file was cut short or damaged");
  }
  std::fseek(stream_.get(), static_cast<long>(kMagic.size()), SEEK_SET);
  left_ = size - kMagic.size() - kTailBytes;
}

void Archive::Refuse(std::string_view field, const std::string& expected,
                     const std::string& found) const {
  throw InputError("[archive] " + file_.string() + ": field '" + std::string(field) +
                   "': expected " + expected + ", found " + found);
}

void Archive::Transfer(void* data, uint64_t size) {
  if (size == 0) return;
  if (loading_) {
    left_ -= size;
    if (std::fread(data, 1, size, stream_.get()) == size) return;
    throw InputError("[archive] " + file_.string() + ": cannot be read: " + SystemError());
  }
  checksum_ = crc32_z(checksum_, static_cast<const Bytef*>(data), size);
  if (std::fwrite(data, 1, size, stream_.get()) == size) return;
  throw Error("[archive] cannot write " + temporary_.string() + ": " + SystemError());
}

void Archive::BeginWrite(std::string_view field, char type, uint64_t count) {
  if (field.empty() || field.size() > kMostName) {
    throw Error("[archive] a field's name has 1 to 255 characters, got '" + std::string(field) +
                "'");
  }
  auto length = static_cast<uint8_t>(field.size());
  Transfer(&length, 1);
  Transfer(const_cast<char*>(field.data()), field.size());
  Transfer(&type, 1);
  Transfer(&count, sizeof(count));
}

uint64_t Archive::BeginRead(std::string_view field, char type, size_t item, uint64_t most) {
  if (left_ < HeadBytes(field)) Refuse(field, "it to follow", "the end of the file");
  uint8_t length = 0;
  Transfer(&length, 1);
  if (length + uint64_t{9} > left_) Refuse(field, "it to follow", "a name beyond the file's end");
  std::string name(length, '\0');
  Transfer(name.data(), length);
  if (name != field) Refuse(field, "it to follow", "field '" + name + "'");
  char found = 0;
  Transfer(&found, 1);
  if (found != type) {
    Refuse(field, std::string("type ") + type, std::string("type ") + found);
  }
  uint64_t count = 0;
  Transfer(&count, sizeof(count));
  if (count > most) {
    Refuse(field, "at most " + std::to_string(most) + " values", std::to_string(count));
  }
  CheckRoom(field, count, item);
  return count;
}

void Archive::CheckRoom(std::string_view field, uint64_t count, uint64_t item_bytes) const {
  if (count <= left_ / item_bytes) return;
  Refuse(field, "what the file has room for", std::to_string(count) + " values");
}

void Archive::Value(std::string_view field, char type, void* value, size_t size) {
  if (!loading_) {
    BeginWrite(field, type, 1);
  } else if (BeginRead(field, type, size, 1) != 1) {
    Refuse(field, "one value", "none");
  }
  Transfer(value, size);
}

void Archive::Flag(std::string_view field, bool& value) {
  uint8_t number = value;
  Number(field, number, uint8_t{0}, uint8_t{1});
  value = number != 0;
}

void Archive::Text(std::string_view field, std::string& value) {
  if (loading_) {
    value.resize(BeginRead(field, kText, 1, std::numeric_limits<uint64_t>::max()));
  } else {
    BeginWrite(field, kText, value.size());
  }
  Transfer(value.data(), value.size());
}

void Archive::Bytes(std::string_view field, void* data, uint64_t size) {
  if (!loading_) {
    BeginWrite(field, kBytes, size);
  } else if (const uint64_t found = BeginRead(field, kBytes, 1, size); found != size) {
    Refuse(field, std::to_string(size) + " bytes", std::to_string(found));
  }
  Transfer(data, size);
}

void Archive::Value(std::string_view field, Tensor& tensor) {
  const std::string name(field);
  std::vector<int64_t> dims;
  int32_t dtype = 0;
  if (!loading_ && !tensor.empty()) {
    dtype = static_cast<int32_t>(tensor.dtype());
    for (int i = 0; i < tensor.shape().rank(); ++i) dims.push_back(tensor.dim(i));
  }
  Array(name + ".shape", dims, 2);
  Number(name + ".dtype", dtype, 0, static_cast<int32_t>(kLastDType));
  if (dims.empty()) {
    if (loading_) tensor = Tensor();
    return;
  }
  if (loading_) {
    const auto type = static_cast<DType>(dtype);
    uint64_t bytes = SizeOf(type);
    for (const int64_t dim : dims) {
      if (dim < 0 || (dim > 0 && bytes > left_ / static_cast<uint64_t>(dim))) {
        Refuse(name + ".shape", "what the file has room for", std::to_string(dim) + " rows");
      }
      bytes *= static_cast<uint64_t>(dim);
    }
    tensor = Tensor(type, dims.size() == 1 ? Shape{dims[0]} : Shape{dims[0], dims[1]});
  }
  if (tensor.device() == Device::kCpu) {
    Bytes(field, tensor.view().raw(), tensor.SizeBytes());
  } else {
    Tensor copy = Placed(tensor.view(), Device::kCpu);
    Bytes(field, copy.view().raw(), copy.SizeBytes());
  }
}

void Archive::Finish() {
  if (loading_) {
    if (left_ == 0) return;
    throw InputError("[archive] " + file_.string() + ": expected its end, found " +
                     std::to_string(left_) + " more bytes");
  }
  BeginWrite(kEnd, kChecksum, 1);
  uint32_t sum = checksum_;
  Transfer(&sum, sizeof(sum));
  std::FILE* const stream = stream_.get();
  if (std::fflush(stream) != 0 || fsync(fileno(stream)) != 0 ||
      std::fclose(stream_.release()) != 0 || std::rename(temporary_.c_str(), file_.c_str()) != 0) {
    const std::string reason = SystemError();
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
    throw Error("[archive] cannot write " + file_.string() + ": " + reason);
  }
}

}  // namespace sluice
