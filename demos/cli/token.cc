// sluice token: makes a token for `sluice serve`.
#include <sys/random.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>

#include "demos/cli/commands.h"
#include "demos/cli/common.h"
#include "proto/access.h"
#include "runtime/error.h"

namespace sluice::cli {
namespace {

constexpr size_t kTokenBytes = 32;  // nobody guesses 256 random bits

struct TokenFlags {
  std::string name;
  int days = 0;
  bool json = false;
};

// Hexadecimal digits can stand in any header, URL and shell.
std::string RandomToken() {
  std::array<unsigned char, kTokenBytes> bytes;
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    throw Error(std::string("[token] the system gives no random bytes: ") + std::strerror(errno));
  }
  std::string token;
  for (const unsigned char byte : bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", byte);
    token += digits;
  }
  return token;
}

std::string InDays(int days) {
  using std::chrono::system_clock;
  const std::time_t time = system_clock::to_time_t(system_clock::now() + std::chrono::days(days));
  std::tm utc = {};
  gmtime_r(&time, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

void MakeToken(const TokenFlags& flags) {
  const std::string token = RandomToken();
  Json entry = {{"name", flags.name}, {"sha256", Sha256Hex(token)}};
  if (flags.days > 0) entry["expires"] = InDays(flags.days);
  if (flags.json) return PrintJson({{"token", token}, {"entry", entry}});
  std::printf("token, for the client; it is kept nowhere else:\n%s\n", token.c_str());
  std::printf("entry of \"tokens\" in the server's file:\n%s\n", entry.dump().c_str());
}

}  // namespace

void AddToken(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("token", "Make a random token for sluice serve, and its entry there");
  auto flags = std::make_shared<TokenFlags>();
  command->add_option("--name", flags->name, "Whose it is, for the server's log")->required();
  command->add_option("--days", flags->days, "Until it expires (default: never)")
      ->check(CLI::Range(1, 36500));
  command->add_flag("--json", flags->json, "Print one JSON object");
  command->callback([flags] { MakeToken(*flags); });
}

}  // namespace sluice::cli
