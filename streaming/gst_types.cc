#include "streaming/gst_types.h"

#include <gst/pbutils/pbutils.h>

#include <algorithm>
#include <string_view>

namespace sluice {

std::string MediaType(const GstCaps* caps) {
  if (gst_caps_is_empty(caps) || gst_caps_is_any(caps)) return "unknown";
  return gst_structure_get_name(gst_caps_get_structure(caps, 0));
}

std::string CodecName(const GstCaps* caps) {
  if (!gst_caps_is_fixed(caps)) return MediaType(caps);
  gint fourcc = 0;
  if (gst_structure_get_int(gst_caps_get_structure(caps, 0), "fourcc", &fourcc)) {
    std::string letters;
    for (int i = 0; i < 4; ++i) {
      const char letter = static_cast<char>(static_cast<guint>(fourcc) >> 8 * i & 0xff);
      letters += g_ascii_isprint(letter) ? letter : '?';
    }
    return "'" + letters + "'";
  }
  const GChars name(gst_pb_utils_get_codec_description(caps));
  return name ? name.get() : MediaType(caps);
}

std::string StreamId(GstPad* pad) {
  const GChars id(gst_pad_get_stream_id(pad));
  return id ? id.get() : "";
}

PadPtr InnermostPad(GstPad* pad) {
  PadPtr inner(GST_PAD(gst_object_ref(pad)));
  while (inner && GST_IS_GHOST_PAD(inner.get())) {
    inner.reset(gst_ghost_pad_get_target(GST_GHOST_PAD(inner.get())));
  }
  return inner;
}

std::string CodecBehind(GstPad* pad) {
  const PadPtr inner = InnermostPad(pad);
  if (!inner) return "unknown";
  const ElementPtr decoder(gst_pad_get_parent_element(inner.get()));
  const PadPtr input(decoder ? gst_element_get_static_pad(decoder.get(), "sink") : nullptr);
  const CapsPtr caps(gst_pad_get_current_caps(input ? input.get() : inner.get()));
  return caps ? CodecName(caps.get()) : "unknown";
}

std::string FactoryName(GstElement* element) {
  const GstElementFactory* factory = gst_element_get_factory(element);
  return factory ? GST_OBJECT_NAME(factory) : GST_OBJECT_NAME(element);
}

bool IsPictureParser(GstElement* element) {
  const gchar* klass = gst_element_get_metadata(element, GST_ELEMENT_METADATA_KLASS);
  const std::string_view role = klass ? klass : "";
  return role.find("Parser") != role.npos && role.find("Video") != role.npos;
}

const char* CutOffHint(GstElement* element) {
  if (FactoryName(element) != "qtdemux") return "";
  return " (it may be cut off: its index, 'moov', is often written last)";
}

std::string Describe(GstMessage* message) {
  GError* error = nullptr;
  gchar* debug = nullptr;
  if (GST_MESSAGE_TYPE(message) == GST_MESSAGE_ERROR) {
    gst_message_parse_error(message, &error, &debug);
  } else {
    gst_message_parse_warning(message, &error, &debug);
  }
  std::string line = error ? error->message : "unknown error";
  std::string detail = debug ? debug : "";
  const bool undetermined = error && error->domain == GST_STREAM_ERROR &&
                            (error->code == GST_STREAM_ERROR_TYPE_NOT_FOUND ||
                             error->code == GST_STREAM_ERROR_WRONG_TYPE);
  g_clear_error(&error);
  g_free(debug);

  GstObject* source = GST_MESSAGE_SRC(message);
  if (undetermined && GST_IS_ELEMENT(source) && IsPictureParser(GST_ELEMENT(source))) {
    return "none of its pictures can be shown: it holds no key frame that states their format";
  }
  if (undetermined) return "not a media file: " + line;
  const size_t last_line = detail.rfind('\n');
  if (last_line != std::string::npos) line += " (" + detail.substr(last_line + 1) + ")";
  std::replace(line.begin(), line.end(), '\n', ' ');
  if (GST_IS_ELEMENT(source)) line += CutOffHint(GST_ELEMENT(source));
  return line;
}

}  // namespace sluice
