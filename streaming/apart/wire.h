// What a decoder's process and the process that started it say to each other. Messages have one
// size each, so that nothing has to be parsed; what comes from the decoder is checked by whoever
// reads it, since a damaged or hostile video may have taken that process over.
#ifndef SLUICE_STREAMING_APART_WIRE_H_
#define SLUICE_STREAMING_APART_WIRE_H_

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace sluice::apart {

// Owns a file descriptor, or none.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd() { Reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int Release() { return std::exchange(fd_, -1); }
  void Reset();

 private:
  int fd_ = -1;
};

// Where the decoder finds what it was given.
inline constexpr int kControlFd = 3;  // Request, Released ->, <- Report
inline constexpr int kFramesFd = 4;   // shared memory: kSlots pictures
inline constexpr int kDialFd = 5;     // <- Dial, DialReply ->
inline constexpr int kFileFd = 6;     // of a file: opened for reading
inline constexpr char kFilePath[] = "/proc/self/fd/6";
inline constexpr uint32_t kSlots = 2;  // one is filled while the other is read

// The first message to the decoder is a JSON text of at most this many bytes, see Request.
inline constexpr size_t kMaxRequestBytes = 128 << 10;

// From the decoder.
struct Report {
  enum class Kind : uint32_t {
    kOpened = 1,  // `text` is the codec
    kFrame,       // slot `slot` holds [height, width, 3] bytes until it is released
    kEnded,       // `text` is a warning or empty
    kFailed,      // `text` is the error's line
  };
  Kind kind;
  uint32_t slot;
  int32_t width, height;
  int64_t time_ns, index;
  int64_t duration_ns;   // below 0: not known
  uint32_t live;         // 0 or 1
  uint32_t endless;      // 0 or 1
  uint32_t input_error;  // 0 or 1: kFailed is an InputError
  char text[1024];       // ends with a NUL
};

// To the decoder: a picture was read.
struct Released {
  uint32_t slot;
};

// From the decoder: the addresses of a host, or a connection.
struct Dial {
  enum class Kind : uint32_t { kResolve = 1, kConnect };
  Kind kind;
  uint32_t port;   // of kConnect
  char text[256];  // the host's name; of kConnect its address ("192.0.2.1", "2001:db8::1")
};

// To the decoder; a connection comes along as a file descriptor.
struct DialReply {
  static constexpr uint32_t kMaxAddresses = 16;
  int32_t error;  // an errno, 0: none
  uint32_t count;
  char addresses[kMaxAddresses][64];
};

// At most size - 1 bytes of `text`, and a NUL.
void SetText(char* to, size_t size, std::string_view text);
template <size_t kSize>
void SetText(char (&to)[kSize], std::string_view text) {
  SetText(to, kSize, text);
}
// Up to the first NUL, or all. Bytes that are no printable ASCII become '?'.
std::string TextOf(const char* from, size_t size);
template <size_t kSize>
std::string TextOf(const char (&from)[kSize]) {
  return TextOf(from, kSize);
}

// One message, whole. False: the other end is gone.
bool SendBytes(int socket, const void* bytes, size_t size, int attached_fd = -1);
// Its size; 0 when the other end is gone, the message is longer than `size` or, with kNoWait, there
// is none yet (errno is EAGAIN then). Descriptors that come along are taken only where asked for.
enum class Waiting { kWait, kNoWait };
size_t ReceiveBytes(int socket, void* bytes, size_t size, Waiting waiting = Waiting::kWait,
                    UniqueFd* attached = nullptr);

template <typename T>
bool Send(int socket, const T& message, int attached_fd = -1) {
  static_assert(std::is_trivially_copyable_v<T>);
  return SendBytes(socket, &message, sizeof message, attached_fd);
}
// False also for a message of another size.
template <typename T>
bool Receive(int socket, T& message, Waiting waiting = Waiting::kWait,
             UniqueFd* attached = nullptr) {
  static_assert(std::is_trivially_copyable_v<T>);
  return ReceiveBytes(socket, &message, sizeof message, waiting, attached) == sizeof message;
}

}  // namespace sluice::apart

#endif  // SLUICE_STREAMING_APART_WIRE_H_
