// Where the keys and values of frames go that left the window: host memory up to a budget, then a
// file up to its own, then nowhere. Knows bytes only. Used by one thread at a time.
#ifndef SLUICE_COMPRESSION_BLOCK_STORE_H_
#define SLUICE_COMPRESSION_BLOCK_STORE_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace sluice {

// Which blocks go when there is no room left.
enum class WhenFull {
  kOldest,  // the oldest
  kThin,    // every second one of the oldest half, so that the past fades instead of ending
};

struct BlockStoreOptions {
  int64_t host_bytes = int64_t{1} << 30;
  int64_t disk_bytes = 0;                     // 0: no file
  std::filesystem::path disk_directory = {};  // of the file
  WhenFull when_full = WhenFull::kOldest;

  bool operator==(const BlockStoreOptions&) const = default;
};

class BlockStore {
 public:
  // The file has no name from the moment it is open: it ends with the process, however that ends.
  // Throws InputError when it cannot be made.
  explicit BlockStore(const BlockStoreOptions& options);
  ~BlockStore();
  BlockStore(const BlockStore&) = delete;
  BlockStore& operator=(const BlockStore&) = delete;

  // Takes a block and returns the numbers of those that had to go for it, perhaps its own. The
  // oldest blocks move to the file when the host's budget is spent. A file that cannot be written
  // to takes no more blocks, and Warning() tells why; what it holds can still be read. Throws
  // ResourceExhausted where the system has no addresses for the host's budget.
  // REQUIRES: number above all before.
  std::vector<int64_t> Add(int64_t number, std::span<const uint8_t> bytes);
  void Remove(int64_t number);  // if it is here
  bool Has(int64_t number) const { return host_.contains(number) || disk_.contains(number); }
  // Bytes [offset, offset + to.size()) of a block; several threads may read at once. REQUIRES:
  // Has(number), so many bytes. Throws Error when the file cannot be read.
  void Read(int64_t number, int64_t offset, std::span<uint8_t> to) const;
  // Says that a block is about to be read, so that the system fetches it from the disk meanwhile.
  // Cold blocks of 64 frames in eight layers then come in 8 ms instead of 20 to 34 (100 KB a
  // frame), in 250 ms instead of 320 (3 MB a frame): no thread of our own is needed.
  void WillRead(int64_t number) const;

  int64_t host_bytes() const { return host_bytes_; }
  int64_t disk_bytes() const { return disk_bytes_; }  // in use; the file is at most disk_bytes long
  int64_t host_blocks() const { return static_cast<int64_t>(host_.size()); }
  int64_t disk_blocks() const { return static_cast<int64_t>(disk_.size()); }
  int64_t dropped() const { return dropped_; }  // for want of room
  // One line, once.
  std::optional<std::string> TakeWarning();

 private:
  struct Extent {
    int64_t offset, size;
  };
  // Which parts of a range of bytes are in use.
  class Room {
   public:
    explicit Room(int64_t limit) : limit_(limit) {}
    std::optional<int64_t> Take(int64_t size);  // where it lies
    void GiveBack(Extent extent);

   private:
    const int64_t limit_;
    int64_t end_ = 0;                  // nothing behind it is in use
    std::map<int64_t, int64_t> free_;  // parts before it: their sizes by their offsets
  };
  struct HostBlock {
    const uint8_t* bytes;  // in `memory_`, or where Add was given them
    int64_t size;
  };
  enum class Moved { kYes, kNoRoom, kFailed };
  Moved MoveToDisk(int64_t number);
  void DropSome(std::vector<int64_t>& dropped);
  void LeaveHost(std::map<int64_t, HostBlock>::iterator block);
  bool Place(HostBlock& block);

  const BlockStoreOptions options_;
  std::map<int64_t, HostBlock> host_;
  // Addresses for all of the host's budget, memory where blocks have been: in large pages, since in
  // small ones the first write to a block costs several times the copy. Blocks that come take the
  // place of those that left.
  uint8_t* memory_ = nullptr;
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  Room host_room_, file_room_;
  std::map<int64_t, Extent> disk_;
  int64_t host_bytes_ = 0, disk_bytes_ = 0, dropped_ = 0;
  int file_ = -1;
  bool writable_ = false;
  std::optional<std::string> warning_;
};

}  // namespace sluice

#endif  // SLUICE_COMPRESSION_BLOCK_STORE_H_
