#include "streaming/apart/apart_source.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/thread_name.h"
#include "streaming/apart/request.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using apart::Dial;
using apart::DialReply;
using apart::Report;
using apart::UniqueFd;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kBetweenLooks{500};  // at the decoder's CPU time
constexpr milliseconds kConnectTimeout{10000};
// A decoder that says nothing for so many stall timeouts while it opens has hung itself up: it
// watches for stalls itself.
constexpr int kOpenStalls = 6;

[[noreturn]] void ThrowErrno(const char* what, int error) {
  throw Error("[source] a decoder cannot be started: " + std::string(what) + ": " +
              std::strerror(error));
}

// Out of the way of the numbers that the decoder's have.
UniqueFd Raised(UniqueFd fd) {
  constexpr int kAbove = 16;
  UniqueFd raised(fcntl(fd.get(), F_DUPFD_CLOEXEC, kAbove));
  if (!raised) ThrowErrno("dup", errno);
  return raised;
}

std::pair<UniqueFd, UniqueFd> SocketPair() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
    ThrowErrno("socketpair", errno);
  }
  UniqueFd ours(ends[0]), theirs(ends[1]);
  return {std::move(ours), Raised(std::move(theirs))};
}

// Shared memory whose size nobody can change, so that reading it never faults.
class FrameMemory {
 public:
  explicit FrameMemory(int64_t slot_bytes)
      : slot_bytes_(slot_bytes), bytes_(static_cast<size_t>(slot_bytes) * apart::kSlots) {
    fd_ = Raised(UniqueFd(memfd_create("sluice-frames", MFD_CLOEXEC | MFD_ALLOW_SEALING)));
    if (ftruncate(fd_.get(), static_cast<off_t>(bytes_)) != 0) ThrowErrno("ftruncate", errno);
    if (fcntl(fd_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
      ThrowErrno("sealing memory", errno);
    }
    void* at = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, fd_.get(), 0);
    if (at == MAP_FAILED) ThrowErrno("mmap", errno);
    at_ = static_cast<const uint8_t*>(at);
  }
  ~FrameMemory() { munmap(const_cast<uint8_t*>(at_), bytes_); }
  FrameMemory(const FrameMemory&) = delete;
  FrameMemory& operator=(const FrameMemory&) = delete;

  int fd() const { return fd_.get(); }
  int64_t slot_bytes() const { return slot_bytes_; }
  const uint8_t* slot(uint32_t number) const { return at_ + slot_bytes_ * number; }

 private:
  const int64_t slot_bytes_;
  const size_t bytes_;
  UniqueFd fd_;
  const uint8_t* at_ = nullptr;
};

// A socket that is connected to `endpoint`; none: `error` tells why. Gives up when `abandoned`
// hangs up.
UniqueFd Connect(const Endpoint& endpoint, int abandoned, int& error) {
  sockaddr_storage address = {};
  socklen_t length = 0;
  auto* four = reinterpret_cast<sockaddr_in*>(&address);
  auto* six = reinterpret_cast<sockaddr_in6*>(&address);
  if (inet_pton(AF_INET, endpoint.address.c_str(), &four->sin_addr) == 1) {
    four->sin_family = AF_INET;
    four->sin_port = htons(static_cast<uint16_t>(endpoint.port));
    length = sizeof *four;
  } else if (inet_pton(AF_INET6, endpoint.address.c_str(), &six->sin6_addr) == 1) {
    six->sin6_family = AF_INET6;
    six->sin6_port = htons(static_cast<uint16_t>(endpoint.port));
    length = sizeof *six;
  } else {
    error = EAFNOSUPPORT;
    return {};
  }
  UniqueFd fd(socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) {
    error = errno;
    return {};
  }
  error = 0;
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) == 0) return fd;
  if (errno != EINPROGRESS) {
    error = errno;
    return {};
  }
  const auto deadline = steady_clock::now() + kConnectTimeout;
  for (;;) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
    std::array<pollfd, 2> watched = {{{fd.get(), POLLOUT, 0}, {abandoned, 0, 0}}};
    const int ready =
        left.count() <= 0 ? 0 : poll(watched.data(), 2, static_cast<int>(left.count()));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0 || watched[1].revents != 0) {
      error = ETIMEDOUT;
      return {};
    }
    socklen_t size = sizeof error;
    getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return {};
    return fd;
  }
}

