#include "streaming/apart/elements.h"

#include <algorithm>

#include "runtime/error.h"

namespace sluice::apart {

std::span<const PluginElements> Machinery() {
  static const std::vector<PluginElements> kList = {
      {"coreelements",
       {"capsfilter", "fakesink", "filesrc", "funnel", "identity", "input-selector", "multiqueue",
        "queue", "queue2", "tee", "typefind", "valve"}},
      {"playback", {"decodebin", "parsebin", "uridecodebin", "urisourcebin"}},
      {"typefindfunctions", {}},
      {"app", {"appsink", "appsrc"}},
      {"videoconvertscale", {"videoconvert", "videoscale", "videoconvertscale"}},
      {"videoconvert", {"videoconvert"}},  // GStreamer 1.20 has them apart
      {"videoscale", {"videoscale"}},
      {"videotestsrc", {"videotestsrc"}},
  };
  return kList;
}

std::span<const PluginElements> Formats() {
  static const std::vector<PluginElements> kList = {
      // Containers.
      {"isomp4", {"qtdemux"}},
      {"matroska", {"matroskademux"}},
      {"avi", {"avidemux"}},
      {"flv", {"flvdemux"}},
      {"mpegtsdemux", {"tsdemux"}},
      {"mpegpsdemux", {"mpegpsdemux"}},
      {"ogg", {"oggdemux"}},
      {"asf", {"asfdemux"}},
      {"multipart", {"multipartdemux"}},
      {"y4mdec", {"y4mdec"}},
      {"ivfparse", {"ivfparse"}},
      {"dv", {"dvdemux", "dvdec"}},
      // Parsers.
      {"videoparsersbad",
       {"av1parse", "diracparse", "h263parse", "h264parse", "h265parse", "jpeg2000parse",
        "mpeg4videoparse", "mpegvideoparse", "pngparse", "vc1parse", "vp9parse"}},
      {"jpegformat", {"jpegparse"}},
      // Decoders.
      {"jpeg", {"jpegdec"}},
      {"png", {"pngdec"}},
      {"webp", {"webpdec"}},
      {"theora", {"theoradec"}},
      {"vpx", {"vp8dec", "vp9dec"}},
      {"codecalpha", {"alphacombine", "codecalphademux", "vp8alphadecodebin", "vp9alphadecodebin"}},
      {"aom", {"av1dec"}},
      {"dav1d", {"dav1ddec"}},
      {"openjpeg", {"openjpegdec"}},
      {"libav", {"avdec_apng",      "avdec_av1",        "avdec_dnxhd",      "avdec_dvvideo",
                 "avdec_ffv1",      "avdec_ffvhuff",    "avdec_flv",        "avdec_gif",
                 "avdec_h263",      "avdec_h263p",      "avdec_h264",       "avdec_h265",
                 "avdec_hap",       "avdec_huffyuv",    "avdec_jpeg2000",   "avdec_mjpeg",
                 "avdec_mjpegb",    "avdec_mpeg1video", "avdec_mpeg2video", "avdec_mpeg4",
                 "avdec_mpegvideo", "avdec_msmpeg4",    "avdec_msmpeg4v1",  "avdec_msmpeg4v2",
                 "avdec_msvideo1",  "avdec_png",        "avdec_prores",     "avdec_qtrle",
                 "avdec_rawvideo",  "avdec_theora",     "avdec_utvideo",    "avdec_v210",
                 "avdec_vc1",       "avdec_vp3",        "avdec_vp6",        "avdec_vp6a",
                 "avdec_vp6f",      "avdec_vp8",        "avdec_vp9",        "avdec_webp",
                 "avdec_wmv1",      "avdec_wmv2",       "avdec_wmv3",       "avdemux_apng",
                 "avdemux_gif"}},
      // The network.
      {"soup", {"souphttpsrc"}},
      {"rtsp", {"rtspsrc"}},
      {"rtpmanager",
       {"rtpbin", "rtpjitterbuffer", "rtpptdemux", "rtpsession", "rtpssrcdemux", "rtpstorage"}},
      {"rtp",
       {"rtpav1depay", "rtph261depay", "rtph263depay", "rtph263pdepay", "rtph264depay",
        "rtph265depay", "rtpj2kdepay", "rtpjpegdepay", "rtpmp2tdepay", "rtpmp4gdepay",
        "rtpmp4vdepay", "rtpmpvdepay", "rtptheoradepay", "rtpvp8depay", "rtpvp9depay",
        "rtpvrawdepay"}},
  };
  return kList;
}

std::span<const PluginElements> Playlists() {
  static const std::vector<PluginElements> kList = {
      {"hls", {"hlsdemux"}},
      {"dash", {"dashdemux"}},
      {"smoothstreaming", {"mssdemux"}},
  };
  return kList;
}

void CheckElements(const std::vector<std::string>& elements) {
  for (const std::string& name : elements) {
    const bool known = std::any_of(Formats().begin(), Formats().end(), [&](const auto& plugin) {
      return std::find(plugin.elements.begin(), plugin.elements.end(), name) !=
             plugin.elements.end();
    });
    if (!known) {
      throw InputError("[serve] source_elements: '" + name +
                       "' is not among the elements that sources may consist of (docs/service.md)");
    }
  }
}

}  // namespace sluice::apart
