#include "proto/connections.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "proto/json_log.h"
#include "runtime/error.h"
#include "runtime/thread_name.h"

namespace sluice {
namespace {

constexpr int kBacklog = 1024;
constexpr int kAcceptsAtOnce = 64;                       // before others are looked after
constexpr auto kPause = std::chrono::milliseconds(100);  // after a failure to accept
constexpr int kLongestWaitMs = 1000;

// A descriptor with an owner.
class Handle {
 public:
  explicit Handle(int descriptor = -1) : descriptor_(descriptor) {}
  ~Handle() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  Handle(Handle&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Handle& operator=(Handle&&) = delete;
  int get() const { return descriptor_; }
  int Release() { return std::exchange(descriptor_, -1); }
  bool valid() const { return descriptor_ >= 0; }

 private:
  int descriptor_;
};

struct Resolved {
  sockaddr_storage address = {};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&address); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

std::vector<Resolved> Resolve(const ListenAddress& listen) {
  addrinfo hints = {};
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(listen.host.c_str(), std::to_string(listen.port).c_str(), &hints, &found);
  if (error != 0) {
    throw InputError("[serve] listen: expected a host of this machine, got '" + listen.host +
                     "': " + gai_strerror(error));
  }
  std::vector<Resolved> all;
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    if (each->ai_family != AF_INET && each->ai_family != AF_INET6) continue;
    Resolved resolved;
    resolved.size = each->ai_addrlen;
    std::memcpy(&resolved.address, each->ai_addr, each->ai_addrlen);
    const auto same = [&](const Resolved& other) {
      return other.size == resolved.size &&
             std::memcmp(&other.address, &resolved.address, resolved.size) == 0;
    };
    if (std::ranges::none_of(all, same)) all.push_back(resolved);
  }
  freeaddrinfo(found);
  return all;
}

bool IsAny(const Resolved& address) {
  const auto peer = PeerAddressOf(address.address);
  if (!peer) return false;
  const std::string text = peer->ToString();
  return text == "::" || text == "0.0.0.0";
}

void SetPort(Resolved& address, int port) {
  if (address.address.ss_family == AF_INET) {
    reinterpret_cast<sockaddr_in&>(address.address).sin_port = htons(static_cast<uint16_t>(port));
  } else {
    reinterpret_cast<sockaddr_in6&>(address.address).sin6_port = htons(static_cast<uint16_t>(port));
  }
}

int PortOf(int descriptor) {
  sockaddr_storage address = {};
  socklen_t size = sizeof address;
  getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &size);
  const auto own = PeerAddressOf(address);
  return own ? own->port : 0;
}

void SetFlag(int descriptor, int level, int option) {
  const int on = 1;
  setsockopt(descriptor, level, option, &on, sizeof on);
}

Handle Listen(const Resolved& address) {
  Handle socket(::socket(address.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid()) return socket;
  SetFlag(socket.get(), SOL_SOCKET, SO_REUSEADDR);  // those of a server before this one may linger
  if (bind(socket.get(), address.get(), address.size) != 0 || listen(socket.get(), kBacklog) != 0) {
    const int error = errno;
    close(socket.Release());
    errno = error;
  }
  return socket;
}

// The other side learns of it at once, and nothing lingers here.
void Abort(int descriptor) {
  const linger now = {.l_onoff = 1, .l_linger = 0};
  setsockopt(descriptor, SOL_SOCKET, SO_LINGER, &now, sizeof now);
  close(descriptor);
}

}  // namespace

ListenAddress ParseListen(const char* flag, const std::string& listen) {
  const size_t colon = listen.rfind(':');
  ListenAddress parsed;
  const char* const end = listen.data() + listen.size();
  const char* const begin = colon == std::string::npos ? end : listen.data() + colon + 1;
  const auto number = std::from_chars(begin, end, parsed.port);
  parsed.host = listen.substr(0, std::min(colon, listen.size()));
  const bool brackets = parsed.host.starts_with('[') && parsed.host.ends_with(']');
  if (brackets) parsed.host = parsed.host.substr(1, parsed.host.size() - 2);
  const bool ambiguous = !brackets && parsed.host.find(':') != std::string::npos;
  if (parsed.host.empty() || ambiguous || begin == end || number.ec != std::errc() ||
      number.ptr != end) {
    throw InputError(
        "[serve] " + std::string(flag) +
        ": expected HOST:PORT such as 127.0.0.1:50051 or [::1]:50051, with a port from "
        "0 to 65535, got '" +
        listen + "'");
  }
  return parsed;
}

bool IsOpenToOthers(const ListenAddress& listen) {
  return std::ranges::any_of(Resolve(listen), [](const Resolved& address) {
    const auto own = PeerAddressOf(address.address);
    return !own || !own->IsLoopback();
  });
}

ConnectionLimits FittingInto(const ConnectionLimits& limits, uint64_t descriptors) {
  ConnectionLimits fitting = limits;
  const uint64_t room = std::max<uint64_t>(1, descriptors / 4);  // two for each
  if (static_cast<uint64_t>(fitting.all) > room) fitting.all = static_cast<int>(room);
  fitting.per_address = std::min(fitting.per_address, fitting.all);
  return fitting;
}

struct Connections::State {
  State(const ConnectionLimits& limits, Metrics& metrics, const Clock& wall)
      : clock(wall),
        table(limits),
        open(metrics.gauge("sluice_connections_open", "TCP connections of the gRPC service.")),
        strangers(metrics.gauge("sluice_connections_without_token",
                                "Those of them that have not shown a valid token.")),
        accepted(metrics.counter("sluice_connections_accepted_total",
                                 "TCP connections that were accepted.")),
        full(Closed(metrics, "full")),
        replaced(Closed(metrics, "replaced")),
        overdue(Closed(metrics, "no_token")),
        failed(metrics.counter("sluice_accept_failures_total",
                               "Times that no connection could be accepted.")) {}

