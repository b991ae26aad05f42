// An HTTP server on loopback for tests: one answer a connection, given by a function.
#ifndef SLUICE_TESTS_SUPPORT_HTTP_SERVER_H_
#define SLUICE_TESTS_SUPPORT_HTTP_SERVER_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace sluice::testing {

// A socket of a server on loopback.
class Listener {
 public:
  explicit Listener(int backlog) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address_;
    if (bind(fd_, reinterpret_cast<sockaddr*>(&address_), size) != 0 || listen(fd_, backlog) != 0 ||
        getsockname(fd_, reinterpret_cast<sockaddr*>(&address_), &size) != 0) {
      std::abort();
    }
  }
  ~Listener() { close(fd_); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int fd() const { return fd_; }
  int port() const { return ntohs(address_.sin_port); }
  const sockaddr* address() const { return reinterpret_cast<const sockaddr*>(&address_); }

 private:
  const int fd_;
  sockaddr_in address_ = {};
};

class HttpServer {
 public:
  // The whole answer, with its status line and headers, to a request with its headers.
  using Handler = std::function<std::string(const std::string& request)>;

  explicit HttpServer(Handler handler) : handler_(std::move(handler)) {
    thread_ = std::thread([this] { Serve(); });
  }
  ~HttpServer() {
    shutdown(listener_.fd(), SHUT_RDWR);
    thread_.join();
  }

  int port() const { return listener_.port(); }
  std::vector<std::string> requests() const {
    const std::lock_guard lock(mutex_);
    return requests_;
  }

  static std::string Ok(const std::string& type, const std::string& body) {
    return "HTTP/1.1 200 OK\r\nContent-Type: " + type +
           "\r\nContent-Length: " + std::to_string(body.size()) + "\r\nConnection: close\r\n\r\n" +
           body;
  }

 private:
  void Serve() {
    for (;;) {
      const int client = accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) return;
      std::string request;
      char buffer[4096];
      ssize_t size = 0;
      while (request.find("\r\n\r\n") == std::string::npos &&
             (size = recv(client, buffer, sizeof buffer, 0)) > 0) {
        request.append(buffer, static_cast<size_t>(size));
      }
      {
        const std::lock_guard lock(mutex_);
        requests_.push_back(request);
      }
      const std::string answer = handler_(request);
      for (size_t sent = 0; sent < answer.size();) {
        size = send(client, answer.data() + sent, answer.size() - sent, MSG_NOSIGNAL);
        if (size <= 0) break;
        sent += static_cast<size_t>(size);
      }
      close(client);
    }
  }

  const Handler handler_;
  const Listener listener_{8};
  mutable std::mutex mutex_;
  std::vector<std::string> requests_;
  std::thread thread_;
};

// An address at which nobody answers: connections already wait there that nobody accepts.
class SilentPlace {
 public:
  SilentPlace() {
    for (int& waiting : waiting_) {
      waiting = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
      connect(waiting, listener_.address(), sizeof(sockaddr_in));
    }
  }
  ~SilentPlace() {
    for (const int waiting : waiting_) close(waiting);
  }

  int port() const { return listener_.port(); }

 private:
  const Listener listener_{0};
  int waiting_[3];
};

// Answers what is no TLS to whatever it is sent.
class NoTlsServer {
 public:
  NoTlsServer()
      : thread_([this] {
          for (int client = 0; (client = accept(listener_.fd(), nullptr, nullptr)) >= 0;
               close(client)) {
            char hello[64];
            if (recv(client, hello, sizeof hello, 0) > 0) {
              send(client, "this is no TLS\n", 15, MSG_NOSIGNAL);
            }
          }
        }) {}
  ~NoTlsServer() {
    shutdown(listener_.fd(), SHUT_RDWR);
    thread_.join();
  }

  int port() const { return listener_.port(); }

 private:
  const Listener listener_{8};
  std::thread thread_;
};

}  // namespace sluice::testing

#endif  // SLUICE_TESTS_SUPPORT_HTTP_SERVER_H_
