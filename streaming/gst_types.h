// GStreamer's references as owning pointers, and the few names of things that messages need.
#ifndef SLUICE_STREAMING_GST_TYPES_H_
#define SLUICE_STREAMING_GST_TYPES_H_

#include <gst/gst.h>

#include <memory>
#include <string>

namespace sluice {

template <auto Free>
struct GDeleter {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
using GChars = std::unique_ptr<gchar, GDeleter<g_free>>;
using CapsPtr = std::unique_ptr<GstCaps, GDeleter<gst_caps_unref>>;
using SamplePtr = std::unique_ptr<GstSample, GDeleter<gst_sample_unref>>;
using PadPtr = std::unique_ptr<GstPad, GDeleter<gst_object_unref>>;
using ElementPtr = std::unique_ptr<GstElement, GDeleter<gst_object_unref>>;
using EventPtr = std::unique_ptr<GstEvent, GDeleter<gst_event_unref>>;
using BusPtr = std::unique_ptr<GstBus, GDeleter<gst_object_unref>>;

// "video/x-h264", or "unknown" of empty or unlimited caps.
std::string MediaType(const GstCaps* caps);
std::string FactoryName(GstElement* element);

// "H.264 (High Profile)"; for codecs GStreamer has never heard of, the container's four letters.
std::string CodecName(const GstCaps* caps);
std::string StreamId(GstPad* pad);

// The pad that a bin's pad stands for; null when there is none any more.
PadPtr InnermostPad(GstPad* pad);
// The name of what the decoder behind a decodebin's pad reads.
std::string CodecBehind(GstPad* pad);

// Whether it takes a stream of coded pictures apart ("Codec/Parser/Converter/Video").
bool IsPictureParser(GstElement* element);

// A hint for what reads a container whose index is often missing; else "".
const char* CutOffHint(GstElement* element);
// One line of what an element said. The debug text's last line often holds the only detail.
std::string Describe(GstMessage* message);

}  // namespace sluice

#endif  // SLUICE_STREAMING_GST_TYPES_H_
