#include "proto/saved_streams.h"

#include <chrono>
#include <string_view>
#include <system_error>

#include "proto/access.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr char kSuffix[] = ".stream";

// ".", sixteen digits, ".stream". What is hashed is no token and no hash of one.
std::string EndOf(const std::string& owner) {
  return "." + Sha256Hex("saved by " + owner).substr(0, 16) + kSuffix;
}

void Check(const SavedLimits& used, const SavedLimits& limits, const char* whose) {
  if (limits.streams > 0 && used.streams >= limits.streams) {
    throw ResourceExhausted("[save] expected at most " + std::to_string(limits.streams) +
                            " saved streams " + whose + ", which are there; close one of them");
  }
  if (limits.bytes > 0 && used.bytes >= limits.bytes) {
    throw ResourceExhausted("[save] expected at most " + std::to_string(limits.bytes >> 20) +
                            " MiB of saved streams " + whose + ", got " +
                            std::to_string(used.bytes >> 20) + "; close one of them");
  }
}

}  // namespace

std::filesystem::path SavedStreams::FileOf(const std::string& id, const std::string& owner) const {
  const bool is_id = id.size() == 32 && id.find_first_not_of("0123456789abcdef") == id.npos;
  return is_id && !directory_.empty() ? directory_ / (id + EndOf(owner)) : std::filesystem::path();
}

void SavedStreams::Admit(const std::string& id, const std::string& owner,
                         const SavedLimits& account) const {
  const std::string end = EndOf(owner);
  SavedLimits of_all, of_account;
  std::error_code error;
  std::filesystem::directory_iterator at(directory_, error);
  for (; !error && at != std::filesystem::directory_iterator(); at.increment(error)) {
    const auto& entry = *at;
    const std::string name = entry.path().filename().string();
    if (!std::string_view(name).ends_with(kSuffix) || name == id + end) continue;
    std::error_code gone;
    const auto size = static_cast<int64_t>(entry.file_size(gone));
    if (gone) continue;  // removed meanwhile
    ++of_all.streams;
    of_all.bytes += size;
    if (!name.ends_with(end)) continue;
    ++of_account.streams;
    of_account.bytes += size;
  }
  if (error) throw Error("[save] the directory for saved streams cannot be read");
  Check(of_account, account, "of this token");
  Check(of_all, all_, "on this server");
}

void SavedStreams::RemoveOld(double days) const {
  using Time = std::filesystem::file_time_type;
  const auto oldest =
      Time::clock::now() - std::chrono::duration_cast<Time::duration>(
                               std::chrono::duration<double, std::ratio<86400>>(days));
  std::error_code error;
  std::filesystem::directory_iterator at(directory_, error);
  for (; !error && at != std::filesystem::directory_iterator(); at.increment(error)) {
    const auto& entry = *at;
    if (entry.path().filename().string().find(kSuffix) == std::string::npos) continue;
    std::error_code gone;
    const Time time = entry.last_write_time(gone);
    if (!gone && time < oldest) std::filesystem::remove(entry.path(), gone);
  }
}

}  // namespace sluice
