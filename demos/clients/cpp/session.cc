// Sends JPEG pictures to a Sluice server as a live session, asks a question and prints the answer.
//
//     client_session localhost:50051 "What is visible?" a.jpg b.jpg c.jpg
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "demos/clients/cpp/client.h"

namespace v1 = sluice::v1;

namespace {

std::string ReadFile(const std::string& path) {
  std::stringstream bytes;
  bytes << std::ifstream(path, std::ios::binary).rdbuf();
  if (bytes.str().empty()) throw std::invalid_argument("cannot read " + path);
  return bytes.str();
}

// A message that cannot be sent means that the server ended the call.
void Send(sluice::client::Session& session, const v1::SessionRequest& request) {
  if (session.Send(request)) return;
  session.Finish();  // throws why
  throw sluice::client::Refused("[client] the server ended the call");
}

void Run(const std::string& server, const std::string& question, char** begin, char** end) {
  std::vector<std::string> pictures;
  for (char** path = begin; path != end; ++path) pictures.push_back(ReadFile(*path));
  sluice::client::Session session({.server = server, .token = "", .ca = ""}, v1::Open());

  // Each frame waits until the one before is taken, so that none is dropped for coming too fast.
  for (size_t number = 0; number < pictures.size(); ++number) {
    v1::SessionRequest request;
    v1::Frame& frame = *request.mutable_frame();
    frame.set_number(number);
    frame.set_media_seconds(0.5 * static_cast<double>(number));
    frame.set_jpeg(pictures[number]);
    Send(session, request);
    while (const auto message = session.Read()) {
      if (message->has_frame_dropped()) {
        std::cerr << begin[number] << " was dropped: " << message->frame_dropped().detail() << "\n";
      }
      if (message->has_refused()) throw std::runtime_error(message->refused().error());
      if (message->has_frame_ack() || message->has_frame_dropped()) break;
    }
  }
  v1::SessionRequest ask, close;
  ask.mutable_ask()->set_question_id(1);
  ask.mutable_ask()->set_text(question);
  Send(session, ask);
  close.mutable_close();
  Send(session, close);
  std::string failure;
  while (const auto message = session.Read()) {
    if (message->has_text()) std::cout << message->text().text() << std::flush;
    if (message->has_answer()) std::cout << "\n" << std::flush;
    if (message->has_answer() && failure.empty()) failure = message->answer().error();
    if (message->has_refused() && failure.empty()) failure = message->refused().error();
  }
  session.Finish();  // throws what the server had against it
  if (!failure.empty()) throw std::runtime_error(failure);
  if (!std::cout) throw std::runtime_error("cannot write the answer");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: client_session HOST:PORT QUESTION PICTURE.jpg...\n";
    return 2;
  }
  try {
    Run(argv[1], argv[2], argv + 3, argv + argc);
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
