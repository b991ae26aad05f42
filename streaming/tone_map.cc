#include "streaming/tone_map.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace sluice {
namespace {

constexpr int kCodes = 1 << 14, kSteps = 4096;
constexpr double kWhite = 203, kHlgPeak = 1000;  // cd/m2

double PqLight(double code) {
  constexpr double kM1 = 2610.0 / 16384, kM2 = 2523.0 / 32, kC1 = 3424.0 / 4096, kC2 = 2413.0 / 128,
                   kC3 = 2392.0 / 128;
  const double power = std::pow(code, 1 / kM2);
  return 10000 / kWhite * std::pow(std::max(power - kC1, 0.0) / (kC2 - kC3 * power), 1 / kM1);
}

// Of the scene; the screen's gamma needs all three colours.
double HlgLight(double code) {
  constexpr double kA = 0.17883277, kB = 1 - 4 * kA;
  const double c = 0.5 - kA * std::log(4 * kA);
  return code <= 0.5 ? code * code / 3 : (std::exp((code - c) / kA) + kB) / 12;
}

double SrgbLight(double code) {
  return code <= 0.04045 ? code / 12.92 : std::pow((code + 0.055) / 1.055, 2.4);
}

double SrgbCode(double light) {
  return light <= 0.0031308 ? 12.92 * light : 1.055 * std::pow(light, 1 / 2.4) - 0.055;
}

}  // namespace

ToneMap::ToneMap(Transfer transfer, bool bt2020_primaries)
    : transfer_(transfer), bt2020_(bt2020_primaries), light_(kCodes), code_(kSteps) {
  for (int i = 0; i < kCodes; ++i) {
    const double code = static_cast<double>(i) / (kCodes - 1);
    light_[i] = static_cast<float>(transfer == Transfer::kPq    ? PqLight(code)
                                   : transfer == Transfer::kHlg ? HlgLight(code)
                                                                : SrgbLight(code));
  }
  for (int i = 0; i < kSteps; ++i) {
    code_[i] =
        static_cast<uint8_t>(std::lround(255 * SrgbCode(static_cast<double>(i) / (kSteps - 1))));
  }
}

void ToneMap::Convert(const uint16_t* argb, size_t pixels, uint8_t* rgb) const {
  // BT.2020 to BT.709, both with D65's white: the rows sum to 1.
  constexpr std::array<std::array<float, 3>, 3> kTo709 = {{{1.6605F, -0.5876F, -0.0729F},
                                                           {-0.1246F, 1.1329F, -0.0083F},
                                                           {-0.0182F, -0.1006F, 1.1188F}}};
  for (; pixels > 0; --pixels, argb += 4, rgb += 3) {
    std::array<float, 3> c = {light_[argb[1] >> 2], light_[argb[2] >> 2], light_[argb[3] >> 2]};
    if (transfer_ == Transfer::kHlg) {
      const float luminance = 0.2627F * c[0] + 0.678F * c[1] + 0.0593F * c[2];
      const float gain = static_cast<float>(kHlgPeak / kWhite) * std::pow(luminance, 0.2F);
      for (float& v : c) v *= gain;
    }
    if (bt2020_) {
      std::array<float, 3> to = {};
      for (int i = 0; i < 3; ++i) {
        to[i] = std::max(kTo709[i][0] * c[0] + kTo709[i][1] * c[1] + kTo709[i][2] * c[2], 0.0F);
      }
      c = to;
    }
    float scale = 1;
    const float most = std::max({c[0], c[1], c[2]});
    if (transfer_ != Transfer::kOrdinary && most > 0.5F) {
      scale = (1 - 0.5F * std::exp(1 - 2 * most)) / most;
    }
    for (int i = 0; i < 3; ++i) {
      const float light = std::clamp(scale * c[i], 0.0F, 1.0F);
      rgb[i] = code_[static_cast<size_t>(light * (kSteps - 1) + 0.5F)];
    }
  }
}

}  // namespace sluice
