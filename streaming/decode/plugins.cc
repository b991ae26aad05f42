#include "streaming/decode/plugins.h"

#include <gst/gst.h>
#include <unistd.h>

#include <cstdlib>
#include <set>
#include <span>
#include <string_view>

#include "runtime/error.h"
#include "streaming/apart/elements.h"

namespace sluice::decode {
namespace {

// Those that are not installed are left out, as everywhere.
void LoadPlugins(std::span<const apart::PluginElements> plugins) {
  for (const apart::PluginElements& plugin : plugins) {
    const std::string file =
        std::string(SLUICE_GST_PLUGINS) + "/libgst" + std::string(plugin.plugin) + ".so";
    if (access(file.c_str(), R_OK) != 0) continue;
    GError* error = nullptr;
    GstPlugin* loaded = gst_plugin_load_file(file.c_str(), &error);
    if (loaded) {
      gst_object_unref(loaded);
    } else {
      g_clear_error(&error);
    }
  }
}

void Add(std::span<const apart::PluginElements> plugins, std::set<std::string_view>& names) {
  for (const apart::PluginElements& plugin : plugins) {
    names.insert(plugin.elements.begin(), plugin.elements.end());
  }
}

}  // namespace

void LoadElements(const std::vector<std::string>& elements, bool playlists) {
  setenv("GST_PLUGIN_SYSTEM_PATH_1_0", "", 1);
  setenv("GST_PLUGIN_PATH_1_0", "", 1);
  setenv("GST_REGISTRY_1_0", "/dev/null/none", 1);
  setenv("GST_REGISTRY_UPDATE", "no", 1);
  gst_registry_fork_set_enabled(FALSE);
  GError* error = nullptr;
  if (!gst_init_check(nullptr, nullptr, &error)) {
    const std::string why = error ? error->message : "unknown reason";
    g_clear_error(&error);
    throw Error("[source] GStreamer does not start: " + why);
  }
  std::set<std::string_view> names = {"bin", "pipeline"};
  Add(apart::Machinery(), names);
  LoadPlugins(apart::Machinery());
  if (elements.empty()) {
    Add(apart::Formats(), names);
  } else {
    names.insert(elements.begin(), elements.end());
  }
  LoadPlugins(apart::Formats());
  if (playlists) {
    Add(apart::Playlists(), names);
    LoadPlugins(apart::Playlists());
  }

  GstRegistry* registry = gst_registry_get();
  GList* features = gst_registry_feature_filter(
      registry, [](GstPluginFeature*, gpointer) -> gboolean { return TRUE; }, FALSE, nullptr);
  for (GList* at = features; at; at = at->next) {
    auto* feature = GST_PLUGIN_FEATURE(at->data);
    if (GST_IS_TYPE_FIND_FACTORY(feature)) continue;
    if (GST_IS_ELEMENT_FACTORY(feature) && names.contains(GST_OBJECT_NAME(feature))) continue;
    gst_registry_remove_feature(registry, feature);
  }
  gst_plugin_feature_list_free(features);
}

}  // namespace sluice::decode
