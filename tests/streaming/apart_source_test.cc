// Sources that are decoded in a process of their own.
#include "streaming/apart/apart_source.h"

#include <dirent.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <set>
#include <string>
#include <thread>

#include "runtime/error.h"
#include "streaming/apart/elements.h"
#include "streaming/decode/confine.h"
#include "tests/support/http_server.h"
#include "tests/support/sanitizers.h"
#include "tests/support/temporary_directory.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ExitedWithCode;
using ::testing::HasSubstr;
using ::testing::KilledBySignal;
using ::testing::Not;

const char kClip[] = SLUICE_SOURCE_DIR "/demos/clips/parade.mp4";

std::string ReadFile(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

SourceOptions Every(double seconds, int64_t frames = 0) {
  SourceOptions options;
  options.rate.fps = 1 / seconds;
  options.max_frames = frames;
  return options;
}

ApartInput FileInput(const fs::path& path) {
  ApartInput input;
  input.label = path.filename();
  input.file = apart::UniqueFd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  return input;
}

ApartInput TestInput(const std::string& uri) {
  ApartInput input;
  input.uri = input.label = uri;
  return input;
}

// At `host`, which is told to be on loopback.
ApartInput HttpInput(const std::string& host, int port, const std::string& path) {
  ApartInput input;
  input.uri = "http://" + host + ":" + std::to_string(port) + path;
  input.label = "http://" + host + path;
  input.host = host;
  input.endpoints = {{"127.0.0.1", port}};
  return input;
}

std::set<pid_t> Decoders() {
  std::set<pid_t> found;
  for (const auto& thread : fs::directory_iterator("/proc/self/task")) {
    std::ifstream children(thread.path() / "children");
    for (pid_t pid = 0; children >> pid;) {
      if (ReadFile("/proc/" + std::to_string(pid) + "/comm") == "sluice-decode\n")
        found.insert(pid);
    }
  }
  return found;
}

// What opening `input` fails with.
std::string Refusal(ApartInput input, const ApartOptions& options = {},
                    const SourceOptions& source = Every(0.5)) {
  try {
    OpenApart(std::move(input), source, options);
  } catch (const Error& error) {
    return error.what();
  }
  return "it was opened";
}

TEST(ApartSourceTest, FramesAreThoseOfASourceInThisProcess) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "GStreamer is not instrumented";
#endif
  const auto here = Source::Open(kClip, Every(2));
  const auto apart = OpenApart(FileInput(kClip), Every(2), {});
  EXPECT_EQ(apart->info().codec, here->info().codec);
  EXPECT_EQ(apart->info().duration, here->info().duration);
  EXPECT_EQ(apart->info().width, here->info().width);
  EXPECT_FALSE(apart->info().live);
  int frames = 0;
  while (const FramePtr expected = here->Next()) {
    const FramePtr frame = apart->Next();
    ASSERT_TRUE(frame);
    EXPECT_EQ(frame->time, expected->time);
    EXPECT_EQ(frame->index, expected->index);
    EXPECT_EQ(frame->width, expected->width);
    EXPECT_TRUE(frame->rgb == expected->rgb) << "frame " << frames;
    ++frames;
  }
  EXPECT_EQ(frames, 6);
  EXPECT_FALSE(apart->Next());
  EXPECT_EQ(apart->warning(), std::nullopt);
}

TEST(ApartSourceTest, ADecoderThatCrashesEndsItsOwnSourceWithOneLine) {
  const auto bystander = OpenApart(TestInput("test:smpte:10"), Every(0.5), {});
  const std::set<pid_t> before = Decoders();
  const auto hit = OpenApart(TestInput("test:smpte:10"), Every(0.5), {});
  for (const pid_t pid : Decoders()) {
    if (!before.contains(pid)) kill(pid, SIGABRT);  // sanitizers handle SIGSEGV themselves
  }
  try {
    while (hit->Next()) {
    }
    FAIL() << "it ended as if it were whole";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("[source] 'test:smpte:10': its decoder died"),
                                    HasSubstr("signal 6"), Not(HasSubstr("\n"))));
  }
  EXPECT_FALSE(hit->Next());
  int frames = 0;
  while (bystander->Next()) ++frames;
  EXPECT_EQ(frames, 20);
}

