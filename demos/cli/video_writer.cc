#include "demos/cli/video_writer.h"

#include <gst/app/gstappsrc.h>
#include <gst/gst.h>

#include <string>

#include "runtime/error.h"

namespace sluice::cli {
namespace {

constexpr GstClockTime kFinishTimeout = 60 * GST_SECOND;

// The error a pipeline reported, as one line; takes over the message.
std::string ErrorText(GstMessage* message) {
  GError* error = nullptr;
  gst_message_parse_error(message, &error, nullptr);
  const std::string text = error != nullptr ? error->message : "unknown error";
  g_clear_error(&error);
  gst_message_unref(message);
  return text;
}

}  // namespace

struct VideoWriter::Pipeline {
  std::string path;
  GstElement* pipeline = nullptr;
  GstElement* input = nullptr;
  GstBus* bus = nullptr;

  ~Pipeline() {
    if (pipeline != nullptr) gst_element_set_state(pipeline, GST_STATE_NULL);
    if (bus != nullptr) gst_object_unref(bus);
    if (input != nullptr) gst_object_unref(input);
    if (pipeline != nullptr) gst_object_unref(pipeline);
  }

  [[noreturn]] void Fail(const std::string& what) const {
    GstMessage* message = bus != nullptr ? gst_bus_pop_filtered(bus, GST_MESSAGE_ERROR) : nullptr;
    throw Error("[video_writer] cannot write " + path + ": " +
                (message != nullptr ? ErrorText(message) : what));
  }
};

VideoWriter::VideoWriter(const std::filesystem::path& path, int width, int height, int fps)
    : pipeline_(std::make_unique<Pipeline>()), width_(width), height_(height), fps_(fps) {
  if (width < 4 || height < 2 || width % 4 != 0 || height % 2 != 0 || fps < 1) {
    throw Error("[video_writer] expected width a multiple of 4, an even height and fps >= 1, got " +
                std::to_string(width) + "x" + std::to_string(height) + " at " +
                std::to_string(fps));
  }
  pipeline_->path = path.string();
  GError* error = nullptr;
  if (!gst_init_check(nullptr, nullptr, &error)) {
    const std::string text = error != nullptr ? error->message : "unknown error";
    g_clear_error(&error);
    throw Error("[video_writer] cannot start GStreamer: " + text);
  }
  // Constant quality: what matters is that a picture read back answers as the rendered one does.
  pipeline_->pipeline = gst_parse_launch(
      "appsrc name=input format=time block=true max-bytes=16000000 ! videoconvert ! "
      "video/x-raw,format=I420 ! x264enc pass=quant quantizer=23 speed-preset=veryfast "
      "key-int-max=50 ! video/x-h264,profile=main ! mp4mux ! filesink name=output",
      &error);
  if (error != nullptr) {
    const std::string text = error->message;
    g_clear_error(&error);
    throw Error("[video_writer] " + text + "; run scripts/install-deps.sh");
  }
  GstElement* output = gst_bin_get_by_name(GST_BIN(pipeline_->pipeline), "output");
  g_object_set(output, "location", pipeline_->path.c_str(), nullptr);
  gst_object_unref(output);
  pipeline_->input = gst_bin_get_by_name(GST_BIN(pipeline_->pipeline), "input");
  pipeline_->bus = gst_element_get_bus(pipeline_->pipeline);

  GstCaps* caps = gst_caps_new_simple("video/x-raw", "format", G_TYPE_STRING, "RGB", "width",
                                      G_TYPE_INT, width, "height", G_TYPE_INT, height, "framerate",
                                      GST_TYPE_FRACTION, fps, 1, nullptr);
  gst_app_src_set_caps(GST_APP_SRC(pipeline_->input), caps);
  gst_caps_unref(caps);
  if (gst_element_set_state(pipeline_->pipeline, GST_STATE_PLAYING) == GST_STATE_CHANGE_FAILURE) {
    pipeline_->Fail("the pipeline does not start");
  }
}

VideoWriter::~VideoWriter() = default;

void VideoWriter::Write(std::span<const uint8_t> rgb) {
  const size_t expected = static_cast<size_t>(width_) * height_ * 3;
  if (rgb.size() != expected) {
    throw Error("[video_writer] expected " + std::to_string(expected) + " bytes a frame, got " +
                std::to_string(rgb.size()));
  }
  GstBuffer* buffer = gst_buffer_new_memdup(rgb.data(), rgb.size());
  GST_BUFFER_PTS(buffer) = gst_util_uint64_scale(frames_, GST_SECOND, fps_);
  GST_BUFFER_DURATION(buffer) =
      gst_util_uint64_scale(frames_ + 1, GST_SECOND, fps_) - GST_BUFFER_PTS(buffer);
  ++frames_;
  if (gst_app_src_push_buffer(GST_APP_SRC(pipeline_->input), buffer) != GST_FLOW_OK) {
    pipeline_->Fail("the encoder takes no more frames");
  }
}

void VideoWriter::Finish() {
  gst_app_src_end_of_stream(GST_APP_SRC(pipeline_->input));
  GstMessage* message =
      gst_bus_timed_pop_filtered(pipeline_->bus, kFinishTimeout,
                                 static_cast<GstMessageType>(GST_MESSAGE_EOS | GST_MESSAGE_ERROR));
  if (message == nullptr) pipeline_->Fail("the encoder did not finish within 60 s");
  if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_ERROR) {
    throw Error("[video_writer] cannot write " + pipeline_->path + ": " + ErrorText(message));
  }
  gst_message_unref(message);
  gst_element_set_state(pipeline_->pipeline, GST_STATE_NULL);
}

}  // namespace sluice::cli
