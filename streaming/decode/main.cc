// sluice-decode: decodes one video for the process that started it (apart/apart_source.h), which
// hands it a socket, shared memory and what it may open. Nobody else calls it.
#include <fcntl.h>
#include <gst/gst.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "streaming/apart/request.h"
#include "streaming/apart/wire.h"
#include "streaming/decode/confine.h"
#include "streaming/decode/network.h"
#include "streaming/decode/plugins.h"
#include "streaming/gst_source.h"

// In place of the C library's, for what reads the file by its name. Once the filter is set, the
// kernel refuses the calls behind the library's own.
extern "C" int open64(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  if (std::strcmp(path, sluice::apart::kFilePath) != 0) {
    return static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, flags, mode));
  }
  lseek(sluice::apart::kFileFd, 0, SEEK_SET);
  return fcntl(sluice::apart::kFileFd, F_DUPFD_CLOEXEC, 0);
}
extern "C" FILE* fopen64(const char* path, const char* mode) {  // as streams of the library do
  const bool reads = mode[0] == 'r' && std::strchr(mode, '+') == nullptr;
  const int fd = reads ? open64(path, O_RDONLY | O_CLOEXEC) : -1;
  if (!reads) errno = EROFS;
  return fd < 0 ? nullptr : fdopen(fd, mode);
}
extern "C" int stat(const char* path, struct stat* status) noexcept {
  if (std::strcmp(path, sluice::apart::kFilePath) != 0) {
    return fstatat(AT_FDCWD, path, status, 0);
  }
  return fstatat(sluice::apart::kFileFd, "", status, AT_EMPTY_PATH);
}
extern "C" int access(const char* path, int mode) noexcept {
  if (std::strcmp(path, sluice::apart::kFilePath) != 0) return faccessat(AT_FDCWD, path, mode, 0);
  if ((mode & (W_OK | X_OK)) == 0) return 0;
  errno = EACCES;
  return -1;
}
extern "C" int connect(int socket, const sockaddr* address, socklen_t size) {
  return sluice::decode::AskedConnect(socket, address, size);
}

namespace sluice::decode {
namespace {

using apart::Report;

void Fail(const std::string& line, bool input_error) {
  Report report = {};
  report.kind = Report::Kind::kFailed;
  report.input_error = input_error ? 1 : 0;
  apart::SetText(report.text, line);
  apart::Send(apart::kControlFd, report);
}

apart::Request ReadRequest() {
  std::vector<char> text(apart::kMaxRequestBytes);
  const size_t size = apart::ReceiveBytes(apart::kControlFd, text.data(), text.size());
  return apart::RequestFrom({text.data(), size});
}

uint8_t* MapFrames(int64_t slot_bytes) {
  void* at = mmap(nullptr, static_cast<size_t>(slot_bytes) * apart::kSlots, PROT_READ | PROT_WRITE,
                  MAP_SHARED, apart::kFramesFd, 0);
  if (at == MAP_FAILED) throw Error(std::string("[decode] mmap: ") + std::strerror(errno));
  return static_cast<uint8_t*>(at);
}

// What an element that is not on the list leaves behind reads as if it were not installed.
std::string WithHint(const std::string& line) {
  const bool lacking =
      line.find("no plugin for") != line.npos || line.find("missing a plug-in") != line.npos ||
      line.find("unsupported codec") != line.npos || line.find("no decoder") != line.npos;
  return lacking ? line +
                       "; servers take the elements of source_elements, and playlists with "
                       "source_playlists alone"
                 : line;
}

void Decode(const apart::Request& request) {
  LimitResources(request.memory_bytes);
  LoadElements(request.elements, request.playlists);
  if (request.network) UseAskedNetwork(request.host, request.addresses);
  uint8_t* const frames = MapFrames(request.slot_bytes);
  if (request.filtered) FilterSystemCalls(request.network);

  // From here on what strangers have written is read.
  SourceRequest what = ParseSource(request.source, request.label);
  what.label = request.label;
  what.one_place = true;
  what.why_unreachable = WhyNotConnected;

  // Never destroyed: taking a pipeline down can wait for a decoder that hangs.
  auto* source = new GstSource(std::move(what), request.options);
  source->Start();
  const SourceInfo& info = source->info();
  Report report = {};
  report.kind = Report::Kind::kOpened;
  report.width = info.width;
  report.height = info.height;
  report.live = info.live ? 1 : 0;
  report.endless = info.endless ? 1 : 0;
  report.duration_ns = info.duration ? info.duration->nanoseconds() : -1;
  apart::SetText(report.text, info.codec);
  if (!apart::Send(apart::kControlFd, report)) return;

  std::vector<uint32_t> free;
  for (uint32_t slot = 0; slot < apart::kSlots; ++slot) free.push_back(slot);
  while (const FramePtr frame = source->Next()) {
    if (static_cast<int64_t>(frame->rgb.size()) > request.slot_bytes) {
      Fail("[source] '" + request.label + "': pictures are " + std::to_string(frame->width) + "x" +
               std::to_string(frame->height) + ", expected at most " +
               std::to_string(request.slot_bytes / 3) + " pixels (frame_pixels)",
           true);
      return;
    }
    while (free.empty()) {
      apart::Released released;
      if (!apart::Receive(apart::kControlFd, released)) return;
      free.push_back(released.slot);
    }
    report = {};
    report.kind = Report::Kind::kFrame;
    report.slot = free.back();
    free.pop_back();
    report.width = frame->width;
    report.height = frame->height;
    report.time_ns = frame->time.nanoseconds();
    report.index = frame->index;
    std::memcpy(frames + report.slot * request.slot_bytes, frame->rgb.data(), frame->rgb.size());
    if (!apart::Send(apart::kControlFd, report)) return;
  }
  report = {};
  report.kind = Report::Kind::kEnded;
  apart::SetText(report.text, source->warning().value_or(""));
  apart::Send(apart::kControlFd, report);
}

int Main() {
  struct stat control = {};
  if (fstat(apart::kControlFd, &control) != 0 || !S_ISSOCK(control.st_mode)) {
    std::fputs("sluice-decode is started by sluice, for one video; run `sluice --help`\n", stderr);
    return 2;
  }
  try {
    // The one who waits for the pictures takes this process along.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    const apart::Request request = ReadRequest();
    if (getppid() != request.parent) return 1;
    Decode(request);
  } catch (const InputError& error) {
    Fail(WithHint(error.what()), true);
  } catch (const std::bad_alloc&) {
    Fail("[source] a decoder's memory does not suffice (source_memory_mb)", false);
  } catch (const std::exception& error) {
    Fail(error.what(), false);
  }
  return 0;
}

}  // namespace
}  // namespace sluice::decode

int main() { _exit(sluice::decode::Main()); }
