#include "streaming/concealed_pictures.h"

#include <gst/gst.h>

#include <mutex>
#include <string_view>
#include <vector>

namespace sluice {

// GStreamer holds one list of functions for messages for the process.
struct ConcealmentListeners {
  std::mutex mutex;
  std::vector<ConcealedPictures*> counting;
  GstDebugCategory* libav = nullptr;
  GstDebugLevel printed = GST_LEVEL_NONE;  // of libav's messages, before we wanted more
  bool prints = false;                     // whether GStreamer would print messages

  static ConcealmentListeners& Get() {
    static ConcealmentListeners listeners;
    return listeners;
  }

  // Once libav's plugin is loaded; called with the mutex held.
  void Listen() {
    if (libav) return;
    libav = _gst_debug_get_category("libav");
    if (!libav) return;
    printed = gst_debug_category_get_threshold(libav);
    prints = (gst_debug_remove_log_function)(nullptr) > 0;  // null: the one that prints
    gst_debug_add_log_function(&ConcealmentListeners::OnMessage, nullptr, nullptr);
    if (printed < GST_LEVEL_INFO) gst_debug_category_set_threshold(libav, GST_LEVEL_INFO);
  }

  static void OnMessage(GstDebugCategory* category, GstDebugLevel level, const gchar* file,
                        const gchar* function, gint line, GObject* object, GstDebugMessage* message,
                        gpointer) {
    ConcealmentListeners& self = Get();
    bool print = self.prints;
    if (category == self.libav) {
      print &= level <= self.printed;
      const gchar* text = gst_debug_message_get(message);
      // "concealing 836 DC, 836 AC, 836 MV errors in P frame": one for each picture.
      if (text && std::string_view(text).starts_with("concealing ")) {
        const std::lock_guard lock(self.mutex);
        for (ConcealedPictures* pictures : self.counting) ++pictures->count_;
      }
    }
    if (print) {
      gst_debug_log_default(category, level, file, function, line, object, message, nullptr);
    }
  }
};

ConcealedPictures::ConcealedPictures() {
  ConcealmentListeners& listeners = ConcealmentListeners::Get();
  const std::lock_guard lock(listeners.mutex);
  listeners.Listen();
  shared_ = !listeners.counting.empty();
  for (ConcealedPictures* other : listeners.counting) other->shared_ = true;
  listeners.counting.push_back(this);
}

ConcealedPictures::~ConcealedPictures() {
  ConcealmentListeners& listeners = ConcealmentListeners::Get();
  const std::lock_guard lock(listeners.mutex);
  std::erase(listeners.counting, this);
}

}  // namespace sluice