TEST(ApartSourceTest, ADecoderHoldsNothingOfThisProcessAndMayGainNothing) {
  const apart::UniqueFd secret(open("/etc/hostname", O_RDONLY));  // goes to programs that are run
  const auto source = OpenApart(FileInput(kClip), Every(2), {});
  const std::set<pid_t> decoders = Decoders();
  ASSERT_EQ(decoders.size(), 1u);
  const fs::path process = "/proc/" + std::to_string(*decoders.begin());
  EXPECT_THAT(ReadFile(process / "status"),
              AllOf(HasSubstr("Seccomp:\t2"), HasSubstr("NoNewPrivs:\t1")));
  EXPECT_THAT(ReadFile(process / "environ"), Not(HasSubstr("HOME=")));
  for (const auto& fd : fs::directory_iterator(process / "fd")) {
    const std::string target = fs::read_symlink(fd.path()).string();
    const bool expected = target == "/dev/null" || target == kClip ||
                          target.starts_with("socket:") || target.starts_with("pipe:") ||
                          target.starts_with("anon_inode:") ||
                          target.starts_with("/memfd:sluice-frames") || testing::kSanitized;
    EXPECT_TRUE(expected) << target;
  }
}

TEST(ApartSourceTest, ADecoderEndsWithTheProcessThatStartedIt) {
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  const pid_t parent = fork();
  if (parent == 0) {
    try {
      const auto source = OpenApart(TestInput("test"), Every(1000), {});
      const pid_t decoder = *Decoders().begin();
      if (write(pipes[1], &decoder, sizeof decoder) == sizeof decoder) pause();
    } catch (const Error& error) {
      std::fprintf(stderr, "%s\n", error.what());
    }
    _exit(1);
  }
  close(pipes[1]);
  pid_t decoder = 0;
  ASSERT_EQ(read(pipes[0], &decoder, sizeof decoder), static_cast<ssize_t>(sizeof decoder));
  const apart::UniqueFd handle(static_cast<int>(syscall(SYS_pidfd_open, decoder, 0)));
  ASSERT_TRUE(handle);
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  pollfd watched = {handle.get(), POLLIN, 0};
  EXPECT_EQ(poll(&watched, 1, 10000), 1) << "the decoder is still there";
}

TEST(ApartSourceTest, CancelWakesNextAndEndsTheDecoder) {
  const auto source = OpenApart(TestInput("test"), Every(1000), {});
  ASSERT_TRUE(source->Next());
  auto next = std::async(std::launch::async, [&] { return source->Next(); });
  source->Cancel();
  EXPECT_FALSE(next.get());
  EXPECT_FALSE(source->Next());
  EXPECT_EQ(source->warning(), std::nullopt);
}

TEST(ApartSourceTest, ADecoderThatWorksTooLongForOnePictureIsEnded) {
  ApartOptions options;
  options.frame_cpu_seconds = 0.5;
  try {  // on a busy machine while it opens
    const auto source = OpenApart(TestInput("test:smpte:86400"), Every(80000), options);
    while (source->Next()) {
    }
    FAIL() << "it ended as if it were whole";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("worked 0.5 s for one picture"));
  }
}

TEST(ApartSourceTest, ADecoderThatWantsMoreMemoryThanItMayHaveFails) {
  if (testing::kSanitized) GTEST_SKIP() << "sanitizers take more address space than there is";
  ApartOptions options;
  options.memory_bytes = 24 << 20;
  EXPECT_NE(Refusal(FileInput(kClip), options), "it was opened");
}

TEST(ApartSourceTest, PicturesOfMorePixelsThanAllowedAreRefused) {
  ApartOptions options;
  options.frame_pixels = 640 * 360 - 1;
  const auto source = OpenApart(FileInput(kClip), Every(2), options);
  try {
    source->Next();
    FAIL() << "taken";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("640x360, expected at most 230399 pixels"));
  }
}

TEST(ApartSourceTest, AFileThatIsNoneIsRefusedAsEverywhere) {
  const TemporaryDirectory directory;
  std::ofstream(directory.path() / "text.mp4") << "nothing to see here, move along";
  std::ofstream(directory.path() / "none.mp4");
  for (const std::string name : {"text.mp4", "none.mp4"}) {
    EXPECT_THAT(Refusal(FileInput(directory.path() / name)),
                AllOf(HasSubstr("[source] '" + name + "': "), Not(HasSubstr("/proc/"))));
  }
}

