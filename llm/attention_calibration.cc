#include "llm/attention_calibration.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "llm/config_object.h"
#include "runtime/error.h"

namespace sluice {
namespace {

constexpr const char* kFormat = "sluice attention calibration 1";

std::string LayerKey(size_t layer) { return "layer." + std::to_string(layer); }

nlohmann::ordered_json Part(const std::vector<CalibratedLayer>& layers) {
  nlohmann::ordered_json part;
  part["layers"] = layers.size();
  for (size_t i = 0; i < layers.size(); ++i) {
    part[LayerKey(i)] = {{"attention", Name(layers[i].precision())},
                         {"cosine", layers[i].cosine},
                         {"relative_l1", layers[i].relative_l1}};
  }
  return part;
}

std::vector<AttentionPrecision> ReadPart(const ConfigObject& file, const char* name, int layers) {
  const ConfigObject part = file.Object(name);
  part.Int({"layers"}, std::nullopt, layers, layers);
  std::vector<AttentionPrecision> precisions;
  for (int i = 0; i < layers; ++i) {
    const ConfigObject layer = part.Object(LayerKey(i).c_str());
    const std::string attention = layer.String({"attention"}, "");
    if (attention == Name(AttentionPrecision::kExact)) {
      precisions.push_back(AttentionPrecision::kExact);
    } else if (attention == Name(AttentionPrecision::kSage)) {
      precisions.push_back(AttentionPrecision::kSage);
    } else {
      layer.Refuse("attention", "\"exact\" or \"sage\"");
    }
  }
  return precisions;
}

}  // namespace

std::string ToJson(const AttentionCalibration& calibration) {
  const nlohmann::ordered_json json = {{"format", kFormat},
                                       {"model", calibration.model},
                                       {"fingerprint", calibration.fingerprint},
                                       {"device", Name(calibration.device)},
                                       {"clips", calibration.clips},
                                       {"tower", Part(calibration.tower)},
                                       {"decoder", Part(calibration.decoder)}};
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

void WriteCalibration(const AttentionCalibration& calibration, const std::filesystem::path& file) {
  std::ofstream out(file);
  out << ToJson(calibration) << '\n';
  out.close();
  if (!out) throw InputError("[calibrate] cannot write " + file.string());
}

LayerPrecisions ChoosePrecisions(const AttentionChoice& choice, const std::string& fingerprint,
                                 Device device, int tower_layers, int decoder_layers) {
  if (choice.file.empty()) {
    return {std::vector<AttentionPrecision>(tower_layers, choice.precision),
            std::vector<AttentionPrecision>(decoder_layers, choice.precision)};
  }
  const ConfigObject file = ConfigObject::Read(choice.file);
  if (file.String({"format"}, "") != kFormat) {
    file.Refuse("format", std::string("\"") + kFormat + "\", as sluice calibrate writes it");
  }
  if (file.String({"fingerprint"}, "") != fingerprint) {
    file.Refuse("fingerprint",
                "this model's \"" + fingerprint + "\" (calibrate each model by itself)");
  }
  if (file.String({"device"}, "") != Name(device)) {
    file.Refuse("device", std::string("\"") + Name(device) +
                              "\", where the model runs (the kernels differ; calibrate there)");
  }
  file.Int({"clips"}, std::nullopt, AttentionCalibration::kFewestClips, 1 << 30);
  return {ReadPart(file, "tower", tower_layers), ReadPart(file, "decoder", decoder_layers)};
}

}  // namespace sluice