  ~State() {
    for (const int watch : table.Ids()) close(watch);
  }

  static Counter& Closed(Metrics& metrics, const char* reason) {
    return metrics.counter("sluice_connections_closed_total",
                           "TCP connections that the server closed: there was no room for them, a "
                           "newcomer took the place, or no token came in time.",
                           {{"reason", reason}});
  }

  void Run() {
    while (!stopping) {
      epoll_event events[64];
      const int count = epoll_wait(poll.get(), events, std::size(events), WaitMs());
      // What has ended comes first: newcomers may get its numbers.
      for (const bool ended : {true, false}) {
        for (int i = 0; i < count; ++i) {
          const int descriptor = events[i].data.fd;
          if (descriptor == wake.get() || IsListener(descriptor) == ended) continue;
          ended ? Ended(descriptor) : Accept(descriptor);
        }
      }
      for (const int late : TakeOverdue()) {
        overdue.Add();
        CloseNow(late);
      }
      if (paused_until && std::chrono::steady_clock::now() >= *paused_until) Pause(false);
      const std::lock_guard lock(mutex);
      open.Set(table.size());
      strangers.Set(table.without_token());
    }
    listeners.clear();  // whoever waits to be accepted is turned away
  }

  bool IsListener(int descriptor) const {
    return std::ranges::any_of(
        listeners, [descriptor](const Handle& each) { return each.get() == descriptor; });
  }

  int WaitMs() {
    using std::chrono::milliseconds;
    const std::lock_guard lock(mutex);
    auto wait = milliseconds(kLongestWaitMs);
    if (const auto due = table.next_due()) {
      wait = std::min(wait, std::chrono::ceil<milliseconds>(*due - clock.Now()));
    }
    if (paused_until) wait = std::min(wait, kPause);
    return static_cast<int>(std::max(wait, milliseconds(0)).count());
  }

  std::vector<int> TakeOverdue() {
    const std::lock_guard lock(mutex);
    return table.TakeOverdue(clock.Now());
  }

  // Others may have all descriptors: what waits in the backlog is taken when there are some again.
  void Pause(bool pause) {
    paused_until.reset();
    if (pause) paused_until = std::chrono::steady_clock::now() + kPause;
    for (const Handle& listener : listeners) {
      epoll_event event = {.events = pause ? 0u : uint32_t{EPOLLIN}, .data = {}};
      event.data.fd = listener.get();
      epoll_ctl(poll.get(), EPOLL_CTL_MOD, listener.get(), &event);
    }
  }

