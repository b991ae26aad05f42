#include "proto/access.h"

#include <openssl/sha.h>

#include <algorithm>
#include <set>
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

std::string Account::name() const {
  const std::lock_guard lock(mutex_);
  return token_.name;
}

bool Account::ExpiredAt(CalendarTime now) const {
  const std::lock_guard lock(mutex_);
  return withdrawn_ || (token_.expires && now >= *token_.expires);
}

void Account::SetTerms(const std::optional<AccessToken>& terms) {
  const std::lock_guard lock(mutex_);
  withdrawn_ = !terms;
  if (terms) token_ = *terms;
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

int Account::sources(int otherwise) const {
  const std::lock_guard lock(mutex_);
  return token_.sources > 0 ? token_.sources : otherwise;
}

SavedLimits Account::saved(const SavedLimits& otherwise) const {
  const std::lock_guard lock(mutex_);
  return {.streams = token_.saved_streams > 0 ? token_.saved_streams : otherwise.streams,
          .bytes = token_.saved_mb > 0 ? token_.saved_mb << 20 : otherwise.bytes};
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

namespace {

// RFC 9110, 11.1: a scheme is compared without its case. Empty: there is no token.
std::string_view BearerToken(std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer ";
  if (authorization.size() < kScheme.size()) return {};
  for (size_t i = 0; i < kScheme.size(); ++i) {
    const char c = authorization[i];
    if ((c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c) != kScheme[i]) return {};
  }
  return authorization.substr(kScheme.size());
}

void CheckTokens(const std::vector<AccessToken>& tokens) {
  std::set<std::string_view> hashes;
  for (const AccessToken& token : tokens) {
    const bool hash = token.sha256.size() == 64 &&
                      token.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (!hash) {
      throw InputError("[tokens] '" + token.name +
                       "': expected sha256 as 64 lower-case hexadecimal digits; sluice token makes "
                       "a token and prints its entry");
    }
    if (!hashes.insert(token.sha256).second) {
      throw InputError("[tokens] '" + token.name + "': the same token twice; remove one");
    }
  }
}

}  // namespace

Access::Access(const std::vector<AccessToken>& tokens) { Replace(tokens); }

bool Access::needs_token() const {
  const std::lock_guard lock(mutex_);
  return everybody_ == nullptr;
}

void Access::Replace(const std::vector<AccessToken>& tokens) {
  CheckTokens(tokens);
  const std::lock_guard lock(mutex_);
  const auto before = std::exchange(accounts_, {});
  for (const AccessToken& token : tokens) {
    const auto known = before.find(token.sha256);
    if (known != before.end()) known->second->SetTerms(token);
    accounts_.emplace(token.sha256,
                      known != before.end() ? known->second : std::make_shared<Account>(token));
  }
  for (const auto& [hash, account] : before) {
    if (!accounts_.contains(hash)) account->SetTerms(std::nullopt);
  }
  if (!tokens.empty()) {
    if (everybody_) everybody_->SetTerms(std::nullopt);
    everybody_ = nullptr;
  } else if (!everybody_) {
    everybody_ = std::make_shared<Account>(AccessToken{.name = "everybody", .sha256 = {}});
  }
}

// Found by its hash: how long that takes tells something of the hash at most, from which no token
// can be made; comparing in constant time would add nothing.
std::shared_ptr<Account> Access::Known(std::string_view authorization) const {
  const std::string_view token = BearerToken(authorization);
  const std::lock_guard lock(mutex_);
  if (everybody_) return everybody_;
  if (token.empty()) return nullptr;
  const auto found = accounts_.find(Sha256Hex(token));
  return found == accounts_.end() ? nullptr : found->second;
}

std::shared_ptr<Account> Access::Find(std::string_view authorization, CalendarTime now) const {
  auto account = Known(authorization);
  return account && !account->ExpiredAt(now) ? account : nullptr;
}

const char* Access::FaultOf(std::string_view authorization, CalendarTime now) const {
  if (BearerToken(authorization).empty()) return "missing";
  const auto account = Known(authorization);
  return account && account->ExpiredAt(now) ? "expired" : "unknown";
}

}  // namespace sluice