// The place in the file is looked at before the filter: what was read without it is seen.
TEST(ApartSourceTest, NothingOfAFileIsReadBeforeTheFilterIsSet) {
  const TemporaryDirectory directory;
  const fs::path path = directory.path() / "boxes.mp4";
  {
    const std::string box("\0\0\0\x08\x66ree", 8);
    std::ofstream out(path, std::ios::binary);
    for (int i = 0; i < 20000; ++i) out << box;  // takes long to walk
  }
  std::atomic<bool> done = false;
  std::future<std::string> refusal = std::async(std::launch::async, [&] {
    const std::string line = Refusal(FileInput(path));
    done = true;
    return line;
  });
  bool read_unfiltered = false;
  for (bool filtered = false; !filtered && !done;) {
    for (const pid_t pid : Decoders()) {
      const fs::path process = "/proc/" + std::to_string(pid);
      const std::string place = ReadFile(process / "fdinfo" / "6");
      const std::string status = ReadFile(process / "status");
      read_unfiltered |= place.starts_with("pos:\t") && !place.starts_with("pos:\t0\n") &&
                         status.find("Seccomp:\t0") != std::string::npos;
      filtered |= status.find("Seccomp:\t2") != std::string::npos;
    }
  }
  EXPECT_FALSE(read_unfiltered);
  EXPECT_NE(refusal.get(), "it was opened");
}

TEST(ApartSourceTest, AMissingDecoderIsNamed) {
  ApartOptions options;
  options.program = "/nowhere/sluice-decode";
  EXPECT_THAT(
      Refusal(TestInput("test"), options),
      AllOf(HasSubstr("/nowhere/sluice-decode cannot be run"), HasSubstr("source_decoder")));
}

TEST(ApartSourceTest, OnlyNamedElementsExist) {
  ApartOptions options;
  options.elements = {"qtdemux", "h264parse"};
  EXPECT_THAT(Refusal(FileInput(kClip), options), HasSubstr("source_elements"));
  EXPECT_THROW(apart::CheckElements({"hlsdemux"}), InputError);
  EXPECT_NO_THROW(apart::CheckElements(options.elements));
}

TEST(ApartSourceTest, APlaylistInAnAllowedPlaceReadsNoOtherFile) {
  const TemporaryDirectory directory;
  std::ofstream(directory.path() / "list.m3u8")
      << "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\nfile://" << kClip
      << "\n#EXT-X-ENDLIST\n";
  EXPECT_THAT(Refusal(FileInput(directory.path() / "list.m3u8")), HasSubstr("source_playlists"));
}

// ---- The network -----------------------------------------------------------------------------

TEST(ApartSourceTest, AHostIsReachedAtTheAddressThatWasCheckedUnderItsOwnName) {
  const std::string clip = ReadFile(kClip);
  const testing::HttpServer server(
      [&](const std::string&) { return testing::HttpServer::Ok("video/mp4", clip); });
  // No resolver knows this name.
  const auto source =
      OpenApart(HttpInput("cam.sluice.invalid", server.port(), "/a.mp4"), Every(2, 1), {});
  EXPECT_EQ(source->info().width, 640);
  ASSERT_FALSE(server.requests().empty());
  EXPECT_THAT(server.requests()[0], HasSubstr("Host: cam.sluice.invalid:"));
}

TEST(ApartSourceTest, WhyThereIsNoConnectionIsSaidAsInThisProcess) {
  const int nobody = testing::HttpServer([](const std::string&) { return std::string(); }).port();
  const std::string place = "cam.sluice.invalid:" + std::to_string(nobody);
  EXPECT_THAT(Refusal(HttpInput("cam.sluice.invalid", nobody, "/a.mp4")),
              HasSubstr("connection refused: nothing listens at " + place));

  const testing::SilentPlace silent;
  SourceOptions options = Every(1);
  options.stall_timeout = std::chrono::milliseconds(500);
  EXPECT_THAT(Refusal(HttpInput("cam.sluice.invalid", silent.port(), "/a.mp4"), {}, options),
              HasSubstr("timed out: cam.sluice.invalid:" + std::to_string(silent.port())));

  const testing::NoTlsServer plain;
  ApartInput secure = HttpInput("cam.sluice.invalid", plain.port(), "/a.mp4");
  secure.uri.insert(4, "s");
  EXPECT_THAT(Refusal(std::move(secure)), HasSubstr("the secure connection (TLS) to "));
}

TEST(ApartSourceTest, RedirectsAreNotFollowedAndOtherPortsAreOutOfReach) {
  const std::string clip = ReadFile(kClip);
  const testing::HttpServer elsewhere(
      [&](const std::string&) { return testing::HttpServer::Ok("video/mp4", clip); });
  const testing::HttpServer server([&](const std::string&) {
    return "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:" + std::to_string(elsewhere.port()) +
           "/a.mp4\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
  });
  EXPECT_THAT(Refusal(HttpInput("cam.sluice.invalid", server.port(), "/a.mp4")),
              HasSubstr("[source] 'http://cam.sluice.invalid/a.mp4': "));
  EXPECT_EQ(server.requests().size(), 1u);

  ApartInput unlisted = HttpInput("cam.sluice.invalid", elsewhere.port(), "/a.mp4");
  unlisted.endpoints[0].port = server.port();
  EXPECT_NE(Refusal(std::move(unlisted)), "it was opened");
  EXPECT_TRUE(elsewhere.requests().empty());
}

