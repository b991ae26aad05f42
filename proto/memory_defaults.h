// What streams may take where the operator says nothing: shares of the memory that is there.
#ifndef SLUICE_PROTO_MEMORY_DEFAULTS_H_
#define SLUICE_PROTO_MEMORY_DEFAULTS_H_

#include <cstdint>

namespace sluice {

struct MemoryShares {
  int64_t kv_mb = 0;              // of all streams together
  int64_t stream_host_mb = 0;     // of one stream's earlier frames
  int64_t queued_picture_mb = 0;  // of all streams together
  int sources = 0;                // open at a time
};

// `memory_bytes`: what this process may use; `weight_bytes`: the checkpoint's files, which may take
// twice that once they are converted. Of what is left half goes to keys and values, an eighth to
// earlier frames of `max_streams` streams (1 GiB each, at most), a sixteenth to pictures that wait,
// three sixteenths to the decoders of sources (16 at most) at `source_mb` each, and the rest stays
// free for messages and scratch. At least 1 MiB each, 16 MiB of pictures, one source.
MemoryShares SharesOf(int64_t memory_bytes, int64_t weight_bytes, int max_streams,
                      int64_t source_mb);

}  // namespace sluice

#endif  // SLUICE_PROTO_MEMORY_DEFAULTS_H_
