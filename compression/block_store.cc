#include "compression/block_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <utility>

#include "runtime/error.h"

namespace sluice {
namespace {

constexpr int64_t kMostHostBytes = int64_t{1} << 42;  // of addresses; a process has 2^47
constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

BlockStore::BlockStore(const BlockStoreOptions& options)
    : options_(options),
      host_room_(std::min(options.host_bytes, kMostHostBytes)),
      file_room_(options.disk_bytes) {
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
  if (mapped_) munmap(mapped_, mapped_bytes_);
}

std::vector<int64_t> BlockStore::Add(int64_t number, std::span<const uint8_t> bytes) {
  const auto size = static_cast<int64_t>(bytes.size());
  host_.emplace(number, HostBlock{bytes.data(), size});
  host_bytes_ += size;
  std::vector<int64_t> dropped;
  for (;;) {
    const auto added = host_.find(number);
    if (added == host_.end()) break;  // moved on already
    if (host_bytes_ <= options_.host_bytes && Place(added->second)) break;
    const Moved moved = writable_ ? MoveToDisk(host_.begin()->first) : Moved::kNoRoom;
    if (moved == Moved::kNoRoom) DropSome(dropped);
  }
  return dropped;
}

// Copies a block to the host's memory; false where no part of it that is free is long enough.
bool BlockStore::Place(HostBlock& block) {
  if (!mapped_) {
    const size_t bytes = std::min(options_.host_bytes, kMostHostBytes) + kHugePage;
    void* const mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      Remove(std::prev(host_.end())->first);
      throw ResourceExhausted("[memory] no addresses for " + std::to_string(options_.host_bytes) +
                              " bytes of earlier frames: " + std::strerror(errno));
    }
    mapped_ = mapped;
    mapped_bytes_ = bytes;
    const auto begin = reinterpret_cast<uintptr_t>(mapped);
    memory_ = static_cast<uint8_t*>(mapped) + (kHugePage - begin % kHugePage) % kHugePage;
    madvise(memory_, bytes - kHugePage, MADV_HUGEPAGE);  // where there are none, small ones do
  }
  const std::optional<int64_t> offset = host_room_.Take(block.size);
  if (!offset) return false;
  std::copy_n(block.bytes, block.size, memory_ + *offset);
  block.bytes = memory_ + *offset;
  return true;
}

BlockStore::Moved BlockStore::MoveToDisk(int64_t number) {
  const auto [bytes, size] = host_.at(number);
  const std::optional<int64_t> offset = file_room_.Take(size);
  if (!offset) return Moved::kNoRoom;
  for (int64_t done = 0; done < size;) {
    const ssize_t wrote = pwrite(file_, bytes + done, size - done, *offset + done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) {
      writable_ = false;
      warning_ = std::string("[memory] cannot write frames to the disk: ") + std::strerror(errno) +
                 "; from now on those that do not fit into host memory are forgotten";
      file_room_.GiveBack({*offset, size});
      return Moved::kFailed;
    }
    done += wrote;
  }
  disk_.emplace(number, Extent{*offset, size});
  disk_bytes_ += size;
  LeaveHost(host_.find(number));
  return Moved::kYes;
}

// The first free part that is large enough, else behind the last.
std::optional<int64_t> BlockStore::Room::Take(int64_t size) {
  for (auto part = free_.begin(); part != free_.end(); ++part) {
    if (part->second < size) continue;
    const auto [offset, room] = *part;
    free_.erase(part);
    if (room > size) free_.emplace(offset + size, room - size);
    return offset;
  }
  if (size > limit_ - end_) return std::nullopt;
  end_ += size;
  return end_ - size;
}

void BlockStore::Room::GiveBack(Extent extent) {
  if (extent.size == 0) return;
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
  if (part->first + part->second == end_) {
    end_ = part->first;
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

void BlockStore::LeaveHost(std::map<int64_t, HostBlock>::iterator block) {
  const auto [bytes, size] = block->second;
  host_bytes_ -= size;
  host_.erase(block);
  const bool placed = mapped_ && std::greater_equal<>()(bytes, memory_) &&
                      std::less<>()(bytes, static_cast<uint8_t*>(mapped_) + mapped_bytes_);
  if (placed) host_room_.GiveBack({bytes - memory_, size});
}

void BlockStore::Remove(int64_t number) {
  if (const auto found = host_.find(number); found != host_.end()) {
    LeaveHost(found);
  } else if (const auto on_disk = disk_.find(number); on_disk != disk_.end()) {
    disk_bytes_ -= on_disk->second.size;
    file_room_.GiveBack(on_disk->second);
    disk_.erase(on_disk);
  }
}

void BlockStore::Read(int64_t number, int64_t offset, std::span<uint8_t> to) const {
  if (const auto found = host_.find(number); found != host_.end()) {
    std::copy_n(found->second.bytes + offset, to.size(), to.begin());
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
