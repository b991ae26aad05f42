#include "proto/access.h"

#include <openssl/sha.h>

#include <algorithm>
#include <utility>

#include "runtime/error.h"

namespace sluice {

std::string Sha256Hex(std::string_view text) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (const unsigned char byte : digest) {
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
  return out;
}

void Account::Bucket::Fill(double rate, WallTime now) {
  const double most = std::max(rate, 1.0);
  const std::chrono::duration<double> passed = now - at;
  level = begun ? std::min(most, level + std::max(0.0, passed.count()) * rate) : most;
  begun = true;
  at = now;
}

bool Account::TakeFrame(int64_t bytes, WallTime now) {
  const std::lock_guard lock(mutex_);
  const auto size = static_cast<double>(bytes);
  frames_.Fill(token_.frames_per_second, now);
  bytes_.Fill(token_.bytes_per_second, now);
  if (token_.frames_per_second > 0 && frames_.level < 1) return false;
  // A message above a second's worth passes when the bucket is full, and leaves a debt.
  const double needed = std::min(size, std::max(token_.bytes_per_second, 1.0));
  if (token_.bytes_per_second > 0 && bytes_.level < needed) return false;
  frames_.level -= 1;
  bytes_.level -= size;
  return true;
}

std::shared_ptr<Account::Lease> Account::Open(const std::shared_ptr<Account>& account) {
  const std::lock_guard lock(account->mutex_);
  const int most = account->token_.sessions;
  if (most > 0 && account->sessions_ >= most) {
    throw ResourceExhausted("[session] expected at most " + std::to_string(most) +
                            " sessions of this token at a time; close one first");
  }
  auto lease = std::make_shared<Lease>(account);
  ++account->sessions_;
  return lease;
}

Account::Lease::~Lease() {
  const std::lock_guard lock(account_->mutex_);
  --account_->sessions_;
}

Access::Access(const std::vector<AccessToken>& tokens) {
  if (tokens.empty()) {
    everybody_ = std::make_shared<Account>(AccessToken{.name = "everybody", .sha256 = {}});
  }
  for (const AccessToken& token : tokens) {
    const bool hash = token.sha256.size() == 64 &&
                      token.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (!hash) {
      throw InputError("[tokens] '" + token.name +
                       "': expected sha256 as 64 lower-case hexadecimal digits (printf %s TOKEN | "
                       "sha256sum)");
    }
    if (!accounts_.emplace(token.sha256, std::make_shared<Account>(token)).second) {
      throw InputError("[tokens] '" + token.name + "': the same token twice; remove one");
    }
  }
}

std::shared_ptr<Account> Access::Find(std::string_view authorization, CalendarTime now) const {
  if (everybody_) return everybody_;
  constexpr std::string_view kScheme = "Bearer ";
  if (!authorization.starts_with(kScheme)) return nullptr;
  // Found by its hash: how long that takes tells nothing of the token.
  const auto found = accounts_.find(Sha256Hex(authorization.substr(kScheme.size())));
  if (found == accounts_.end() || found->second->ExpiredAt(now)) return nullptr;
  return found->second;
}

}  // namespace sluice
