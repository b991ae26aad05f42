#include "streaming/apart/wire.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace sluice::apart {

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    Reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void UniqueFd::Reset() {
  if (fd_ >= 0) close(std::exchange(fd_, -1));
}

void SetText(char* to, size_t size, std::string_view text) {
  const size_t length = std::min(text.size(), size - 1);
  std::memcpy(to, text.data(), length);
  std::memset(to + length, 0, size - length);
}

std::string TextOf(const char* from, size_t size) {
  std::string text(from, strnlen(from, size));
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

bool SendBytes(int socket, const void* bytes, size_t size, int attached_fd) {
  iovec part = {const_cast<void*>(bytes), size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (attached_fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &attached_fd, sizeof(int));
  }
  ssize_t sent = -1;
  do {
    sent = sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(size);
}

size_t ReceiveBytes(int socket, void* bytes, size_t size, Waiting waiting, UniqueFd* attached) {
  iovec part = {bytes, size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (attached) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
  }
  ssize_t received = -1;
  // ECONNRESET: the other end has closed with messages of ours unread. The kernel says so once,
  // before it hands out what the other end sent last.
  do {
    received = recvmsg(socket, &message,
                       MSG_CMSG_CLOEXEC | (waiting == Waiting::kNoWait ? MSG_DONTWAIT : 0));
  } while (received < 0 && (errno == EINTR || errno == ECONNRESET));
  if (received <= 0) {
    if (received == 0) errno = ECONNRESET;
    return 0;
  }
  if (attached) {
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); header;
         header = CMSG_NXTHDR(&message, header)) {
      if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
      *attached = UniqueFd(fd);
    }
  }
  if (message.msg_flags & MSG_TRUNC) {
    errno = EMSGSIZE;
    return 0;
  }
  return static_cast<size_t>(received);
}

}  // namespace sluice::apart