// The decoder's process. Started, waited for and served by a thread of its own: the kernel ends the
// decoder with the thread that has started it.
class Decoder {
 public:
  Decoder(const fs::path& program, ApartInput input, const FrameMemory& frames)
      : input_(std::move(input)) {
    auto [control, their_control] = SocketPair();
    auto [dial, their_dial] = SocketPair();
    control_ = std::move(control);
    dial_ = std::move(dial);
    UniqueFd file = input_.file ? Raised(std::move(input_.file)) : UniqueFd();
    const std::array<int, 4> fds = {their_control.get(), frames.fd(), their_dial.get(), file.get()};
    std::promise<int> started;
    std::future<int> error = started.get_future();
    keeper_ = std::thread([this, &program, &fds, started = std::move(started)]() mutable {
      NameThread("decoder");
      const int failed = Spawn(program, fds);
      started.set_value(failed);  // the constructor's variables may be gone after this
      if (failed == 0) Keep();
    });
    if (const int failed = error.get(); failed != 0) {
      keeper_.join();
      ThrowErrno(program.c_str(), failed);
    }
  }
  ~Decoder() {
    Kill();
    keeper_.join();
  }

  int control() const { return control_.get(); }

  // Thread-safe, like all below.
  void Kill() {
    const std::lock_guard lock(mutex_);
    if (!ended_) kill(pid_, SIGKILL);
  }
  // Wakes whoever waits for a message.
  void HangUp() { shutdown(control_.get(), SHUT_RDWR); }

  double cpu_seconds() {
    const std::lock_guard lock(mutex_);
    clockid_t clock;
    timespec time = {};
    if (ended_ || clock_getcpuclockid(pid_, &clock) != 0 || clock_gettime(clock, &time) != 0) {
      return 0;
    }
    return static_cast<double>(time.tv_sec) + time.tv_nsec * 1e-9;
  }

  // Waits for its end, of which the control socket has told.
  std::string HowItEnded() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(5), [&] { return ended_.has_value(); })) {
      kill(pid_, SIGKILL);
      changed_.wait(lock, [&] { return ended_.has_value(); });
    }
    const int status = ended_->si_status;
    if (ended_->si_code == CLD_EXITED) return "exit status " + std::to_string(status);
    const char* name = strsignal(status);
    return "signal " + std::to_string(status) + ", " + (name ? name : "unknown");
  }

 private:
  // An errno, or 0.
  int Spawn(const fs::path& program, const std::array<int, 4>& fds) {
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDWR, 0);
    posix_spawn_file_actions_adddup2(&actions, 0, 1);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    // Lines of the libraries that decode, about content that strangers choose, stay out of the log.
    posix_spawn_file_actions_adddup2(&actions, 0, 2);
