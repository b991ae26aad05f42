// Who may use the service, and how much: bearer tokens, known by their SHA-256 only.
#ifndef SLUICE_PROTO_ACCESS_H_
#define SLUICE_PROTO_ACCESS_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "proto/saved_streams.h"
#include "runtime/clock.h"

namespace sluice {

// Seconds since 1970, by the calendar: tokens expire by it.
using CalendarTime = std::chrono::system_clock::time_point;

struct AccessToken {
  std::string name;    // for logs
  std::string sha256;  // of the token, 64 hexadecimal digits
  std::optional<CalendarTime> expires = {};
  // 0: no limit.
  int sessions = 0;              // at a time, those that wait for their client included
  double frames_per_second = 0;  // of all its sessions together, and of sources
  double bytes_per_second = 0;   // of messages
  int sources = 0;               // that the server opens for it at a time
  int saved_streams = 0;         // that wait on the disk, and their MiB
  int64_t saved_mb = 0;
};

std::string Sha256Hex(std::string_view text);

// One token's share while somebody uses it. Thread-safe.
class Account {
 public:
  explicit Account(AccessToken token)
      : owner_(token.sha256.empty() ? "everybody" : token.sha256), token_(std::move(token)) {}
  // Whose the streams are: the token's hash, since names may be missing or equal. Not for logs.
  const std::string& owner() const { return owner_; }
  std::string name() const;
  // Also true of a token that was withdrawn.
  bool ExpiredAt(CalendarTime now) const;
  // From now on the token has these terms; none: it was withdrawn. What it has in use stays
  // counted.
  void SetTerms(const std::optional<AccessToken>& terms);
  // Whether a frame in a message of so many bytes is within the quotas, and if so counts it. About
  // a second's worth may come at once.
  bool TakeFrame(int64_t bytes, WallTime now);
  // Of the token; what it leaves open is the server's.
  int sources(int otherwise) const;
  SavedLimits saved(const SavedLimits& otherwise) const;

  // Counts one session as long as it lives.
  class Lease {
   public:
    explicit Lease(std::shared_ptr<Account> account) : account_(std::move(account)) {}
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Account& account() const { return *account_; }
    const std::shared_ptr<Account>& shared() const { return account_; }

   private:
    std::shared_ptr<Account> account_;
  };
  // Throws ResourceExhausted when the token's sessions are all in use.
  static std::shared_ptr<Lease> Open(const std::shared_ptr<Account>& account);

 private:
  // Fills at `rate` a second up to a second's worth (at least one).
  struct Bucket {
    double level = 0;
    WallTime at;
    bool begun = false;
    void Fill(double rate, WallTime now);
  };

  const std::string owner_;
  mutable std::mutex mutex_;
  AccessToken token_;
  bool withdrawn_ = false;
  int sessions_ = 0;
  Bucket frames_, bytes_;
};

// Thread-safe.
class Access {
 public:
  // Without tokens everybody may do everything. Throws InputError on a hash that is none, or twice.
  explicit Access(const std::vector<AccessToken>& tokens);
  // `authorization`: the metadata's value, "Bearer TOKEN"; the scheme's case does not matter. Null
  // if there is no such token or it has expired.
  std::shared_ptr<Account> Find(std::string_view authorization, CalendarTime now) const;
  // Why Find returned null: "missing", "unknown" or "expired".
  const char* FaultOf(std::string_view authorization, CalendarTime now) const;
  bool needs_token() const;
  // From now on these are the tokens. One that was there before keeps its account, and what it has
  // in use; one that is not in the list is withdrawn. Throws as the constructor and changes
  // nothing.
  void Replace(const std::vector<AccessToken>& tokens);

 private:
  // Null: no such token, expired or not.
  std::shared_ptr<Account> Known(std::string_view authorization) const;

  mutable std::mutex mutex_;
  std::shared_ptr<Account> everybody_;                        // where there are no tokens
  std::map<std::string, std::shared_ptr<Account>> accounts_;  // by hash
};

}  // namespace sluice

#endif  // SLUICE_PROTO_ACCESS_H_
