#include "compression/block_store.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#include "runtime/error.h"

namespace sluice {

BlockStore::BlockStore(const BlockStoreOptions& options) : options_(options) {
  if (options_.host_bytes < 0 || options_.disk_bytes < 0) {
    throw InputError("[memory] budgets must not be negative, got " +
                     std::to_string(options_.host_bytes) + " bytes of host memory and " +
                     std::to_string(options_.disk_bytes) + " of disk");
  }
  if (options_.disk_bytes == 0) return;
  const std::string directory = options_.disk_directory.string();
  if (directory.empty()) {
    throw InputError("[memory] frames on the disk need a directory, got none: name one");
  }
  std::string name = directory + "/sluice-memory-XXXXXX";
  file_ = mkostemp(name.data(), O_CLOEXEC);
  if (file_ < 0) {
    throw InputError("[memory] expected a directory to write frames to, cannot make a file in '" +
                     directory + "': " + std::strerror(errno));
  }
  unlink(name.c_str());
  writable_ = true;
}

BlockStore::~BlockStore() {
  if (file_ >= 0) close(file_);
}

std::vector<int64_t> BlockStore::Add(int64_t number, std::span<const uint8_t> bytes) {
  std::vector<uint8_t> block;
  if (!spare_.empty()) {
    block = std::move(spare_.back());
    spare_.pop_back();
  }
  block.assign(bytes.begin(), bytes.end());
  host_bytes_ += static_cast<int64_t>(block.size());
  host_.emplace(number, std::move(block));
  std::vector<int64_t> dropped;
  while (host_bytes_ > options_.host_bytes) {
    const Moved moved = writable_ ? MoveToDisk(host_.begin()->first) : Moved::kNoRoom;
    if (moved == Moved::kNoRoom) DropSome(dropped);
  }
  return dropped;
}

BlockStore::Moved BlockStore::MoveToDisk(int64_t number) {
  const std::vector<uint8_t>& bytes = host_.at(number);
  const auto size = static_cast<int64_t>(bytes.size());
  const std::optional<int64_t> offset = FindRoom(size);
  if (!offset) return Moved::kNoRoom;
  for (int64_t done = 0; done < size;) {
    const ssize_t wrote = pwrite(file_, bytes.data() + done, size - done, *offset + done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) {
      writable_ = false;
      warning_ = std::string("[memory] cannot write frames to the disk: ") + std::strerror(errno) +
                 "; from now on those that do not fit into host memory are forgotten";
      GiveBack({*offset, size});
      return Moved::kFailed;
    }
    done += wrote;
  }
  disk_.emplace(number, Extent{*offset, size});
  disk_bytes_ += size;
  LeaveHost(host_.find(number));
  return Moved::kYes;
}

// The first free part that is large enough, else the file's end.
std::optional<int64_t> BlockStore::FindRoom(int64_t size) {
  for (auto part = free_.begin(); part != free_.end(); ++part) {
    if (part->second < size) continue;
    const auto [offset, room] = *part;
    free_.erase(part);
    if (room > size) free_.emplace(offset + size, room - size);
    return offset;
  }
  if (file_bytes_ + size > options_.disk_bytes) return std::nullopt;
  file_bytes_ += size;
  return file_bytes_ - size;
}

void BlockStore::GiveBack(Extent extent) {
  auto part = free_.emplace(extent.offset, extent.size).first;
  const auto next = std::next(part);
  if (next != free_.end() && part->first + part->second == next->first) {
    part->second += next->second;
    free_.erase(next);
  }
  if (part != free_.begin()) {
    const auto before = std::prev(part);
    if (before->first + before->second == part->first) {
      before->second += part->second;
      free_.erase(part);
      part = before;
    }
  }
  if (part->first + part->second == file_bytes_) {
    file_bytes_ = part->first;
    free_.erase(part);
  }
}

// Drops blocks of the last tier that takes any: at least one.
void BlockStore::DropSome(std::vector<int64_t>& dropped) {
  std::vector<int64_t> numbers;  // of the oldest half
  const bool from_disk = writable_ && !disk_.empty();
  const size_t count = from_disk ? disk_.size() : host_.size();
  const auto collect = [&](const auto& tier) {
    for (const auto& entry : tier) {
      if (numbers.size() >= std::max<size_t>(1, count / 2)) break;
      numbers.push_back(entry.first);
    }
  };
  from_disk ? collect(disk_) : collect(host_);
  std::vector<int64_t> leaving;
  if (options_.when_full == WhenFull::kThin) {
    for (size_t i = 1; i < numbers.size(); i += 2) leaving.push_back(numbers[i]);
  }
  if (leaving.empty()) leaving.push_back(numbers.front());
  for (const int64_t number : leaving) Remove(number);
  dropped_ += static_cast<int64_t>(leaving.size());
  dropped.insert(dropped.end(), leaving.begin(), leaving.end());
}

void BlockStore::LeaveHost(std::map<int64_t, std::vector<uint8_t>>::iterator block) {
  constexpr size_t kMostSpare = 2;  // one comes for one that goes; blocks differ in length
  host_bytes_ -= static_cast<int64_t>(block->second.size());
  if (spare_.size() < kMostSpare) spare_.push_back(std::move(block->second));
  host_.erase(block);
}

void BlockStore::Remove(int64_t number) {
  if (const auto found = host_.find(number); found != host_.end()) {
    LeaveHost(found);
  } else if (const auto on_disk = disk_.find(number); on_disk != disk_.end()) {
    disk_bytes_ -= on_disk->second.size;
    GiveBack(on_disk->second);
    disk_.erase(on_disk);
  }
}

void BlockStore::Read(int64_t number, int64_t offset, std::span<uint8_t> to) const {
  if (const auto found = host_.find(number); found != host_.end()) {
    std::copy_n(found->second.begin() + offset, to.size(), to.begin());
    return;
  }
  const int64_t begin = disk_.at(number).offset + offset;
  for (size_t done = 0; done < to.size();) {
    const ssize_t got =
        pread(file_, to.data() + done, to.size() - done, begin + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw Error(std::string("[memory] cannot read frames back from the disk: ") +
                  (got == 0 ? "the file is too short" : std::strerror(errno)));
    }
    done += static_cast<size_t>(got);
  }
}

void BlockStore::WillRead(int64_t number) const {
  const auto found = disk_.find(number);
  if (found == disk_.end()) return;
  posix_fadvise(file_, found->second.offset, found->second.size, POSIX_FADV_WILLNEED);
}

std::optional<std::string> BlockStore::TakeWarning() { return std::exchange(warning_, {}); }

}  // namespace sluice