#endif
    constexpr std::array<int, 4> kNumbers = {apart::kControlFd, apart::kFramesFd, apart::kDialFd,
                                             apart::kFileFd};
    for (size_t i = 0; i < fds.size(); ++i) {
      if (fds[i] >= 0) posix_spawn_file_actions_adddup2(&actions, fds[i], kNumbers[i]);
    }
    posix_spawn_file_actions_addclosefrom_np(&actions,
                                             fds[3] >= 0 ? apart::kFileFd + 1 : apart::kFileFd);

    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(
        &attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);

    // Of the environment only what finds the libraries: it may hold secrets.
    std::vector<std::string> kept;
    for (const char* name : {"LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "ASAN_OPTIONS",
                             "LSAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS"}) {
      if (const char* value = std::getenv(name)) kept.push_back(std::string(name) + "=" + value);
    }
    kept.push_back("MALLOC_ARENA_MAX=2");
    std::vector<char*> environment;
    for (std::string& variable : kept) environment.push_back(variable.data());
    environment.push_back(nullptr);
    std::string name = "sluice-decode";
    char* arguments[] = {name.data(), nullptr};
    const int error =
        posix_spawn(&pid_, program.c_str(), &actions, &attributes, arguments, environment.data());
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return error;
  }

  // Serves the decoder until it is gone.
  void Keep() {
    Dial dial;
    UniqueFd connection;
    while (apart::Receive(dial_.get(), dial)) {
      const DialReply reply = Answer(dial, connection);
      const bool sent = apart::Send(dial_.get(), reply, connection.get());
      connection.Reset();
      if (!sent) break;
    }
    siginfo_t how = {};
    Kill();  // one that has only closed its end
    while (waitid(P_PID, static_cast<id_t>(pid_), &how, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
    }
    {
      const std::lock_guard lock(mutex_);
      ended_ = how;
      waitid(P_PID, static_cast<id_t>(pid_), &how, WEXITED);  // from here on the number is free
    }
    changed_.notify_all();
    HangUp();
  }

  DialReply Answer(const Dial& dial, UniqueFd& connection) {
    DialReply reply = {};
    const std::string text = apart::TextOf(dial.text);
    if (dial.kind == Dial::Kind::kResolve) {
      std::vector<Endpoint> found;
      try {
        if (input_.further) found = input_.further(text);
      } catch (const Error&) {  // told as "not known" by whoever asked
      }
      for (Endpoint& endpoint : found) {
        if (reply.count < DialReply::kMaxAddresses) {
          apart::SetText(reply.addresses[reply.count++], endpoint.address);
        }
        const bool known = Knows(endpoint);
        if (!known && input_.endpoints.size() < kMaxEndpoints) {
          input_.endpoints.push_back(std::move(endpoint));
        }
      }
      reply.error = reply.count == 0 ? EACCES : 0;
    } else if (dial.kind == Dial::Kind::kConnect && dial.port <= 0xFFFF) {
      const Endpoint wanted{.address = text, .port = static_cast<int>(dial.port)};
      reply.error = EACCES;
      if (Knows(wanted)) connection = Connect(wanted, dial_.get(), reply.error);
    } else {
      reply.error = EINVAL;
    }
    return reply;
  }
  bool Knows(const Endpoint& wanted) const {
    return std::any_of(input_.endpoints.begin(), input_.endpoints.end(), [&](const Endpoint& e) {
      return e.address == wanted.address && e.port == wanted.port;
    });
  }

  static constexpr size_t kMaxEndpoints = 1024;
  ApartInput input_;  // the keeper's
  UniqueFd control_, dial_;
  pid_t pid_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<siginfo_t> ended_;
  std::thread keeper_;  // last: it uses all above
};

class ApartSource final : public Source {
 public:
  ApartSource(ApartInput input, const SourceOptions& source, const ApartOptions& options)
      : label_(input.label),
        options_(options),
        frames_(3 * std::min(options.frame_pixels,
                             int64_t{source.max_side_pixels} * source.max_side_pixels)) {
    apart::Request request{.parent = getpid(),
                           .source = input.file ? apart::kFilePath : input.uri,
                           .label = input.label,
                           .host = input.host,
                           .addresses = {},
                           .network = !input.endpoints.empty(),
                           .playlists = options.playlists,
                           .filtered = options.filtered,
                           .memory_bytes = options.memory_bytes,
                           .slot_bytes = frames_.slot_bytes(),
                           .elements = options.elements,
                           .options = source};
    for (const Endpoint& endpoint : input.endpoints) request.addresses.push_back(endpoint.address);
    decoder_ = std::make_unique<Decoder>(DecoderProgram(options), std::move(input), frames_);
    const std::string text = apart::ToText(request);
    if (text.size() > apart::kMaxRequestBytes ||
        !apart::SendBytes(decoder_->control(), text.data(), text.size())) {
      throw Error("[source] '" + label_ + "': its decoder does not take the request (" +
                  std::to_string(text.size()) + " bytes)");
    }
    const Report report = NextReport(steady_clock::now() + kOpenStalls * source.stall_timeout);
    if (report.kind != Report::Kind::kOpened) ThrowOdd();
    if (report.duration_ns >= 0 && !IsTime(report.duration_ns)) ThrowOdd();
    info_.live = report.live != 0;
    info_.endless = report.endless != 0;
    if (report.duration_ns >= 0) info_.duration = MediaTime::FromNanoseconds(report.duration_ns);
    info_.width = report.width;
    info_.height = report.height;
    info_.codec = apart::TextOf(report.text);
  }

  const SourceInfo& info() const override { return info_; }

  FramePtr Next() override {
    while (!ended_) {
      std::optional<Report> report;
      try {
        report = NextReport(std::nullopt);
      } catch (const Error&) {
        ended_ = true;
        if (!cancelled_) throw;
      }
      if (cancelled_ || !report) return nullptr;
      if (report->kind == Report::Kind::kFrame) return ToFrame(*report);
      if (report->kind != Report::Kind::kEnded) ThrowOdd();
      ended_ = true;
      if (report->text[0] != 0) warning_ = apart::TextOf(report->text);
    }
    return nullptr;
  }