  void Accept(int listener) {
    for (int i = 0; i < kAcceptsAtOnce; ++i) {
      sockaddr_storage address = {};
      socklen_t size = sizeof address;
      Handle socket(accept4(listener, reinterpret_cast<sockaddr*>(&address), &size,
                            SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (socket.valid()) {
        Take(std::move(socket), address);
        continue;
      }
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      if (errno == ECONNABORTED || errno == EINTR || errno == EPROTO) continue;  // it went again
      const int error = errno;
      failed.Add();
      LogRarely(failures, spdlog::level::err, "accept_failed", {{"error", std::strerror(error)}});
      return Pause(true);
    }
  }

  void Take(Handle socket, const sockaddr_storage& address) {
    const auto peer = PeerAddressOf(address);
    if (!peer) return;
    bool own = false;
    {
      const std::lock_guard lock(mutex);
      own = dialled == peer;
      if (own) dialled.reset();
    }
    if (own) return hand_over(socket.Release(), true);
    accepted.Add();
    Handle watch(fcntl(socket.get(), F_DUPFD_CLOEXEC, 0));
    if (!watch.valid()) {
      failed.Add();
      return Abort(socket.Release());
    }
    ConnectionTable::Admission admission;
    int size_now = 0;
    {
      const std::lock_guard lock(mutex);
      admission = table.Admit(watch.get(), *peer, clock.Now());
      size_now = table.size();
    }
    if (admission.replaced) {
      replaced.Add();
      CloseNow(*admission.replaced);
    }
    if (!admission.admitted) {
      full.Add();
      LogRarely(refusals, spdlog::level::warn, "connection_refused",
                {{"address", peer->ToString()}, {"open", size_now}});
      return Abort(socket.Release());
    }
    // Its end is always told, nothing else is asked for.
    epoll_event event = {.events = 0, .data = {}};
    event.data.fd = watch.get();
    if (epoll_ctl(poll.get(), EPOLL_CTL_ADD, watch.get(), &event) != 0) {
      failed.Add();
      const std::lock_guard lock(mutex);
      table.Remove(watch.get());
      return Abort(socket.Release());
    }
    watch.Release();
    SetFlag(socket.get(), IPPROTO_TCP, TCP_NODELAY);
    hand_over(socket.Release(), false);
  }

  // Both directions are shut: gRPC has closed its descriptor, or is about to.
  void Ended(int watch) {
    {
      const std::lock_guard lock(mutex);
      if (!table.Remove(watch)) return;  // closed here, in the same round
    }
    Forget(watch);
  }

  // gRPC sees the end of its descriptor and closes it. REQUIRES: no longer in the table.
  void CloseNow(int watch) {
    shutdown(watch, SHUT_RDWR);
    Forget(watch);
  }

  // While gRPC's descriptor of the same socket is open, closing alone would not end the events, and
  // they would go on under a number that a newcomer may have.
  void Forget(int watch) {
    epoll_ctl(poll.get(), EPOLL_CTL_DEL, watch, nullptr);
    close(watch);
  }

  const Clock& clock;
  std::vector<Handle> listeners;
  std::vector<Resolved> addresses;  // of the listeners, with their ports
  Handle poll{epoll_create1(EPOLL_CLOEXEC)}, wake{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  HandOver hand_over;
  std::thread thread;
  std::atomic<bool> stopping = false;
  std::optional<WallTime> paused_until;  // by the steady clock
  RareEvent failures, refusals;

  std::mutex mutex;
  ConnectionTable table;               // by the descriptor that watches
  std::optional<PeerAddress> dialled;  // a connection of our own that was not accepted yet
  Gauge &open, &strangers;
  Counter &accepted, &full, &replaced, &overdue, &failed;
};

Connections::Connections(const ListenAddress& listen, const ConnectionLimits& limits,
                         Metrics& metrics, const Clock& clock) {
  rlimit descriptors = {};
  getrlimit(RLIMIT_NOFILE, &descriptors);
  const ConnectionLimits fitting = FittingInto(limits, descriptors.rlim_cur);
  state_ = std::make_unique<State>(fitting, metrics, clock);
  if (!state_->poll.valid() || !state_->wake.valid()) {
    throw Error(std::string("[serve] cannot wait for connections: ") + std::strerror(errno));
  }
  int port = listen.port;
  std::string reason = "no address";
  for (Resolved address : Resolve(listen)) {
    SetPort(address, port);
    Handle socket = Listen(address);
    if (!socket.valid()) {
      reason = std::strerror(errno);
      // A name may have an address of a family that this machine has switched off.
      if (errno == EADDRNOTAVAIL || errno == EAFNOSUPPORT) continue;
      state_->listeners.clear();
      break;
    }
    port = PortOf(socket.get());
    SetPort(address, port);
    state_->listeners.push_back(std::move(socket));
    state_->addresses.push_back(address);
  }
  if (state_->listeners.empty()) {
    throw InputError("[serve] cannot listen on " + listen.host + ":" + std::to_string(listen.port) +
                     ": " + reason + "; --listen takes another HOST:PORT");
  }
  LogEvent(fitting.all < limits.all ? spdlog::level::warn : spdlog::level::info, "connections",
           {{"most", fitting.all},
            {"most_of_an_address", fitting.per_address},
            {"asked_for", limits.all},
            {"descriptors", descriptors.rlim_cur}});
}

Connections::~Connections() { Stop(); }

int Connections::port() const { return PeerAddressOf(state_->addresses.front().address)->port; }

void Connections::Start(HandOver hand_over) {
  state_->hand_over = std::move(hand_over);
  for (const Handle& each : state_->listeners) {
    epoll_event event = {.events = EPOLLIN, .data = {}};
    event.data.fd = each.get();
    epoll_ctl(state_->poll.get(), EPOLL_CTL_ADD, each.get(), &event);
  }
  epoll_event event = {.events = EPOLLIN, .data = {}};
  event.data.fd = state_->wake.get();
  epoll_ctl(state_->poll.get(), EPOLL_CTL_ADD, state_->wake.get(), &event);
  state_->thread = std::thread([state = state_.get()] {
    NameThread("connections");
    state->Run();
  });
}

void Connections::Stop() {
  if (!state_->thread.joinable()) return;
  state_->stopping = true;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t told = write(state_->wake.get(), &one, sizeof one);
  state_->thread.join();
}

void Connections::ShownToken(std::string_view peer) {
  const auto address = ParsePeer(peer);
  if (!address) return;
  const std::lock_guard lock(state_->mutex);
  state_->table.ShownToken(*address);
}

int Connections::Dial(std::chrono::milliseconds patience) {
  Resolved to = state_->addresses.front();
  Resolved from = to;
  const bool v6 = to.address.ss_family == AF_INET6;
  if (IsAny(to)) {
    if (v6) {
      reinterpret_cast<sockaddr_in6&>(to.address).sin6_addr = in6addr_loopback;
    } else {
      reinterpret_cast<sockaddr_in&>(to.address).sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    }
    from = to;
  }
  SetPort(from, 0);
  Handle socket(::socket(to.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.valid() || bind(socket.get(), from.get(), from.size) != 0) return -1;
  auto own = PeerAddressOf(from.address);
  own->port = static_cast<uint16_t>(PortOf(socket.get()));
  {
    const std::lock_guard lock(state_->mutex);
    state_->dialled = own;
  }
  const bool begun = connect(socket.get(), to.get(), to.size) == 0 || errno == EINPROGRESS;
  pollfd ready = {.fd = socket.get(), .events = POLLOUT, .revents = 0};
  int error = 0;
  socklen_t size = sizeof error;
  if (begun && ::poll(&ready, 1, static_cast<int>(patience.count())) == 1 &&
      getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0) {
    return socket.Release();
  }
  const std::lock_guard lock(state_->mutex);
  state_->dialled.reset();
  return -1;
}

}  // namespace sluice
