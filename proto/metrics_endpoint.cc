#include "proto/metrics_endpoint.h"

#include <atomic>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <charconv>
#include <chrono>
#include <list>
#include <optional>
#include <thread>
#include <utility>

#include "runtime/error.h"
#include "runtime/thread_name.h"

namespace sluice {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using boost::system::error_code;

constexpr size_t kMaxConnections = 16;
constexpr uint32_t kMaxHeaderBytes = 8 << 10;
constexpr auto kPause = std::chrono::milliseconds(100);  // after a failure to accept
constexpr auto kPatience = std::chrono::seconds(5);      // for a request, and for taking the answer

asio::ip::tcp::endpoint Parse(const std::string& listen) {
  const size_t colon = listen.rfind(':');
  std::string host = listen.substr(0, colon);
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  uint16_t port = 0;
  const char* const end = listen.data() + listen.size();
  const char* const begin = colon == std::string::npos ? end : listen.data() + colon + 1;
  const auto parsed = std::from_chars(begin, end, port);
  error_code error;
  const auto address = asio::ip::make_address(host, error);
  if (error || begin == end || parsed.ec != std::errc() || parsed.ptr != end) {
    throw InputError("[metrics] expected ADDRESS:PORT such as 127.0.0.1:9464, got '" + listen +
                     "'");
  }
  return {address, port};
}

class Connection;
using OpenConnections = std::list<Connection*>;  // the oldest first

// Reads one request, answers it, closes.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(tcp::socket socket, const Metrics& metrics, OpenConnections& open)
      : stream_(std::move(socket)), metrics_(metrics), open_(open) {
    open_.push_back(this);
    parser_.header_limit(kMaxHeaderBytes);
    parser_.body_limit(0);
  }
  ~Connection() { open_.remove(this); }
  // What is under way ends with an error, and the connection with it.
  void Cut() { stream_.close(); }

  void Serve() {
    stream_.expires_after(kPatience);
    http::async_read(stream_, buffer_, parser_,
                     [self = shared_from_this()](error_code error, size_t) {
                       if (!error) self->Answer();
                     });
  }

 private:
  void Answer() {
    const auto& request = parser_.get();
    const bool known = request.target() == "/metrics";
    const bool get = request.method() == http::verb::get || request.method() == http::verb::head;
    response_.result(!known ? http::status::not_found
                     : get  ? http::status::ok
                            : http::status::method_not_allowed);
    response_.set(http::field::content_type, "text/plain; version=0.0.4; charset=utf-8");
    if (response_.result() == http::status::ok) response_.body() = metrics_.Text();
    response_.keep_alive(false);
    response_.prepare_payload();
    if (request.method() == http::verb::head) response_.body().clear();
    stream_.expires_after(kPatience);
    http::async_write(stream_, response_, [self = shared_from_this()](error_code, size_t) {
      error_code ignored;
      self->stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    });
  }

  beast::tcp_stream stream_;
  const Metrics& metrics_;
  OpenConnections& open_;  // of the endpoint; everything runs on its thread
  beast::flat_buffer buffer_{kMaxHeaderBytes};
  http::request_parser<http::string_body> parser_;
  http::response<http::string_body> response_;
};

}  // namespace

struct MetricsEndpoint::State {
  State(const Metrics& shown, const tcp::endpoint& endpoint)
      : metrics(shown), acceptor(context, endpoint), pause(context) {}

  void Accept() {
    acceptor.async_accept([this](error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted) return;
      if (error && error != asio::error::connection_aborted) return Pause();
      if (!error) {
        // Slow ones are in nobody's way: the oldest makes room.
        if (open.size() >= kMaxConnections) open.front()->Cut();
        std::make_shared<Connection>(std::move(socket), metrics, open)->Serve();
      }
      Accept();
    });
  }
  // There are no descriptors left, which trying again at once would not change.
  void Pause() {
    pause.expires_after(kPause);
    pause.async_wait([this](error_code error) {
      if (!error) Accept();
    });
  }

  const Metrics& metrics;
  OpenConnections open;  // before `context`, whose handlers take themselves out when they go
  asio::io_context context{1};
  tcp::acceptor acceptor;
  asio::steady_timer pause;
  std::thread thread;
};

MetricsEndpoint::MetricsEndpoint(const Metrics& metrics, const std::string& listen) {
  const tcp::endpoint endpoint = Parse(listen);
  try {
    state_ = std::make_unique<State>(metrics, endpoint);
  } catch (const boost::system::system_error& error) {
    throw InputError("[metrics] cannot listen on " + listen + ": " + error.code().message() +
                     "; --metrics takes another ADDRESS:PORT, or nothing to turn metrics off");
  }
  state_->Accept();
  state_->thread = std::thread([state = state_.get()] {
    NameThread("metrics");
    state->context.run();
  });
}

MetricsEndpoint::~MetricsEndpoint() {
  state_->context.stop();
  state_->thread.join();
}

int MetricsEndpoint::port() const { return state_->acceptor.local_endpoint().port(); }

}  // namespace sluice