  void Cancel() override {
    cancelled_ = true;
    decoder_->HangUp();
    decoder_->Kill();
  }
  std::optional<std::string> warning() const override { return warning_; }

 private:
  // Within thirty years of the beginning: sums of a few never overflow.
  static bool IsTime(int64_t nanoseconds) {
    constexpr int64_t kMost = 1'000'000'000'000'000'000;
    return nanoseconds >= -kMost && nanoseconds <= kMost;
  }
  [[noreturn]] void Throw(const std::string& what) const {
    throw Error("[source] '" + label_ + "': " + what);
  }
  [[noreturn]] void ThrowOdd() {
    ended_ = true;
    decoder_->Kill();
    Throw("its decoder sent what no decoder sends; it was ended, other sources go on");
  }

  // Throws what the decoder failed with, and when it died, hangs or works for too long.
  Report NextReport(std::optional<steady_clock::time_point> deadline) {
    const double cpu_before = decoder_->cpu_seconds();
    for (;;) {
      pollfd watched = {decoder_->control(), POLLIN, 0};
      const int ready = poll(&watched, 1, static_cast<int>(kBetweenLooks.count()));
      if (ready > 0) {
        Report report;
        if (!apart::Receive(decoder_->control(), report)) break;
        if (report.kind != Report::Kind::kFailed) return report;
        ended_ = true;
        const std::string line = apart::TextOf(report.text);
        if (report.input_error != 0) throw InputError(line);
        throw Error(line);
      }
      char seconds[32];
      if (decoder_->cpu_seconds() - cpu_before > options_.frame_cpu_seconds) {
        std::snprintf(seconds, sizeof seconds, "%.3g", options_.frame_cpu_seconds);
        decoder_->Kill();
        Throw("its decoder worked " + std::string(seconds) +
              " s for one picture and was ended (source_cpu_seconds)");
      }
      if (deadline && steady_clock::now() > *deadline) {
        decoder_->Kill();
        Throw("its decoder hangs while it opens the source and was ended");
      }
    }
    if (errno == EMSGSIZE) ThrowOdd();
    ended_ = true;
    if (cancelled_) Throw("cancelled");
    Throw("its decoder died (" + decoder_->HowItEnded() + ", at most " +
          std::to_string(options_.memory_bytes >> 20) +
          " MiB of memory: source_memory_mb); other sources go on");
  }

  FramePtr ToFrame(const Report& report) {
    const int64_t pixels = int64_t{report.width} * report.height;
    if (report.width <= 0 || report.height <= 0 || report.slot >= apart::kSlots ||
        pixels > frames_.slot_bytes() / 3 || !IsTime(report.time_ns) || report.index < 0) {
      ThrowOdd();
    }
    auto frame = std::make_shared<Frame>();
    frame->width = report.width;
    frame->height = report.height;
    const uint8_t* rgb = frames_.slot(report.slot);
    frame->rgb.assign(rgb, rgb + 3 * pixels);
    frame->time = MediaTime::FromNanoseconds(report.time_ns);
    frame->index = report.index;
    apart::Send(decoder_->control(), apart::Released{report.slot});  // if it is gone, Next tells
    return frame;
  }

  const std::string label_;
  const ApartOptions options_;
  FrameMemory frames_;
  std::unique_ptr<Decoder> decoder_;
  SourceInfo info_;
  std::optional<std::string> warning_;
  bool ended_ = false;
  std::atomic<bool> cancelled_ = false;
};

}  // namespace

fs::path DecoderProgram(const ApartOptions& options) {
  fs::path program = options.program;
  if (program.empty()) {
    std::error_code error;
    program = fs::read_symlink("/proc/self/exe", error).parent_path() / "sluice-decode";
  }
  if (access(program.c_str(), X_OK) != 0) {
    throw InputError("[source] the decoder " + program.string() +
                     " cannot be run: " + std::strerror(errno) +
                     "; install it beside this program or name it " + "(source_decoder)");
  }
  return program;
}

std::unique_ptr<Source> OpenApart(ApartInput input, const SourceOptions& source,
                                  const ApartOptions& options) {
  return std::make_unique<ApartSource>(std::move(input), source, options);
}

}  // namespace sluice
