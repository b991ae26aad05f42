// The elements of GStreamer that a source of the server may consist of. The decoder's process knows
// no others: what is not on these lists does not exist there.
#ifndef SLUICE_STREAMING_APART_ELEMENTS_H_
#define SLUICE_STREAMING_APART_ELEMENTS_H_

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sluice::apart {

// One plugin's file (libgstNAME.so) with the elements that are taken from it.
struct PluginElements {
  std::string_view plugin;
  std::vector<std::string_view> elements;
};

// What every pipeline is built with; opens nothing, reads no format.
std::span<const PluginElements> Machinery();
// Demuxers, parsers, decoders, depayloaders and what fetches from the network. Nothing among them
// opens further sources.
std::span<const PluginElements> Formats();
// What reads playlists, which name further sources.
std::span<const PluginElements> Playlists();

// Throws InputError in one line for a name that is not in Formats.
void CheckElements(const std::vector<std::string>& elements);

}  // namespace sluice::apart

#endif  // SLUICE_STREAMING_APART_ELEMENTS_H_
