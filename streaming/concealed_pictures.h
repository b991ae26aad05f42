// Pictures with damage that libav's decoders conceal. GStreamer 1.22 hands them on like any other;
// that they are damaged is said in libav's messages alone.
#ifndef SLUICE_STREAMING_CONCEALED_PICTURES_H_
#define SLUICE_STREAMING_CONCEALED_PICTURES_H_

#include <atomic>
#include <cstdint>

namespace sluice {

// Counts those of the whole process while it lives: libav's messages name no decoder. The first one
// has GStreamer pass libav's messages on; what it printed without that, it still prints. Threads:
// any.
class ConcealedPictures {
 public:
  ConcealedPictures();
  ~ConcealedPictures();
  ConcealedPictures(const ConcealedPictures&) = delete;
  ConcealedPictures& operator=(const ConcealedPictures&) = delete;

  int64_t count() const { return count_; }
  void Reset() { count_ = 0; }
  // Whether another was counting at the same time, whose pictures these may be.
  bool shared() const { return shared_; }

 private:
  friend struct ConcealmentListeners;
  std::atomic<int64_t> count_ = 0;
  std::atomic<bool> shared_ = false;
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_CONCEALED_PICTURES_H_