TEST(ApartSourceTest, APlaylistsTargetsAreReachedWhereTheRulesSaySoAndNowhereElse) {
  const std::string clip = ReadFile(kClip);
  const testing::HttpServer unlisted(
      [&](const std::string&) { return testing::HttpServer::Ok("video/mp4", clip); });
  const testing::HttpServer media(
      [&](const std::string&) { return testing::HttpServer::Ok("video/mp4", clip); });
  std::string target;
  const testing::HttpServer server([&](const std::string&) {
    return testing::HttpServer::Ok(
        "application/vnd.apple.mpegurl",
        "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\n" + target +
            "\n#EXT-X-ENDLIST\n");
  });
  const auto open = [&](const std::string& host, int port, bool playlists) {
    target = "http://" + host + ":" + std::to_string(port) + "/a.mp4";
    ApartInput input = HttpInput("cam.sluice.invalid", server.port(), "/list.m3u8");
    input.further = [&](const std::string& name) {
      return name == "media.sluice.invalid" ? std::vector<Endpoint>{{"127.0.0.1", media.port()}}
                                            : std::vector<Endpoint>{};
    };
    ApartOptions options;
    options.playlists = playlists;
    return Refusal(std::move(input), options, Every(2, 1));
  };
  EXPECT_THAT(open("media.sluice.invalid", media.port(), false), HasSubstr("source_playlists"));
  EXPECT_TRUE(media.requests().empty());
  EXPECT_NE(open("other.sluice.invalid", unlisted.port(), true), "it was opened");
  EXPECT_NE(open("127.0.0.1", unlisted.port(), true), "it was opened");
  EXPECT_NE(open("media.sluice.invalid", unlisted.port(), true), "it was opened");
  EXPECT_TRUE(unlisted.requests().empty());
  EXPECT_EQ(open("media.sluice.invalid", media.port(), true), "it was opened");
}

// ---- The filter ------------------------------------------------------------------------------

// Exit status 0: the filter refused.
void TryTo(const std::function<bool()>& escape) {
  decode::FilterSystemCalls(true);
  _exit(escape() ? 1 : 0);
}

TEST(ConfineTest, NothingIsOpenedSentOrStarted) {
  const auto refused = [](bool done) { return done || errno != EPERM; };
  EXPECT_EXIT(TryTo([&] { return refused(open("/etc/passwd", O_RDONLY) >= 0); }), ExitedWithCode(0),
              "");
  EXPECT_EXIT(TryTo([&] { return refused(unlink("/tmp/none") == 0); }), ExitedWithCode(0), "");
  EXPECT_EXIT(TryTo([&] { return refused(kill(getppid(), 0) == 0); }), ExitedWithCode(0), "");
  EXPECT_EXIT(TryTo([&] { return refused(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) >= 0); }),
              ExitedWithCode(0), "");
  EXPECT_EXIT(TryTo([&] { return refused(socket(AF_INET, SOCK_DGRAM, 0) >= 0); }),
              ExitedWithCode(0), "");
  EXPECT_EXIT(TryTo([&] { return refused(socket(AF_INET, SOCK_STREAM, IPPROTO_SCTP) >= 0); }),
              ExitedWithCode(0), "");
  // Shared memory is not in what a process may have.
  EXPECT_EXIT(TryTo([&] {
                return refused(mmap(nullptr, 4096, PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
              }),
              ExitedWithCode(0), "");
  EXPECT_EXIT(TryTo([&] { return refused(socket(AF_UNIX, SOCK_STREAM, 0) >= 0); }),
              ExitedWithCode(0), "");
  EXPECT_EXIT(TryTo([&] {
                const int tcp = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
                if (tcp < 0) return true;
                sockaddr_in address = {};
                address.sin_family = AF_INET;
                address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
                address.sin_port = htons(9);
                const auto* to = reinterpret_cast<sockaddr*>(&address);
                return refused(connect(tcp, to, sizeof address) == 0) ||
                       refused(sendto(tcp, "x", 1, MSG_FASTOPEN, to, sizeof address) >= 0);
              }),
              ExitedWithCode(0), "");
}

TEST(ConfineTest, RunningAProgramAndTracingEndTheProcess) {
  EXPECT_EXIT(TryTo([] { return execl("/bin/true", "true", nullptr) == 0; }),
              KilledBySignal(SIGSYS), "");
  EXPECT_EXIT(TryTo([] { return ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) == 0; }),
              KilledBySignal(SIGSYS), "");
}

}  // namespace
}  // namespace sluice
