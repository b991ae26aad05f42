// Sends JPEG pictures to a Sluice server as a live session, asks a question and prints the answer.
//
//     client_session localhost:50051 "What is visible?" a.jpg b.jpg c.jpg
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>

#include "demos/clients/cpp/client.h"

namespace v1 = sluice::v1;

namespace {

std::string ReadFile(const std::string& path) {
  std::stringstream bytes;
  bytes << std::ifstream(path, std::ios::binary).rdbuf();
  if (bytes.str().empty()) throw std::runtime_error("cannot read " + path);
  return bytes.str();
}

void Run(const std::string& server, const std::string& question, char** begin, char** end) {
  sluice::client::Session session({.server = server, .token = "", .ca = ""}, v1::Open());

  // Each frame waits until the one before is taken, so that none is dropped for coming too fast.
  uint64_t number = 0;
  for (char** path = begin; path != end; ++path, ++number) {
    v1::SessionRequest request;
    v1::Frame& frame = *request.mutable_frame();
    frame.set_number(number);
    frame.set_media_seconds(0.5 * static_cast<double>(number));
    frame.set_jpeg(ReadFile(*path));
    session.Send(request);
    while (const auto message = session.Read()) {
      if (message->has_frame_dropped()) {
        std::cerr << *path << " was dropped: " << message->frame_dropped().detail() << "\n";
      }
      if (message->has_frame_ack() || message->has_frame_dropped()) break;
    }
  }
  v1::SessionRequest ask, close;
  ask.mutable_ask()->set_question_id(1);
  ask.mutable_ask()->set_text(question);
  session.Send(ask);
  close.mutable_close();
  session.Send(close);
  while (const auto message = session.Read()) {
    if (message->has_text()) std::cout << message->text().text() << std::flush;
    if (message->has_answer()) std::cout << "\n" << message->answer().error();
    if (message->has_refused()) std::cerr << message->refused().error() << "\n";
  }
  session.Finish();  // throws what the server had against it
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: client_session HOST:PORT QUESTION PICTURE.jpg...\n";
    return 2;
  }
  try {
    Run(argv[1], argv[2], argv + 3, argv + argc);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
