// What a recording's file says about itself that GStreamer does not tell: sizes of the containers'
// outermost parts, and whether a picture moves.
#ifndef SLUICE_STREAMING_CONTAINER_FILE_H_
#define SLUICE_STREAMING_CONTAINER_FILE_H_

#include <filesystem>
#include <string>

namespace sluice {

enum class MovingFormat { kNone, kPng, kWebp };

struct ContainerFacts {
  std::string cut_off;  // of a file that is shorter than its header says: both sizes
  std::string unread;   // what the file holds that GStreamer passes over
  MovingFormat moving = MovingFormat::kNone;
};

// Reads headers of MP4, Matroska, AVI, PNG and WebP; of other files, and of what is unreadable, all
// is unset.
ContainerFacts ReadContainerFacts(const std::filesystem::path& path);

}  // namespace sluice

#endif  // SLUICE_STREAMING_CONTAINER_FILE_H_
