// Pictures of a wide range of light (HDR) or of colours (BT.2020) as the ordinary pictures that
// models were trained on.
//
//   light   the transfer function undone: PQ (SMPTE ST 2084) in units of 203 cd/m2, the reference
//           white of BT.2408; HLG (ARIB STD-B67) likewise, for a screen of 1000 cd/m2 with its
//           system gamma of 1.2; BT.709 and BT.2020 by sRGB's curve
//   colour  BT.2020's primaries to BT.709's by a matrix; what is outside is cut
//   tone    of PQ and HLG: with m the largest of red, green and blue, all three are scaled by T(m)
//   / m
//           where T(m) = m up to 0.5 and 1 - 0.5 exp(1 - 2 m) above, which goes on smoothly towards
//           1
//   code    sRGB's curve
#ifndef SLUICE_STREAMING_TONE_MAP_H_
#define SLUICE_STREAMING_TONE_MAP_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sluice {

enum class Transfer : uint8_t { kOrdinary, kPq, kHlg };

// Immutable once made; safe to use from many threads.
class ToneMap {
 public:
  ToneMap(Transfer transfer, bool bt2020_primaries);
  Transfer transfer() const { return transfer_; }
  bool bt2020_primaries() const { return bt2020_; }

  // `argb`: [pixels, 4] of 16 bits, the transparency first; `rgb`: [pixels, 3].
  void Convert(const uint16_t* argb, size_t pixels, uint8_t* rgb) const;

 private:
  Transfer transfer_;
  bool bt2020_;
  std::vector<float> light_;   // of each 4th of the 65536 codes
  std::vector<uint8_t> code_;  // of light in steps of 1 / 4095
};

}  // namespace sluice

#endif  // SLUICE_STREAMING_TONE_MAP_H_
